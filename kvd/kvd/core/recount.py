"""The accounting identities, as code: a slow recount that every running total must agree with.

    budget == unassigned + directories + staging
              + sum over arenas of (free + filling + active + pinned + cached), in bytes of stride
    per tenant: held == its directories + staging + backed slots <= quota, in bytes of stride, and
    budget == unassigned + sum over tenants of held == max(what it is to be, sum of held)
    per arena, in slots: backed == free + filling + active + pinned + cached, each in one place

The recount may go in steps, between which anything may happen, so that it holds nobody up. What
must hold of one block is looked at block by block, each at a moment of its own: it must hold at
every moment. The totals must hold at one moment, and are counted at once: those of the budget from
the arenas' (`check_totals`, at any time), those of an arena from all of its blocks, which is a pass
of 0.1 us a block, and those of a tenant's LRU from a list of it.
"""

from collections.abc import Iterator
from operator import attrgetter

from kvd.core.accounting import AccountingError, totals
from kvd.core.amounts import Amount
from kvd.core.arenas import Arena
from kvd.core.cache import (
    AllocBacking,
    AppendBacking,
    Cache,
    Checking,
    Copying,
    PinsGrowing,
    WantedPin,
)
from kvd.core.pins import pins_bytes_for
from kvd.core.sequences import Sequence, Session, State
from kvd.core.tree import ADOPTED, FILLING, GONE, SEALED, Block
from kvd_proto.messages import Alloc, Pin

STEP_BLOCKS = 128
"""Looked at at once, for 3 to 5 us each."""

_holds = attrgetter("holds")
_tokens_of = attrgetter("tokens")


def check(cache: Cache) -> None:
    """Recount everything at once and compare it with the running totals; raises AccountingError."""
    check_totals(cache)
    for _ in check_in_steps(cache):
        pass


def check_in_steps(cache: Cache) -> Iterator[None]:
    """Recount all blocks; raises AccountingError. `check_totals` is the rest."""
    for arena in list(cache.budget.arenas.values()):
        first = 0
        while first < len(arena.blocks) and arena.number in cache.budget.arenas:
            _check_slots(cache, arena, range(first, first + STEP_BLOCKS))
            first += STEP_BLOCKS
            yield
        if arena.number not in cache.budget.arenas:
            continue  # given up meanwhile
        _check_counts(cache, arena)
        yield
    _check_filling(cache)
    yield
    for tenant in list(cache.budget.tenants.values()):
        plain = [arena for arena in tenant.arenas if arena.evictable is tenant.evictable]
        cached = sum(arena.cached for arena in plain)
        order = list(tenant.evictable)
        yield from _check_order(tenant.name, order, cached, cache.budget.clock)
    for arena in [each for each in cache.budget.arenas.values() if each.model is not None]:
        if arena.number not in cache.budget.arenas:
            continue  # given up meanwhile
        name = f"{arena.name} of {arena.tenant.name}"
        yield from _check_order(name, list(arena.evictable), arena.cached, cache.budget.clock)


def check_totals(cache: Cache) -> None:
    """Compare all totals that are made of others, and what sessions have, at this moment; raises
    AccountingError. Costs nothing for each block."""
    totals(cache).check()
    sessions = [*cache.sessions.values(), *cache.leaving.values()]
    _check_tenants(cache, sessions)
    sequences = cache.sequences()
    _equal("open sequences", cache.open_sequences, len(sequences))
    timed_out = sum(sequence.state is State.TIMED_OUT for sequence in sequences)
    _equal("sequences timed out", cache.timed_out_sequences, timed_out)
    waiting = sum(len(context.waiting) for context in cache.contexts.values())
    _equal("waiting", len(cache.waiting), waiting)
    for sequence in sequences:
        if sequence.leased.state is GONE:
            raise AccountingError(
                f"sequence {sequence.seq_id} of context {sequence.context.number} leases a block "
                "that is gone"
            )
    copies = dict.fromkeys(sessions, 0)
    reserved = {session: Amount() for session in sessions}
    for sequence in sequences:
        reserved[sequence.context.session].add(len(sequence.reserved), 0, _stride(sequence))
    for job in cache.jobs.values():
        if isinstance(job, Copying):
            copies[job.session] += len(job.blocks)
        elif isinstance(job, AllocBacking):
            session = job.sequence.context.session
            if session in reserved:
                reserved[session].add(len(job.slots), 0, _stride(job.sequence))
    for session in sessions:
        _equal(f"copies from the staging of {session.client}", session.in_flight, copies[session])
        n_tasks = sum(task.session is session for task in cache.tasks)
        _equal(f"tasks of {session.client}", session.tasks, n_tasks)
        _equal(f"reserved by {session.client}", session.reserved, reserved[session])
        _check_session(cache, session)


