"""A request as its submitter sees it, from any thread. What the worker makes of it: worker.py."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

OnToken = Callable[[int], None]


class RequestFailed(Exception):
    """The request could not be answered; the message says why."""


class Result(NamedTuple):
    """How a request ended, and what it cost.

    `ended` is "eog" (the model ended its text), "length" (all tokens that were asked for),
    "cancelled" or "timeout"; with the last two `tokens` are what there was by then. Of the prompt
    `matched_tokens` were found in the cache, and `copied_tokens` in another sequence of the worker,
    some of them the same. `computed_tokens` were computed, all in all, also again after the request
    was put back, which happened `put_back` times.
    """

    tokens: list[int]
    ended: str
    matched_tokens: int
    copied_tokens: int
    computed_tokens: int
    put_back: int


class Request:
    """What `BatchingWorker.submit` gives. Iterate over it for its tokens, as they come; each
    iteration begins with the first one. The token that ends a text is not among them."""

    def __init__(
        self,
        cancel: Callable[["Request"], None],
        check_wait: Callable[[], None],
        on_token: OnToken | None,
    ) -> None:
        self._cancel = cancel
        self._check_wait = check_wait
        self._on_token = on_token
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._ended: str | None = None
        # Counted by the worker:
        self.matched_tokens = 0
        self.copied_tokens = 0
        self.computed_tokens = 0
        self.put_back = 0

    @property
    def ended(self) -> str | None:
        """Why it ended: see Result; or "failed: ...". None before."""
        return self._ended

    def cancel(self) -> None:
        """Give up: the worker stops with it before its next step. Nothing if it has ended."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for its end, up to `timeout` seconds (None: for ever). Raises RequestFailed if it
        failed, and TimeoutError if it goes on."""
        with self._changed:
            if not self._wait(lambda: self._ended is not None, timeout):
                raise TimeoutError(f"the request has not ended in {timeout} seconds")
        assert self._ended is not None
        self._raise_failure()
        return Result(
            list(self._tokens),
            self._ended,
            self.matched_tokens,
            self.copied_tokens,
            self.computed_tokens,
            self.put_back,
        )

    def __iter__(self) -> Iterator[int]:
        """Its tokens; waits for each. Afterwards `ended` says why there are no more. Raises
        RequestFailed after the last one if it failed."""
        told = 0
        while True:
            with self._changed:
                self._wait(partial(self._has_news, told), None)
                new = self._tokens[told:]
            if not new:
                break
            told += len(new)
            yield from new
        self._raise_failure()

    def _has_news(self, told: int) -> bool:
        return told < len(self._tokens) or self._ended is not None

    # --- for the worker

    def took(self, token: int) -> None:
        """Tell the next token. Raises what the callback raises."""
        with self._changed:
            self._tokens.append(token)
            self._changed.notify_all()
        if self._on_token is not None:
            self._on_token(token)

    def finish(self, reason: str) -> None:
        """Tell the end, once."""
        with self._changed:
            assert self._ended is None, f"ended twice: {self._ended}, {reason}"
            self._ended = reason
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        if not condition():
            self._check_wait()
        return self._changed.wait_for(condition, timeout)

    def _raise_failure(self) -> None:
        if self._ended is not None and self._ended.startswith("failed"):
            raise RequestFailed(self._ended)
