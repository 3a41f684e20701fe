"""The accounting identities, as code: running totals against a slow recount from the trees.

    budget == unassigned + directories + staging + sum over arenas of (free + filling + active +
    cached) per arena, in slots: backed == free + filling + active + cached, and no slot is in two
    places

Nothing can be pinned yet, so the pinned term that reports carry is always 0.
"""

from dataclasses import dataclass
from typing import Any

from kvd.core.budget import Arena
from kvd.core.cache import AllocBacking, AppendBacking, Cache, Copying
from kvd.core.commits import blocks_of
from kvd.core.tree import FILLING, GONE, NO_SLOT, SEALED, Block


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
    """Of filling, active and cached: what the stride has beyond the payload's exact size."""

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
    staging = sum(
        session.staging_bytes for session in (*cache.sessions.values(), *cache.leaving.values())
    )
    _equal("staging", cache.budget.staging, staging)
    _equal("open sequences", cache.open_sequences, len(cache.sequences()))
    lru = list(cache.budget.lru)
    _equal(
        "blocks in the LRU", len(lru), sum(arena.cached for arena in cache.budget.arenas.values())
    )
    place = {block: index for index, block in enumerate(lru)}
    for block in lru:
        for child in block.children:
            if child not in place or place[child] > place[block]:
                raise AccountingError(f"slot {block.slot} would be evicted before its child")
    leases: dict[Block, int] = {}
    for sequence in cache.sequences():
        leases[sequence.leased] = leases.get(sequence.leased, 0) + 1
    for arena in cache.budget.arenas.values():
        _check_arena(cache, arena, leases)


def _check_arena(cache: Cache, arena: Arena, leases: dict[Block, int]) -> None:
    filling, active, cached = set[int](), set[int](), set[int]()
    for block in blocks_of(arena):
        holding = sum(1 for child in block.children if child.holds or child.state is FILLING)
        expected = leases.get(block, 0) + holding + (block.state is FILLING)
        _equal(f"holds of slot {block.slot}", block.holds, expected)
        if block.children and block.n_tokens != arena.block_tokens:
            raise AccountingError(f"slot {block.slot} is not full and has children")
        if block.state is FILLING:
            filling.add(block.slot)
        elif block.holds:
            active.add(block.slot)
        else:
            cached.add(block.slot)
    for sequence in cache.sequences():
        if sequence.context.arena is arena:
            filling.update(sequence.reserved)
            if sequence.leased.state is GONE:
                raise AccountingError(f"sequence {sequence.seq_id} leases a block that is gone")
    filling.update(_slots_of_jobs(cache, arena))
    places = [list(range(arena.high_water, arena.slots)), arena.punched, arena.free]
    slots = [slot for place in places for slot in place] + [*filling, *active, *cached]
    _equal(f"slots of arena {arena.number}", arena.slots, len(slots))
    _equal(f"different slots of arena {arena.number}", arena.slots, len(set(slots)))
    _equal("filling", arena.filling, len(filling))
    _equal("active", arena.active, len(active))
    _equal("cached", arena.cached, len(cached))


def _slots_of_jobs(cache: Cache, arena: Arena) -> set[int]:
    """Slots that only a job of the shell still knows: their blocks are gone, or are to come."""
    found = set[int]()
    for job in cache.jobs.values():
        if isinstance(job, AllocBacking):
            if job.sequence.context.arena is arena:
                found.update(job.slots)
        elif isinstance(job, AppendBacking | Copying):
            found.update(
                block.slot
                for block in job.blocks
                if block.arena is arena and block.state is GONE and block.slot != NO_SLOT
            )
    return found


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
    """What the arena's directory must hold."""
    return [block for block in blocks_of(arena) if block.state is SEALED]


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
                "state": "PENDING",
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
