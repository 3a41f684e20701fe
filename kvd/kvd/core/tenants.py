"""Tenants: what each may take of the budget, what it holds, and in which order it would go.

Does not cover who is of which tenant (kvd.tenants), nor making room (budget.py).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvd.core.eviction import LRU, Policy
from kvd.core.ghosts import Ghosts
from kvd.core.reasons import Reason
from kvd.core.shares import Share, reclaimable
from kvd_proto.errors import OverQuota

if TYPE_CHECKING:
    from kvd.core.arenas import Arena


@dataclass(frozen=True, slots=True)
class TenantRule:
    """What the configuration says of a tenant. `quota` and `minimum` in bytes; a quota of None: the
    whole budget."""

    name: str
    salt: bytes = field(default=b"", repr=False)
    """Roots its block keys. A secret: it is in no report, log, error or directory."""
    quota: int | None = None
    minimum: int = 0


class Tenant:
    """One tenant's part of the budget.

    `held` is the running total of its directories, its backed slots and its sessions' stagings, and
    never more than `quota`. That is `limit`, what the configuration says, or the budget, whichever
    is less; but never less than what is held: resizing.py. `pins` counts those of all its arenas.
    `evictable` has what it has cached, in the order in which it goes.
    """

    def __init__(self, rule: TenantRule, budget: int) -> None:
        self.name = rule.name
        self.salt = rule.salt
        self.limit = rule.quota
        self.held = 0
        self.share = Share(rule.minimum)
        """Of what it holds, all but what counts for a model's minimum."""
        self.staging = 0
        self.pins = 0
        self.arenas: list[Arena] = []
        self.evictable: Policy = LRU()
        self.ghosts = Ghosts()
        self.settle(budget)

    def settle(self, budget: int) -> None:
        """Set the quota in effect, of a budget that is so large."""
        self.has_quota = self.limit is not None and self.limit < budget
        most = self.limit if self.limit is not None and self.limit < budget else budget
        self.quota = max(most, self.held)
        self.reason = Reason.QUOTA if self.has_quota else Reason.ROOM
        """Why a block goes, if it does for want of headroom."""
        self.excess = self.quota - most
        """What it holds beyond what it is to."""

    @property
    def evicted(self) -> dict[Reason, int]:
        """How many of its blocks were ever dropped, by the reason."""
        return self.ghosts.counts

    @property
    def headroom(self) -> int:
        """Bytes that it may still take without giving any back."""
        return self.quota - self.held

    def arena_of(self, fingerprint: bytes) -> "Arena | None":
        """Its arena of this model, if there is one."""
        return next((arena for arena in self.arenas if arena.fingerprint == fingerprint), None)

    @property
    def policies(self) -> list[Policy]:
        """In which order what it has cached goes: its own, and those of its models that there are
        rules for."""
        ruled = [arena.evictable for arena in self.arenas if arena.model is not None]
        return [self.evictable, *ruled]

    def check_quota(self, n_bytes: int, taker: Share, but: "Arena | None" = None) -> None:
        """Raise OverQuota unless it may take `n_bytes` more, if all that may go of its own does for
        `taker`. Without a quota the budget decides, and its errors say more. Mutates nothing."""
        could = self.headroom + reclaimable(self.arenas, taker, but)
        if n_bytes > could and self.has_quota:
            raise OverQuota(
                "the tenant's quota has no room for this",
                tenant=self.name,
                quota_bytes=self.quota,
                held_bytes=self.held,
                asked_bytes=n_bytes,
                available_bytes=could,
            )
