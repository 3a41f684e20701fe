"""Makes an ordinary `llama_cpp.Llama` share its K/V through the daemon.

    from kvd_client.integrations.llama import share

    llama = Llama("model.gguf", n_ctx=4096, flash_attn=True)
    share(llama)                # that is all: completions, chats, streaming, generate

Covers what happens at each prompt: ask for its longest cached prefix, bring it into the context if
the context does not have it already, and let `Llama.generate` find it there; store what is new,
after the first token and at the end. Methods of that one Llama are replaced for it (hooks.py). What
may be shared is in llama_params.py, which tokens are trusted in known.py and watching.py, how
blocks move in kv/mover.py, how they are stored in storing.py.

Each prompt is a line in the log, at INFO: how many of its tokens are not decoded.

Only `generate`, and what is built on it, asks for a prefix: `eval` called alone evaluates all that
it is given. Whoever decodes with llama.cpp's own calls, past the Llama, must `forget` before.
"""

import contextlib
import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from kvd_client.client import DEFAULT_STAGING, Client, Sequence
from kvd_client.errors import KvdError
from kvd_client.integrations.llama.attached.hooks import Hooks
from kvd_client.integrations.llama.attached.known import KnownTokens, Tokens, common_prefix
from kvd_client.integrations.llama.attached.llama_params import read_llama
from kvd_client.integrations.llama.attached.watching import ContextWatch
from kvd_client.integrations.llama.errors import ImportFailed
from kvd_client.integrations.llama.kv.mover import BlockAt
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.storing import Storer
from kvd_client.integrations.llama.worker import model_of

logger = logging.getLogger("kvd_client")

_SEQ = 0
"""The one sequence of a Llama."""
MIN_TOKENS = 8
"""Measured by bench/threshold.py with a model of 135M: to ask costs 0.3 ms, to store 2 ms after the
first token, and 8 tokens that are found save 40 ms, 2 save 6. So time is gained from 2 tokens on.
But any stored prompt takes a block of memory, however short, which fewer are not worth."""
_NO_WAIT = 0.0


@dataclass
class ShareCounters:
    """Counts since the Llama was shared, in tokens but for `prompts`.

    Of the prompts' tokens `live_tokens` were in the context already, and `imported_tokens` came
    from the cache; `decoded_tokens` went through llama.cpp, prompts' and others.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    live_tokens: int = 0
    imported_tokens: int = 0
    decoded_tokens: int = 0


class _Request:
    """One run of `generate`: the sequence at the daemon that stands for it, as long as it runs."""

    def __init__(self) -> None:
        self.storer: Storer | None = None
        self.chain: Tokens = np.empty(0, np.int32)
        """The tokens of the sequence's full blocks: what is stored next must follow them."""
        self.prompt_tokens: int | None = None
        """How many the prompt has; None if it continues what is in the context."""
        self.has_asked = False
        self.has_first_token = False

    def follows(self, storer: Storer, tokens: Tokens) -> None:
        self.storer = storer
        self.chain = tokens[: storer.leased.full_tokens].copy()


