"""How blocks go: which go next, and what is told of each that does.

Evictions come in runs: whoever stores a prompt of n blocks into a full cache needs n slots, and the
n blocks that go next are mostly of the same arena. So they go together, and what they have in
common is looked up once. The outcome is that of one after the other.

Why anything has to go, and for whom: budget.py.
"""

import math
from collections.abc import Iterable, Sequence

from kvd.core.ages import SAMPLED
from kvd.core.arenas import Arena
from kvd.core.events import NO_SLOT, DropRecord, Effect
from kvd.core.eviction import Policy
from kvd.core.holds import Holds
from kvd.core.journal import Journal
from kvd.core.reasons import Reason
from kvd.core.shares import Share, may_lose
from kvd.core.tree import ADOPTED, FILLING, GONE, Block
from kvd_proto.happenings import Kind

MOST_AT_ONCE = 256
"""Blocks of a run."""

_new = tuple.__new__
"""Makes an effect in half the time. Each eviction has one."""
_NEVER = math.inf
_ROOM, _SUPERSEDED = Reason.ROOM, Reason.SUPERSEDED
"""To look a member up in an Enum takes as long as to take a block out of its list."""


class Dropping(Holds):
    """Forgets blocks. Part of the budget, which knows what has to go."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal()
        self.evictions = 0
        """Blocks dropped since the start, but those that a longer one has superseded."""

    def drop(self, block: Block, reason: Reason, effects: list[Effect]) -> None:
        """Forget a cached block, which has no children: its slot is free."""
        block.arena.evictable.drop(block)
        self._forget(block.arena, [block], reason, effects)

    def drop_unleased(self, block: Block, reason: Reason, effects: list[Effect]) -> None:
        """Forget a block that has no children and that no sequence leases. If a client of an
        earlier daemon may still read it, its slot is set aside until nobody can."""
        arena = block.arena
        is_read = block in arena.former
        if is_read:
            del arena.former[block]
            self._let_go(block, arena.backed)
        self.drop(block, reason, effects)
        if is_read:
            arena.retired.append(arena.free.pop())
            arena.filling += 1

    def pop_oldest(
        self,
        policies: Iterable[Policy],
        effects: list[Effect],
        reason: Reason = _ROOM,
        taker: Share | None = None,
        for_arena: Arena | None = None,
        most: int = 1,
    ) -> Sequence[Block]:
        """Evict the least recently used block of all `policies` that has no resident children and
        may go for `taker`. If it is of `for_arena`, whose share that is, so do up to `most` that
        come next and are of that arena, too. There is one that may go. Returns them, in their
        order."""
        oldest: Block | None = None
        of_it: Policy | None = None
        until = _NEVER
        for policy in policies:
            head = policy.oldest()
            if (
                head is None
                or head.used >= until
                or (taker is not None and not may_lose(head.arena.share, taker, head.arena.stride))
            ):
                continue
            used = head.used
            if oldest is None:
                oldest, of_it = head, policy
            elif used < oldest.used:
                oldest, of_it, until = head, policy, oldest.used
            else:
                until = used
        assert oldest is not None, "check_room counted it"
        assert of_it is not None
        arena = oldest.arena
        if arena is not for_arena:  # may be more than is wanted
            most = 1
        elif most > MOST_AT_ONCE:
            most = MOST_AT_ONCE
        run: Sequence[Block]
        if most == 1:
            of_it.drop(oldest)
            run = (oldest,)
        else:
            run = of_it.pop(most, arena, until)
        self._forget(arena, run, reason, effects)
        return run

    def _forget(
        self, arena: Arena, blocks: Sequence[Block], reason: Reason, effects: list[Effect]
    ) -> None:
        """Cached blocks of one arena that are struck out of its policy, and have no children but
        those that come before them, are gone: their slots are free."""
        if reason is not _SUPERSEDED:  # whose tokens are all there still
            first = -self.evictions % SAMPLED
            if first < len(blocks):
                for block in blocks[first::SAMPLED]:
                    self.ages.evicted(block, block.used)
            self.evictions += len(blocks)
        number, token_bytes = arena.number, arena.token_bytes
        slots, free = arena.blocks, arena.free
        tenant, journal = arena.tenant, self.journal
        noted = tenant.ghosts.noted(journal.now, reason)
        for block in blocks:
            parent = block.parent
            assert parent is not None
            assert block.family is None, "a parent goes after its children"
            if parent.family is block:  # most often, and without a call
                parent.family = None
            else:
                parent.remove(block)
            last_use = block.last_use
            heir = NO_SLOT
            if (
                parent.last_use < last_use
                and parent.parent is not None
                and parent.state is not FILLING
            ):
                parent.last_use = last_use
                heir = parent.slot
            else:
                last_use = 0
            if block.state is ADOPTED:
                arena.unchecked -= 1
            block.state = GONE
            if len(block.tokens) < token_bytes:
                arena.cached_lacks -= arena.lack_of(block)
            noted.append(block.key_and_checksum)
            slot = block.slot
            free.append(slot)
            slots[slot] = None
            effects.append(_new(DropRecord, (number, slot, heir, last_use)))
        arena.cached -= len(blocks)
        if journal.is_followed:
            for block in blocks:
                values = (reason, block.start, block.n_tokens, block.slot)
                journal.note_frequent(Kind.EVICT, tenant.name, arena.name, *values)
