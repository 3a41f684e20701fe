"""Pin and unpin: what an owner asks for. What a pin is: pins.py.

pin ──► match ──► a place in the directory ──► WritePin, reply
          │             └─ none has memory: BackPins ──► tried again, the block held meanwhile
          └─ what an earlier daemon left is checked first (checking.py)
"""

from kvd.core import pins
from kvd.core.allocating import defer
from kvd.core.cache import Cache, PinsGrowing, WantedPin
from kvd.core.events import Backed, BackPins, Effect, RenewPin
from kvd.core.pins import Pin
from kvd.core.sequences import Session
from kvd.core.tree import match
from kvd_proto import messages
from kvd_proto.errors import KvdError, TooMany, UnknownModel
from kvd_proto.happenings import Kind
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import MAX_TOKENS, Pinned, Unpin, Unpinned


def pin(
    cache: Cache,
    session: Session,
    correlation: int,
    message: messages.Pin,
    now: float,
    effects: list[Effect],
) -> Pinned | None:
    """Pin what is cached of these tokens. None: the reply comes when the directory has memory for
    it, or what an earlier daemon left has been checked."""
    arena = session.tenant.arena_of(message.model)
    if arena is None:
        raise UnknownModel(
            "no model of this fingerprint is registered for this tenant",
            tenant=session.tenant.name,
            fingerprint=message.model.hex(),
        )
    if defer(cache, session, correlation, arena, message, effects):
        return None
    # At once, however long it is: people pin seldom.
    found = match(arena.root, message.tokens, arena.block_tokens * TOKEN_BYTES, MAX_TOKENS)
    block = found.partial or (found.full[-1] if found.full else None)
    if block is None:
        return Pinned(0)
    wanted = WantedPin(
        session, correlation, message.owner, block, found.n_tokens, message.ttl_ms / 1000
    )
    return _pin(cache, wanted, now, effects)


def unpin(cache: Cache, session: Session, message: Unpin, effects: list[Effect]) -> Unpinned:
    """End the owner's pins: of the session's tenant, or if an administrator asks of all. A walk of
    all pins there are."""
    budget = cache.budget
    arenas = budget.arenas.values() if session.administrator else session.tenant.arenas
    ended = [
        each
        for arena in arenas
        for each in arena.pins.pins.values()
        if each.owner == message.owner and message.model in ("", arena.name)
    ]
    for each in ended:
        pins.end(cache, each, "asked", effects)
    return Unpinned(len(ended))


def grown(cache: Cache, job: PinsGrowing, event: Backed, now: float, effects: list[Effect]) -> None:
    """The directory has memory for more pins, or has not: who waited for it is answered."""
    job.arena.pins.growing = None
    if event.error is None:
        job.arena.pins.backed = job.n_bytes
    for wanted in job.wanted:
        body: Pinned | KvdError | None = event.error
        if body is None and wanted.session.alive:
            try:
                body = _pin(cache, wanted, now, effects)
            except KvdError as error:
                body = error
        if body is not None:
            cache.reply(wanted.session, wanted.correlation, body, effects)
        cache.budget.unhold(wanted.block, effects)


def _pin(cache: Cache, wanted: WantedPin, now: float, effects: list[Effect]) -> Pinned | None:
    """Make or renew a pin of a sealed block."""
    block, owner = wanted.block, wanted.owner
    arena = block.arena
    expires = now + wanted.seconds if wanted.seconds else 0.0
    known = arena.pins.find(owner, block)
    if known is not None:
        pins.renew(cache, known, expires)
        effects.append(RenewPin(arena.number, known.place, expires))
        _note(cache, wanted)
        return Pinned(wanted.n_tokens)
    if arena.tenant.pins >= cache.limits.max_pins:
        raise TooMany(
            "this tenant has as many pins as it may",
            tenant=arena.tenant.name,
            max_pins=cache.limits.max_pins,
        )
    place = arena.pins.take_place()
    if place is None:
        _grow(cache, wanted, effects)
        return None
    made = Pin(owner, block, place, expires)
    pins.start(cache, made)
    effects.append(pins.write_effect(made))
    _note(cache, wanted)
    return Pinned(wanted.n_tokens)


def _note(cache: Cache, wanted: WantedPin) -> None:
    arena = wanted.block.arena
    values = (wanted.owner, wanted.n_tokens, wanted.seconds or None)
    cache.budget.journal.note(Kind.PIN, arena.tenant.name, arena.name, *values)


def _grow(cache: Cache, wanted: WantedPin, effects: list[Effect]) -> None:
    """Let a pin wait until the directory has memory for it. Raises ResourceError."""
    budget, arena = cache.budget, wanted.block.arena
    job = arena.pins.growing
    if job is not None and arena.tenant.pins + len(job.wanted) >= cache.limits.max_pins:
        raise TooMany(
            "more pins wait for memory than this tenant may have",
            tenant=arena.tenant.name,
            max_pins=cache.limits.max_pins,
        )
    # From here on the block must stay, whatever has to be evicted for the directory.
    budget.hold(wanted.block)
    if job is None:
        try:
            budget.charge_pins(arena, effects)
        except KvdError:
            budget.unhold(wanted.block, effects)
            raise
        job = arena.pins.growing = PinsGrowing(arena, arena.pins.n_bytes, [])
        number = cache.new_job(job)
        effects.append(BackPins(number, arena.number, wanted.session.id, job.n_bytes))
    job.wanted.append(wanted)
