"""The `SequenceCache` that examples/server/server.py of llama-cpp-python asks for, with kvd behind.

    lookup(tokens) -> Match     the longest cached prefix, exact to the token, leased
    load(match) -> Load         the state of exactly these tokens, merged from the leased blocks
    save(tokens, state, ...)    what is new in the state of a whole sequence, cut into blocks

How that script uses it, which decides what is done here. All three are called by its one scheduler
thread. `lookup` is asked again and again while a request waits for a sequence, and most often
nothing comes of it (its own context has as much, or there is no room); if something does, `load`
follows at once, in the same step. So one match at a time is leased, and one that is not loaded is
given back by itself. `save` comes when a prompt has been computed, before its first token is
sampled. What any of them raises is counted by the script, which then computes by itself.

Logits are not cached: a match leaves at least the last token to decode. Identities that the script
gives to images are no tokens of the vocabulary: such a prompt is matched up to the first, and not
stored.
"""

import logging
import threading
import time
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvd_client.client import Client, Sequence
from kvd_client.context import Commit, Model
from kvd_client.errors import BadPosition, DeadlineExceeded, KvdError, StagingFull
from kvd_client.integrations.llama.kv.blobs import Block, SequenceState, StateForm, merge
from kvd_client.integrations.llama.storing import blocks_at_once
from kvd_client.operations import settle_appends
from kvd_client.staging import Staged

logger = logging.getLogger("kvd_client")

Tokens = npt.NDArray[np.int32]

LEASE_SECONDS = 0.5
"""How long a match waits for its `load`, which follows at once if at all."""
STAGING_WAIT = 0.5
"""Seconds that a save waits for the daemon to copy what came before, of one that is larger than
half the staging: thousands of tokens, which took seconds to compute."""


@dataclass(frozen=True)
class Match:
    """A prefix that is cached; `length` in tokens."""

    tokens: tuple[int, ...]
    has_prompt_logits: bool = False

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass
class Load:
    """The state of `tokens`, as llama_state_seq_set_data takes it: uint8, the caller's own."""

    tokens: list[int]
    state_bytes: npt.NDArray[np.uint8]
    prompt_logits: npt.NDArray[np.float32] | None = None


@dataclass
class _Held:
    """A match whose blocks are leased until it is loaded, or until `until` (monotonic)."""

    asked: list[int]
    match: Match
    leased: Sequence
    until: float


