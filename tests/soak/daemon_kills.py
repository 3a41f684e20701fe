"""Kills the daemon at random moments while workers use it, starts it again, and looks for what was
stored: it must be there, bit for bit, or have been evicted; and nothing else may be there. Some of
it is pinned: that must be there, whatever was evicted."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kvd_client
from tests.shell.raw import until
from tests.soak.content import BLOCK_BYTES, BLOCK_TOKENS, MODEL, block_rows, rows
from tests.support import Daemon, start_daemon

N_WORKERS = 4
MAX_PINNED = 8
SECONDS = 60.0


class Worker:
    """A survivor process; `stored` are the prompts that it knows to be stored, in order."""

    def __init__(self, runtime_dir: Path, seed: int) -> None:
        command = [sys.executable, "-m", "tests.soak.survivors", str(runtime_dir), str(seed)]
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environ, text=True,
        )  # fmt: skip
        self.stored: list[list[int]] = []
        self.lived: dict[str, Any] = {}
        self._said = ""
        self._readers = [threading.Thread(target=each) for each in (self._listen, self._complain)]
        for reader in self._readers:
            reader.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as said:
            for line in said:
                message = json.loads(line)
                if "stored" in message:
                    self.stored.append(message["stored"])
                else:
                    self.lived = message["lived"]

    def _complain(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as complaints:
            self._said = complaints.read()

    def check(self) -> None:
        """It lives."""
        if self._process.poll() is not None:
            self._readers[1].join()
            raise AssertionError(self._said)

    def stop(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(SECONDS)
        for reader in self._readers:
            reader.join()
        assert code == 0, self._said
        return self.lived

    def kill(self) -> None:
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        for reader in self._readers:
            reader.join()


Pinned = dict[str, tuple[list[int], int]]
"""By owner: a prompt, and how many of its tokens are pinned."""


@dataclass
class Outcome:
    """What was seen. Seconds, counts, and what the workers have lived through."""

    kills: int = 0
    ready: list[float] = field(default_factory=list)
    """From the start of a process until it was ready."""
    adopted: int = 0
    damaged: int = 0
    evicted: Counter[str] = field(default_factory=Counter)
    """By the reason."""
    looked_up: int = 0
    lost: int = 0
    """Prompts that were stored and not found whole."""
    pins: int = 0
    """Pinned prompts that were looked up, and found."""
    lived: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        total = {name: sum(lived[name] for lived in self.lived) for name in self.lived[0]}
        longest = max(lived["longest_alloc"] for lived in self.lived)
        ready = sorted(self.ready)
        return (
            f"{self.kills} kills of the daemon; ready again after {ready[len(ready) // 2]:.2f} s, "
            f"{ready[-1]:.2f} s at most\n"
            f"{self.adopted} blocks adopted, {self.damaged} damaged, "
            f"evicted: {dict(+self.evicted)}; "
            f"{self.looked_up} stored prompts looked up, {self.lost} not whole, "
            f"{self.pins} pinned ones\n"
            f"workers: {total['requests']} requests, {total['shared']} with the daemon, "
            f"{total['alone']} without, {total['hits']} hits, {total['rows']} rows compared, "
            f"{total['stored']} stored, {total['errors']} cut off by a death\n"
            f"longest alloc: {1000 * longest:.0f} ms"
        )


def run(directory: Path, kills: int, seed: int, budget: str) -> Outcome:
    """Any wrong byte, and any disagreement of the accounts, is an AssertionError."""
    chance = random.Random(seed)
    outcome = Outcome()
    runtime_dir, instance = directory / "rt", f"soak-{os.getpid()}-{seed}"
    flags = ("--max-memory", budget, "--max-sequences", "32", "--n-seq-max", "4")
    daemon = start_daemon(*flags, runtime_dir=runtime_dir, instance=instance)
    workers = [Worker(runtime_dir, seed + number) for number in range(N_WORKERS)]
    pinned: Pinned = {}
    try:
        until(lambda: all(worker.stored for worker in workers), SECONDS)
        for _ in range(kills):
            # Also in the middle of the start, of adoption, and of what is checked behind it.
            time.sleep(chance.choice((0.02, 0.3, 1.0, 2.5)) * chance.random())
            daemon.kill()
            stored = [len(worker.stored) for worker in workers]
            begin = time.monotonic()
            daemon = start_daemon(*flags, runtime_dir=runtime_dir, instance=instance)
            outcome.kills += 1
            outcome.ready.append(time.monotonic() - begin)
            for worker in workers:
                worker.check()
            if chance.random() < 0.5:
                _look(daemon, workers, stored, chance, outcome, pinned)
        for worker in workers:
            outcome.lived.append(worker.stop())
        every = [len(worker.stored) for worker in workers]
        _look(daemon, workers, every, chance, outcome, pinned, at_most=1_000_000)
    finally:
        for worker in workers:
            worker.kill()
        daemon.stop()
    assert not daemon.segments()
    return outcome


def _look(
    daemon: Daemon,
    workers: list[Worker],
    stored: list[int],
    chance: random.Random,
    outcome: Outcome,
    pinned: Pinned,
    at_most: int = 20,
) -> None:
    """Look up what the workers had stored before this daemon was there, as another worker would,
    and what is pinned; then pin something else."""
    prompts = [
        prompt
        for worker, count in zip(workers, stored, strict=True)
        for prompt in worker.stored[:count]
    ]
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=0, timeout=SECONDS) as client,
        client.open_context(MODEL.model, 1) as context,
    ):
        for tokens in chance.sample(prompts, min(at_most, len(prompts))):
            outcome.looked_up += 1
            outcome.lost += _matched(context, tokens) < len(tokens)
        assert {row["owner"] for row in client.pins()} == set(pinned)
        for owner, (tokens, n_tokens) in pinned.items():
            assert _matched(context, tokens) >= n_tokens, f"the pin of {owner} kept nothing"
            outcome.pins += 1
        if len(pinned) == MAX_PINNED:
            for owner in list(pinned)[: MAX_PINNED // 2]:
                assert client.unpin(owner) == 1
                del pinned[owner]
        tokens = chance.choice(prompts)
        owner = f"pin {outcome.kills}"
        if n_tokens := client.pin(MODEL.model, tokens, owner=owner):
            pinned[owner] = (tokens, n_tokens)
        report = client.verify()
        assert report["ok"], report
        counters = client.status()["counters"]
    outcome.adopted += counters["adopted_blocks"]
    outcome.damaged += counters["damaged_blocks"]
    outcome.evicted.update(counters["evicted"])


def _matched(context: kvd_client.Context, tokens: list[int]) -> int:
    """How many of the tokens are cached, each byte of which is right."""
    buffer = np.empty(BLOCK_BYTES, np.uint8)
    with context.alloc(tokens) as sequence:
        expected = rows(tokens[: sequence.matched_tokens])
        for index, start in enumerate(range(0, sequence.matched_tokens, BLOCK_TOKENS)):
            sequence.read_into(index, buffer)
            wanted = expected[:, :, start : start + BLOCK_TOKENS]
            found = block_rows(buffer)[:, :, : wanted.shape[2]]
            assert np.array_equal(found, wanted), f"wrong bytes in {index} of {tokens}"
        return sequence.matched_tokens
