"""Workers are killed, hundreds of them, in the middle of everything: see campaign.py.

KVD_SOAK_WORKER_KILLS says how many (500), a fifth of which leave a forked child that holds the
lifeline open; KVD_SEED replays a run's choices.
"""

import os
from pathlib import Path

import pytest

from tests.soak.campaign import kill_workers

KILLS = int(os.environ.get("KVD_SOAK_WORKER_KILLS", "500"))
SEED = int(os.environ.get("KVD_SEED", "3"))


@pytest.mark.timeout(60 + 2 * KILLS)
def test_killed_workers_give_everything_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = kill_workers(tmp_path, kills=KILLS, forked=KILLS // 5, seed=SEED)
    with capsys.disabled():
        print(f"\nworker deaths, seed {SEED}\n{outcome}")
