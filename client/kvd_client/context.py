"""Operations on contexts and sequences: open, alloc, read, release, close.

A context outlives its session: after the daemon was away it is opened again at the next alloc, with
the ids that are still in use. What a context and a sequence are: state.py. How a sequence stores
blocks: appending.py.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from struct import unpack
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvd_client.appending import post_append
from kvd_client.errors import (
    BadMessage,
    BadPayload,
    Closed,
    KvdError,
    NoSequenceFree,
    SequenceEnded,
    ServiceError,
    Unavailable,
    ViewsAlive,
    copy_error,
)
from kvd_client.operations import ClientState, Operation, Wait, call
from kvd_client.session import Commit, Session
from kvd_client.state import ContextState, Model, SequenceState, Tokens, pack_tokens
from kvd_proto.messages import (
    COMPLETED,
    FAILED,
    MAX_WAIT_MS,
    Alloc,
    Allocated,
    Blocks,
    CloseContext,
    ContextOpened,
    Get,
    KeepAlive,
    KeptAlive,
    ModelRegistered,
    OpenContext,
    RegisterModel,
    Release,
)

__all__ = [
    "Commit",
    "ContextState",
    "Model",
    "SequenceState",
    "Tokens",
    "alloc",
    "block_view",
    "close_context",
    "keep_alive",
    "keep_all_alive",
    "open_context",
    "open_new_context",
    "pack_tokens",
    "post_append",
    "read_into",
    "refresh",
    "release",
    "reopen",
]

S = TypeVar("S", bound=SequenceState)

ONWARD = 0.75
"""Of a request's time, what must be left for two more answers, on the way back to a daemon."""


class _NotYet(Exception):
    """The daemon has come back, and is slow: what is left of the way is for the next request. The
    session goes on. The context is not open in it, so its ids are still for us to choose."""


# --- contexts


def open_context(
    context: ContextState, deadline: float, *, in_parts: bool = False
) -> Operation[Session]:
    """Make sure that the context is open in the client's session, which is returned. With
    `in_parts` _NotYet is raised if so much of a request's time is gone that it would not do."""
    client = context.client
    while True:
        session = yield from client.ensure_session(deadline)
        context.check()
        if context.session is session:
            return session
        if not context.opening:
            break
        yield Wait(session, context.is_settled, deadline - time.monotonic(), may_fail=True)
    context.opening = True
    try:
        yield from _open(context, session, deadline, in_parts=in_parts)
    finally:
        context.opening = False
    return session


def open_new_context(context: ContextState) -> Operation[None]:
    """Open it for the first time; with fail_open and no daemon it opens later by itself."""
    client = context.client
    try:
        yield from open_context(context, client.first_deadline())
    except BaseException as error:
        if not (isinstance(error, KvdError) and client.without_daemon(error)):
            context.end()
            client.contexts.discard(context)
            raise


def reopen(context: ContextState) -> Operation[bool]:
    """Have the context open in a live session; whether it is. With fail_open that is no error."""
    context.check()
    client = context.client
    try:
        yield from open_context(context, client.deadline(), in_parts=client.fail_open)
    except _NotYet:
        return False
    except KvdError as error:
        if not client.without_daemon(error):
            raise
        return False
    return True


def _register(
    context: ContextState, session: Session, deadline: float
) -> Operation[ModelRegistered]:
    client, model = context.client, context.model
    registered: ModelRegistered = yield from client.call(
        session,
        RegisterModel(
            model.name,
            model.fingerprint,
            model.payload_format,
            model.block_tokens,
            [list(layer) for layer in model.layers],
            [list(trait) for trait in model.traits],
        ),
        deadline,
    )
    session.look()  # the descriptors were sent before the reply
    if registered.segment not in session.arenas:
        here = partial(session.arenas.__contains__, registered.segment)
        yield Wait(session, here, deadline - time.monotonic())
    return registered


def _open(
    context: ContextState, session: Session, deadline: float, *, in_parts: bool
) -> Operation[None]:
    client = context.client

    def close_again(opened: ContextOpened) -> None:
        session.post(CloseContext(opened.context))

    if context.registered is None or context.registered[0] is not session:
        context.registered = session, (yield from _register(context, session, deadline))
    _, registered = context.registered
    if in_parts and deadline - time.monotonic() < ONWARD * client.timeout:
        raise _NotYet
    busy = dict(sorted(context.sequences.items()))
    opened: ContextOpened = yield from client.call(
        session,
        OpenContext(registered.model, context.n_seq_max, list(busy)),
        deadline,
        close_again,
    )
    if session.lost is not None:
        raise copy_error(session.lost)
    if context.closed:
        close_again(opened)
        context.check()
    context.number = opened.context
    context.stride = registered.stride_bytes
    context.arena = session.arenas[registered.segment]
    context.session = session
    for (seq_id, sequence), generation in zip(busy.items(), opened.generations, strict=True):
        if context.sequences.get(seq_id) is sequence:
            sequence.generation = generation
        else:
            # It was released while we asked.
            session.post(Release(context.number, seq_id, generation, COMPLETED))


