"""Two batching workers in processes of their own that are asked everything at random, and killed.

    test ──► "stop": take nothing new, finish what there is, and tell the totals
    worker ──► Told, after every so many answers and at the end, or the traceback of what was wrong

A worker's prompts begin with one of a few documents, or with a whole earlier exchange, so they
share with each other and between the workers. Each answer is compared with what a private context
says: see batching.py.
"""

import multiprocessing
import random
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from kvd_client.client import Client
from kvd_client.integrations.llama.batching.request import Request
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.runtime.model import LlamaModel
from tests.e2e.batching import LAST_BITS, ExactWorker, Recorder, difference
from tests.llama.tiny_models import N_VOCAB

N_SEQ_MAX = 8
OUTSTANDING = 14
"""More than there are sequences, and than there is room for in the context."""
STAGING = 1 << 20
_PATIENCE = 60
"""Seconds, or waits of a second."""


@dataclass
class Told:
    """What a worker has done since it last told."""

    ended: Counter[str] = field(default_factory=Counter)
    compared_tokens: int = 0
    checked_blocks: int = 0
    matched_tokens: int = 0
    copied_tokens: int = 0
    put_back: int = 0
    is_last: bool = False
    problem: str = ""


@dataclass(eq=False)
class _Asked:
    prompt: np.ndarray
    max_tokens: int
    request: Request
    pick: Recorder
    cancel_at: float | None
    timeout: float | None
    cancelled: bool = False


def serve(pipe: Connection, model: Path, runtime_dir: Path, seed: int) -> None:
    """One worker's life, in its own process."""
    try:
        client = Client(
            runtime_dir, name="storm", fail_open=True, timeout=1.0, staging_bytes=STAGING
        )
        sizes = {"n_ctx": 1024, "n_threads": 1}
        with (
            client,
            LlamaModel(model) as loaded,
            LlamaEngine(model=loaded, n_seq_max=N_SEQ_MAX, n_batch=64, **sizes) as engine,
            ExactWorker(engine=engine, client=client) as worker,
            LlamaEngine(model=loaded, n_seq_max=1, n_batch=1024, n_ubatch=1024, **sizes) as alone,
        ):
            worker.start()
            _Storm(worker, alone, seed).run(pipe)
            assert all(engine.length(seq) == 0 for seq in range(N_SEQ_MAX))
            pipe.send(Told(is_last=True))
    except BaseException:
        pipe.send(Told(is_last=True, problem=traceback.format_exc()))


class _Storm:
    def __init__(self, worker: ExactWorker, alone: LlamaEngine, seed: int) -> None:
        self.worker, self.alone = worker, alone
        self.chance = random.Random(seed)
        self.asked: list[_Asked] = []
        self.exchanges: list[np.ndarray] = []
        """Prompts with their answers, to go on from."""
        self.told = Told()
        self.n_asked = 0

    def run(self, pipe: Connection) -> None:
        stopping = False
        while self.asked or not stopping:
            stopping = stopping or pipe.poll()
            if not stopping and len(self.asked) < self.chance.randrange(OUTSTANDING):
                self._ask()
            for asked in list(self.asked):
                self._look_at(asked)
            if sum(self.told.ended.values()) >= 20:
                self._tell(pipe)
            time.sleep(self.chance.choice((0, 0.001, 0.005)))  # arrivals are random
        self.worker.close()
        self._tell(pipe)

    def _ask(self) -> None:
        chance = self.chance
        prompt, max_tokens = self._prompt(), chance.randrange(1, 60)
        now = time.monotonic()
        timeout = chance.choice((None, None, None, 0.05))
        pick = Recorder(chance.randrange(1 << 30))
        request = self.worker.submit(
            prompt, max_tokens, priority=chance.choice((0, 0, 0, 1)), timeout=timeout, pick=pick
        )
        cancel_at = None if chance.random() < 0.8 else now + 0.1 * chance.random()
        self.asked.append(_Asked(prompt, max_tokens, request, pick, cancel_at, timeout))

    def _prompt(self) -> np.ndarray:
        chance = self.chance
        if self.exchanges and chance.random() < 0.3:
            begin = self.exchanges.pop(chance.randrange(len(self.exchanges)))
        else:
            # Equal in all workers.
            document = np.random.default_rng(chance.randrange(4)).integers(1, N_VOCAB, 250)
            begin = document[: chance.randrange(250)]
        own = [chance.randrange(1, N_VOCAB) for _ in range(chance.randrange(1, 50))]
        return np.append(begin, own).astype(np.int32)

    def _look_at(self, asked: _Asked) -> None:
        if asked.cancel_at is not None and time.monotonic() > asked.cancel_at:
            asked.cancel_at = None
            asked.cancelled = True
            asked.request.cancel()
        if asked.request.ended is None:
            return
        self.asked.remove(asked)
        result = asked.request.result(0)
        if result.ended == "cancelled":
            assert asked.cancelled
        elif result.ended == "timeout":
            assert asked.timeout is not None
        else:
            assert result.ended == "length", result.ended
            assert len(result.tokens) == asked.max_tokens, "it is cut"
        if result.tokens:
            logits = asked.pick.logits[: len(result.tokens)]
            off = difference(self.alone, asked.prompt, result.tokens, logits)
            assert off < LAST_BITS, f"{off}: it has seen other tokens than its own"
            if len(asked.prompt) < 300:
                self.exchanges.append(np.append(asked.prompt, result.tokens))
                del self.exchanges[:-8]
        told = self.told
        told.ended[result.ended] += 1
        told.compared_tokens += len(result.tokens)
        told.matched_tokens += result.matched_tokens
        told.copied_tokens += result.copied_tokens
        told.put_back += result.put_back

    def _tell(self, pipe: Connection) -> None:
        self.told.checked_blocks, self.worker.checked_blocks = self.worker.checked_blocks, 0
        pipe.send(self.told)
        self.told = Told()


class Process:
    """A worker, its process, and what it has told."""

    def __init__(self, model: Path, runtime_dir: Path, seed: int, totals: Told) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, model, runtime_dir, seed))
        self._process.start()
        theirs.close()
        self._totals = totals
        self.is_done = False
        self.has_told = False

    def listen(self, timeout: float) -> None:
        """Take in what it tells. Raises AssertionError with what was wrong."""
        while not self.is_done and self.pipe.poll(timeout):
            timeout = 0.0
            told: Told = self.pipe.recv()
            assert not told.problem, told.problem
            self.has_told = True
            self.is_done = told.is_last
            totals = self._totals
            totals.ended += told.ended
            for name in (
                "compared_tokens",
                "checked_blocks",
                "matched_tokens",
                "copied_tokens",
                "put_back",
            ):
                setattr(totals, name, getattr(totals, name) + getattr(told, name))

    def stop(self) -> None:
        """Let it finish."""
        self.pipe.send("stop")
        for _ in range(_PATIENCE):
            self.listen(1.0)
            if self.is_done:
                break
        assert self.is_done, "a worker does not finish"
        self._process.join(_PATIENCE)
        assert self._process.exitcode == 0
        self.pipe.close()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join(_PATIENCE)
        self.pipe.close()
