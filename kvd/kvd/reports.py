"""What the daemon tells people and scripts: status, clients, and the recount of `verify`.

Taken while no job is under way (Store.hold), so that the operating system's numbers and the core's
are of one moment. Nothing here changes anything.
"""

from typing import Any

from kvd import __version__
from kvd.core.accounting import AccountingError, Totals, arena_counts, check, sealed_blocks, totals
from kvd.core.budget import Arena
from kvd.core.cache import Cache
from kvd.store import Store, StoredArena


def status(cache: Cache, store: Store, instance: str, uptime: float) -> dict[str, Any]:
    """The map of `kvctl status --json`; its keys are in PROTOCOL.md."""
    now = totals(cache)
    os_bytes = _os_bytes(store)
    counters = cache.counters
    return {
        "version": __version__,
        "instance": instance,
        "uptime_seconds": round(uptime, 3),
        "clients": len(cache.sessions),
        "sequences": {
            "max": cache.limits.max_sequences,
            "in_use": cache.open_sequences,
            "free": cache.limits.max_sequences - cache.open_sequences,
            "waiting": len(cache.waiting),
        },
        "accounting": {
            "budget_bytes": now.budget,
            "unassigned_bytes": now.unassigned,
            "free_bytes": now.free,
            "filling_bytes": now.filling,
            "active_bytes": now.active,
            "cached_bytes": now.cached,
            "pinned_bytes": 0,
            "padding_bytes": now.padding,
            "directory_bytes": now.directory,
            "staging_bytes": now.staging,
            "os_bytes": os_bytes,
            "drift_bytes": os_bytes - now.backed,
        },
        "models": [_model(arena) for arena in cache.budget.arenas.values()],
        "counters": {
            "requests": counters.requests,
            "errors": counters.errors,
            "queried_tokens": counters.queried_tokens,
            "hit_tokens": counters.hit_tokens,
            "stored_blocks": counters.stored_blocks,
            "stored_bytes": counters.stored_bytes,
            "present_blocks": counters.present_blocks,
            "joined_blocks": counters.joined_blocks,
            "failed_blocks": counters.failed_blocks,
            "evicted_blocks": cache.budget.evicted_blocks,
            "sequences_opened": counters.sequences_opened,
            "sequences_timed_out": counters.sequences_timed_out,
            "sessions_opened": counters.sessions_opened,
        },
    }


def clients(cache: Cache, now: float) -> dict[str, Any]:
    """A row for each session, and what it holds."""
    rows = []
    for session in cache.sessions.values():
        sequences = [seq for context in session.contexts.values() for seq in context.open.values()]
        rows.append(
            {
                "session": session.id.hex()[:8],
                "client": session.client,
                "pid": session.pid,
                "uid": session.uid,
                "tenant": session.tenant,
                "contexts": len(session.contexts),
                "sequences": len(sequences),
                "leased_blocks": len(_leased(sequences)),
                "staging_bytes": session.staging_bytes,
                "commits_in_flight": len(session.commits),
                "connected_seconds": round(now - session.connected, 3),
            }
        )
    return {"clients": rows}


def verify(cache: Cache, store: Store) -> dict[str, Any]:
    """Recount everything: the core's trees, the directories' records, the operating system's pages.

    `ok` is whether all agree; `differences` names what does not, `terms` has every number.
    """
    differences: list[str] = []
    try:
        check(cache)
    except AccountingError as error:
        differences.append(f"core: {error}")
    now = totals(cache)
    for number, arena in cache.budget.arenas.items():
        differences += _verify_records(arena, store.arenas[number])
        differences += _verify_pages(arena, store.arenas[number])
    for session, staging in store.stagings.items():
        if staging.backed_bytes() != staging.size:
            differences.append(
                f"staging of session {session.hex()[:8]}: {staging.size} bytes were given, the "
                f"system has {staging.backed_bytes()}: its owner has punched holes"
            )
    os_bytes = _os_bytes(store)
    if os_bytes != now.backed:
        differences.append(
            f"system: {os_bytes} bytes are backed, {now.backed} are accounted for: "
            f"budget {now.budget} - unassigned {now.unassigned}"
        )
    return {"ok": not differences, "differences": differences, "terms": _terms(now, store)}


def _terms(now: Totals, store: Store) -> dict[str, Any]:
    return {
        "budget_bytes": now.budget,
        "unassigned_bytes": now.unassigned,
        "directory_bytes": now.directory,
        "staging_bytes": now.staging,
        "free_bytes": now.free,
        "filling_bytes": now.filling,
        "active_bytes": now.active,
        "cached_bytes": now.cached,
        "os_arena_bytes": sum(each.segment.backed_bytes() for each in store.arenas.values()),
        "os_directory_bytes": sum(
            each.directory.segment.backed_bytes() for each in store.arenas.values()
        ),
        "os_staging_bytes": sum(each.backed_bytes() for each in store.stagings.values()),
    }


def _os_bytes(store: Store) -> int:
    segments = sum(
        stored.segment.backed_bytes() + stored.directory.segment.backed_bytes()
        for stored in store.arenas.values()
    )
    return segments + sum(staging.backed_bytes() for staging in store.stagings.values())


def _model(arena: Arena) -> dict[str, Any]:
    return {
        "name": arena.name,
        "tenant": arena.tenant,
        "fingerprint": arena.fingerprint.hex()[:16],
        "format": arena.format.name,
        "block_tokens": arena.block_tokens,
        "payload_bytes": arena.payload_bytes,
        "stride_bytes": arena.stride,
        "bytes_per_token": arena.geometry.bytes_per_token,
        "blocks": arena_counts(arena),
    }


def _leased(sequences: list[Any]) -> set[Any]:
    """The different blocks that these sequences lease, ancestors included."""
    blocks = set()
    for sequence in sequences:
        node = sequence.leased
        while node.parent is not None and node not in blocks:
            blocks.add(node)
            node = node.parent
    return blocks


def _verify_records(arena: Arena, stored: StoredArena) -> list[str]:
    """The directory must hold exactly the sealed blocks."""
    found = stored.directory.records()
    differences = []
    for block in sealed_blocks(arena):
        record = found.pop(block.slot, None)
        if record is None:
            differences.append(f"{arena.name}: slot {block.slot} is sealed and has no record")
        elif (record.key, record.tokens, record.generation, record.checksum) != (
            block.key,
            block.tokens,
            block.generation,
            block.checksum,
        ):
            differences.append(f"{arena.name}: the record of slot {block.slot} is of another block")
    differences += [f"{arena.name}: slot {slot} has a record and no block" for slot in found]
    return differences


def _verify_pages(arena: Arena, stored: StoredArena) -> list[str]:
    """Exactly the slots that count as backed must have memory."""
    stride = arena.stride
    without = {*arena.punched, *range(arena.high_water, arena.slots)}
    differences = []
    for span in stored.segment.backed_ranges():
        first, last = span.offset // stride, (span.offset + span.length - 1) // stride
        strangers = [slot for slot in range(first, last + 1) if slot in without]
        differences += [
            f"{arena.name}: slot {slot} has memory that nobody accounts for: a client has read "
            "what it had no lease on"
            for slot in strangers
        ]
    accounted = arena.backed * stride
    backed = stored.segment.backed_bytes()
    if backed != accounted:
        differences.append(
            f"{arena.name}: {arena.backed} slots of {stride} bytes are {accounted}, the system "
            f"has {backed}"
        )
    return differences
