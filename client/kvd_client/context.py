"""Models, contexts and sequences as both clients see them: their state, and operations on it.

The public classes with methods to call are in client.py and aio.py. A context outlives its
session: after the daemon was away it is opened again at the next alloc, with the ids that are
still in use.
"""

import time
from dataclasses import dataclass, field
from struct import pack, unpack
from typing import Any

import numpy as np
import numpy.typing as npt

from kvd_client.arena import Arena
from kvd_client.errors import (
    BadMessage,
    Closed,
    DeadlineExceeded,
    KvdError,
    NoSequenceFree,
    ServiceError,
    StagingFull,
    StaleHandle,
    Unavailable,
    ViewsAlive,
)
from kvd_client.operations import ClientState, Operation, Wait, call
from kvd_client.session import Session
from kvd_client.staging import Staged
from kvd_proto.geometry import Geometry
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import (
    COMPLETED,
    FAILED,
    Alloc,
    Allocated,
    Append,
    Appended,
    Blocks,
    CloseContext,
    Flush,
    Get,
    OpenContext,
    RegisterModel,
    Release,
)
from kvd_proto.payload import PayloadFormat, make_format

Tokens = npt.ArrayLike | bytes


@dataclass(frozen=True, slots=True)
class Model:
    """What a model's K/V looks like, and the fingerprint of everything that determines its values.

    `fingerprint` is 32 bytes: equal only where K/V of equal tokens is equal to the bit. `layers`
    are [k_type, k_row_bytes, v_type, v_row_bytes] each, rows in bytes for one token.
    """

    name: str
    fingerprint: bytes
    payload_format: str
    layers: tuple[tuple[str, int, str, int], ...]
    block_tokens: int = 32

    def format(self) -> PayloadFormat:
        """Sizes of blocks; raises BadMessage for an impossible model."""
        geometry = Geometry.from_wire(self.layers)
        return make_format(self.payload_format, geometry, self.block_tokens)


@dataclass(slots=True, eq=False)
class Commit:
    """An append on its way. `number` is known, and `error` final, once `answered`."""

    answered: bool = False
    number: int = 0
    stored: int = 0
    present: int = 0
    joined: int = 0
    error: KvdError | None = None


@dataclass(slots=True, eq=False)
class ContextState:
    """A pool of sequence ids 0 .. n_seq_max-1 for one model."""

    client: ClientState
    model: Model
    n_seq_max: int
    payload: PayloadFormat = field(init=False)
    session: Session | None = None
    number: int = 0
    stride: int = 0
    arena: Arena | None = None
    sequences: "dict[int, SequenceState]" = field(default_factory=dict)
    opening: bool = False
    closed: bool = False

    def __post_init__(self) -> None:
        self.payload = self.model.format()


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
    views: list[memoryview] = field(default_factory=list)
    released: bool = False

    @property
    def shared(self) -> bool:
        """Whether the daemon knows this sequence under this handle."""
        session = self.session
        return session is not None and session.lost is None and not self.released

    def check(self) -> Session:
        """Raise Closed or StaleHandle unless the sequence can be used with the daemon."""
        self.context.client.check()
        if self.released:
            raise Closed("this sequence has been released", seq_id=self.seq_id)
        if self.session is None or self.session.lost is not None:
            raise StaleHandle(
                "this sequence is of a session that has ended; release it and alloc another",
                seq_id=self.seq_id,
                generation=self.generation,
            )
        return self.session


def pack_tokens(tokens: Tokens) -> bytes:
    """Token ids as the protocol wants them: little-endian u32. Bytes are taken as they are."""
    if isinstance(tokens, bytes):
        return tokens
    array = np.asarray(tokens)
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BadMessage(
            "tokens are a flat sequence of integers", shape=str(array.shape), type=str(array.dtype)
        )
    if array.dtype.kind == "i" and int(array.min()) < 0:
        raise BadMessage("a token id is not negative", got=int(array.min()))
    if array.dtype.itemsize > TOKEN_BYTES and int(array.max()) >= 1 << 32:
        raise BadMessage("a token id is below 2**32", got=int(array.max()))
    return array.astype("<u4", copy=False).tobytes()


