"""Holds and pins over ancestors: what is leased or pinned is never evicted, and all else is in the
order of its last use.

A lease may cover 31,250 blocks, so it ends from the tail up in steps, between which it is a lease
on what is left of it (`letting_go`). Who needs the room at once does not wait for that.

The records tell this order: a block's place is that of the latest `last_use` of itself and all
below it. So a use is recorded for the deepest block alone, and a block that is dropped leaves its
own to its parent.
"""

from collections import deque

from kvd.core.ages import Ages
from kvd.core.events import Effect, UseRecord
from kvd.core.reasons import Reason
from kvd.core.tree import FILLING, GONE, Block

WALK_BLOCKS = 1024
"""Leased, or let go, at once: in less than a millisecond, before others get their turn."""

_new = tuple.__new__
"""Makes an effect in half the time."""


class Holds:
    """What holds blocks, and the clock of their uses. Part of the budget, which drops blocks."""

    def __init__(self) -> None:
        self.clock = 0
        """Counts uses of blocks. A sealed block's generation is its first use."""
        self.ages = Ages()
        self.letting_go: deque[Block] = deque()
        """Leases that have ended, but for what is left of them."""
        self.allowance = WALK_BLOCKS
        """How many blocks may be let go still before others get their turn: set anew for each
        event."""

    def tick(self) -> int:
        """The clock's next moment."""
        self.clock += 1
        return self.clock

    def begin_moment(self, now: float) -> None:
        """A second has passed since the last moment began: let the clock tell them apart."""
        self.ages.begin(self.clock, now)
        if self.clock:  # else nothing has been used yet
            self.tick()

    def drop(self, block: Block, reason: Reason, effects: list[Effect]) -> None:
        """Forget a cached block, which has no children: its slot is free."""
        raise NotImplementedError

    def hold(self, block: Block) -> None:
        """Keep `block` and all its ancestors. Stops at the first that is held already."""
        node = above = block
        arena = block.arena
        if block.is_listed:
            self.ages.reused(block.used)
        n_cached = n_pinned = 0
        while (parent := node.parent) is not None:
            node.holds += 1
            if node.holds > 1:
                break
            if node.pins:
                n_pinned += 1
            else:
                n_cached += 1
                above = parent
            node = parent
        if n_cached:
            arena.evictable.remove(block, above)
        arena.cached -= n_cached
        arena.pinned -= n_pinned
        arena.active += n_cached + n_pinned
        if n_cached + n_pinned and len(block.tokens) < arena.token_bytes:
            lack = arena.lack_of(block)
            arena.active_lacks += lack
            if block.pins:
                arena.pinned_lacks -= lack
            else:
                arena.cached_lacks -= lack

    def unhold(self, block: Block, effects: list[Effect]) -> None:
        """Undo one `hold`. What nobody holds any more becomes the youngest of the LRU, tail first;
        but not an open tail that a longer block has replaced meanwhile: that goes. What is beyond
        the allowance follows in `let_go_some`."""
        if block.holds == 1 or block in block.arena.former:
            self.use(block, effects)
        self._let_go(block, self.allowance)
        self._drop_superseded(block, effects)

    def pin(self, block: Block) -> None:
        """Keep `block` and all its ancestors, whether they are held or not. Stops at the first that
        is kept already."""
        node: Block | None = block
        arena = block.arena
        while node is not None and node.parent is not None:
            node.pins += 1
            if node.pins > 1:
                return
            if not node.holds:
                arena.evictable.remove(node, node.parent)
                lack = arena.lack_of(node)
                arena.cached -= 1
                arena.cached_lacks -= lack
                arena.pinned += 1
                arena.pinned_lacks += lack
            node = node.parent

    def unpin(self, block: Block, effects: list[Effect]) -> None:
        """Undo one `pin`. It counts as a use until now: what nobody holds or keeps any more becomes
        the youngest of the LRU, tail first."""
        if block.pins == 1 and not block.holds:
            self.use(block, effects)
        node: Block | None = block
        arena = block.arena
        while node is not None and node.parent is not None:
            node.pins -= 1
            if node.pins:
                break
            if not node.holds:
                lack = arena.lack_of(node)
                arena.pinned -= 1
                arena.pinned_lacks -= lack
                arena.cached += 1
                arena.cached_lacks += lack
                arena.evictable.add(node, node.parent, self.clock)
            node = node.parent
        self._drop_superseded(block, effects)

    def _drop_superseded(self, block: Block, effects: list[Effect]) -> None:
        """Drop an open tail that a longer block has replaced, unless somebody keeps it."""
        if block.parent is not None and not block.is_kept and block.is_superseded:
            self.drop(block, Reason.SUPERSEDED, effects)

    def let_go_some(self, effects: list[Effect]) -> None:
        """Go on with leases that have ended, for as many blocks as are allowed now."""
        while self.letting_go and self.allowance > 0:
            self.unhold(self.letting_go.popleft(), effects)

    def let_go_below(self, doomed: set[Block], parent: Block) -> None:
        """Go on with leases that have ended until nothing is left of them in `doomed`, which is all
        that there is below `parent` in one place."""
        for block in [each for each in self.letting_go if each in doomed]:
            self.letting_go.remove(block)
            self.hold(parent)
            self._let_go(block, len(doomed))
            self.letting_go.append(parent)

    def use(self, block: Block, effects: list[Effect]) -> None:
        """A lease on this very block has ended: that enters its record, if it has one, and does not
        say so already (it was sealed just now)."""
        has_record = block.parent is not None and block.state not in (FILLING, GONE)
        if has_record and block.last_use < self.clock:
            self._record_use(block, self.tick(), effects)

    def _record_use(self, block: Block, last_use: int, effects: list[Effect]) -> None:
        block.last_use = last_use
        effects.append(_new(UseRecord, (block.arena.number, block.slot, last_use)))

    def _let_go(self, block: Block, most: int) -> None:
        """Count one `hold` less. What nobody holds any more is pinned, or is cached and was used
        now: `most` blocks, and no more than these from the allowance; what is left is noted."""
        node = above = block
        arena = block.arena
        n_cached = n_pinned = 0
        while (parent := node.parent) is not None:
            if node.holds > 1:
                node.holds -= 1
                break
            if n_cached + n_pinned >= most:
                self.letting_go.append(node)
                break
            node.holds = 0
            if node.pins:
                n_pinned += 1
            else:
                n_cached += 1
                above = parent
            node = parent
        if n_cached:
            arena.evictable.add(block, above, self.clock)
        arena.active -= n_cached + n_pinned
        arena.pinned += n_pinned
        arena.cached += n_cached
        if n_cached + n_pinned and len(block.tokens) < arena.token_bytes:
            lack = arena.lack_of(block)
            arena.active_lacks -= lack
            if block.pins:
                arena.pinned_lacks += lack
            else:
                arena.cached_lacks += lack
        self.allowance -= n_cached + n_pinned
