"""The accounting identities, as code: running totals against a slow recount from the trees.

budget == unassigned + directories + staging
          + sum over arenas of (free + filling + active + pinned + cached), in bytes of stride
per tenant: held == its directories + staging + backed slots <= quota, in bytes of stride, and
budget == unassigned + sum over tenants of held
per arena, in slots: backed == free + filling + active + pinned + cached, each in one place
"""

from dataclasses import dataclass
from typing import Any

from kvd.core.budget import Arena, places_in
from kvd.core.cache import AllocBacking, Cache, Checking, Copying, PinsGrowing, WantedPin
from kvd.core.pins import pins_bytes_for
from kvd.core.sequences import Session, State
from kvd.core.tenants import Tenant
from kvd.core.tree import ADOPTED, FILLING, GONE, SEALED, Block
from kvd_proto.messages import Alloc, Pin


class AccountingError(AssertionError):
    """A total and its recount differ. The message has every term."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes of the budget by use. All but `padding` and `payload` add up to the budget."""

    budget: int
    unassigned: int
    directory: int
    staging: int
    free: int
    filling: int
    active: int
    pinned: int
    cached: int
    padding: int
    """Of filling, active, pinned and cached: what the stride has beyond a full block's payload."""

    @property
    def backed(self) -> int:
        """What the operating system should say: arenas, directories and staging."""
        return self.budget - self.unassigned

    def check(self) -> None:
        """Raise AccountingError unless the terms add up to the budget."""
        total = (
            self.unassigned
            + self.directory
            + self.staging
            + self.free
            + self.filling
            + self.active
            + self.pinned
            + self.cached
        )
        if total != self.budget:
            raise AccountingError(f"budget {self.budget} != {total}, the sum of {self}")


def totals(cache: Cache, tenant: Tenant | None = None) -> Totals:
    """The running totals; of one tenant as if its quota were the budget."""
    budget = cache.budget
    arenas = budget.arenas.values() if tenant is None else tenant.arenas
    return Totals(
        budget=budget.n_bytes if tenant is None else tenant.quota,
        unassigned=budget.unassigned if tenant is None else tenant.headroom,
        directory=sum(arena.memory_beside for arena in arenas),
        staging=budget.staging if tenant is None else tenant.staging,
        free=sum(len(arena.free) * arena.stride for arena in arenas),
        filling=sum(arena.filling * arena.stride for arena in arenas),
        active=sum(arena.active * arena.stride for arena in arenas),
        pinned=sum(arena.pinned * arena.stride for arena in arenas),
        cached=sum(arena.cached * arena.stride for arena in arenas),
        padding=sum(
            (arena.stride - arena.payload_bytes) * (arena.backed - len(arena.free))
            for arena in arenas
        ),
    )


def check(cache: Cache) -> None:
    """Recount everything and compare with the running totals; raises AccountingError.

    A walk of all trees: for tests and for `kvctl verify`.
    """
    totals(cache).check()
    sessions = [*cache.sessions.values(), *cache.leaving.values()]
    _check_tenants(cache, sessions)
    _equal("open sequences", cache.open_sequences, len(cache.sequences()))
    waiting = sum(len(context.waiting) for context in cache.contexts.values())
    _equal("waiting", len(cache.waiting), waiting)
    for session in sessions:
        copies = [len(job.blocks) for job in _copies(cache) if job.session is session]
        _equal(f"copies from the staging of {session.client}", session.in_flight, sum(copies))
    leases: dict[Block, int] = {}
    for sequence in cache.sequences():
        leases[sequence.leased] = leases.get(sequence.leased, 0) + 1
        if sequence.leased.state is GONE:
            raise AccountingError(
                f"sequence {sequence.seq_id} of context {sequence.context.number} leases a block "
                "that is gone"
            )
    for wanted in _wanted_pins(cache):
        leases[wanted.block] = leases.get(wanted.block, 0) + 1
    adopted = 0
    for arena in cache.budget.arenas.values():
        adopted += sum(block.state is ADOPTED for block in arena.root.below())
    _equal("blocks to check", count_unchecked(cache), adopted)
    for arena in cache.budget.arenas.values():
        _check_arena(cache, arena, leases)
    for tenant in cache.budget.tenants.values():
        cached = sum(arena.cached for arena in tenant.arenas)
        _equal(f"blocks in the LRU of {tenant.name}", len(tenant.lru), cached)
        _check_order(tenant)
    for session in sessions:
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
        if tenant.held > tenant.quota:
            raise AccountingError(
                f"{tenant.name} holds {tenant.held}, more than its quota {tenant.quota}"
            )
    held = sum(tenant.held for tenant in budget.tenants.values())
    _equal("unassigned", budget.unassigned, budget.n_bytes - held)


