"""Registering models, opening and closing contexts."""

from collections import deque

from kvd.core.allocating import close_sequence, refuse_beyond_limit, refuse_waiters, serve_waiters
from kvd.core.arenas import Arena
from kvd.core.cache import Cache
from kvd.core.events import CreateArena, Effect, ShareArena
from kvd.core.sequences import Context, Session, State, find_context
from kvd.core.tenants import Tenant
from kvd_proto.errors import (
    BadMessage,
    GeometryMismatch,
    ModelTooLarge,
    SequenceLimit,
    TooMany,
    UnknownModel,
)
from kvd_proto.geometry import Geometry, round_up
from kvd_proto.happenings import Kind
from kvd_proto.keys import arena_fingerprint, root_key
from kvd_proto.messages import (
    CloseContext,
    ContextOpened,
    Done,
    ModelRegistered,
    OpenContext,
    RegisterModel,
)
from kvd_proto.payload import make_format


def register_model(
    cache: Cache, session: Session, message: RegisterModel, effects: list[Effect]
) -> ModelRegistered:
    """Find or make the arena of (tenant, model), and see that the session gets its descriptor."""
    geometry = Geometry.from_wire(message.layers)
    fingerprint = arena_fingerprint(
        message.fingerprint, message.payload_format, message.block_tokens
    )
    arena = session.tenant.arena_of(fingerprint)
    known = arena is not None and arena.number in session.shared
    if not known and len(session.shared) >= cache.limits.session_models:
        raise TooMany(
            "this session has registered as many models as it may",
            max_session_models=cache.limits.session_models,
        )
    if arena is None:
        arena = _create_arena(cache, session, message, geometry, fingerprint, effects)
    elif arena.geometry != geometry:
        raise GeometryMismatch(
            "this fingerprint is registered with another geometry",
            model=arena.name,
            registered_bytes_per_token=arena.geometry.bytes_per_token,
            asked_bytes_per_token=geometry.bytes_per_token,
            registered_layers=len(arena.geometry.layers),
            asked_layers=len(geometry.layers),
        )
    if message.traits:
        arena.traits = dict(message.traits)
    if not known:
        session.shared.add(arena.number)
        arena.sessions += 1
        effects.append(ShareArena(session.id, arena.number))
    return ModelRegistered(
        arena.number, arena.number, arena.payload_bytes, arena.stride, arena.slots
    )


def open_context(cache: Cache, session: Session, message: OpenContext, now: float) -> ContextOpened:
    """Open a pool of sequence ids for a model that this session has registered."""
    arena = cache.budget.arenas.get(message.model)
    if arena is None or message.model not in session.shared:
        raise UnknownModel("this session has registered no such model", model=message.model)
    if message.n_seq_max > cache.limits.n_seq_max:
        raise BadMessage(
            "n_seq_max is too large", got=message.n_seq_max, most=cache.limits.n_seq_max
        )
    busy = set(message.busy)
    if len(busy) != len(message.busy) or not busy.issubset(range(message.n_seq_max)):
        raise BadMessage("busy ids are different ids of the context", n_seq_max=message.n_seq_max)
    if cache.open_sequences + len(busy) > cache.limits.max_sequences:
        raise SequenceLimit("too many sequences are open", max_sequences=cache.limits.max_sequences)
    refuse_beyond_limit(cache, session, len(busy))
    if len(session.contexts) >= cache.limits.session_contexts:
        raise TooMany(
            "this session has as many contexts open as it may",
            max_contexts=cache.limits.session_contexts,
        )
    number = cache.next_context
    cache.next_context += 1
    free_ids = deque(seq_id for seq_id in range(message.n_seq_max) if seq_id not in busy)
    context = Context(number, session, arena, free_ids)
    cache.contexts[number] = session.contexts[number] = context
    cache.open_sequences += len(busy)
    session.open_sequences += len(busy)
    taken = [context.open_id(seq_id, "", 0.0, now) for seq_id in message.busy]
    return ContextOpened(number, [sequence.generation for sequence in taken])


