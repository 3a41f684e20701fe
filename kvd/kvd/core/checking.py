"""Checking what an earlier daemon left: before a match could use it, and all of it in the end.

    ArenaFound ──► blocks are ADOPTED ──Check──► the checksum is right: SEALED
                                              └─ it is wrong: gone, with all below

One check of a few MiB is always under way, so that copies of clients, which share the copier's
queue, never wait long. An alloc, or a pin, whose path has unchecked blocks has them checked at
once, and is tried again then. How blocks are adopted: adopting.py.
"""

from kvd.core import pins
from kvd.core.cache import Cache, Checking
from kvd.core.commits import supersede
from kvd.core.events import BlocksDamaged, Check, Checked, CheckItem, Effect
from kvd.core.reasons import Reason
from kvd.core.storing import remove
from kvd.core.tree import ADOPTED, SEALED, Block, unchecked
from kvd_proto.errors import InternalError
from kvd_proto.happenings import Kind
from kvd_proto.keys import TOKEN_BYTES

BATCH_BYTES = 8 << 20
"""Of one check in the background: about 1 ms."""


def check_first(
    cache: Cache, node: Block, tokens: bytes, most: int, effects: list[Effect]
) -> Checking | None:
    """Have all checked that a match of these tokens from `node` on, over `most` blocks, could use.
    With the end of the check that is returned, all of it has been; None: it has been already."""
    if not cache.unchecked:
        return None
    blocks = unchecked(node, tokens, node.arena.block_tokens * TOKEN_BYTES, most)
    if not blocks:
        return None
    new = [block for block in blocks if cache.unchecked[block] is None]
    if new:
        _start(cache, new, effects)
    # Jobs end in their order: with the last one that has a block of the path, all have ended.
    job = cache.jobs[max(cache.unchecked[block] or 0 for block in blocks)]
    assert isinstance(job, Checking)
    return job


def check_next(cache: Cache, effects: list[Effect]) -> None:
    """Check some more, if nothing is being checked."""
    if any(isinstance(job, Checking) for job in cache.jobs.values()):
        return
    batch: list[Block] = []
    gone: list[Block] = []
    n_bytes = 0
    for block in cache.unchecked:
        if block.state is not ADOPTED:
            gone.append(block)  # evicted meanwhile
            continue
        if batch and (n_bytes >= BATCH_BYTES or block.arena is not batch[0].arena):
            break
        batch.append(block)
        n_bytes += block.arena.stride
    for block in gone:
        del cache.unchecked[block]
    if batch:
        _start(cache, batch, effects)


def checked(cache: Cache, job: Checking, event: Checked, effects: list[Effect]) -> None:
    """Seal what has the right checksum; drop what has not, with all below it."""
    damaged = 0
    for block, is_right in zip(job.blocks, event.results, strict=True):
        cache.unchecked.pop(block, None)
        if block.state is not ADOPTED:
            continue  # evicted meanwhile, or below a damaged one
        if is_right:
            _seal(cache, block, effects)
        else:
            damaged += 1
            pins.end_below(cache, block, effects)
            error = InternalError("a block that was left by an earlier daemon is damaged")
            remove(cache, block, error, Reason.DAMAGED, effects)
    if damaged:
        cache.counters.damaged_blocks += damaged
        arena = job.blocks[0].arena
        cache.budget.journal.note(Kind.DAMAGED, arena.tenant.name, arena.name, damaged)
        effects.append(BlocksDamaged(arena.number, damaged))


def _start(cache: Cache, blocks: list[Block], effects: list[Effect]) -> None:
    """Check blocks of one arena."""
    number = cache.new_job(Checking(blocks, [], []))
    items = []
    for block in blocks:
        cache.unchecked[block] = number
        items.append(CheckItem(block.slot, block.arena.format.size(block.n_tokens), block.checksum))
    effects.append(Check(number, blocks[0].arena.number, items))


def _seal(cache: Cache, block: Block, effects: list[Effect]) -> None:
    block.state = SEALED
    block.arena.unchecked -= 1
    supersede(block, cache.budget, effects)
    if not block.is_kept and block.is_superseded:
        cache.budget.drop(block, Reason.SUPERSEDED, effects)
