"""Which block goes next: what a policy is told and answers, and the one there is, LRU.

A policy orders the blocks of one tenant that may be evicted. It is told of each one that may be
from now on, and of each that may not any more, since it is used again or gone; it answers which one
goes next. Who may be evicted at all: budget.py.

It is told something for each block of each lease, so everything is O(1), in the worst case too: no
table grows. A block carries its own place.

    oldest                                                        youngest
     ends <-> grandchild <-> child <-> parent <-> another one <-> ... <-> ends

It is told of chains: a block and its ancestors, below one that stays as it is. A block is listed
after its children, so whatever the policy, it must answer children before their parents.
"""

import math
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from kvd.core.arenas import Arena
    from kvd.core.tree import Block


class Place:
    """What a block carries for the policy, which alone changes it."""

    __slots__ = ("older", "used", "younger")

    older: "Place"
    younger: "Place"
    used: int
    """When it was used last, if it is listed."""

    @property
    def is_listed(self) -> bool:
        """Whether it may be evicted."""
        return self.older is not NOWHERE


class Policy(Protocol):
    """The order in which one tenant's blocks are evicted."""

    def add(self, block: "Block", above: "Block", used: int) -> None:
        """List `block` and its ancestors below `above`, which may be evicted from now on. They were
        `used` last, not before any other that is listed."""

    def remove(self, block: "Block", above: "Block") -> None:
        """Strike out `block` and its ancestors below `above`, which are listed."""

    def drop(self, block: "Block") -> None:
        """Strike out one that is listed, and is gone."""

    def oldest(self) -> "Block | None":
        """The block that goes next. It stays listed."""

    def pop(self, most: int, arena: "Arena", until: float) -> list["Block"]:
        """Strike out the one that goes next, which is of `arena`, and those that come then, as long
        as they are of `arena` and were used before `until`: at most so many. They are gone."""

    def __iter__(self) -> Iterator["Block"]:
        """All that are listed, in the order in which they go. Nothing may change meanwhile."""


class LRU:
    """The block that was used before all others goes next: the order is that of `add`."""

    def __init__(self) -> None:
        self._ends = Place()
        self._ends.older = self._ends.younger = self._ends

    def add(self, block: "Block", above: "Block", used: int) -> None:
        ends = self._ends
        youngest = ends.older
        node: Block | None = block
        while node is not above:
            assert node is not None, "the chain does not come to its end"
            node.used = used
            node.older = youngest
            youngest.younger = node
            youngest = node
            node = node.parent
        youngest.younger = ends
        ends.older = youngest

    def remove(self, block: "Block", above: "Block") -> None:
        nowhere = NOWHERE
        node: Block | None = block
        while node is not above:
            assert node is not None, "the chain does not come to its end"
            older, younger = node.older, node.younger
            older.younger = younger
            younger.older = older
            node.older = node.younger = nowhere
            node = node.parent

    def drop(self, block: "Block") -> None:
        older, younger = block.older, block.younger
        older.younger = younger
        younger.older = older
        block.older = block.younger = NOWHERE

    def oldest(self) -> "Block | None":
        first = self._ends.younger
        # Not cast: a call, in the way of every eviction.
        return None if first is self._ends else first  # type: ignore[return-value]

    def pop(self, most: int, arena: "Arena", until: float) -> list["Block"]:
        ends = self._ends
        nowhere = NOWHERE
        place: Any = ends.younger  # not cast: a call for each
        popped: list[Block] = []
        for _ in range(most):
            block = place
            popped.append(block)
            place = block.younger
            block.older = block.younger = nowhere
            if place is ends or place.arena is not arena or place.used >= until:
                break
        ends.younger = place
        place.older = ends
        return popped

    def __iter__(self) -> Iterator["Block"]:
        place = self._ends.younger
        while place is not self._ends:
            yield cast("Block", place)
            place = place.younger


def arrange_by_records(policy: Policy) -> None:
    """List all blocks anew, in the order of their last use by the records of each and all below it.
    A walk of all."""
    tails_first = sorted(policy, key=attrgetter("start"), reverse=True)
    used = {block: block.last_use for block in tails_first}
    for block in tails_first:
        above = block.parent
        assert above is not None
        if used.get(above, math.inf) < used[block]:
            used[above] = used[block]
    for block in sorted(tails_first, key=used.__getitem__):  # stable: tails first
        assert block.parent is not None
        policy.remove(block, block.parent)
        policy.add(block, block.parent, used[block])


NOWHERE: Place = Place.__new__(Place)
"""The neighbour of what is not listed."""