class LlamaShare:
    """The handle of a shared Llama. A context manager; its end makes the Llama as it was.

    It need not be kept: the Llama keeps it, and closing the Llama closes it.
    """

    def __init__(
        self,
        llama: Any,
        *,
        client: Client | None = None,
        runtime_dir: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        block_tokens: int = 32,
        min_tokens: int = MIN_TOKENS,
        name: str = "llama",
        request: str = "",
    ) -> None:
        """Without a `client` it opens one, called `name`, that fails open: while no daemon answers
        within `timeout` seconds (None: 0.05), the Llama computes by itself.

        A prompt of fewer than `min_tokens` tokens is not looked up, and nothing is stored of a
        sequence before it is as long. `request` is what the daemon shows of the Llama's sequences.

        Raises NotShareable for a Llama that cannot share exactly, ValueError for one that is
        shared already.
        """
        if isinstance(getattr(llama.generate, "__self__", None), LlamaShare):
            raise ValueError("this Llama is shared already: close its handle first")
        if llama.verbose:
            native.show_log()
        source = read_llama(llama)
        self._block_tokens = block_tokens
        self._mover = source.mover
        self._memory = source.mover.scratch.memory
        self._request_name = request
        self._min_tokens = max(1, min_tokens)
        self._known = KnownTokens(source.n_ctx)
        self._request: _Request | None = None
        self._matched_tokens = 0
        self._counters = ShareCounters()
        self._without_scores = 0
        """Tokens from the first on, among which some were imported, so that `scores` lacks them."""
        self._reads_no_scores = False
        self._is_foreign = llama.n_tokens > 0
        """Whether the context has tokens of before, which nobody saw going in."""
        # Held while a hook works with the context. A generator that is dropped may be ended by the
        # garbage collector at any moment, in any thread: it then finds this taken.
        self._lock = threading.Lock()
        self.closed = False
        self._own_client = client is None
        self.client = client or Client(
            runtime_dir,
            name=name,
            fail_open=True,
            timeout=timeout,
            staging_bytes=DEFAULT_STAGING,
        )
        try:
            self.context = self.client.open_context(model_of(source, block_tokens), 1)
        except BaseException:
            if self._own_client:
                self.client.close()
            raise
        # No reference to the Llama: it is to go, and to free its memory, when its user drops it.
        self._llama = weakref.ref(llama)
        self._generate_arguments = inspect.signature(type(llama).generate)
        self._completion_arguments = inspect.signature(type(llama).create_completion)
        self._hooks = Hooks(
            llama,
            {
                "generate": self._generate,
                "eval": self._eval,
                "load_state": self._load_state,
                "create_completion": self._create_completion,
            },
        )
        self._watch = ContextWatch(llama._ctx, self._known)
        # Called before the context is freed, since it was pushed after it.
        llama._stack.callback(self.close)

    @property
    def matched_tokens(self) -> int:
        """How many tokens of the last prompt were cached, whether or not the context had them."""
        return self._matched_tokens

    @property
    def counters(self) -> ShareCounters:
        """A copy of the counts so far."""
        return replace(self._counters)

    def forget(self) -> None:
        """Say that the context is about to change past the Llama: nothing that is in it now is
        stored or relied on any more."""
        self._known.cut(0)

    def close(self) -> None:
        """Store what is new, give everything back, and let the Llama be as it was before."""
        if self.closed or sys.is_finalizing():
            return
        self.closed = True
        llama = self._llama()
        if llama is not None:
            self._hooks.remove(llama)
            self._watch.end()
        try:
            with self._lock:
                self._finish()
        finally:
            if self._own_client:
                self.client.close()
            elif not self.client.closed:
                self.context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- one prompt --------------------------------------------------------------------------------

    def _generate(self, *arguments: Any, **named: Any) -> Generator[int, Any, None]:
        """Llama.generate, with a prefix brought in before and what is new stored on the way."""
        llama = self._llama()
        given = self._generate_arguments.bind(llama, *arguments, **named)
        given.apply_defaults()
        prompt = given.arguments["tokens"] = list(given.arguments["tokens"])
        request = self._begin(llama, prompt, given.arguments["reset"])
        try:
            yield from self._hooks.call(llama, "generate", *given.args[1:], **given.kwargs)
        finally:
            self._end(request)

    def _begin(self, llama: Any, prompt: list[int], reset: bool) -> _Request:
        with self._lock:
            self._finish()  # of a generator that was left in the middle
            self._request = request = _Request()
            self._matched_tokens = 0
            counters = self._counters
            counters.prompts += 1
            counters.prompt_tokens += len(prompt)
            if not reset:
                return request
            request.prompt_tokens = len(prompt)
            if self._is_foreign or (self._without_scores and self._needs_scores(llama)):
                llama.n_tokens = 0  # all is evaluated anew: known, and with its scores
            self._is_foreign = False
            live = 0
            try:
                tokens = np.array(prompt, np.int32)
                live = common_prefix(llama.input_ids[: llama.n_tokens], tokens)
                self._look_up(llama, request, tokens, live)
            except (KvdError, OverflowError) as error:
                logger.warning("a prompt is computed without the cache: %s", str(error))
            counters.live_tokens += min(live, llama.n_tokens)
            return request

    def _look_up(self, llama: Any, request: _Request, prompt: Tokens, live: int) -> None:
        """Find the prompt's longest cached prefix, and import what the context lacks of it; `live`
        of its tokens are in it, as Llama.generate counts them."""
        if not self._min_tokens <= len(prompt) < self._known.capacity or prompt.min() < 0:
            return
        if live > common_prefix(self._known.tokens, prompt):
            # These tokens stand for something else, such as an image, or have other K/V.
            request.has_asked = True
            return
        leased = self._ask(request, prompt[:-1])
        self._matched_tokens = matched = leased.matched_tokens
        if matched > live and not self._watch.is_shifted and not self._needs_scores(llama):
            self._import(llama, leased, prompt, live)

    def _ask(self, request: _Request, tokens: Tokens) -> Sequence:
        request.has_asked = True
        leased = self.context.alloc(tokens, request=self._request_name)
        request.follows(Storer(leased, self._mover, _SEQ), tokens)
        return leased

    def _import(self, llama: Any, leased: Sequence, prompt: Tokens, live: int) -> None:
        """Put the leased blocks into the context, from the first one that it lacks a part of."""
        block_tokens = self._block_tokens
        matched, first = leased.matched_tokens, live // block_tokens
        start = first * block_tokens
        counts = [block_tokens] * (leased.n_blocks - 1) + [leased.last_block_tokens]
        payloads = leased.payloads()
        blocks = list(map(BlockAt, payloads.addresses, payloads.sizes, counts))
        # First the Llama is told that it has less, so that an exception leaves nothing wrong.
        self._shorten(llama, start)
        try:
            self._mover.import_blocks(_SEQ, start, blocks[first:])
            native.memory_seq_rm(self._memory, _SEQ, matched, -1)
            self._mover.check_range(_SEQ, 0, matched)
        except ImportFailed as error:
            # As text: a log that kept the exception would keep the arena mapped. What was taken in
            # goes with the next eval, which cuts the context at n_tokens.
            logger.warning("computing a cached prefix again: %s", str(error))
            return
        self._known.append(start, prompt[start:matched])
        llama.input_ids[start:matched] = prompt[start:matched]
        llama.n_tokens = matched
        self._counters.imported_tokens += matched - live
        self._without_scores = matched
        if llama._logits_all:
            llama.scores[start:matched] = np.nan  # rather than those of other tokens

    def _shorten(self, llama: Any, length: int) -> None:
        self._known.cut(length)
        llama.n_tokens = length
        llama._requires_eval = True
        native.memory_seq_rm(self._memory, _SEQ, length, -1)

    def _end(self, request: _Request) -> None:
        """Its generator has ended, or was closed, or dropped: perhaps by the end of Python."""
        if sys.is_finalizing():
            return
        if self._lock.acquire(blocking=False):
            try:
                if self._request is request:
                    self._finish()
            finally:
                self._lock.release()

    def _finish(self) -> None:
        """Store the rest of the last request, and give its sequence back: what was imported are
        copies. The lock is held."""
        request, self._request = self._request, None
        if request is None:
            return
        try:
            self._store(request, tail=True, wait=None)
        finally:
            self._release(request)

    def _release(self, request: _Request) -> None:
        storer, request.storer = request.storer, None
        if storer is not None:
            with contextlib.suppress(KvdError):
                storer.leased.release()

    def _store(self, request: _Request, *, tail: bool, wait: float | None) -> None:
        known, storer = self._known, request.storer
        start = len(request.chain) if storer is not None else 0
        new = known.length - start
        if known.length < self._min_tokens or not (new > 0 if tail else new >= self._block_tokens):
            return
        try:
            tokens = known.tokens
            if storer is None:
                if request.has_asked:
                    return
                # A short prompt has become long, or it continued what was there.
                start = self._ask(request, tokens).full_tokens
                storer = request.storer
                assert storer is not None
            elif not np.array_equal(tokens[:start], request.chain):
                # The context was cut, and went on otherwise.
                self._release(request)
                request.has_asked = False
                self._store(request, tail=tail, wait=wait)
                return
            storer.store(tokens, tail=tail, wait=wait)
            if storer.leased.full_tokens != len(request.chain):
                request.follows(storer, tokens)
        except KvdError as error:
            logger.warning("what a Llama computed is not stored: %s", str(error))

    # -- methods of the Llama ----------------------------------------------------------------------

    def _eval(self, tokens: Any) -> None:
        llama = self._llama()
        assert llama is not None
        with self._lock:
            request = self._request
            start = llama.n_tokens
            if request is not None and request.has_first_token:
                self._store(request, tail=False, wait=_NO_WAIT)
            elif request is not None and request.prompt_tokens is not None:
                logger.info("matched %d of %d tokens", start, request.prompt_tokens)
            try:
                with self._watch.of_known_tokens():
                    self._hooks.call(llama, "eval", tokens)
            finally:
                done = llama.n_tokens - start
                if done > 0:
                    self._known.append(start, tokens[:done])
                    self._counters.decoded_tokens += done
                    self._without_scores = min(self._without_scores, start)
            if request is not None:
                request.has_first_token = True

    def _load_state(self, state: Any) -> None:
        """K/V from anywhere: none of it is known."""
        llama = self._llama()
        self._known.cut(0)
        self._without_scores = state.n_tokens
        self._hooks.call(llama, "load_state", state)

    def _needs_scores(self, llama: Any) -> bool:
        """Whether somebody may look at the scores of the prompt's tokens, which only decoding
        gives: those of the whole prompt, or of its first token."""
        return bool(llama._logits_all) and not self._reads_no_scores

    def _create_completion(self, *arguments: Any, **named: Any) -> Any:
        """Llama.create_completion; says of most completions that they read no such scores."""
        llama = self._llama()
        given = self._completion_arguments.bind(llama, *arguments, **named).arguments
        echoes_scores = given.get("echo") and given.get("logprobs") is not None
        if echoes_scores or given.get("stopping_criteria") is not None:
            return self._hooks.call(llama, "create_completion", *arguments, **named)
        with self._no_scores():
            result = self._hooks.call(llama, "create_completion", *arguments, **named)
        return self._stream(result) if given.get("stream") else result

    def _stream(self, chunks: Iterator[Any]) -> Iterator[Any]:
        with contextlib.closing(chunks):  # type: ignore[type-var]
            while True:
                with self._no_scores():
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk

    @contextlib.contextmanager
    def _no_scores(self) -> Iterator[None]:
        before, self._reads_no_scores = self._reads_no_scores, True
        try:
            yield
        finally:
            self._reads_no_scores = before