class SequenceCache:
    """Fulfils the protocol for one context. Opened with a client of its own, which it closes.

    `form` is that of the context's states and `n_vocab` the size of its vocabulary.
    """

    def __init__(self, model: Model, form: StateForm, n_vocab: int, client: Client) -> None:
        self.client = client
        self._form = form
        self._n_vocab = n_vocab
        # One id for a match, one for a save.
        self._context = client.open_context(model, n_seq_max=2)
        self._changed = threading.Condition()
        self._held: _Held | None = None
        self._posted: list[Commit] = []
        self._closed = False
        self._reaper = threading.Thread(target=self._reap, name="kvd-leases", daemon=True)
        self._reaper.start()

    def lookup(self, tokens: SequenceOf[int]) -> Match | None:
        """The longest cached prefix of `tokens`, or None. Its blocks are leased for a moment."""
        asked = self._text(tokens)[: len(tokens) - 1].tolist()
        with self._changed:
            held = self._held
            if held is not None and held.asked == asked and time.monotonic() < held.until:
                return held.match
            self._let_go()
            if not asked:
                return None
            leased = self._context.alloc(asked)
            if not leased.matched_tokens:
                leased.release()
                return None
            match = Match(tuple(asked[: leased.matched_tokens]))
            self._held = _Held(asked, match, leased, time.monotonic() + LEASE_SECONDS)
            self._changed.notify()
            return match

    def load(self, match: Match) -> Load | None:
        """The state of the match's tokens, or None if they are not cached any more."""
        tokens = np.array(match.tokens, np.int32)
        with self._changed:
            held, self._held = self._held, None
            if held is not None and held.match is not match:
                held.leased.release()
                held = None
            leased = self._context.alloc(tokens) if held is None else held.leased
            try:
                if leased.matched_tokens < match.length:
                    return None
                state = merge(self._form, tokens, _blocks(leased))
            finally:
                leased.release()
        return Load(list(match.tokens), state)

    def can_store(self) -> bool:
        """Whether a daemon is there to save for. Without one, the state of a sequence need not be
        copied out of the context, which takes as long as it is large."""
        with suppress(KvdError):
            self.client.run(self.client.ensure_session(self.client.deadline()))
            return True
        return False

    def save(
        self, tokens: SequenceOf[int], state_bytes: npt.ArrayLike, prompt_logits: Any = None
    ) -> None:
        """Store the blocks of a sequence's state that are not cached yet; `tokens` are all that it
        holds. Logits are not stored. Others can find it after `settle`, or a moment later; what the
        daemon refuses is logged. Raises BadState, StagingFull."""
        text = self._text(tokens)
        if not text.size or text.size < len(tokens):
            return
        state = SequenceState(np.asarray(state_bytes, np.uint8), self._form, text)
        with self._changed:
            self._let_go()
            self._tell_failures()
            with self._context.alloc(text) as leased:
                if leased.matched_tokens < text.size:
                    self._store(leased, text, state)

    def settle(self) -> None:
        """Wait until others can find what was saved, but no longer than for any answer."""
        with suppress(KvdError):
            self.client.flush(timeout=self.client.timeout)
        with self._changed:
            self._tell_failures()

    def close(self) -> None:
        """Give everything back. Closing twice does nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._let_go()
            self._changed.notify()
        self._reaper.join()
        self.client.close()

    def _text(self, tokens: SequenceOf[int]) -> Tokens:
        """The tokens up to the first that is not of the vocabulary."""
        ids = np.array(tokens, np.int64)
        strange = np.flatnonzero((ids < 0) | (ids >= self._n_vocab))
        return ids[: strange[0] if strange.size else None].astype(np.int32)

    def _store(self, leased: Sequence, tokens: Tokens, state: SequenceState) -> None:
        block_tokens = self._context.model.block_tokens
        at_once = blocks_at_once(self._context) * block_tokens
        start = leased.full_tokens
        while start < tokens.size and leased.shared:
            end = min(start + at_once, tokens.size)
            try:
                staged = self._stage(leased, end - start)
            except DeadlineExceeded:
                return  # it hangs; what it has not taken in is told later
            try:
                for index in range(len(staged.sizes)):
                    first = start + index * block_tokens
                    count = min(block_tokens, end - first)
                    state.write_block(first, count, staged.block(index))
                # Not waited for: the first token of the prompt is.
                commit = leased.post_append(tokens[start:end], staged, start=start)
            except BadPosition:
                leased.unstage(staged)
                return  # an earlier one was refused, which is told later
            except BaseException:
                leased.unstage(staged)
                raise
            self._posted.append(commit)
            start = end

    def _stage(self, leased: Sequence, n_tokens: int) -> Staged:
        """Room for so many tokens. A daemon that works is waited for; one that hangs, which is one
        that does not even answer, is not, but for its answers."""
        try:
            return leased.stage(n_tokens, wait=0.0)
        except StagingFull:
            session, client = leased.session, self.client
            assert session is not None, "it was staged for"
            client.run(settle_appends(session, client.timeout, may_fail=False))
        return leased.stage(n_tokens, wait=STAGING_WAIT)

    def _tell_failures(self) -> None:
        """Log what of the posted appends has failed, and forget those that are answered."""
        for commit in self._posted:
            if commit.error is not None:
                logger.warning("a prompt was not stored: %s", commit.error)
        self._posted = [c for c in self._posted if not c.answered and c.session.lost is None]

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.leased.release()

    def _reap(self) -> None:
        """Give back a match that is not loaded in time."""
        with self._changed:
            while not self._closed:
                held = self._held
                left = None if held is None else held.until - time.monotonic()
                if left is not None and left <= 0:
                    try:
                        self._let_go()
                    except Exception as error:  # the thread must live: others' matches come
                        logger.warning("a match was not given back: %s", error)
                else:
                    self._changed.wait(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _blocks(leased: Sequence) -> list[Block]:
    """The leased blocks, in place. The arrays must be gone before the release."""
    counts = [leased.context.model.block_tokens] * leased.n_blocks
    counts[-1] = leased.last_block_tokens
    return [Block(leased.payload_of(i), count) for i, count in enumerate(counts)]
