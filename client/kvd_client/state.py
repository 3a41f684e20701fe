"""Models, contexts and sequences as both clients see them: what is known of them, without waiting.

The operations on them are in context.py and appending.py, the public classes with methods to call
in client.py and aio.py.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvd_client.arena import Arena, Views
from kvd_client.errors import BadMessage, Closed, StaleHandle, copy_error
from kvd_client.operations import ClientState
from kvd_client.packing import Tokens, pack_tokens
from kvd_client.peeking import PromptKeys
from kvd_client.session import Session
from kvd_proto.geometry import Geometry
from kvd_proto.keys import arena_fingerprint
from kvd_proto.messages import ModelRegistered
from kvd_proto.payload import PayloadFormat, make_format

__all__ = ["ContextState", "Model", "Payloads", "SequenceState", "Tokens", "pack_tokens"]


@dataclass(frozen=True, slots=True)
class Model:
    """What a model's K/V looks like, and the fingerprint of everything that determines its values.

    `fingerprint` is 32 bytes: equal only where K/V of equal tokens is equal to the bit. `layers`
    are [k_type, k_row_bytes, v_type, v_row_bytes] each, rows in bytes for one token. `traits` say
    in words what the fingerprint is made of, name and text, for people who ask `explain`: see
    `asking.traits_of`.
    """

    name: str
    fingerprint: bytes
    payload_format: str
    layers: tuple[tuple[str, int, str, int], ...]
    block_tokens: int = 32
    traits: tuple[tuple[str, str], ...] = ()

    def format(self) -> PayloadFormat:
        """Sizes of blocks; raises BadMessage for an impossible model."""
        geometry = Geometry.from_wire(self.layers)
        return make_format(self.payload_format, geometry, self.block_tokens)

    @property
    def arena_fingerprint(self) -> bytes:
        """What the daemon tells its arenas apart by, within a tenant: 32 bytes."""
        return arena_fingerprint(self.fingerprint, self.payload_format, self.block_tokens)


@dataclass(slots=True, eq=False)
class ContextState:
    """A pool of sequence ids 0 .. n_seq_max-1 for one model."""

    client: ClientState
    model: Model
    n_seq_max: int
    payload: PayloadFormat = field(init=False)
    session: Session | None = None
    """The one in which it is open, or was open last."""
    registered: tuple[Session, ModelRegistered] | None = None
    """What a session has said of the model."""
    number: int = 0
    stride: int = 0
    arena: Arena | None = None
    sequences: "dict[int, SequenceState]" = field(default_factory=dict)
    opening: bool = False
    closed: bool = False

    def __post_init__(self) -> None:
        self.payload = self.model.format()
        self.client.contexts.add(self)

    def check(self) -> None:
        """Raise Closed or Forked."""
        self.client.check()
        if self.closed:
            raise Closed("this context has been closed")

    def peek(self, tokens: Tokens | PromptKeys) -> int:
        """How many of `tokens` are cached at this moment, as far as can be seen in shared memory:
        a hint, never a lease. No round trip, and nobody is waited for; with the asyncio client a
        plain call, too.

        Full blocks are counted, so it is a multiple of the model's block_tokens: an alloc may match
        some tokens more, in a block that is not full or goes on otherwise. Blocks that an earlier
        daemon left count before they have been checked. 0 without a daemon, and after it was away
        until the context is open again: see `reopen`. From any thread. Raises Closed, Forked, and
        BadMessage for what are no tokens.
        """
        self.check()
        keys = tokens if isinstance(tokens, PromptKeys) else PromptKeys(tokens)
        session, arena = self.session, self.arena
        if session is None or arena is None or not self.client.goes_on(session):
            return 0
        index = arena.index
        if index is None:
            return 0
        block_tokens = self.model.block_tokens
        return index.count(keys.prefixes(index.root_key, block_tokens)) * block_tokens

    def bytes_of(self, n_tokens: int) -> int:
        """Bytes in the arena of the blocks for so many tokens, roughly."""
        return max(n_tokens, 0) * self.payload.max_bytes // self.model.block_tokens

    def is_settled(self) -> bool:
        """Whether nobody is opening it at this moment."""
        return not self.opening

    def end(self) -> None:
        """Mark it and its sequences as closed."""
        self.closed = True
        for sequence in self.sequences.values():
            sequence.released = True
        self.sequences.clear()


@dataclass(slots=True, eq=False)
class SequenceState:
    """An open sequence. `session` is None for one that was opened without a daemon."""

    context: ContextState
    seq_id: int
    generation: int
    session: Session | None
    matched_tokens: int = 0
    slots: list[int] = field(default_factory=list)
    last_block_tokens: int = 0
    full_tokens: int = 0
    """Where the next append starts."""
    n_appends: int = 0
    """Appends that were sent, and how many of them have not been answered."""
    n_unanswered: int = 0
    stores: bool = True
    """Whether it may be stored, by the word of who opened it."""
    released: bool = False
    _views: Views | None = None

    @property
    def shared(self) -> bool:
        """Whether the daemon knows this sequence under this handle, as far as we have heard."""
        session = self.session
        return session is not None and session.lost is None and not self.released

    def check(self) -> Session:
        """Raise Closed or StaleHandle unless the sequence can be used with the daemon."""
        self.context.client.check()
        if self.released:
            raise Closed("this sequence has been released", seq_id=self.seq_id)
        if self.session is None:
            raise StaleHandle(
                "this sequence was opened without a daemon; release it and alloc another",
                seq_id=self.seq_id,
            )
        if self.session.lost is not None:
            raise StaleHandle(
                "this sequence is of a session that has ended; release it and alloc another",
                seq_id=self.seq_id,
                generation=self.generation,
            )
        return self.session

    def live_session(self) -> Session:
        """Like check; and look whether the daemon has gone: the first to notice is told just that,
        as Unavailable."""
        session = self.check()
        session.look()
        if session.lost is not None:
            raise copy_error(session.lost)
        return session

    def payload_of(self, index: int) -> npt.NDArray[np.uint8]:
        """The payload of a block, read-only and without a copy; not counted as a view."""
        self.check()
        context = self.context
        if not 0 <= index < len(self.slots):
            raise BadMessage("no such block", index=index, blocks=len(self.slots))
        assert context.arena is not None
        is_last = index == len(self.slots) - 1
        count = self.last_block_tokens if is_last else context.model.block_tokens
        return context.arena.read(self.slots[index] * context.stride, context.payload.size(count))

    def payloads(self) -> "Payloads":
        """Where all payloads lie, for code that wants addresses; not counted as views."""
        self.check()
        context = self.context
        assert context.arena is not None
        memory = context.arena.read(0, context.arena.size)
        base: int = memory.__array_interface__["data"][0]
        sizes = [context.payload.max_bytes] * len(self.slots)
        if sizes:
            sizes[-1] = context.payload.size(self.last_block_tokens)
        return Payloads(memory, [base + slot * context.stride for slot in self.slots], sizes)

    def views(self) -> Views:
        """Those that were handed out."""
        if self._views is None:
            self._views = Views()
        return self._views

    def invalidate_views(self, first_block: int = 0) -> bool:
        """Make views from block `first_block` on invalid. False if arrays over them are alive."""
        return self._views is None or self._views.invalidate(first_block)


class Payloads(NamedTuple):
    """Addresses and sizes (bytes) of a sequence's blocks, in order.

    Valid as long as the lease, and while `memory`, the arena they lie in, is referred to.
    """

    memory: npt.NDArray[np.uint8]
    addresses: list[int]
    sizes: list[int]