def open_context(context: ContextState) -> Operation[None]:
    """Make sure that the context is open in the client's session."""
    client = context.client
    session = yield from client.ensure_session()
    if context.closed:
        raise Closed("this context has been closed")
    if context.session is session:
        return
    if context.opening:
        yield Wait(session, lambda: context.session is session, client.timeout)
        return
    context.opening = True
    try:
        model = context.model
        registered = yield from call(
            session,
            RegisterModel(
                model.name,
                model.fingerprint,
                model.payload_format,
                model.block_tokens,
                [list(layer) for layer in model.layers],
            ),
            client.timeout,
        )
        yield Wait(session, lambda: registered.segment in session.arenas, client.timeout)
        busy = sorted(context.sequences)
        opened = yield from call(
            session, OpenContext(registered.model, context.n_seq_max, busy), client.timeout
        )
        context.number = opened.context
        context.stride = registered.stride_bytes
        context.arena = session.arenas[registered.segment]
        context.session = session
        for seq_id, generation in zip(busy, opened.generations, strict=True):
            context.sequences[seq_id].generation = generation
    finally:
        context.opening = False


def close_context(context: ContextState) -> Operation[None]:
    """Give back the context and its sequences. Closing again does nothing."""
    if context.closed:
        return
    for sequence in list(context.sequences.values()):
        _drop_views(sequence)
    context.closed = True
    for sequence in context.sequences.values():
        sequence.released = True
    context.sequences.clear()
    session = context.session
    if session is not None and session.lost is None:
        yield from call(session, CloseContext(context.number), context.client.timeout)


def alloc(
    context: ContextState,
    tokens: Tokens,
    request: str,
    reserve_tokens: int,
    wait: float,
    idle_timeout: float,
    make: Any,
) -> Operation[Any]:
    """A sequence with the cached prefix of `tokens`; `make` builds the caller's class."""
    client = context.client
    packed = pack_tokens(tokens)
    try:
        yield from open_context(context)
        message = Alloc(
            context.number,
            request,
            packed,
            reserve_tokens,
            int(wait * 1000),
            int(idle_timeout * 1000),
        )
        reply: Allocated = yield from client.call(message, extra_time=wait)
    except ServiceError as error:
        if not client.fail_open:
            raise
        if client.session is not None:
            # Ids that we choose now must not meet ids that this session still hands out.
            client.session.lose(Unavailable("the session was given up after an error"))
        client.note_outage(error)
        return _alloc_without_daemon(context, make)
    slots = list(unpack(f"<{len(reply.slots) // 4}I", reply.slots))
    sequence = make(context, reply.seq_id, reply.generation, context.session)
    sequence.matched_tokens = reply.matched_tokens
    sequence.slots = slots
    sequence.last_block_tokens = reply.last_block_tokens
    block_tokens = context.model.block_tokens
    sequence.full_tokens = reply.matched_tokens // block_tokens * block_tokens
    context.sequences[reply.seq_id] = sequence
    if slots and context.arena is not None:
        context.arena.populate(slots, context.stride)
    return sequence


def stage(sequence: SequenceState, n_tokens: int, wait: float | None) -> Operation[Staged]:
    """Room in the staging for the blocks of an append of `n_tokens` tokens.

    Waits up to `wait` seconds for commits on their way to be finished, then raises StagingFull.
    """
    session = sequence.check()
    area = session.staging
    if area is None:
        raise StagingFull("this client was opened without staging")
    context = sequence.context
    block_tokens = context.model.block_tokens
    counts = [min(block_tokens, n_tokens - at) for at in range(0, n_tokens, block_tokens)]
    sizes = [context.payload.size(count) for count in counts]
    deadline = time.monotonic() + (context.client.timeout if wait is None else wait)
    while True:
        session.receive()
        sequence.check()
        staged = area.take(sizes)
        if staged is not None:
            return staged
        left = deadline - time.monotonic()
        commit = area.oldest_commit
        if left <= 0 or (commit is None and not session.in_flight):
            raise StagingFull(
                "the staging is full of blocks that are not stored yet", staging_bytes=area.size
            )
        try:
            if commit is not None:
                yield from call(session, Flush(commit), left, may_fail=True)
            else:
                # An append's reply tells which commit to wait for.
                yield Wait(session, lambda: area.has_commits() or not session.in_flight, left, True)
        except DeadlineExceeded:
            continue  # one more look, then it is said to be full


def settle(session: Session, timeout: float) -> Operation[None]:
    """Wait until every request that was sent is answered, or raise DeadlineExceeded."""
    yield Wait(session, lambda: not session.in_flight, timeout, may_fail=True)


def unstage(sequence: SequenceState, staged: Staged) -> None:
    """Give room back that was not committed; nothing happens if the session has ended."""
    session = sequence.session
    if session is not None and session.lost is None and session.staging is not None:
        session.staging.give_back(staged)


