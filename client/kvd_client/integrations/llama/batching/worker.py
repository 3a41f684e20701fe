"""Continuous batching: many requests at once over one llama.cpp context that shares through kvd.

    with BatchingWorker("model.gguf", n_ctx=8192) as worker:
        worker.start()
        requests = [worker.submit(prompt, 100) for prompt in prompts]
        for token in requests[0]: ...

What is computed next is decided in schedule.py and carried out in stepper.py; this is what users
call, and which thread does what.

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
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from kvd_client.client import Client
from kvd_client.integrations.llama.batching.request import OnToken, Request
from kvd_client.integrations.llama.batching.schedule import Job
from kvd_client.integrations.llama.batching.stepper import BLOCKS_A_STEP, PAUSE, Live, Stepper
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.worker import LlamaWorker, Pick

logger = logging.getLogger("kvd_client")


class BatchingWorker(Stepper):
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
        llama = LlamaWorker(
            model_path,
            engine=engine,
            client=client,
            runtime_dir=runtime_dir,
            timeout=timeout,
            block_tokens=block_tokens,
            name=name,
            **engine_options,
        )
        super().__init__(llama, blocks_a_step)
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
        now, or when the step ends that is being done then, it ends with what there is. `pick`
        chooses a token from logits (float32 [n_vocab], its own); without, the most likely one. It
        and `on_token`, which is told each token, are called by the thread that steps; if one
        raises, the request fails.
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
        live = Live(job, request, pick)
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
            return self._carry_out() or bool(self._orders)

    def wait_for_news(self, timeout: float | None = None) -> None:
        """Wait until there may be something to do for `step`, at most so many seconds."""
        if self._schedule.waiting or self._schedule.lingering:
            # For an id of the daemon, or room in the staging.
            timeout = PAUSE if timeout is None else min(timeout, PAUSE)
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
            self._store_rest()
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

    def _fail_all(self, reason: str) -> None:
        self._closed = self._closed or reason
        self._take_orders()
        self._end_all(f"failed: {reason}")

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()
