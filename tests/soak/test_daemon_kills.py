"""The daemon is killed again and again under the load of four workers."""

import os
from pathlib import Path

import pytest

from kvd.core.reasons import Reason
from tests.soak.daemon_kills import run

KILLS = int(os.environ.get("KVD_SOAK_DAEMON_KILLS", 200))
SEED = int(os.environ.get("KVD_SEED", 1))


@pytest.mark.timeout(3600)
def test_nothing_that_was_stored_is_lost_when_all_of_it_fits(tmp_path: Path) -> None:
    outcome = run(tmp_path, KILLS // 2, SEED, "256MiB")
    print(f"\n{outcome}")
    assert outcome.damaged == outcome.lost == 0
    # An open tail that a longer block has all of, with its tokens, is nothing lost.
    assert set(+outcome.evicted) <= {Reason.SUPERSEDED}
    assert outcome.adopted > 0


@pytest.mark.timeout(3600)
def test_no_byte_is_wrong_when_blocks_are_evicted_all_the_time(tmp_path: Path) -> None:
    outcome = run(tmp_path, KILLS - KILLS // 2, SEED + 1000, "2MiB")
    print(f"\n{outcome}")
    assert outcome.damaged == 0
    assert outcome.adopted > 0