def post_append(sequence: SequenceState, tokens: Tokens, staged: Staged) -> Commit:
    """Send an append and do not wait. The staging and the commit's outcome take care of
    themselves."""
    session = sequence.check()
    context = sequence.context
    area = session.staging
    assert area is not None
    packed = pack_tokens(tokens)
    start = sequence.full_tokens
    commit = Commit()

    def answered(body: Any) -> None:
        commit.answered = True
        if isinstance(body, Appended):
            commit.number, commit.stored = body.commit, body.stored
            session.last_commit = max(session.last_commit, body.commit)
            commit.present, commit.joined = body.present, body.joined
            area.committed(staged, body.commit)
        else:
            commit.error = body
            if session.lost is None:
                area.give_back(staged)
                # The blocks are not there; what comes next must not build on them.
                sequence.full_tokens = min(sequence.full_tokens, start)

    offsets = pack(f"<{len(staged.offsets)}Q", *staged.offsets)
    message = Append(context.number, sequence.seq_id, sequence.generation, start, packed, offsets)
    session.send(message, answered)
    n_tokens = len(packed) // TOKEN_BYTES
    sequence.full_tokens = (
        start + n_tokens // context.model.block_tokens * context.model.block_tokens
    )
    return commit


def append(sequence: SequenceState, tokens: Tokens, staged: Staged) -> Operation[Commit]:
    """Send an append and wait for its reply; raises what is answered."""
    session = sequence.check()
    commit = post_append(sequence, tokens, staged)
    yield Wait(session, lambda: commit.answered, sequence.context.client.timeout)
    if commit.error is not None:
        raise commit.error
    return commit


def refresh(sequence: SequenceState, first_block: int) -> Operation[Blocks]:
    """Ask for the sequence's sealed blocks from `first_block` on, and remember their slots."""
    session = sequence.check()
    context = sequence.context
    message = Get(context.number, sequence.seq_id, sequence.generation, first_block)
    reply: Blocks = yield from call(session, message, context.client.timeout)
    slots = unpack(f"<{len(reply.slots) // 4}I", reply.slots)
    sequence.slots[first_block:] = slots
    sequence.last_block_tokens = reply.last_block_tokens
    if slots and context.arena is not None:
        context.arena.populate(list(slots), context.stride)
    return reply


def release(sequence: SequenceState, failed: bool) -> Operation[None]:
    """The sequence's K/V is gone from the engine: its id may be used again. Never fails for want of
    a daemon, which gives everything back by itself. Raises ViewsAlive before anything changes."""
    context = sequence.context
    if sequence.released:
        raise Closed("this sequence has been released", seq_id=sequence.seq_id)
    context.client.check()
    _drop_views(sequence)
    sequence.released = True
    context.sequences.pop(sequence.seq_id, None)
    session = context.session
    if session is None or session.lost is not None:
        return
    message = Release(
        context.number, sequence.seq_id, sequence.generation, FAILED if failed else COMPLETED
    )
    try:
        yield from call(session, message, context.client.timeout)
    except ServiceError as error:
        context.client.note_outage(error)


def block_view(sequence: SequenceState, index: int) -> memoryview:
    """A read-only view of the payload of block `index`, without a copy. Valid until release."""
    sequence.check()
    context = sequence.context
    if not 0 <= index < len(sequence.slots):
        raise BadMessage("no such block", index=index, blocks=len(sequence.slots))
    assert context.arena is not None
    is_last = index == len(sequence.slots) - 1
    count = sequence.last_block_tokens if is_last else context.model.block_tokens
    view = context.arena.view(sequence.slots[index] * context.stride, context.payload.size(count))
    sequence.views.append(view)
    return view


def _alloc_without_daemon(context: ContextState, make: Any) -> Any:
    """A sequence that only this process knows: nothing is matched, nothing will be stored."""
    for seq_id in range(context.n_seq_max):
        if seq_id not in context.sequences:
            sequence = make(context, seq_id, 0, None)
            context.sequences[seq_id] = sequence
            return sequence
    raise NoSequenceFree("every sequence id of the context is in use", in_use=context.n_seq_max)


def _drop_views(sequence: SequenceState) -> None:
    try:
        while sequence.views:
            sequence.views[-1].release()
            sequence.views.pop()
    except BufferError:
        raise ViewsAlive(
            "arrays over this sequence's blocks are still alive: drop them before release",
            seq_id=sequence.seq_id,
        ) from None
