"""Minima and caps: how the budget is shared between tenants and models.

A minimum is bytes that stay to a tenant or a model, whatever others need: what is missing of it is
promised, so that nobody else takes it, and what is cached of it is not evicted for others. Each
byte counts for one minimum: that of its model, if that has one, else that of its tenant. So a model
with a minimum stands beside its tenants, and minima add up.

    promised to a share   == max(0, its minimum - what it holds)
    available to a share  == unassigned - what is promised to all others

As long as the minima fit the budget, unassigned is never less than all that is promised: who takes
what is available leaves that, and who gives back n bytes is promised n more at the most. (What an
earlier daemon left may break that at the start; then others give way until it holds.)

A cap is what a tenant (its quota) or a model, over all tenants, may hold. Making room: budget.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvd.core.reasons import Reason
from kvd_proto.errors import OverQuota

if TYPE_CHECKING:
    from kvd.core.arenas import Arena
    from kvd.core.eviction import Policy


_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class ModelRule:
    """What the configuration says of a model, by the name that clients give it. Bytes, over all
    tenants; a `cap` of None: the whole budget."""

    name: str
    minimum: int = 0
    cap: int | None = None


@dataclass(slots=True, eq=False)
class Share:
    """Whose minimum some bytes count for, and how many are `held` of it."""

    minimum: int
    held: int = 0

    @property
    def promised(self) -> int:
        """What is missing of the minimum."""
        return max(0, self.minimum - self.held)

    def spares(self, n_bytes: int) -> bool:
        """Whether it may lose so many to others."""
        return self.held - n_bytes >= self.minimum


class ModelShare:
    """A model that has a rule: `held` by all its arenas together."""

    reason = Reason.QUOTA
    """Why a block goes, if it does for want of headroom."""

    def __init__(self, rule: ModelRule) -> None:
        self.name = rule.name
        self.limit = rule.cap
        self.share = Share(rule.minimum)
        self.held = 0
        self.arenas: list[Arena] = []
        self.settle()

    def settle(self) -> None:
        """Set the cap in effect: resizing.py."""
        self.cap = None if self.limit is None else max(self.limit, self.held)
        self.excess = 0 if self.limit is None else max(0, self.held - self.limit)
        """What it holds beyond what it is to."""

    @property
    def headroom(self) -> int:
        """Bytes that it may still take without giving any back."""
        return _NO_LIMIT if self.cap is None else self.cap - self.held

    @property
    def policies(self) -> "list[Policy]":
        """In which order what it has cached goes, of each tenant."""
        return [arena.evictable for arena in self.arenas]

    def check_cap(self, n_bytes: int, taker: Share, but: "Arena | None" = None) -> None:
        """Raise OverQuota unless it may take `n_bytes` more, if all that may go of it does for
        `taker`, that of the arena `but` left out. Mutates nothing."""
        if self.cap is None:
            return
        could = self.headroom + reclaimable(self.arenas, taker, but)
        if n_bytes > could:
            raise OverQuota(
                "the model's cap has no room for this",
                model=self.name,
                cap_bytes=self.cap,
                held_bytes=self.held,
                asked_bytes=n_bytes,
                available_bytes=could,
            )


def may_lose(loser: Share, taker: Share | None, n_bytes: int) -> bool:
    """Whether `loser` may lose bytes to `taker`. None takes by command, whatever the minima are."""
    return taker is None or loser is taker or not loser.minimum or loser.spares(n_bytes)


def reclaimable(arenas: Iterable["Arena"], taker: Share, but: "Arena | None" = None) -> int:
    """Bytes that may go for `taker`, those of the arena `but` left out. Of others with a minimum so
    many as go for certain, in whole slots, in whatever order."""
    total = 0
    limited: dict[Share, tuple[int, set[int]]] = {}
    for arena in arenas:
        if arena is but:
            continue
        share = arena.share
        if share is taker or not share.minimum:
            total += arena.reclaimable
        elif n_bytes := (len(arena.free) + arena.cached) * arena.stride:
            before, strides = limited.get(share, (0, set()))
            limited[share] = (before + n_bytes, strides | {arena.stride})
    for share, (n_bytes, strides) in limited.items():
        surplus, largest = max(0, share.held - share.minimum), max(strides)
        # If there are several strides, the next one may be of the largest.
        whole = surplus // largest * largest
        sure = whole if len(strides) == 1 else max(0, surplus - largest + 1)
        total += min(n_bytes, sure)
    return total
