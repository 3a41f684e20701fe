"""The daemon's core without a daemon: one client after the other asks, stores and lets go.

Effects are carried out at once, and without memory: what would be backed is backed, what would be
copied is copied. So the tree, the accounts and the eviction are those of the daemon, block by
block. For `kvd simulate`, and to measure the core.
"""

import math
from struct import pack
from typing import Any

from kvd.core.cache import Limits
from kvd.core.events import (
    Back,
    Backed,
    Connected,
    Copied,
    Copy,
    CopyResult,
    Event,
    Reply,
    Requested,
    Ticked,
)
from kvd.core.machine import Core
from kvd_proto.errors import KvdError
from kvd_proto.geometry import PAGE_BYTES, round_up
from kvd_proto.index import index_length
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.layout import DIRECTORY_CHUNK, directory_bytes_for, record_bytes
from kvd_proto.messages import (
    COMPLETED,
    Alloc,
    Allocated,
    Append,
    Message,
    OpenContext,
    RegisterModel,
    Release,
)

_LAYERS = [["f16", 2, "f16", 2]]
"""Of the smallest model there can be: a block takes one page."""
_STAGING = 2 * PAGE_BYTES
_CLIENT, _OTHER = b"client", b"other"


class Replay:
    """A core whose budget is exactly enough for `n_blocks` blocks of `block_tokens` tokens."""

    def __init__(self, n_blocks: int, block_tokens: int = 1) -> None:
        self.n_blocks = n_blocks
        self._block_bytes = block_tokens * TOKEN_BYTES
        self._staging = memoryview(bytes(_STAGING))
        at_most = round_up(directory_bytes_for(n_blocks, block_tokens), DIRECTORY_CHUNK)
        at_most += index_length(at_most // record_bytes(block_tokens))
        budget = _STAGING + at_most + n_blocks * PAGE_BYTES
        self.core = Core(Limits(budget))
        self._handle(Connected(_CLIENT, "replay", 0, 0, "replay", _STAGING))
        self._ask(RegisterModel("replay", bytes(32), "array", block_tokens, _LAYERS))
        (self.arena,) = self.core.cache.budget.arenas.values()
        self._context = self._ask(OpenContext(self.arena.number, 1, [])).context
        # What the directory does not come to need is somebody else's.
        rest = budget - _STAGING - self.arena.directory_for(n_blocks) - n_blocks * PAGE_BYTES
        self._handle(Connected(_OTHER, "rest", 0, 0, "replay", rest))

    @property
    def evicted_blocks(self) -> int:
        """Since the start."""
        return sum(self.arena.tenant.evicted.values())

    def request(self, tokens: bytes) -> int:
        """Match a prompt of whole blocks, store what is missing, and let go of it; returns how many
        of its blocks were there. Of a prompt that is longer than the cache the first blocks are
        stored, as many as fit."""
        opened: Allocated = self._ask(Alloc(self._context, "", tokens, 0, 0, 0))
        handle = (self._context, opened.seq_id, opened.generation)
        n_matched = opened.matched_tokens * TOKEN_BYTES // self._block_bytes
        start = n_matched * self._block_bytes
        missing = tokens[start : self.n_blocks * self._block_bytes]
        if missing:
            staged = pack("<Q", PAGE_BYTES) * (len(missing) // self._block_bytes)
            self._ask(Append(*handle, start // TOKEN_BYTES, missing, staged))
        self._ask(Release(*handle, COMPLETED))
        while self.core.next_deadline() == -math.inf:
            self._handle(Ticked())
        return n_matched

    def _ask(self, message: Message) -> Any:
        """What the core answers, when all that it wanted is done. Raises KvdError."""
        reply = self._handle(Requested(_CLIENT, 0, message, self._staging))
        if isinstance(reply, KvdError):
            raise reply
        return reply

    def _handle(self, event: Event) -> Any:
        """Let an event happen, and all that follows from it; returns the reply, if there is one."""
        reply: Any = None
        events = [event]
        while events:
            for effect in self.core.handle(events.pop(), 0.0):
                if isinstance(effect, Reply):
                    reply = effect.body
                elif isinstance(effect, Back):
                    events.append(Backed(effect.job, None))
                elif isinstance(effect, Copy):
                    copied = [CopyResult(0, None) for _ in effect.items]
                    events.append(Copied(effect.job, copied))
        return reply
