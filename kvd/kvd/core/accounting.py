"""The accounting identities, as code: running totals against a slow recount from the trees.

    budget == unassigned + directories + staging
              + sum over arenas of (free + filling + active + cached), in bytes of stride
    per arena, in slots: backed == free + filling + active + cached, and each is in one place

Nothing can be pinned yet, so the pinned term that reports carry is always 0.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvd.core.budget import Arena
from kvd.core.cache import AllocBacking, Cache, Checking, Copying
from kvd.core.sequences import State
from kvd.core.tree import ADOPTED, FILLING, GONE, SEALED, Block


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
    cached: int
    padding: int
    """Of filling, active and cached: what the stride has beyond a full block's payload."""

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
            + self.cached
        )
        if total != self.budget:
            raise AccountingError(f"budget {self.budget} != {total}, the sum of {self}")


def totals(cache: Cache) -> Totals:
    """The running totals."""
    arenas = cache.budget.arenas.values()
    return Totals(
        budget=cache.budget.n_bytes,
        unassigned=cache.budget.unassigned,
        directory=sum(arena.directory_bytes for arena in arenas),
        staging=cache.budget.staging,
        free=sum(len(arena.free) * arena.stride for arena in arenas),
        filling=sum(arena.filling * arena.stride for arena in arenas),
        active=sum(arena.active * arena.stride for arena in arenas),
        cached=sum(arena.cached * arena.stride for arena in arenas),
        padding=sum(
            (arena.stride - arena.payload_bytes) * (arena.filling + arena.active + arena.cached)
            for arena in arenas
        ),
    )


def check(cache: Cache) -> None:
    """Recount everything and compare with the running totals; raises AccountingError.

    A walk of all trees: for tests and for `kvctl verify`.
    """
    totals(cache).check()
    sessions = [*cache.sessions.values(), *cache.leaving.values()]
    staging = sum(session.staging_bytes for session in sessions)
    _equal("staging", cache.budget.staging, staging)
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
    adopted = 0
    for arena in cache.budget.arenas.values():
        adopted += sum(block.state is ADOPTED for block in arena.root.below())
    unchecked = [block for block in cache.unchecked if block.state is ADOPTED]
    _equal("blocks to check", len(unchecked), adopted)
    cached = 0
    for arena in cache.budget.arenas.values():
        _check_arena(cache, arena, leases)
        cached += arena.cached
    _equal("blocks in the LRU", len(cache.budget.lru), cached)
    _check_order(cache)


def _check_arena(cache: Cache, arena: Arena, leases: dict[Block, int]) -> None:
    places: dict[str, list[int]] = {
        "punched": arena.punched,
        "free": arena.free,
        "filling": _slots_set_aside(cache, arena),
        "active": [],
        "cached": [],
    }
    for block in arena.root.below():
        held = sum(1 for child in block.children if child.holds)
        expected = leases.get(block, 0) + held + (block.state is FILLING) + (block in arena.former)
        _equal(f"holds of slot {block.slot}", block.holds, expected)
        if block.children and block.n_tokens != arena.block_tokens:
            raise AccountingError(f"slot {block.slot} is not full and has children")
        if block.state is FILLING:
            places["filling"].append(block.slot)
        elif block.holds:
            places["active"].append(block.slot)
        else:
            places["cached"].append(block.slot)
            if block not in cache.budget.lru:
                raise AccountingError(f"nobody holds slot {block.slot}, which is not in the LRU")
            if block.is_superseded:
                raise AccountingError(
                    f"nobody holds slot {block.slot}, which a longer one replaced"
                )
    _equal("filling", arena.filling, len(places["filling"]))
    _equal("active", arena.active, len(places["active"]))
    _equal("cached", arena.cached, len(places["cached"]))
    slots = sorted(slot for place in places.values() for slot in place)
    if slots != list(range(arena.high_water)):
        raise AccountingError(
            f"arena {arena.number}: each slot below {arena.high_water} should be in one of {places}"
        )
    _equal("directory", arena.directory_bytes, arena.directory_for(arena.high_water))


def _check_order(cache: Cache) -> None:
    """No block is evicted before its children, nor before what its record says is older."""
    place = {block: index for index, block in enumerate(cache.budget.lru)}
    for block, index in place.items():
        for child in block.children:
            if place.get(child, index) >= index:
                raise AccountingError(f"slot {block.slot} would be evicted before its child")
    places = cache.budget.places()
    for block, later in pairwise(cache.budget.lru):
        if places[block] > places[later]:
            raise AccountingError(
                f"slot {block.slot}, last used at {places[block]}, would be evicted before slot "
                f"{later.slot}, last used at {places[later]}"
            )


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
        elif not isinstance(job, Checking):
            gone = [block for block in job.blocks if block.state is GONE]
            found += [block.slot for block in gone if block.arena is arena]
    return found


def _copies(cache: Cache) -> list[Copying]:
    return [job for job in cache.jobs.values() if isinstance(job, Copying)]


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
        "pinned": 0,
        "total": arena.backed,
    }


def sealed_blocks(arena: Arena) -> list[Block]:
    """What the arena's directory must hold: adopted blocks have their record already."""
    return [block for block in arena.root.below() if block.state in (ADOPTED, SEALED)]


def report_of_sequences(cache: Cache, now: float) -> list[dict[str, Any]]:
    """A row for each open or waiting sequence."""
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
    ]
    for waiter in cache.waiting:
        session = waiter.context.session
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