def _check_tenants(cache: Cache, sessions: list[Session]) -> None:
    """What each tenant holds; together with what is unassigned it is the budget."""
    budget = cache.budget
    for tenant in budget.tenants.values():
        staging = sum(each.staging_bytes for each in sessions if each.tenant is tenant)
        _equal(f"staging of {tenant.name}", tenant.staging, staging)
        arenas = [arena for arena in budget.arenas.values() if arena.tenant is tenant]
        if arenas != tenant.arenas:
            raise AccountingError(f"arenas of {tenant.name}: {tenant.arenas}, recounted {arenas}")
        slots = sum(arena.backed * arena.stride for arena in arenas)
        directories = sum(arena.memory_beside for arena in arenas)
        _equal(f"pins of {tenant.name}", tenant.pins, sum(len(each.pins.pins) for each in arenas))
        _equal(f"held by {tenant.name}", tenant.held, staging + slots + directories)
        limit = min(tenant.limit or budget.n_bytes, budget.n_bytes)
        _equal(f"quota of {tenant.name}", tenant.quota, max(limit, tenant.held))
        _equal(f"excess of {tenant.name}", tenant.excess, tenant.quota - limit)
        own = sum(_bytes_of(arena) for arena in arenas if arena.share is tenant.share)
        _equal(f"of the minimum of {tenant.name}", tenant.share.held, staging + own)
    by_name: dict[str, list[Arena]] = {}
    for arena in budget.arenas.values():
        by_name.setdefault(arena.name, []).append(arena)
    for model in budget.models.values():
        arenas = by_name.get(model.name, [])
        if arenas != model.arenas or any(arena.model is not model for arena in arenas):
            raise AccountingError(f"arenas of {model.name}: {model.arenas}, recounted {arenas}")
        _equal(f"held by {model.name}", model.held, sum(map(_bytes_of, arenas)))
        limit = model.held if model.limit is None else model.limit
        _equal(f"excess of {model.name}", model.excess, max(0, model.held - limit))
        if model.limit is not None:
            _equal(f"cap of {model.name}", model.cap, max(limit, model.held))
        own = sum(_bytes_of(arena) for arena in arenas if arena.share is model.share)
        _equal(f"of the minimum of {model.name}", model.share.held, own)
    promised = sum(max(0, share.minimum - share.held) for share in budget.shares)
    _equal("promised", budget.promised, promised)
    held = sum(tenant.held for tenant in budget.tenants.values())
    _equal("budget", budget.n_bytes, max(budget.wanted, held))
    _equal("unassigned", budget.unassigned, budget.n_bytes - held)


def _check_session(cache: Cache, session: Session) -> None:
    """What the session has against its limits."""
    name, contexts = session.client, session.contexts.values()
    n_open = sum(len(context.open) for context in contexts)
    _equal(f"open sequences of {name}", session.open_sequences, n_open)
    waiting: list[Alloc | Pin] = [
        waiter.message for context in contexts for waiter in context.waiting
    ]
    for job in cache.jobs.values():
        if isinstance(job, Checking):
            waiting += [each.message for each in job.deferred if each.session is session]
    _equal(f"waiting allocs of {name}", session.waiting, len(waiting))
    n_bytes = sum(len(message.tokens) for message in waiting)
    _equal(f"tokens of waiting allocs of {name}", session.waiting_bytes, n_bytes)


def _check_slots(cache: Cache, arena: Arena, slots: range) -> None:
    """Whether the blocks in these slots are what they must be, each for itself; and as many of the
    root's children, so that no block is in the tree alone."""
    leases: dict[Block, int] = {}
    held = [each.leased for each in cache.sequences()]
    held += [each.block for each in _wanted_pins(cache)]
    for leased in [*held, *cache.budget.letting_go]:
        leases[leased] = leases.get(leased, 0) + 1
    pins: dict[Block, int] = {}
    for pin in arena.pins.pins.values():
        pins[pin.block] = pins.get(pin.block, 0) + 1
    for slot in slots:
        block = arena.blocks[slot] if slot < len(arena.blocks) else None
        if block is not None and block.state is not GONE:
            _check_block(cache, arena, slot, block, leases.get(block, 0), pins.get(block, 0))
    for child in arena.root.children[slots.start : slots.stop]:
        _check_is_filed(arena, child)