def _check_session(cache: Cache, session: Session) -> None:
    """What the session has against its limits."""
    name, contexts = session.client, session.contexts.values()
    sequences = [each for context in contexts for each in context.open.values()]
    _equal(f"open sequences of {name}", session.open_sequences, len(sequences))
    waiting: list[Alloc | Pin] = [
        waiter.message for context in contexts for waiter in context.waiting
    ]
    for job in cache.jobs.values():
        if isinstance(job, Checking):
            waiting += [each.message for each in job.deferred if each.session is session]
    _equal(f"waiting allocs of {name}", session.waiting, len(waiting))
    n_bytes = sum(len(message.tokens) for message in waiting)
    _equal(f"tokens of waiting allocs of {name}", session.waiting_bytes, n_bytes)
    reserved = sum(len(each.reserved) * each.context.arena.stride for each in sequences)
    for job in cache.jobs.values():
        if isinstance(job, AllocBacking) and job.sequence.context.session is session:
            reserved += len(job.slots) * job.sequence.context.arena.stride
    _equal(f"reserved by {name}", session.reserved_bytes, reserved)


def _check_arena(cache: Cache, arena: Arena, leases: dict[Block, int]) -> None:
    places: dict[str, list[int]] = {
        "punched": arena.punched,
        "free": arena.free,
        "filling": _slots_set_aside(cache, arena),
        "active": [],
        "pinned": [],
        "cached": [],
    }
    pins = _check_pins(arena)
    for block in arena.root.below():
        held = sum(1 for child in block.children if child.holds)
        expected = leases.get(block, 0) + held + (block.state is FILLING) + (block in arena.former)
        _equal(f"holds of slot {block.slot}", block.holds, expected)
        kept = sum(1 for child in block.children if child.pins)
        _equal(f"pins of slot {block.slot}", block.pins, pins.pop(block, 0) + kept)
        if block.children and block.n_tokens != arena.block_tokens:
            raise AccountingError(f"slot {block.slot} is not full and has children")
        if block.state is FILLING:
            places["filling"].append(block.slot)
        elif block.holds:
            places["active"].append(block.slot)
        elif block.pins:
            places["pinned"].append(block.slot)
        else:
            places["cached"].append(block.slot)
            if block not in arena.lru:
                raise AccountingError(f"nobody holds slot {block.slot}, which is not in the LRU")
            if block.is_superseded:
                raise AccountingError(
                    f"nobody holds slot {block.slot}, which a longer one replaced"
                )
    if pins:
        raise AccountingError(f"arena {arena.number}: {list(pins)} are pinned, and not in the tree")
    _equal("filling", arena.filling, len(places["filling"]))
    _equal("active", arena.active, len(places["active"]))
    _equal("pinned", arena.pinned, len(places["pinned"]))
    _equal("cached", arena.cached, len(places["cached"]))
    slots = sorted(slot for place in places.values() for slot in place)
    if slots != list(range(arena.high_water)):
        raise AccountingError(
            f"arena {arena.number}: each slot below {arena.high_water} should be in one of {places}"
        )
    _equal("directory", arena.directory_bytes, arena.directory_for(arena.high_water))
    registered = sum(arena.number in session.shared for session in cache.sessions.values())
    _equal("sessions that have registered it", arena.sessions, registered)


def _check_pins(arena: Arena) -> dict[Block, int]:
    """How many pins are on each block; each has a place of its own, which has memory."""
    table = arena.pins
    found: dict[Block, int] = {}
    for (owner, block), pin in table.pins.items():
        if (pin.owner, pin.block) != (owner, block) or block.state not in (ADOPTED, SEALED):
            raise AccountingError(f"the pin at place {pin.place} is not of slot {block.slot}")
        found[block] = found.get(block, 0) + 1
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
    return found


