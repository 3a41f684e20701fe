"""The running totals, what must add up, and what is reported from them.

    budget == unassigned + directories + staging
              + sum over arenas of (free + filling + active + pinned + cached), in bytes of stride

That each of the terms is right: recount.py.
"""

from dataclasses import dataclass
from typing import Any

from kvd.core.arenas import Arena
from kvd.core.cache import Cache
from kvd.core.sequences import State
from kvd.core.tenants import Tenant


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


@dataclass(frozen=True, slots=True)
class Contents:
    """What an arena's slots hold, by state: "free" and so on, and "total".

    In bytes: total == free + payload's total + padding + open.
    """

    tokens: dict[str, int]
    bytes: dict[str, int]
    """Of stride."""
    payload: dict[str, int]
    """Bytes of payloads that are stored, or being stored."""
    padding: int
    """What the stride has beyond a full block's payload, of all slots but free ones."""
    open: int
    """What blocks lack to be full, and slots that are set aside."""


def contents(arena: Arena) -> Contents:
    """From the running totals, without a walk."""
    counts = arena_counts(arena)
    blocks = {**counts, "free": 0, "filling": arena.filling_blocks}
    size = arena.format.size
    per_token = size(2) - size(1) if arena.block_tokens > 1 else 0
    beside = size(1) - per_token
    lacks = {
        "active": arena.active_lacks,
        "pinned": arena.pinned_lacks,
        "cached": arena.cached_lacks,
    }
    states = ("free", "filling", "active", "cached", "pinned")
    tokens = {state: blocks[state] * arena.block_tokens - lacks.get(state, 0) for state in states}
    tokens["filling"] = arena.filling_tokens
    payload = {state: blocks[state] * beside + tokens[state] * per_token for state in states}
    for each in (tokens, payload):
        each["total"] = sum(each.values())
    used = counts["total"] - counts["free"]
    return Contents(
        tokens,
        {state: count * arena.stride for state, count in counts.items()},
        payload,
        used * (arena.stride - arena.payload_bytes),
        used * arena.payload_bytes - payload["total"],
    )


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
            "state": sequence.state,
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
                "state": State.PENDING,
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