def _check_block(
    cache: Cache, arena: Arena, slot: int, block: Block, leases: int, pins: int
) -> None:
    parent = block.parent
    assert parent is not None
    if block.slot != slot:
        raise AccountingError(f"the block in slot {slot} says that it is in slot {block.slot}")
    if parent.state is GONE or parent.child(block.tokens) is not block:
        raise AccountingError(f"slot {slot} has a block that is not in the tree")
    held = kept = 0
    for child in block.children:
        held += child.holds > 0
        kept += child.pins > 0
        _check_is_filed(arena, child)
    is_filling = block.state is FILLING
    expected = leases + held + is_filling + (block in arena.former)
    _equal(f"holds of slot {slot}", block.holds, expected)
    _equal(f"pins of slot {slot}", block.pins, pins + kept)
    if block.children and block.n_tokens != arena.block_tokens:
        raise AccountingError(f"slot {slot} is not full and has children")
    if block.state is ADOPTED and block not in cache.unchecked:
        raise AccountingError(f"slot {slot} was left by an earlier daemon, and nobody checks it")
    place = block.used if block.is_listed else None
    if block.is_kept:
        if place is not None:
            raise AccountingError(f"slot {slot} is held or pinned, and in the LRU")
        return
    if place is None:
        raise AccountingError(f"nobody holds slot {slot}, which is not in the LRU")
    if block.is_superseded:
        raise AccountingError(f"nobody holds slot {slot}, which a longer one replaced")
    by_records = max([block.last_use, *(each.used for each in block.children)])
    if place != by_records:
        raise AccountingError(
            f"slot {slot} was used at {by_records} by its records, and at {place} by its place in "
            "the LRU"
        )


def _check_is_filed(arena: Arena, block: Block) -> None:
    if block.slot >= len(arena.blocks) or arena.blocks[block.slot] is not block:
        raise AccountingError(f"a block in the tree is not the one in its slot {block.slot}")


def _check_counts(cache: Cache, arena: Arena) -> None:
    """The arena's totals, and that each slot is in one place: a block's, or in one of the lists."""
    filling = _filling_blocks(cache, arena)
    aside = _slots_set_aside(cache, arena)
    idle = [*arena.free, *arena.punched, *aside]
    places = set(idle)
    is_right = len(places) == len(idle) and len(arena.blocks) == arena.high_water
    is_right &= max(places, default=-1) < arena.high_water
    in_idle = [arena.blocks[slot] for slot in idle] if is_right else []
    gone = [block for block in in_idle if block is not None]
    is_right &= all(block.state is GONE for block in gone)
    n_blocks = len(arena.blocks) - arena.blocks.count(None) - len(gone)
    if not is_right or n_blocks + len(idle) != arena.high_water:
        raise AccountingError(_name_places(arena, aside))
    n_held = sum(map(bool, map(_holds, filter(None, arena.blocks))))
    n_held -= sum(map(bool, map(_holds, gone)))
    pinned = _pinned_blocks(arena)
    _equal("filling", arena.filling, len(filling) + len(aside))
    _equal("active", arena.active, n_held - len(filling))
    _equal("pinned", arena.pinned, sum(not block.holds for block in pinned))
    _equal("cached", arena.cached, n_blocks - n_held - arena.pinned)
    _check_lacks(arena, [block for block in arena.blocks if block and block.state is not GONE])
    _check_pins(arena)
    adopted = 0
    if arena.unchecked:
        adopted = sum(block.state is ADOPTED for block in arena.blocks if block is not None)
    _equal("blocks to check", arena.unchecked, adopted)
    _equal("directory", arena.directory_bytes, arena.directory_for(arena.high_water))
    registered = sum(arena.number in session.shared for session in cache.sessions.values())
    _equal("sessions that have registered it", arena.sessions, registered)


def _check_lacks(arena: Arena, blocks: list[Block]) -> None:
    """How many tokens blocks of each state lack to be full."""
    lacks = {"active": 0, "pinned": 0, "cached": 0}
    lengths = map(len, map(_tokens_of, blocks))
    for block, length in zip(blocks, lengths, strict=True):
        if length < arena.token_bytes and block.state is not FILLING:
            state = "active" if block.holds else "pinned" if block.pins else "cached"
            lacks[state] += arena.lack_of(block)
    for state, lack in lacks.items():
        _equal(f"tokens that {state} blocks lack", getattr(arena, f"{state}_lacks"), lack)


def _pinned_blocks(arena: Arena) -> set[Block]:
    """All that some pin keeps: its block and what is above that."""
    found: set[Block] = set()
    for pin in arena.pins.pins.values():
        node: Block | None = pin.block
        while node is not None and node.parent is not None and node not in found:
            found.add(node)
            node = node.parent
    return found


def _check_pins(arena: Arena) -> None:
    """Each pin is of a block that is there, and has a place of its own, which has memory."""
    table = arena.pins
    for (owner, block), pin in table.pins.items():
        if (pin.owner, pin.block) != (owner, block) or block.state not in (ADOPTED, SEALED):
            raise AccountingError(f"the pin at place {pin.place} is not of slot {block.slot}")
    places = sorted([*table.free, *(pin.place for pin in table.pins.values())])
    if places != list(range(table.high_water)):
        raise AccountingError(
            f"arena {arena.number}: each place below {table.high_water} should be one of {places}"
        )
    if not pins_bytes_for(table.high_water) <= table.backed <= table.n_bytes:
        raise AccountingError(
            f"arena {arena.number}: {table.high_water} places for pins, {table.backed} of "
            f"{table.n_bytes} bytes backed"
        )