def close_context(
    cache: Cache, session: Session, message: CloseContext, now: float, effects: list[Effect]
) -> Done:
    """Give back a context, its sequences and what waits for one of its ids."""
    context = find_context(session, cache.contexts, message.context)
    drop_context(cache, context, State.COMPLETED, effects)
    serve_waiters(cache, now, effects)
    return Done()


def drop_context(cache: Cache, context: Context, outcome: str, effects: list[Effect]) -> None:
    """Close all sequences of a context and forget it."""
    refuse_waiters(cache, context, effects)
    for sequence in list(context.open.values()):
        close_sequence(cache, sequence, outcome, effects)
    del cache.contexts[context.number]
    del context.session.contexts[context.number]


def forget_arena(cache: Cache, number: int) -> None:
    """Undo the registration of an arena that could not be made; nobody has used it yet."""
    cache.budget.forget_arena(cache.budget.arenas[number])
    for session in cache.sessions.values():
        session.shared.discard(number)


def leave_models(cache: Cache, session: Session) -> None:
    """The session has ended, and its contexts are closed: it has registered nothing any more."""
    for number in session.shared:
        cache.budget.arenas[number].sessions -= 1


def check_models(cache: Cache, tenant: Tenant) -> None:
    """Raise TooMany if the tenant has as many models as it may."""
    if len(tenant.arenas) >= cache.limits.max_models:
        raise TooMany(
            "as many models are registered as a tenant may have",
            tenant=tenant.name,
            max_models=cache.limits.max_models,
        )


def make_arena(
    cache: Cache,
    number: int,
    tenant: Tenant,
    name: str,
    fingerprint: bytes,
    geometry: Geometry,
    payload_format: str,
    block_tokens: int,
    slots: int | None = None,
) -> Arena:
    """An arena that is not yet known to anyone, with so many slots, or (None) as many as a new one
    has here. Raises ModelTooLarge if not even one block fits the budget."""
    form = make_format(payload_format, geometry, block_tokens)
    if slots is None:
        slots = max(cache.limits.max_memory, cache.limits.arena_bytes) // round_up(form.max_bytes)
    arena = Arena(
        number=number,
        tenant=tenant,
        name=name,
        fingerprint=fingerprint,
        geometry=geometry,
        payload_format=form,
        block_tokens=block_tokens,
        slots=slots,
        root_key=root_key(fingerprint, tenant.salt),
        model=cache.budget.models.get(name),
    )
    cap = None if arena.model is None else arena.model.cap
    most = tenant.quota if cap is None else min(tenant.quota, cap)
    if not arena.slots or arena.stride + arena.directory_for(1) > most:
        raise ModelTooLarge(
            "not even one block of this model fits the budget, the tenant's quota or its own cap",
            stride_bytes=arena.stride,
            directory_bytes=arena.directory_for(1),
            budget_bytes=cache.limits.max_memory,
            quota_bytes=tenant.quota,
            bytes_per_token=geometry.bytes_per_token,
        )
    return arena


def _create_arena(
    cache: Cache,
    session: Session,
    message: RegisterModel,
    geometry: Geometry,
    fingerprint: bytes,
    effects: list[Effect],
) -> Arena:
    arena = make_arena(
        cache,
        cache.next_arena,
        session.tenant,
        message.name,
        fingerprint,
        geometry,
        message.payload_format,
        message.block_tokens,
    )
    if len(arena.tenant.arenas) >= cache.limits.max_models:
        cache.budget.give_up_oldest(arena.tenant, effects)
    check_models(cache, arena.tenant)
    cache.budget.charge_directory(arena, effects)
    cache.next_arena += 1
    values = (session.client, session.pid, arena.block_tokens, arena.stride)
    cache.budget.journal.note(Kind.MODEL, arena.tenant.name, arena.name, *values)
    effects.append(
        CreateArena(
            arena.number,
            arena.tenant.name,
            arena.name,
            fingerprint,
            message.payload_format,
            arena.block_tokens,
            geometry.layers,
            arena.payload_bytes,
            arena.stride,
            arena.slots,
            arena.records_bytes,
            arena.root.key,
        )
    )
    return arena
