"""The report of `list_clients`: what each client and each tenant holds, of one moment.

How leased blocks are counted, and why those of all clients do not add up to what is active:
kvd.core.holdings. What is in memory by use, and what the operating system says: reports.py.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvd.core import holdings
from kvd.core.accounting import Totals
from kvd.core.amounts import Amount
from kvd.core.cache import Cache
from kvd.core.sequences import Session
from kvd.reports import settled
from kvd.stopped import Stopped
from kvd.store import Store


class Holders(NamedTuple):
    """A row for each client, and for each tenant."""

    clients: list[dict[str, Any]]
    tenants: list[dict[str, Any]]

    def report(self, tenant: str | None) -> dict[str, Any]:
        """Of one tenant, or (None) of all."""
        return {
            "clients": [row for row in self.clients if tenant in (None, row["tenant"])],
            "tenants": [row for row in self.tenants if tenant in (None, row["name"])],
        }


@dataclass(slots=True)
class _Shares:
    """A tenant's totals, and what of them is its sessions', those that are leaving included."""

    quota: int
    totals: Totals
    sessions: int = 0
    sequences: int = 0
    reserved: Amount = field(default_factory=Amount)
    filling: Amount = field(default_factory=Amount)
    alone: Amount = field(default_factory=Amount)


def take(
    cache: Cache, store: Store, stopped: Stopped, now: float
) -> Generator[None, None, Holders]:
    """Count, in steps, what is held at the moment of the first one."""
    rows = {session: _client(session, stopped, now) for session in cache.sessions.values()}
    shares = {
        tenant.name: _Shares(tenant.quota, settled(tenant, cache, store))
        for tenant in cache.budget.tenants.values()
    }
    for session in [*rows, *cache.leaving.values()]:
        share = shares[session.tenant.name]
        share.sessions += session.alive
        share.sequences += session.open_sequences
        share.reserved.include(session.reserved)
        share.filling.include(session.filling)
    found = yield from holdings.count(cache)
    for session, row in rows.items():
        held = found.of[session]
        row |= {**_amount("leased", held.leased), **_amount("alone", held.alone)}
        shares[session.tenant.name].alone.include(held.alone)
    tenants = [
        _tenant(name, share, found.together.get(name, Amount())) for name, share in shares.items()
    ]
    return Holders(list(rows.values()), tenants)


def _client(session: Session, stopped: Stopped, now: float) -> dict[str, Any]:
    """What costs no walk."""
    return {
        "session": session.id.hex()[:8],
        "client": session.client,
        "pid": session.pid,
        "uid": session.uid,
        "tenant": session.tenant.name,
        "contexts": len(session.contexts),
        "sequences": session.open_sequences,
        "staging_bytes": session.staging_bytes,
        "reserved_blocks": session.reserved.blocks,
        "reserved_bytes": session.reserved.n_bytes,
        **_amount("filling", session.filling),
        "commits_in_flight": len(session.commits),
        "connected_seconds": round(now - session.connected, 3),
        "idle_seconds": round(now - session.heard, 3),
        "stopped": stopped[session.id],
    }


def _tenant(name: str, share: _Shares, together: Amount) -> dict[str, Any]:
    now = share.totals
    sessions_filling = share.reserved.n_bytes + share.filling.n_bytes
    return {
        "name": name,
        "quota_bytes": share.quota,
        "held_bytes": now.backed,
        "sessions": share.sessions,
        "sequences": share.sequences,
        "staging_bytes": now.staging,
        "directory_bytes": now.directory,
        "free_bytes": now.free,
        "reserved_bytes": share.reserved.n_bytes,
        "filling_bytes": share.filling.n_bytes,
        "filling_other_bytes": now.filling - sessions_filling,
        "alone_bytes": share.alone.n_bytes,
        "together_bytes": together.n_bytes,
        "active_other_bytes": now.active - share.alone.n_bytes - together.n_bytes,
        "pinned_bytes": now.pinned,
        "cached_bytes": now.cached,
    }


def _amount(name: str, amount: Amount) -> dict[str, int]:
    return {
        f"{name}_blocks": amount.blocks,
        f"{name}_tokens": amount.tokens,
        f"{name}_bytes": amount.n_bytes,
    }
