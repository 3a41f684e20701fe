"""What the daemon tells people and scripts: status, and the recount of `verify`. What each client
holds: holders.py.

The core's numbers and the operating system's must be of one moment, though memory is given and
taken back all the time, in the copier's thread. So a report has two halves: `take` reads the core,
on the loop, and `look` asks the operating system, in that thread's queue behind all jobs that were
submitted before. Only when the system refused memory in between do the halves not fit together
(`Store.refusals`).

The recount of `verify` comes before that, in steps between which requests are served (audit.py):
block by block, with its record. What `take` then adds up holds at its moment.

A report is of everything, or of what is one tenant's: whoever may see no more gets its account as
if its quota were the budget.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import psutil

from kvd import __version__
from kvd.arena import PAGE, ByteRange, Segment, byte_ranges
from kvd.audit import Compared, recount_totals
from kvd.core.accounting import Totals, arena_counts, contents, totals
from kvd.core.arenas import Arena
from kvd.core.cache import Cache, Counters, sum_of
from kvd.core.events import SessionId
from kvd.core.reasons import Reason
from kvd.core.sequences import Session
from kvd.core.tenants import Tenant
from kvd.directory import Directory
from kvd.index import Index
from kvd.stopped import is_stopped
from kvd.store import StagingRoom, Store
from kvd.stored import StoredArena

SLOTS_SHOWN = 10
"""Of those that have lost memory."""


@dataclass(frozen=True, slots=True)
class ArenaPages:
    """What memory an arena should have, in bytes, and (of a recount) which of its slots should have
    none."""

    name: str
    tenant: str
    segment: Segment
    directory: Directory
    index: Index
    stride: int
    backed_bytes: int
    directory_bytes: int
    high_water: int
    punched: frozenset[int]

    def holes(self) -> list[ByteRange]:
        """Where no slot has memory; the last one is all that was never used."""
        unused = self.high_water * self.stride
        return [
            *byte_ranges(self.punched, self.stride),
            ByteRange(unused, self.segment.size - unused),
        ]


class StagingPages(NamedTuple):
    """A staging, and whose it is."""

    session: SessionId
    tenant: str
    room: StagingRoom


class ClientProcess(NamedTuple):
    """A session, whose it is, and its process."""

    session: SessionId
    tenant: str
    pid: int


@dataclass(frozen=True, slots=True)
class Taken:
    """The core's half of the reports of one moment."""

    totals: dict[str | None, Totals]
    """Of each tenant that was asked for, by its name; under None, of everything."""
    status: dict[str | None, dict[str, Any]]
    arenas: list[ArenaPages]
    stagings: list[StagingPages]
    clients: list[ClientProcess]
    differences: list[str]
    """Between the core's own totals, its trees, and the directories' records; empty if they were
    not recounted."""


@dataclass(slots=True)
class Seen:
    """The operating system's half, in bytes; `differences` from what the core believes."""

    arenas: int
    directories: int
    stagings: int
    differences: list[str]
    undone: int = 0
    """Foreign fills that were given back: what is told apart from the others."""
    of_tenants: Counter[str] = field(default_factory=Counter)
    """All three together, by the tenant's name."""

    stopped: dict[SessionId, bool | None] = field(default_factory=dict)
    """Whether each client's process is stopped: see kvd.stopped."""

    def total(self, tenant: str | None) -> int:
        """Of one tenant, or (None) of all."""
        if tenant is not None:
            return self.of_tenants[tenant]
        return self.arenas + self.directories + self.stagings