def _check_order(tenant: Tenant) -> None:
    """No block is evicted before its children, and the oldest is first; the records say so too."""
    places = places_in(tenant.lru)
    seen: set[Block] = set()
    before = 0
    for block, place in tenant.lru.items():
        for child in block.children:
            if child not in seen:
                raise AccountingError(f"slot {block.slot} would be evicted before its child")
        seen.add(block)
        if place != places[block] or place < before:
            raise AccountingError(
                f"slot {block.slot} was used at {places[block]} by its records, and at {place} by "
                f"its place in the LRU, which comes after {before}"
            )
        before = place


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


def _copies(cache: Cache) -> list[Copying]:
    return [job for job in cache.jobs.values() if isinstance(job, Copying)]


def _wanted_pins(cache: Cache) -> list[WantedPin]:
    """Those that wait for memory, and hold their blocks meanwhile."""
    jobs = [job for job in cache.jobs.values() if isinstance(job, PinsGrowing)]
    return [wanted for job in jobs for wanted in job.wanted]


def _equal(what: str, running: int, recounted: int) -> None:
    if running != recounted:
        raise AccountingError(f"{what}: running total {running}, recounted {recounted}")


def arena_counts(arena: Arena) -> dict[str, int]:
    """Slots by state; they add up to `total`, the slots that have memory."""
    return {
        "free": len(arena.free),
        "filling": arena.filling,
        "active": arena.active,
        "cached": arena.cached,
        "pinned": arena.pinned,
        "total": arena.backed,
    }


def sealed_blocks(arena: Arena) -> list[Block]:
    """What the arena's directory must hold: adopted blocks have their record already."""
    return [block for block in arena.root.below() if block.state in (ADOPTED, SEALED)]


def count_unchecked(cache: Cache) -> int:
    """Blocks that an earlier daemon left and that are not served before they are checked."""
    return sum(block.state is ADOPTED for block in cache.unchecked)


def report_of_pins(cache: Cache, now: float, tenant: Tenant | None = None) -> list[dict[str, Any]]:
    """A row for each pin, of one tenant or (None) of all."""
    arenas = cache.budget.arenas.values() if tenant is None else tenant.arenas
    return [
        {
            "tenant": arena.tenant.name,
            "model": arena.name,
            "owner": pin.owner,
            "tokens": pin.block.end,
            "blocks": -(-pin.block.end // arena.block_tokens),
            "expires_seconds": round(pin.expires - now, 3) if pin.expires else None,
        }
        for arena in arenas
        for pin in arena.pins.pins.values()
    ]


def report_of_sequences(
    cache: Cache, now: float, tenant: Tenant | None = None
) -> list[dict[str, Any]]:
    """A row for each open or waiting sequence, of one tenant or (None) of all."""
    rows: list[dict[str, Any]] = [
        {
            "context": sequence.context.number,
            "seq_id": sequence.seq_id,
            "generation": sequence.generation,
            "state": sequence.state.value,
            "request": sequence.request,
            "client": sequence.context.session.client,
            "pid": sequence.context.session.pid,
            "model": sequence.context.arena.name,
            "tokens": sequence.length,
            "leased_blocks": -(-sequence.leased.end // sequence.context.arena.block_tokens),
            "reserved_blocks": len(sequence.reserved),
            "idle_seconds": round(now - sequence.touched, 3),
        }
        for sequence in cache.sequences()
        if tenant is None or sequence.context.session.tenant is tenant
    ]
    for waiter in cache.waiting:
        session = waiter.context.session
        if tenant is not None and session.tenant is not tenant:
            continue
        rows.append(
            {
                "context": waiter.context.number,
                "seq_id": None,
                "generation": None,
                "state": State.PENDING.value,
                "request": waiter.message.request,
                "client": session.client,
                "pid": session.pid,
                "model": waiter.context.arena.name,
                "tokens": 0,
                "leased_blocks": 0,
                "reserved_blocks": 0,
                "idle_seconds": round(now - waiter.since, 3),
            }
        )
    return rows
