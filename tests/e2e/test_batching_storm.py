"""Eight sequences at once in each of two workers, arrivals and cancellations at random; workers are
killed, and so is the daemon, which stays away for some seconds: see storm.py.

KVD_BATCHING_SECONDS says how long (30); KVD_SEED replays a run's choices, though not its timing.
"""

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import kvd_client
from tests.e2e.storm import N_SEQ_MAX, Process, Told
from tests.llama import tiny_models
from tests.support import start_daemon

pytestmark = pytest.mark.model

SECONDS = float(os.environ.get("KVD_BATCHING_SECONDS", "30"))
SEED = int(os.environ.get("KVD_SEED", "5"))
FLAGS = ("--max-memory", "8MiB")
"""So little that blocks are evicted all the time."""


PATIENCE = 1000
"""Rounds more, of a tenth of a second or two, until all has happened that is to happen, on a busy
machine. Not seconds: the machine may stop all of us for a while."""


@pytest.mark.timeout(300 + 2 * SECONDS)
def test_nothing_is_wrong_cut_or_left_whatever_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(SEED)
    model = tiny_models.write_llama(tmp_path / "llama.gguf")
    runtime_dir = tmp_path / "run"
    daemon = start_daemon(*FLAGS, runtime_dir=runtime_dir)
    totals = Told()
    seeds = itertools.count(1000 * SEED)
    workers = [Process(model, runtime_dir, next(seeds), totals) for _ in range(2)]
    happened: Counter[str] = Counter()

    def missing() -> list[str]:
        """What has not happened yet, and must, for this test to mean something."""
        counts = {
            **{name: totals.ended[name] - N_SEQ_MAX for name in ("length", "cancelled", "timeout")},
            "imported": totals.checked_blocks,
            "shared": totals.copied_tokens,
            "put back": totals.put_back,
            **{name: happened[name] for name in ("workers killed", "outages", "evicted")},
        }
        return [name for name, count in counts.items() if count <= 0]

    try:
        begun = time.monotonic()
        kill_at, outage_at, patience = 4.0, 10.0, PATIENCE
        while (now := time.monotonic() - begun) < SECONDS or missing():
            patience -= now > SECONDS
            assert patience, f"these have not happened: {missing()}"
            for worker in workers:
                worker.listen(0.1)
            if now > kill_at:
                # One that has answered something, so that there is something to lose.
                victim = chance.randrange(2)
                if workers[victim].has_told:
                    workers[victim].kill()
                    workers[victim] = Process(model, runtime_dir, next(seeds), totals)
                    happened["workers killed"] += 1
                    kill_at = now + 2 + 4 * chance.random()
            if now > outage_at:
                with kvd_client.connect(runtime_dir, staging_bytes=0, timeout=20) as watcher:
                    happened["evicted"] += watcher.status()["counters"]["evicted_blocks"]
                answered = sum(totals.ended.values())
                daemon.kill()
                away_until = time.monotonic() + 3
                while time.monotonic() < away_until or sum(totals.ended.values()) == answered:
                    for worker in workers:
                        worker.listen(0.1)
                daemon = start_daemon(*FLAGS, runtime_dir=runtime_dir, instance=daemon.instance)
                happened["outages"] += 1
                outage_at = time.monotonic() - begun + 8 + 10 * chance.random()
        with kvd_client.connect(runtime_dir, staging_bytes=0, timeout=20) as watcher:
            for worker in workers:
                worker.stop()
            # Those that were killed as well: nothing of theirs is left.
            wait_until(lambda: watcher.status()["clients"] == 1)
            status = watcher.status()
            assert status["sequences"]["in_use"] == 0
            for row in status["models"]:
                assert row["blocks"]["active"] == row["blocks"]["filling"] == 0
            assert watcher.verify(checksums=True)["differences"] == []
    finally:
        for worker in workers:
            if not worker.is_done:
                worker.kill()
        daemon.stop()
    with capsys.disabled():
        print(
            f"\nbatching, seed {SEED}: {dict(totals.ended)}; {dict(happened)};\n"
            f"{totals.checked_blocks} imported blocks exact, {totals.compared_tokens} tokens as if "
            f"alone; {totals.matched_tokens} matched,\n{totals.copied_tokens} shared; "
            f"{totals.put_back} times put back"
        )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in 30 s"
