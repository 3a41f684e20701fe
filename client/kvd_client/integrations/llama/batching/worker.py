"""Continuous batching: many requests at once over one llama.cpp context that shares through kvd.

    with BatchingWorker("model.gguf", n_ctx=8192) as worker:
        worker.start()
        requests = [worker.submit(prompt, 100) for prompt in prompts]
        for token in requests[0]: ...

What is decided is in schedule.py; here it is carried out. A step, in this order: take in what was
submitted and cancelled; start who may start (an id and a leased prefix from the daemon, cells
shared with another sequence, blocks imported); decode one token of each who has one, then pieces of
prompts; and export some blocks of what is new. Nothing of a step waits for the daemon but the round
trips that open and release a sequence, and no token is told later for the sake of storing it.

Threads: `submit`, and all of a Request, from any thread. The engine and the client belong to
whoever steps: one thread at a time.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from kvd_client.client import Client
from kvd_client.errors import KvdError, NoSequenceFree, SequenceLimit, StaleHandle
from kvd_client.integrations.llama.batching.request import OnToken, Request
from kvd_client.integrations.llama.batching.schedule import Job, Schedule, Start, State
from kvd_client.integrations.llama.engine import LlamaEngine
from kvd_client.integrations.llama.errors import DecodeFailed, LlamaEngineError
from kvd_client.integrations.llama.worker import LlamaSequence, LlamaWorker, Pick

logger = logging.getLogger("kvd_client")

BLOCKS_A_STEP = 4
"""Exported after each step, of all sequences together. A block of a small model costs 0.1 ms, of a
large one some, with steps that last as many times longer."""
_NO_ROOM = 1
"""The code of DecodeFailed."""
_PAUSE = 0.01
"""Seconds until the daemon is asked again for an id that it did not have."""
_LINGER = 1.0
"""Seconds after which an answered request gives up storing the rest: the daemon hangs."""


@dataclass(eq=False, slots=True)
class _Live:
    """A request that is not gone, and its sequence if it has one."""

    job: Job
    request: Request
    pick: Pick | None
    sequence: LlamaSequence | None = None
    ended_at: float = 0.0

    @property
    def open(self) -> LlamaSequence:
        assert self.sequence is not None
        return self.sequence


class BatchingWorker:
    """An engine that answers many requests at once. A context manager."""

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        *,
        engine: LlamaEngine | None = None,
        client: Client | None = None,
        runtime_dir: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        block_tokens: int = 32,
        n_seq_max: int = 8,
        blocks_a_step: int = BLOCKS_A_STEP,
        name: str = "batching",
        **engine_options: Any,
    ) -> None:
        """Load `model_path` with `engine_options` (those of LlamaEngine), or take `engine`.

        So many requests are computed at once as the engine has sequences: `n_seq_max`, for one that
        is made here. `n_batch` of the engine is also how many tokens of others' prompts may come
        between two tokens of a request: a smaller one makes text flow more evenly, and prompts
        take longer. `client` and what else there is: see LlamaWorker. Raises NotShareable.
        """
        if engine is None:
            engine_options["n_seq_max"] = n_seq_max
        self.llama = LlamaWorker(
            model_path,
            engine=engine,
            client=client,
            runtime_dir=runtime_dir,
            timeout=timeout,
            block_tokens=block_tokens,
            name=name,
            **engine_options,
        )
        self.engine = self.llama.engine
        self.blocks_a_step = blocks_a_step
        self._schedule = Schedule(
            n_ctx=self.engine.n_ctx,
            n_batch=self.engine.n_batch,
            n_seq_max=self.engine.n_seq_max,
        )
        self._live: dict[Job, _Live] = {}
        self._orders: deque[Callable[[], None]] = deque()
        """What other threads have asked for, to be done by the next step."""
        self._news = threading.Event()
        self._lock = threading.Lock()
        """Held while a thread steps."""
        self._stepper = threading.get_ident()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = ""
        """Why nothing can be submitted any more."""
        self._ask_again_at = 0.0
        self._computed = 0
        """Tokens of this step."""

    # --- for any thread

    def submit(
        self,
        tokens: npt.ArrayLike,
        max_tokens: int,
        *,
        priority: int = 0,
        timeout: float | None = None,
        pick: Pick | None = None,
        on_token: OnToken | None = None,
    ) -> Request:
        """Ask for up to `max_tokens` tokens that follow a prompt (int [n], n >= 1).

        Requests of higher `priority` go first; among equals, who came first. `timeout` seconds from
        now it ends, whatever there is by then. `pick` chooses a token from logits (float32
        [n_vocab], its own); without, the most likely one. It and `on_token`, which is told each
        token, are called by the thread that steps; if one raises, the request fails.
        ValueError for what does not fit the context, even alone, and for a token that the model
        does not have; RuntimeError after the end.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        job = Job(tokens, max_tokens, priority=priority, deadline=deadline)
        self._schedule.check_fits(job)
        low, high = int(job.tokens.min()), int(job.tokens.max())
        if low < 0 or high >= self.engine.n_vocab:
            wrong = low if low < 0 else high
            raise ValueError(f"token ids are 0 .. {self.engine.n_vocab - 1}, not {wrong}")
        request = Request(
            lambda _: self._order(lambda: self._cancel(job)), self._check_wait, on_token
        )
        live = _Live(job, request, pick)
        self._order(lambda: self._take(live))
        if self._closed:
            # Whoever ended it may have seen the order, or not.
            self._refuse_orders()
            raise RuntimeError(self._closed)
        return request

    def stop(self) -> None:
        """Let `run` return after its step. What is not answered stays."""
        self._stopping = True
        self._news.set()

    # --- for the thread that steps

    def step(self) -> bool:
        """Do what there is to do next; returns whether there is more to do at once.

        If not, wait for `wait_for_news`. RuntimeError if another thread is in here. What else it
        raises is a fault; all requests have failed then, and the worker is of no use any more.
        """
        with self._alone():
            self._take_orders()
            self._expire()
            self._start_some()
            plan = self._schedule.plan()
            self._computed = 0
            self._decode(plan.rows)
            for job in plan.prefills:
                self._prefill(job)
            exported = self._store_some()
            return bool(self._schedule.running or self._orders or exported)

    def wait_for_news(self, timeout: float | None = None) -> None:
        """Wait until there may be something to do for `step`, at most so many seconds."""
        if self._schedule.waiting or self._schedule.lingering:
            # For an id of the daemon, or room in the staging.
            timeout = _PAUSE if timeout is None else min(timeout, _PAUSE)
        self._news.wait(timeout)

    def run(self) -> None:
        """Step until `stop` is called, in this thread; `start` does it in another."""
        while not self._stopping:
            if not self.step():
                self.wait_for_news()
        self._stopping = False

    def start(self) -> None:
        """Have a thread of its own step, until `close`."""
        if self._thread is not None:
            raise RuntimeError("the worker has a thread already")
        self._thread = threading.Thread(target=self._run_in_thread, name="kvd-batching")
        self._thread.start()

    def close(self) -> None:
        """Stop, store what is new of answered requests, and give everything back. The others fail.
        Not to be called by a callback."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self.stop()
            thread.join()
        with self._lock:
            for job in self._schedule.lingering:
                self._live[job].open.store(tail=True)
            self._fail_all("the worker was closed")
        self.llama.close()

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except Exception:
            logger.exception("the batching worker has ended")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._closed:
            raise RuntimeError(self._closed)
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("another thread steps this worker: one does it at a time")
        try:
            self._stepper = threading.get_ident()
            yield
        except BaseException as error:
            with suppress(Exception):
                self._fail_all(f"the worker broke: {error!r}")
            for live in self._live.values():  # with which giving it back has failed, too
                if live.request.ended is None:
                    live.request.finish(f"failed: {self._closed}")
            self._live.clear()
            raise
        finally:
            self._lock.release()

    def _check_wait(self) -> None:
        """Raise RuntimeError if the thread that is about to wait is the one that would step."""
        if self._thread is None and self._stepper == threading.get_ident():
            raise RuntimeError(
                "this thread would wait for ever: call start(), or step() until the request ends"
            )

    # --- what was asked for

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        self._news.set()

    def _take_orders(self) -> None:
        self._news.clear()
        while self._orders:
            self._orders.popleft()()

    def _refuse_orders(self) -> None:
        while True:
            try:
                self._orders.popleft()
            except IndexError:
                return

    def _take(self, live: _Live) -> None:
        self._schedule.submit(live.job)
        self._live[live.job] = live

    def _cancel(self, job: Job) -> None:
        if job.state in (State.WAITING, State.RUNNING):
            self._end(job, "cancelled")

    def _expire(self) -> None:
        for job in self._schedule.expired(time.monotonic()):
            self._end(job, "timeout")

    # --- starting, and ending

    def _start_some(self) -> None:
        if time.monotonic() < self._ask_again_at:
            return
        while True:
            victim = self._schedule.outranked()
            if victim is not None:
                self._put_back(victim)
                continue
            start = self._schedule.next_start()
            if start is None or not self._start(start):
                return

    def _start(self, start: Start) -> bool:
        """Open its sequence. False if the daemon has no id for it now."""
        job, donor = start
        live = self._live[job]
        like = None if donor is None else self._live[donor].open
        try:
            sequence = self.open_sequence(job, like)
        except (NoSequenceFree, SequenceLimit, StaleHandle):
            # All ids of this or of all contexts are in use, or the daemon has gone just now.
            self._ask_again_at = time.monotonic() + _PAUSE
            return False
        except (KvdError, LlamaEngineError) as error:
            self._end(job, f"failed: {error}")
            return True
        live.sequence = sequence
        if not live.request.put_back:
            live.request.matched_tokens = sequence.matched_tokens
            live.request.copied_tokens = sequence.copied_tokens
        copied = sequence.copied_tokens
        self._schedule.started(job, sequence.length, donor if copied else None, copied)
        return True

    def open_sequence(self, job: Job, like: LlamaSequence | None) -> LlamaSequence:
        """A sequence for what there is of a job, sharing cells with `like`. For classes that look
        closer, or open it otherwise."""
        return self.llama.open(job.tokens, like=like)

    def _put_back(self, job: Job) -> None:
        self._close_sequence(self._live[job])
        self._schedule.put_back(job)
        self._live[job].request.put_back += 1

    def _end(self, job: Job, reason: str) -> None:
        """It ends without its answer, and what it has is given back at once."""
        live = self._live.pop(job)
        self._close_sequence(live, failed=True)
        self._schedule.end(job, reason)
        live.request.finish(reason)

    def _gone(self, job: Job) -> None:
        self._close_sequence(self._live.pop(job))
        self._schedule.gone(job)

    def _close_sequence(self, live: _Live, failed: bool = False) -> None:
        sequence, live.sequence = live.sequence, None
        if sequence is not None:
            sequence.close(store=False, failed=failed)

    def _fail_all(self, reason: str) -> None:
        self._closed = self._closed or reason
        self._take_orders()
        for live in list(self._live.values()):
            if live.job.state is State.LINGERING:
                self._gone(live.job)
            else:
                self._end(live.job, f"failed: {reason}")

    # --- computing

    def _decode(self, rows: list[Job]) -> None:
        """One batch of one token of each."""
        while rows:
            opened = [self._live[job].open for job in rows]
            tokens = [int(job.tokens[-1]) for job in rows]
            positions = [sequence.length for sequence in opened]
            try:
                self.engine.decode(tokens, positions, [each.seq_id for each in opened], True)
            except DecodeFailed as error:
                self._could_not(rows, error)
                rows = [job for job in rows if job.state is State.RUNNING]
                continue
            for job, sequence, token in zip(rows, opened, tokens, strict=True):
                sequence.took(token, None)
                self._note(job)
            # All logits are read before the next batch; a callback ends nobody but its own request.
            for row, job in enumerate(rows):
                self._sample(job, row)
            return

    def _prefill(self, job: Job) -> None:
        """The next piece of a prompt, as a batch of its own."""
        while job.state is State.RUNNING:
            sequence = self._live[job].open
            try:
                pending = sequence.prefill_some()
            except DecodeFailed as error:
                self._could_not([job], error)
                continue
            self._note(job)
            if not pending:
                self._sample(job, -1)
            return

    def _note(self, job: Job) -> None:
        """Its row or piece was computed."""
        before = job.length
        self._schedule.computed(job)
        self._computed += job.length - before
        self._live[job].request.computed_tokens += job.length - before

    def _sample(self, job: Job, row: int) -> None:
        live = self._live[job]
        try:
            if live.pick is None:
                token = self.engine.argmax(row)
            else:
                token = live.pick(self.engine.logits(row))
            is_eog = self.engine.is_eog(token)
            if not is_eog:
                live.request.took(token)
        except Exception as error:
            self._end(job, f"failed: {type(error).__name__}: {error}")
            return
        self._schedule.sampled(job, token, is_eog)
        if job.ended is not None:
            live.ended_at = time.monotonic()
            live.request.finish(job.ended)

    def _could_not(self, jobs: list[Job], error: DecodeFailed) -> None:
        """Decoding a batch of `jobs` failed: make room if that is why, or end them."""
        victim = self._schedule.victim()
        if error.code == _NO_ROOM and victim is not None:
            if victim.state is State.LINGERING:
                self._gone(victim)
            else:
                logger.debug("the context is full: a request is put back")
                self._put_back(victim)
            return
        for job in jobs:
            self._end(job, f"failed: {error}")

    # --- storing

    def _store_some(self) -> int:
        """Export some blocks, of those first that only wait for that; returns how many.

        As many as were computed in this step, if that is more than `blocks_a_step`: so a prompt is
        stored as it is computed, in a thousandth of that time.
        """
        most = max(self.blocks_a_step, self._computed // self.llama.context.model.block_tokens)
        left, now = most, time.monotonic()
        for job in self._schedule.lingering + self._schedule.running:
            live = self._live[job]
            lingers = job.state is State.LINGERING
            if left > 0:
                left -= live.open.store(tail=lingers, wait=0.0, most=left)
            if lingers and (not live.open.unstored_tokens or now - live.ended_at > _LINGER):
                self._gone(job)
        return most - left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()
