"""Why is this prompt not cached? What of it matches, the first block that does not, and why.

What may be the matter with a block that is not found, and what is known of it:

    filling, unchecked    it is in the tree, and not served yet
    evicted               its ghost says when, and why (ghosts.py)
    too_short             it is the prompt's end, and nobody has stored that
    not_known             it was never stored, or is gone for longer than ghosts last

Beside that: whether another model of the same tenant has more of the prompt, and in what it
differs; and, for an administrator alone, whether another tenant has. Everybody else's answer is
made from what is their own tenant's, and so are its steps: neither it nor how long it takes tells
of others.

Nothing is leased and no use is noted. A step is a walk of WALK_BLOCKS at the most.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

from kvd.core.arenas import Arena
from kvd.core.cache import Cache
from kvd.core.events import Effect
from kvd.core.ghosts import Ghost
from kvd.core.holds import WALK_BLOCKS
from kvd.core.sequences import Session
from kvd.core.tasks import Steps, alive, find_tenant
from kvd.core.tenants import Tenant
from kvd.core.tree import ADOPTED, Block, match
from kvd_proto.keys import TOKEN_BYTES, block_key
from kvd_proto.messages import Explain, Reported

MOST_OTHERS = 8
"""Of other models that have more of the prompt: those that have most."""
SHAPE = ("payload_format", "block_tokens")
"""What the daemon itself knows of a fingerprint."""


class Found(NamedTuple):
    """A match: its deepest full block, how many blocks and tokens it has in all."""

    tip: Block
    n_blocks: int
    n_tokens: int


def explain(cache: Cache, session: Session, message: Explain) -> Steps:
    """The report of `explain`; its keys are in PROTOCOL.md."""
    budget, tokens = cache.budget, message.tokens
    tenant = find_tenant(budget, session, message.tenant)
    yield
    arena = tenant.arena_of(message.model)
    found: Found | None = None
    if arena is not None:
        found = yield from _match(arena, tokens)
    n_tokens = found.n_tokens if found else 0
    others: list[dict[str, Any]] = []
    here = dict(message.traits) or (_traits(arena) if arena else {})
    for other in list(tenant.arenas):
        if other is arena:
            continue
        theirs = yield from _match(other, tokens)
        if theirs.n_tokens > n_tokens and other in tenant.arenas:
            others.append(_compare(other, theirs.n_tokens, here))
        yield
    elsewhere = None
    if session.administrator:
        elsewhere = yield from _others_have_more(cache, tenant, message, n_tokens)
    others.sort(key=lambda row: -row["tokens"])
    ghosts, now = tenant.ghosts, budget.journal.now
    dropped = ghosts.arenas.get(message.model)
    counters = cache.counters_of.get(tenant.name)
    complete = ghosts.complete_since
    return Reported(
        {
            "model": arena.name if arena else None,
            "fingerprint": message.model.hex(),
            "tenant": tenant.name,
            "block_tokens": arena.block_tokens if arena else None,
            "asked_tokens": len(tokens) // TOKEN_BYTES,
            "matched_tokens": n_tokens,
            "matched_blocks": found.n_blocks if found else 0,
            "missing": _missing(found, tenant, tokens, now) if found else None,
            "memory_seconds": None if complete is None else round(now - complete, 3),
            "model_dropped_seconds": None if dropped is None else round(now - dropped, 3),
            "sequences_not_stored": counters.sequences_not_stored if counters else 0,
            "others": others[:MOST_OTHERS],
            "another_tenant": elsewhere,
        }
    )


def _match(arena: Arena, tokens: bytes) -> Generator[None, list[Effect], Found]:
    """What an alloc would match."""
    node = arena.root
    block_bytes = arena.block_tokens * TOKEN_BYTES
    while True:
        found = match(node, tokens, block_bytes, WALK_BLOCKS)
        if found.full:
            node = found.full[-1]
        if not found.is_cut:
            n_blocks = node.end // arena.block_tokens + (found.partial is not None)
            return Found(node, n_blocks, found.n_tokens)
        yield
        node = alive(node)


def _others_have_more(
    cache: Cache, tenant: Tenant, message: Explain, n_tokens: int
) -> Generator[None, list[Effect], bool]:
    """Whether another tenant has more of these tokens for this model."""
    for other in list(cache.budget.tenants.values()):
        arena = other.arena_of(message.model) if other is not tenant else None
        if arena is not None:
            found = yield from _match(arena, message.tokens)
            if found.n_tokens > n_tokens:
                return True
            yield
    return False


def _missing(found: Found, tenant: Tenant, tokens: bytes, now: float) -> dict[str, Any] | None:
    """The first block that does not match, and what is known of it. The match may be of an earlier
    step: what has gone since is the same as what was not there."""
    tip = alive(found.tip)
    arena = tip.arena
    start = tip.end
    chunk = tokens[start * TOKEN_BYTES : (start + arena.block_tokens) * TOKEN_BYTES]
    agreed = found.n_tokens - start if tip is found.tip else 0
    length = len(chunk) // TOKEN_BYTES
    if agreed == length:
        return None
    block = _beginning_with(tip, chunk)
    why, ghost, n_evicted = "not_known", None, 0
    if block is not None:
        why = "unchecked" if block.state is ADOPTED else "filling"
    else:
        for n_evicted in range(length, agreed, -1):
            ghost = tenant.ghosts.find(block_key(tip.key, chunk[: n_evicted * TOKEN_BYTES]))
            if ghost is not None:
                why = "evicted"
                break
        else:
            n_evicted = 0
            if length < arena.block_tokens:
                why = "too_short"
    return {
        "block": start // arena.block_tokens,
        "start": start,
        "end": start + length,
        "why": why,
        "tokens": n_evicted,
        **_told(ghost, now),
    }


def _told(ghost: Ghost | None, now: float) -> dict[str, Any]:
    if ghost is None:
        return {"reason": None, "seconds_ago": None}
    return {"reason": ghost.reason.value, "seconds_ago": round(now - ghost.when, 3)}


def _beginning_with(node: Block, chunk: bytes) -> Block | None:
    """A child that has all of these tokens; since none of them matches, none is sealed."""
    child = next(node.since(chunk), None)
    return child if child is not None and child.tokens.startswith(chunk) else None


def _traits(arena: Arena) -> dict[str, str]:
    return {
        **arena.traits,
        "payload_format": arena.format.name,
        "block_tokens": str(arena.block_tokens),
    }


def _compare(other: Arena, n_tokens: int, here: dict[str, str]) -> dict[str, Any]:
    """Another model that has more, and which of its fingerprint's fields differ: of those that both
    have told, if one has told none of its own."""
    there = _traits(other)
    known = all(told.keys() - set(SHAPE) for told in (here, there))
    names = here.keys() | there.keys() if known else here.keys() & there.keys()
    return {
        "model": other.name,
        "fingerprint": other.fingerprint.hex(),
        "tokens": n_tokens,
        "traits_known": known,
        "differs": [
            {"name": name, "here": here.get(name), "there": there.get(name)}
            for name in sorted(names)
            if here.get(name) != there.get(name)
        ],
    }