def take(
    cache: Cache,
    store: Store,
    instance: str,
    uptime: float,
    tenants: Iterable[Tenant | None],
    recounted: list[str] | None,
) -> Taken:
    """Read the core, at this moment, for those who may see one of `tenants`, or (None) everything.
    `recounted` are the differences that a recount has found, if there was one."""
    stored = store.arenas
    now: dict[str | None, Totals] = {}
    status: dict[str | None, dict[str, Any]] = {}
    for tenant in tenants:
        key = None if tenant is None else tenant.name
        now[key] = settled(tenant, cache, store)
        status[key] = _status(cache, store, now[key], instance, uptime, tenant)
    sessions = {**cache.sessions, **cache.leaving}
    return Taken(
        totals=now,
        status=status,
        arenas=[
            _pages(arena, stored[arena.number], thoroughly=recounted is not None)
            for arena in cache.budget.arenas.values()
        ],
        stagings=[
            StagingPages(session, sessions[session].tenant.name, room)
            for session, room in store.stagings.items()
        ],
        clients=[
            ClientProcess(session.id, session.tenant.name, session.pid)
            for session in cache.sessions.values()
        ],
        differences=[] if recounted is None else recounted + recount_totals(cache),
    )


def look(taken: Taken, *, undoing: bool) -> Seen:
    """Ask the operating system. With `undoing` it is asked page by page, foreign fills are named,
    and punched out: for the copier's thread, since no other may give or take memory then."""
    seen = Seen(0, 0, 0, [])
    for pages in taken.arenas:
        if undoing:
            _undo_foreign_fills(pages, seen)
        backed = pages.segment.backed_bytes()
        seen.arenas += backed
        seen.of_tenants[pages.tenant] += backed
        seen.differences += _compare(f"{pages.name}: slots", pages.backed_bytes, backed)
        if undoing and backed != pages.backed_bytes:
            seen.differences += _lost_slots(pages)
        backed = pages.directory.segment.backed_bytes() + pages.index.segment.backed_bytes()
        seen.directories += backed
        seen.of_tenants[pages.tenant] += backed
        seen.differences += _compare(
            f"{pages.name}: directory and index", pages.directory_bytes, backed
        )
    for session, tenant, room in taken.stagings:
        backed = room.staging.backed_bytes() if room.staging is not None else 0
        seen.stagings += backed
        seen.of_tenants[tenant] += backed
        seen.differences += _compare(
            f"staging of session {session.hex()[:8]}", room.n_bytes, backed
        )
    # Here, since /proc takes 10 us for each, which the loop has not got.
    seen.stopped = {each.session: is_stopped(each.pid) for each in taken.clients}
    return seen


def status(taken: Taken, seen: Seen, tenant: str | None) -> dict[str, Any]:
    """The map of `kvctl status --json`, of one tenant or (None) of everything; its keys are in
    PROTOCOL.md."""
    report, os_bytes = taken.status[tenant], seen.total(tenant)
    accounting = {
        **report["accounting"],
        "os_bytes": os_bytes,
        "drift_bytes": os_bytes - taken.totals[tenant].backed,
    }
    whose = [each.session for each in taken.clients if tenant in (None, each.tenant)]
    n_stopped = sum(seen.stopped[session] is True for session in whose)
    return {**report, "stopped_clients": n_stopped, "accounting": accounting}


def verify(taken: Taken, seen: Seen, compared: Compared | None) -> dict[str, Any]:
    """The recount: `ok` is whether all agree, `differences` names what does not, `terms` has every
    number. `compared`: if checksums were asked for."""
    differences = taken.differences + seen.differences
    if compared is not None:
        differences += compared.differences
    now = taken.totals[None]
    terms = {
        "budget_bytes": now.budget,
        "unassigned_bytes": now.unassigned,
        "directory_bytes": now.directory,
        "staging_bytes": now.staging,
        "free_bytes": now.free,
        "filling_bytes": now.filling,
        "active_bytes": now.active,
        "pinned_bytes": now.pinned,
        "cached_bytes": now.cached,
        "os_arena_bytes": seen.arenas,
        "os_directory_bytes": seen.directories,
        "os_staging_bytes": seen.stagings,
        "undone_bytes": seen.undone,
        "compared_bytes": 0 if compared is None else compared.n_bytes,
    }
    return {"ok": not differences, "differences": differences, "terms": terms}