def _wanted_pins(cache: Cache) -> list[WantedPin]:
    """Those that wait for memory, and hold their blocks meanwhile."""
    jobs = [job for job in cache.jobs.values() if isinstance(job, PinsGrowing)]
    return [wanted for job in jobs for wanted in job.wanted]


def _name_places(arena: Arena, aside: list[int]) -> str:
    """Which slots are in no place, or in several."""
    found: dict[int, list[str]] = {slot: [] for slot in range(arena.high_water)}
    for name, slots in (
        ("free", arena.free),
        ("punched", arena.punched),
        ("set aside", aside),
        ("a block's", [slot for slot, block in enumerate(arena.blocks) if _is_alive(block)]),
    ):
        for slot in slots:
            found.setdefault(slot, []).append(name)
    wrong = [
        f"{slot} is {' and '.join(names) or 'in none'}"
        for slot, names in found.items()
        if len(names) != 1 or slot >= arena.high_water
    ]
    return (
        f"arena {arena.number}: each slot below {arena.high_water} should be in one place: "
        + ", ".join(wrong[:10])
    )


def _check_order(name: str, order: list[Block], cached: int, now: int) -> Iterator[None]:
    """All that is cached is in the LRU, no block before its children, and the oldest first. What is
    used after `now`, when this begins, has another place then, and is left out."""
    _equal(f"blocks in the LRU of {name}", len(order), cached)
    seen: set[Block] = set()
    before = 0
    for first in range(0, len(order), STEP_BLOCKS):
        for block in order[first : first + STEP_BLOCKS]:
            seen.add(block)
            place = block.used
            if not block.is_listed or place > now:
                continue
            if not all(child in seen for child in block.children):
                raise AccountingError(f"slot {block.slot} would be evicted before its child")
            if place < before:
                raise AccountingError(
                    f"slot {block.slot} was used at {place} by its place in the LRU, which comes "
                    f"after {before}"
                )
            before = place
        yield


def _is_alive(block: Block | None) -> bool:
    return block is not None and block.state is not GONE


def _check_filling(cache: Cache) -> None:
    """What is filled from the staging of each session. All at once: a block may get another source
    at any time."""
    sessions = [*cache.sessions.values(), *cache.leaving.values()]
    filling = {session: Amount() for session in sessions}
    for arena in cache.budget.arenas.values():
        n_tokens = 0
        blocks = _filling_blocks(cache, arena)
        for block in blocks:
            n_tokens += block.n_tokens
            session = block.first_source.commit.session
            if session in filling:  # it may have left before the memory for its blocks was there
                filling[session].add(1, block.n_tokens, arena.stride)
        _equal(f"blocks being stored for {arena.name}", arena.filling_blocks, len(blocks))
        _equal(f"tokens being stored for {arena.name}", arena.filling_tokens, n_tokens)
    for session in sessions:
        _equal(f"filled by {session.client}", session.filling, filling[session])


def _filling_blocks(cache: Cache, arena: Arena) -> set[Block]:
    """Those of the arena: each is some job's to fill."""
    found: set[Block] = set()
    for job in cache.jobs.values():
        if isinstance(job, AppendBacking):
            found.update(job.commit.pending)
        if isinstance(job, AppendBacking | Copying):
            found.update(job.blocks)
    return {block for block in found if block.arena is arena and block.state is FILLING}


def _slots_set_aside(cache: Cache, arena: Arena) -> list[int]:
    """Slots that are filling and have no block in the tree: reserved ones, retired ones, and those
    that only a job of the shell still knows, since their blocks are gone."""
    found: list[int] = list(arena.retired)
    for sequence in cache.sequences():
        if sequence.context.arena is arena:
            found += sequence.reserved
    for job in cache.jobs.values():
        if isinstance(job, AllocBacking):
            if job.sequence.context.arena is arena:
                found += job.slots
        elif not isinstance(job, Checking | PinsGrowing):
            gone = [block for block in job.blocks if block.state is GONE]
            found += [block.slot for block in gone if block.arena is arena]
    return found


def _bytes_of(arena: Arena) -> int:
    return arena.memory_beside + arena.backed * arena.stride


def _stride(sequence: Sequence) -> int:
    return sequence.context.arena.stride


def _equal(what: str, running: object, recounted: object) -> None:
    if running != recounted:
        raise AccountingError(f"{what}: running total {running}, recounted {recounted}")
