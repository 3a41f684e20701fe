"""A sample of tests/soak/test_worker_deaths.py: workers killed in the middle of everything."""

import os
from pathlib import Path

from tests.soak.campaign import kill_workers


def test_killed_workers_give_everything_back(tmp_path: Path) -> None:
    seed = int(os.environ.get("KVD_SEED", "1"))
    outcome = kill_workers(tmp_path, kills=25, forked=5, seed=seed)
    assert len(outcome.seconds) == 20
    assert len(outcome.forked_seconds) == 5
    # It was not idle: there was storing, eviction and comparing all the time.
    assert outcome.rows_checked > 1000
    assert outcome.counters["stored_blocks"] > 100
    assert outcome.counters["evicted_blocks"] > 0