def line(cache: Cache) -> str:
    """The state in a few words, for the service manager."""
    budget, counters = cache.budget, _counters(cache, None)
    found = 100 * counters.hit_tokens // max(1, counters.queried_tokens)
    return (
        f"{len(cache.sessions)} clients, {cache.open_sequences} sequences, "
        f"{(budget.n_bytes - budget.unassigned) >> 20} of {budget.n_bytes >> 20} MiB in memory, "
        f"{found} % of {counters.queried_tokens} tokens found"
    )


def _status(
    cache: Cache,
    store: Store,
    now: Totals,
    instance: str,
    uptime: float,
    tenant: Tenant | None,
) -> dict[str, Any]:
    """The status, but for what the operating system says."""
    sessions = _sessions(cache, tenant)
    arenas = cache.budget.arenas.values() if tenant is None else tenant.arenas
    tenants = cache.budget.tenants.values() if tenant is None else [tenant]
    return {
        "version": __version__,
        "instance": instance,
        "uptime_seconds": round(uptime, 3),
        "rss_bytes": psutil.Process().memory_info().rss,
        "clients": len(sessions),
        "sequences": {
            "max": cache.limits.max_sequences,
            "in_use": sum(session.open_sequences for session in sessions),
            "free": max(0, cache.limits.max_sequences - cache.open_sequences),
            "waiting": sum(session.waiting for session in sessions),
        },
        "recovery": {
            "unchecked_blocks": sum(arena.unchecked for arena in arenas),
            "read_from_before": sum(bool(arena.former or arena.retired) for arena in arenas),
        },
        "accounting": {
            "budget_bytes": now.budget,
            "unassigned_bytes": now.unassigned,
            "promised_bytes": cache.budget.promised if tenant is None else tenant.share.promised,
            **_uses(now),
            "padding_bytes": now.padding,
        },
        "tenants": [_tenant(cache, store, each) for each in tenants],
        "models": [_model(arena) for arena in arenas],
        "counters": {
            **asdict(_counters(cache, tenant)),
            **_evicted(tenants),
        },
    }


def _uses(now: Totals) -> dict[str, int]:
    """What is in memory, by use."""
    return {
        "free_bytes": now.free,
        "filling_bytes": now.filling,
        "active_bytes": now.active,
        "cached_bytes": now.cached,
        "pinned_bytes": now.pinned,
        "directory_bytes": now.directory,
        "staging_bytes": now.staging,
    }


def _tenant(cache: Cache, store: Store, tenant: Tenant) -> dict[str, Any]:
    now = settled(tenant, cache, store)
    sessions = _sessions(cache, tenant)
    return {
        "name": tenant.name,
        "quota_bytes": tenant.quota,
        "minimum_bytes": tenant.share.minimum,
        "held_bytes": now.backed,
        **_uses(now),
        "sessions": len(sessions),
        "sequences": sum(session.open_sequences for session in sessions),
    }


def _sessions(cache: Cache, tenant: Tenant | None) -> list[Session]:
    """Those of one tenant, or (None) all."""
    sessions = cache.sessions.values()
    return [each for each in sessions if tenant is None or each.tenant is tenant]


def _counters(cache: Cache, tenant: Tenant | None) -> Counters:
    """Those of one tenant, or (None) the totals."""
    if tenant is not None:
        return cache.counters_of.get(tenant.name, Counters())
    return sum_of([cache.counters, *cache.counters_of.values()])


def _evicted(tenants: Collection[Tenant]) -> dict[str, Any]:
    """How many blocks were dropped, and why."""
    by_reason = {
        reason.value: sum(tenant.evicted[reason] for tenant in tenants) for reason in Reason
    }
    return {"evicted_blocks": sum(by_reason.values()), "evicted": by_reason}


