"""Adopting what an earlier daemon left: from the records of a directory to a tree of blocks.

A record is taken if its parent is, its key follows from its tokens, and it fits the tree; so what
is below a lost record goes too. What is taken enters the tree as ADOPTED, and is matched only when
its bytes have been checked (checking.py).

The order of last use comes back exactly, over all arenas: the records have it (budget.py). Each
block is leased once to the time before, until no client of the earlier daemon can read the arena
any more; then it takes its old place in the LRU, unless it has been used since, or is pinned. A pin
is taken if its block is, and its time is not over.
"""

from collections.abc import Iterable

from kvd.core import pins, resizing
from kvd.core.arenas import Arena
from kvd.core.cache import Cache
from kvd.core.events import (
    ArenaAdopted,
    ArenaFound,
    ArenaRefused,
    DropPin,
    DropRecord,
    Effect,
    FoundPin,
    FoundRecord,
    Punch,
)
from kvd.core.models import check_models, make_arena
from kvd.core.pins import Pin
from kvd.core.tree import ADOPTED, Block
from kvd_proto.errors import KvdError
from kvd_proto.geometry import Geometry
from kvd_proto.happenings import Kind
from kvd_proto.keys import TOKEN_BYTES, block_key

_LATEST_USE = 1 << 62
"""No clock comes so far: what is beyond was not written by one."""
_LATEST_GENERATION = 1 << 63
"""Beyond: a last use is not covered by a checksum, and whatever was taken for one, the clock that
goes on from it must not make records that the next daemon would not take."""


def adopt(cache: Cache, found: ArenaFound, now: float, effects: list[Effect]) -> None:
    """Take an arena over, or refuse it with the reason. No session is there yet."""
    cache.next_arena = max(cache.next_arena, found.arena + 1)
    try:
        arena = _make(cache, found)
    except (KvdError, ValueError) as error:
        _refuse(cache, found, str(error), effects)
        return
    blocks = _plant(arena, found.records)
    lost = sorted({record.slot for record in found.records} - {block.slot for block in blocks})
    unused = [*lost, *found.unrecorded]
    retired = unused if found.has_readers else []
    slots = [*(block.slot for block in blocks), *retired]
    kept = _find_pinned(found.pins, blocks, now)
    arena.pins.adopt({pin.place for pin in kept})
    beside = arena.directory_for(max(slots, default=-1) + 1) + arena.pins.n_bytes
    # What blocks have too much is evicted, but this stays.
    if not _fits_beside(cache, arena, beside):
        _refuse(cache, found, "its directory does not fit the budget", effects)
        return
    ended = sorted({pin.place for pin in found.pins} - {pin.place for pin in kept})
    effects.extend(DropPin(arena.number, place) for place in ended)
    effects.extend(DropRecord(arena.number, slot) for slot in lost)
    if unused and not retired:
        effects.append(Punch(arena.number, unused))
    budget = cache.budget
    budget.adopt(arena, blocks, retired)
    resizing.settle(budget)  # it may have brought more than there should be
    for pin in kept:
        pins.start(cache, pin)
    cache.unchecked.update(dict.fromkeys(blocks))
    uses = [max(block.last_use, block.generation) for block in blocks]
    budget.clock = max(budget.clock, *uses, 0)
    cache.counters.adopted_blocks += len(blocks)
    budget.journal.note(Kind.ADOPTED, found.tenant, arena.name, len(blocks), len(kept))
    effects.append(
        ArenaAdopted(
            arena.number, len(blocks), arena.records_bytes, arena.pins.n_bytes, arena.root.key
        )
    )
    if not found.has_readers:
        budget.readers_gone(arena, effects)


def _refuse(cache: Cache, found: ArenaFound, reason: str, effects: list[Effect]) -> None:
    cache.budget.journal.note(Kind.NOT_ADOPTED, found.tenant, found.name, reason)
    effects.append(ArenaRefused(found.arena, reason))


def _make(cache: Cache, found: ArenaFound) -> Arena:
    """An empty arena of today's configuration. Raises KvdError or ValueError if the one that was
    found is not of that kind."""
    tenant = cache.budget.tenant(found.tenant)
    check_models(cache, tenant)
    arena = make_arena(
        cache,
        found.arena,
        tenant,
        found.name,
        found.fingerprint,
        Geometry(found.layers),
        found.payload_format,
        found.block_tokens,
        found.slots,
    )
    if arena.stride != found.stride_bytes:
        raise ValueError(f"its slots have {found.stride_bytes} bytes, not {arena.stride}")
    if tenant.arena_of(arena.fingerprint) is not None:
        raise ValueError("there is another arena of the same model and tenant")
    return arena


def _fits_beside(cache: Cache, arena: Arena, n_bytes: int) -> bool:
    """Whether a directory of so many bytes fits the budget and its tenant's quota beside the other
    directories."""
    budget, tenant = cache.budget, arena.tenant
    of_all = sum(each.memory_beside for each in budget.arenas.values())
    of_tenant = sum(each.memory_beside for each in tenant.arenas)
    limit = budget.wanted if tenant.limit is None else min(tenant.limit, budget.wanted)
    return of_all + n_bytes <= budget.wanted and of_tenant + n_bytes <= limit


def _plant(arena: Arena, records: Iterable[FoundRecord]) -> list[Block]:
    """Put the records into the empty tree as far as they fit; the blocks, parents first."""
    by_key = {arena.root.key: arena.root}
    planted: list[Block] = []
    # Newer ones first, should two records be of one block.
    for record in sorted(records, key=lambda each: (each.start, -each.generation)):
        parent = by_key.get(record.parent_key)
        if parent is None or not _fits(record, parent, arena):
            continue
        block = Block(arena, parent, record.tokens, record.key, record.slot)
        block.state = ADOPTED
        block.generation = record.generation
        block.checksum = record.checksum
        block.last_use = _last_use(record)
        parent.add(block)
        by_key[block.key] = block
        planted.append(block)
    return planted


def _fits(record: FoundRecord, parent: Block, arena: Arena) -> bool:
    return (
        record.start == parent.end
        and 0 < len(record.tokens) <= arena.block_tokens * TOKEN_BYTES
        and (parent.parent is None or parent.n_tokens == arena.block_tokens)
        and 0 < record.generation < _LATEST_GENERATION
        and record.slot < arena.slots
        and record.key == block_key(parent.key, record.tokens)
        and parent.child(record.tokens) is None
    )


def _find_pinned(found: Iterable[FoundPin], blocks: Iterable[Block], now: float) -> list[Pin]:
    """The pins whose block is there and whose time is not over, one of each owner and block."""
    by_key = {block.key: block for block in blocks}
    kept: dict[tuple[str, bytes], Pin] = {}
    for place, key, owner, expires in found:
        if key in by_key and (not expires or expires > now):
            kept.setdefault((owner, key), Pin(owner, by_key[key], place, expires))
    return list(kept.values())


def _last_use(record: FoundRecord) -> int:
    return record.last_use if record.last_use < _LATEST_USE else 0
