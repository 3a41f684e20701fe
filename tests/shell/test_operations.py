"""Random operations of four clients over three models, under memory pressure: every byte is
accounted for, and is what was stored. See tests/soak/operations.py.

KVD_OPERATIONS says how many (20,000); KVD_SEED replays a run's choices.
"""

import os
from pathlib import Path

import pytest

from tests.soak.operations import do_operations

OPERATIONS = int(os.environ.get("KVD_OPERATIONS", "20000"))
SEED = int(os.environ.get("KVD_SEED", "4"))
ROUNDS = max(20, OPERATIONS // 10_000)


@pytest.mark.timeout(120 + OPERATIONS // 100)
def test_no_operation_loses_a_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = do_operations(tmp_path, operations=OPERATIONS, rounds=ROUNDS, seed=SEED)
    with capsys.disabled():
        print(f"\nrandom operations, seed {SEED}\n{outcome}")
    assert outcome.counters["evicted_blocks"] > OPERATIONS // 100
    assert outcome.checks == ROUNDS