def _model(arena: Arena) -> dict[str, Any]:
    held = contents(arena)
    return {
        "name": arena.name,
        "tenant": arena.tenant.name,
        "fingerprint": arena.fingerprint.hex(),
        "format": arena.format.name,
        "block_tokens": arena.block_tokens,
        "payload_bytes": arena.payload_bytes,
        "stride_bytes": arena.stride,
        "bytes_per_token": arena.geometry.bytes_per_token,
        "minimum_bytes": arena.model.share.minimum if arena.model is not None else 0,
        "cap_bytes": arena.model.cap if arena.model is not None else None,
        "blocks": arena_counts(arena),
        "tokens": held.tokens,
        "bytes": held.bytes,
        "payload": held.payload,
        "padding_bytes": held.padding,
        "open_bytes": held.open,
    }


def settled(tenant: Tenant | None, cache: Cache, store: Store) -> Totals:
    """The totals of one tenant or (None) of everything. What a directory could not get when it was
    to grow is not spent yet, whatever the core has set aside for it: it gets it with the next
    growth."""
    now = totals(cache, tenant)
    owed = sum(
        arena.memory_beside - store.arenas[arena.number].directory_bytes
        for arena in (cache.budget.arenas.values() if tenant is None else tenant.arenas)
    )
    return replace(now, directory=now.directory - owed, unassigned=now.unassigned + owed)


def _pages(arena: Arena, stored: StoredArena, *, thoroughly: bool) -> ArenaPages:
    return ArenaPages(
        arena.name,
        arena.tenant.name,
        stored.segment,
        stored.directory,
        stored.index,
        arena.stride,
        arena.backed * arena.stride,
        stored.directory_bytes,
        arena.high_water,
        frozenset(arena.punched if thoroughly else ()),
    )


def _undo_foreign_fills(pages: ArenaPages, seen: Seen) -> None:
    """Punch out what nobody gave memory, and name it. Reading a hole through a read-only mapping
    fills it. Only holes are looked at: one system call that walks over a GiB of memory keeps a core
    for 15 ms, and the loop with it if it was there."""
    for hole in pages.holes():
        for filled in _punch_filled(pages.segment, hole, pages.stride):
            seen.undone += filled.length
            seen.differences.append(
                f"{pages.name}: {filled.length} bytes of slot {filled.offset // pages.stride} had "
                "memory that "
                "nobody gave them: a client read what it had no lease on. They are given back."
            )
    for hole in pages.directory.holes():
        for filled in _punch_filled(pages.directory.segment, hole, PAGE):
            seen.undone += filled.length
            seen.differences.append(
                f"{pages.name}: {filled.length} bytes at {filled.offset} of its directory had "
                "memory that nobody gave them: some process of this user, or of root's, was there. "
                "They are given back."
            )
    for hole in pages.index.holes():
        for filled in _punch_filled(pages.index.segment, hole, PAGE):
            seen.undone += filled.length
            seen.differences.append(
                f"{pages.name}: {filled.length} bytes at {filled.offset} of its index had memory "
                "that nobody gave them: a client read more than is in use. They are given back."
            )


def _punch_filled(segment: Segment, hole: ByteRange, step: int) -> Iterator[ByteRange]:
    """Punch out what has memory in a hole, which begins at a multiple of `step`, so many bytes at
    once: where they begin, and how many of them had memory."""
    end = hole.offset + hole.length
    found = segment.next_backed(hole.offset)
    while found is not None and found < end:
        start = found // step * step
        before = segment.backed_bytes()
        segment.punch(start, step)
        yield ByteRange(start, before - segment.backed_bytes())
        found = segment.next_backed(start + step)


def _lost_slots(pages: ArenaPages) -> list[str]:
    """The slots that have less memory than they were given."""
    lost = []
    for slot in range(pages.high_water):
        first = slot * pages.stride
        if slot not in pages.punched and pages.segment.next_hole(first) < first + pages.stride:
            lost.append(slot)
    shown = ", ".join(map(str, lost[:SLOTS_SHOWN])) + (", ..." if len(lost) > SLOTS_SHOWN else "")
    return [f"{pages.name}: memory was taken from {len(lost)} slots: {shown}"] if lost else []


def _compare(what: str, given: int, backed: int) -> Iterable[str]:
    if given == backed:
        return []
    return [f"{what}: {given} bytes were given, the system has {backed}"]
