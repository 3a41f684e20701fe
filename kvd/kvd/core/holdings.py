"""What each session holds, and what several hold together.

Covers the count of leased blocks, which goes in steps, since sessions may lease many. Yet it is of
one moment, that of its first step, whatever happens after it: what a sequence leased then follows
from its deepest block, since no block ever gets another parent; and whether a block was sealed
then, from its generation.

    active == leased by one session alone + leased by several + other
    filling == reserved by sessions + filled by sessions + other

Blocks that several sessions lease are counted for each of them, so what sessions lease does not add
up to what is active: `alone` and `together` do. Other: what ended leases have not given back yet,
what filling blocks rest on, what clients of an earlier daemon may still read; and slots that a
session which has left had set aside, until the shell is done with them.
"""

from collections.abc import Generator
from dataclasses import dataclass, field

from kvd.core.amounts import Amount
from kvd.core.cache import Cache
from kvd.core.sequences import Session
from kvd.core.tree import Block

STEP_BLOCKS = 512
"""Counted at once, for 0.6 us each."""


@dataclass(slots=True)
class Holding:
    """What one session has: `leased` are different blocks, `alone` those of them that no other
    session leases."""

    leased: Amount = field(default_factory=Amount)
    alone: Amount = field(default_factory=Amount)


@dataclass(slots=True)
class Holdings:
    """Of all sessions. `together` has, by the tenant's name, what several of them lease, each block
    counted once."""

    of: dict[Session, Holding]
    together: dict[str, Amount]


def count(cache: Cache) -> Generator[None, None, Holdings]:
    """Count in steps of STEP_BLOCKS, as of the moment of the first one."""
    held = {session: Holding() for session in cache.sessions.values()}
    together = {name: Amount() for name in cache.budget.tenants}
    now = cache.budget.clock
    leased = [
        (session, sequence.leased)
        for session in held
        for context in session.contexts.values()
        for sequence in context.open.values()
    ]
    lessee: dict[Block, Session | None] = {}
    """Who leases a block; None: several."""
    seen: set[Block] = set()
    of: Session | None = None
    n_walked = 0
    for session, block in leased:
        if session is not of:
            of = session
            seen = set()
        node = block
        while node.parent is not None and node not in seen:
            seen.add(node)
            if 0 < node.generation <= now:
                _count(node, session, held, together, lessee)
            node = node.parent
            n_walked += 1
            if n_walked == STEP_BLOCKS:
                n_walked = 0
                yield
    return Holdings(held, together)


def _count(
    node: Block,
    session: Session,
    held: dict[Session, Holding],
    together: dict[str, Amount],
    lessee: dict[Block, Session | None],
) -> None:
    n_tokens, stride = node.n_tokens, node.arena.stride
    held[session].leased.add(1, n_tokens, stride)
    if node not in lessee:
        lessee[node] = session
        held[session].alone.add(1, n_tokens, stride)
    elif (first := lessee[node]) is not None:
        lessee[node] = None
        held[first].alone.add(-1, -n_tokens, stride)
        together[node.arena.tenant.name].add(1, n_tokens, stride)