def close_context(context: ContextState) -> Operation[None]:
    """Give back the context and its sequences. Closing again does nothing; like release it never
    fails for want of a daemon. Raises ViewsAlive before anything changes."""
    if context.closed:
        return
    client = context.client
    client.check()
    if not all(sequence.invalidate_views() for sequence in context.sequences.values()):
        raise ViewsAlive("arrays over blocks are still alive: drop them before the context")
    context.end()
    client.contexts.discard(context)
    session = context.session
    if session is not None and session.lost is None:
        yield from _give_back(client, session, CloseContext(context.number))


# --- sequences


def alloc(
    context: ContextState,
    tokens: Tokens,
    request: str,
    reserve_tokens: int,
    wait: float,
    idle_timeout: float,
    use: bool,
    store: bool,
    make: Callable[[ContextState, int, int, Session | None], S],
) -> Operation[S]:
    """A sequence with the cached prefix of `tokens`; `make` builds the caller's class."""
    context.check()
    client = context.client
    packed = pack_tokens(tokens)
    wait_ms, idle_ms = _milliseconds("wait", wait), _milliseconds("idle_timeout", idle_timeout)
    deadline = client.deadline()
    try:
        session = client.live_session()
        if session is None or context.session is not session:
            session = yield from open_context(context, deadline, in_parts=client.fail_open)
        message = Alloc(
            context.number,
            request,
            packed,
            reserve_tokens,
            wait_ms,
            idle_ms,
            int(use),
            int(store),
        )
        # What a worker loses at most is for all of it: the way back to a daemon is no extra.
        timeout = deadline - time.monotonic() if client.fail_open else client.timeout
        timeout += client.seconds_for(context.bytes_of(reserve_tokens)) + wait
        undo = partial(_release_again, session, context.number)
        reply: Allocated = yield from call(session, message, timeout, late=undo)
        if session.lost is not None:
            # With the reply came the news that the daemon has gone; the id is nobody's any more.
            raise copy_error(session.lost)
        try:
            sequence = _allocated(context, session, reply, make)
        except BaseException as error:
            context.sequences.pop(reply.seq_id, None)
            undo(reply)
            if isinstance(error, OSError):  # of mmap: a process may be limited to less (ulimit -v)
                text = f"the arena cannot be mapped: {error.strerror or error}"
                raise Unavailable(text) from error
            raise
    except _NotYet:
        sequence = _alloc_without_daemon(context, make)
    except KvdError as error:
        if not client.without_daemon(error):
            raise
        sequence = _alloc_without_daemon(context, make)
    sequence.stores = store
    return sequence


def _release_again(session: Session, number: int, reply: Allocated) -> None:
    session.post(Release(number, reply.seq_id, reply.generation, FAILED))


def _allocated(
    context: ContextState,
    session: Session,
    reply: Allocated,
    make: Callable[[ContextState, int, int, Session | None], S],
) -> S:
    context.check()
    slots = list(unpack(f"<{len(reply.slots) // 4}I", reply.slots))
    block_tokens = context.model.block_tokens
    sequence = make(context, reply.seq_id, reply.generation, session)
    sequence.matched_tokens = reply.matched_tokens
    sequence.slots = slots
    sequence.last_block_tokens = reply.last_block_tokens
    sequence.full_tokens = reply.matched_tokens // block_tokens * block_tokens
    if slots and context.arena is not None:
        context.arena.populate(slots, context.stride)
    context.sequences[reply.seq_id] = sequence
    return sequence


def _alloc_without_daemon(
    context: ContextState, make: Callable[[ContextState, int, int, Session | None], S]
) -> S:
    """A sequence that only this process knows: nothing is matched, nothing will be stored."""
    context.check()
    for seq_id in range(context.n_seq_max):
        if seq_id not in context.sequences:
            sequence = make(context, seq_id, 0, None)
            context.sequences[seq_id] = sequence
            return sequence
    raise NoSequenceFree("every sequence id of the context is in use", in_use=context.n_seq_max)


def refresh(sequence: SequenceState, first_block: int) -> Operation[Blocks]:
    """Ask for the sequence's sealed blocks from `first_block` on, and remember their slots."""
    session = sequence.live_session()
    context = sequence.context
    if not 0 <= first_block <= len(sequence.slots):
        raise BadMessage(
            "blocks before the first one asked for must be known",
            first_block=first_block,
            known=len(sequence.slots),
        )
    n_appends, full_tokens = sequence.n_appends, sequence.full_tokens
    message = Get(context.number, sequence.seq_id, sequence.generation, first_block)
    reply: Blocks = yield from context.client.call(session, message, context.client.deadline())
    slots = unpack(f"<{len(reply.slots) // 4}I", reply.slots)
    sequence.check()
    if sequence.n_appends != n_appends:
        # An open tail that the reply tells of has lost its lease meanwhile.
        slots = slots[: max(0, full_tokens // context.model.block_tokens - first_block)]
    if first_block <= len(sequence.slots):
        sequence.slots[first_block:] = slots
        sequence.last_block_tokens = reply.last_block_tokens
    if slots and context.arena is not None:
        context.arena.populate(slots, context.stride)
    return reply


def keep_alive(sequence: SequenceState) -> Operation[None]:
    """Let the sequence's idle time begin anew. Raises SequenceEnded if it is over already."""
    session = sequence.live_session()
    client, number = sequence.context.client, sequence.context.number
    message = KeepAlive(number, [sequence.seq_id], [sequence.generation])
    reply: KeptAlive = yield from client.call(session, message, client.deadline())
    if reply.timed_out:
        raise SequenceEnded("the sequence has timed out", seq_id=sequence.seq_id)


def keep_all_alive(context: ContextState) -> Operation[list[SequenceState]]:
    """The same for all sequences of a context; returns those that have timed out already. Without a
    daemon nothing times out."""
    context.check()
    client = context.client
    session = client.live_session()
    if session is None or context.session is not session:
        return []
    message = KeepAlive(context.number, [], [])
    try:
        reply: KeptAlive = yield from client.call(session, message, client.deadline())
    except ServiceError as error:
        if not client.without_daemon(error):
            raise
        return []
    found = [context.sequences.get(seq_id) for seq_id in reply.timed_out]
    return [sequence for sequence in found if sequence is not None]


def release(sequence: SequenceState, failed: bool) -> Operation[None]:
    """The sequence's K/V is gone from the engine: its id may be used again. Never fails for want of
    a daemon, which gives everything back by itself. Raises ViewsAlive before anything changes."""
    context = sequence.context
    context.client.check()
    if sequence.released:
        raise Closed("this sequence has been released", seq_id=sequence.seq_id)
    if not sequence.invalidate_views():
        raise ViewsAlive(
            "arrays over this sequence's blocks are still alive: drop them before release",
            seq_id=sequence.seq_id,
        )
    sequence.released = True
    context.sequences.pop(sequence.seq_id, None)
    session = context.session
    if session is None or session.lost is not None:
        return
    session.look()
    if session.lost is None:
        outcome = FAILED if failed else COMPLETED
        message = Release(context.number, sequence.seq_id, sequence.generation, outcome)
        yield from _give_back(context.client, session, message)


def _give_back(
    client: ClientState, session: Session, message: Release | CloseContext
) -> Operation[None]:
    """Ask, but a daemon that does not answer is no reason to fail: it gives back by itself."""
    with suppress(ServiceError):
        yield from client.call(session, message, client.deadline())


def block_view(sequence: SequenceState, index: int) -> memoryview:
    """A read-only view of the payload of a block, without a copy. Valid as long as its lease."""
    payload = sequence.payload_of(index)
    return sequence.views().hand_out(index, payload)


def read_into(sequence: SequenceState, index: int, target: memoryview | npt.NDArray[Any]) -> int:
    """Copy the payload of a block to the start of `target`; returns its length in bytes."""
    payload = sequence.payload_of(index)
    try:
        room = np.frombuffer(target, np.uint8)
        if room.size < payload.size:
            raise BadPayload("the buffer is too small", needs=payload.size, has=room.size)
        np.copyto(room[: payload.size], payload)
    except (ValueError, TypeError) as error:
        raise BadPayload(f"not a buffer to write into: {error}") from None
    return payload.size


# --- values


def _milliseconds(name: str, seconds: float) -> int:
    """Rounded up, so that a short time does not become none."""
    if not 0 <= seconds <= MAX_WAIT_MS / 1000:
        raise BadMessage(f"{name} is from 0 to {MAX_WAIT_MS // 1000} seconds", got=str(seconds))
    return math.ceil(seconds * 1000)
