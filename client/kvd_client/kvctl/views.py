"""What kvctl prints for people: each report of the daemon as text. How it is aligned: tables.py."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvd_client.kvctl.tables import (
    Column,
    Look,
    Part,
    bar,
    clean,
    count,
    duration,
    percent,
    size,
    table,
)

Report = Mapping[str, Any]

STATE_COLOURS = {"PROCESSING": "green", "PENDING": "yellow", "TIMED_OUT": "red"}


class _Share(NamedTuple):
    """A use of the budget: the report's key, its name, its look in the bar, what it means."""

    key: str
    name: str
    character: str
    plain: str
    colour: str
    meaning: str


_SHARES = (
    _Share("active_bytes", "active", "█", "#", "green", "blocks that open sequences lease"),
    _Share("pinned_bytes", "pinned", "▉", "P", "magenta", "blocks that are kept on purpose"),
    _Share("cached_bytes", "cached", "▓", "=", "cyan", "blocks that wait to be found or evicted"),
    _Share("filling_bytes", "filling", "▒", "+", "yellow", "reserved, or being written"),
    _Share("free_bytes", "free", "░", "-", "blue", "backed by memory, and empty"),
    _Share("staging_bytes", "staging", "◆", "s", "magenta", "the clients', for what they commit"),
    _Share("directory_bytes", "directory", "◇", "d", "blue", "what the blocks are"),
    _Share("unassigned_bytes", "unassigned", "·", ".", "dim", "not yet asked of the system"),
)


def status(report: Report, look: Look) -> str:
    """Everything about a daemon at a glance."""
    sequences, counters = report["sequences"], report["counters"]
    accounting = report["accounting"]
    drift = accounting["drift_bytes"]
    asked, hit = counters["queried_tokens"], counters["hit_tokens"]
    system = f"{size(accounting['os_bytes'])} in memory, "
    if drift:
        system += look.paint(f"{size(drift)} off the accounts: see kvctl verify", "red")
    else:
        system += "as accounted, to the byte"
    hits = f"{percent(hit, asked)} of {count(asked)} tokens asked for" if asked else "nothing asked"
    failed = count(counters["failed_blocks"])
    lines = [
        f"{look.paint('kvd ' + report['version'], 'bold')}, instance {report['instance']}, "
        f"up {duration(report['uptime_seconds'])}",
        "",
        *_memory(accounting, look),
        "",
        f"system     {system}",
        f"hit rate   {hits}",
        f"blocks     {count(counters['stored_blocks'])} stored, "
        f"{count(counters['present_blocks'])} were there already, "
        f"{count(counters['evicted_blocks'])} evicted, {failed} failed",
        f"sequences  {sequences['in_use']} of {sequences['max']} in use, "
        f"{sequences['waiting']} waiting",
        f"clients    {report['clients']}" + _stopped(report["stopped_clients"], look),
        f"requests   {count(counters['requests'])}, {count(counters['errors'])} refused",
    ]
    if any(row["name"] != "default" for row in report["tenants"]):
        lines += ["", tenants(report["tenants"], look)]
    if report["models"]:
        lines += ["", models(report["models"], look)]
    return "\n".join(lines)


def _stopped(n_clients: int, look: Look) -> str:
    if not n_clients:
        return ""
    return look.paint(f", {n_clients} stopped: see kvctl clients", "red")


def tenants(rows: Sequence[Report], look: Look) -> str:
    """What each tenant holds against its quota."""
    columns = (
        Column("TENANT", elastic=True),
        Column("QUOTA", right=True),
        Column("HELD", right=True),
        Column("", right=True),
        Column("ACTIVE", right=True),
        Column("CACHED", right=True),
        Column("STAGING", right=True),
        Column("CLIENTS", right=True),
        Column("SEQS", right=True),
    )
    cells = [
        (
            row["name"],
            size(row["quota_bytes"]),
            size(row["held_bytes"]),
            percent(row["held_bytes"], row["quota_bytes"]),
            size(row["active_bytes"] + row["pinned_bytes"]),
            size(row["cached_bytes"]),
            size(row["staging_bytes"]),
            row["sessions"],
            row["sequences"],
        )
        for row in rows
    ]
    return table(columns, cells, look)


def models(rows: Sequence[Report], look: Look) -> str:
    """Each model's geometry and blocks."""
    if not rows:
        return "no model is registered"
    columns = (
        Column("MODEL", elastic=True),
        Column("TOKEN", right=True),
        Column("BLOCK", right=True),
        Column("ACTIVE", right=True),
        Column("CACHED", right=True),
        Column("FILLING", right=True),
        Column("FREE", right=True),
        Column("MEMORY", right=True),
    )
    cells = []
    for row in rows:
        blocks = row["blocks"]
        cells.append(
            (
                row["name"],
                size(row["bytes_per_token"]),
                f"{row['block_tokens']} tok",
                count(blocks["active"] + blocks["pinned"]),
                count(blocks["cached"]),
                count(blocks["filling"]),
                count(blocks["free"]),
                size(blocks["total"] * row["stride_bytes"]),
            )
        )
    return table(columns, cells, look)


def sequences(rows: Sequence[Report], look: Look) -> str:
    """Each open or waiting sequence."""
    if not rows:
        return "no sequence is open"
    columns = (
        Column("CLIENT", elastic=True),
        Column("PID", right=True),
        Column("MODEL", elastic=True),
        Column("SEQ", right=True),
        Column("GEN", right=True),
        Column("STATE", colour_of=lambda state: STATE_COLOURS.get(state, "")),
        Column("TOKENS", right=True),
        Column("BLOCKS", right=True),
        Column("IDLE", right=True),
        Column("REQUEST", elastic=True),
    )
    cells = [
        (
            row["client"],
            row["pid"],
            row["model"],
            "-" if row["seq_id"] is None else row["seq_id"],
            "-" if row["generation"] is None else row["generation"],
            row["state"],
            count(row["tokens"]),
            count(row["leased_blocks"] + row["reserved_blocks"]),
            duration(row["idle_seconds"]),
            row["request"],
        )
        for row in rows
    ]
    return table(columns, cells, look)


def clients(report: Report, look: Look) -> str:
    """Each connected client, and what it holds; and if there are tenants, what each holds."""
    rows = report["clients"]
    columns = (
        Column("CLIENT", elastic=True),
        Column("PID", right=True),
        Column("TENANT", elastic=True),
        Column("SEQS", right=True),
        Column("LEASED", right=True),
        Column("ALONE", right=True),
        Column("FILLING", right=True),
        Column("STAGING", right=True),
        Column("SINCE", right=True),
    )
    cells = [
        (
            row["client"],
            row["pid"],
            row["tenant"],
            row["sequences"],
            size(row["leased_bytes"]),
            size(row["alone_bytes"]),
            size(row["reserved_bytes"] + row["filling_bytes"]),
            size(row["staging_bytes"]),
            duration(row["connected_seconds"]),
        )
        for row in rows
    ]
    lines = [table(columns, cells, look)]
    lines += [
        look.paint(f"process {row['pid']} is stopped: it lives, and keeps what it holds", "red")
        for row in rows
        if row["stopped"]
    ]
    lines += ["", _holders(report["tenants"], look)]
    return "\n".join(lines)


def _holders(rows: Sequence[Report], look: Look) -> str:
    """What is held for each tenant's clients. Blocks that several lease count once here."""
    columns = (
        Column("TENANT", elastic=True),
        Column("QUOTA", right=True),
        Column("HELD", right=True),
        Column("ALONE", right=True),
        Column("SHARED", right=True),
        Column("PINNED", right=True),
        Column("CACHED", right=True),
        Column("STAGING", right=True),
    )
    cells = [
        (
            row["name"],
            size(row["quota_bytes"]),
            size(row["held_bytes"]),
            size(row["alone_bytes"]),
            size(row["together_bytes"]),
            size(row["pinned_bytes"]),
            size(row["cached_bytes"]),
            size(row["staging_bytes"]),
        )
        for row in rows
    ]
    return table(columns, cells, look)


def pins(rows: Sequence[Report], look: Look) -> str:
    """Each pin, and how long it stays."""
    if not rows:
        return "nothing is pinned"
    columns = (
        Column("OWNER", elastic=True),
        Column("TENANT", elastic=True),
        Column("MODEL", elastic=True),
        Column("TOKENS", right=True),
        Column("BLOCKS", right=True),
        Column("ENDS IN", right=True),
    )
    cells = [
        (
            row["owner"],
            row["tenant"],
            row["model"],
            count(row["tokens"]),
            count(row["blocks"]),
            "-" if row["expires_seconds"] is None else duration(max(0.0, row["expires_seconds"])),
        )
        for row in rows
    ]
    return table(columns, cells, look)


def verify(report: Report, look: Look) -> str:
    """Whether the recount agrees, and every term of it."""
    if report["ok"]:
        lines = [look.paint("ok", "green") + ": the accounts, the blocks and the system agree"]
    else:
        found = report["differences"]
        plural = "s" if len(found) != 1 else ""
        lines = [look.paint(f"{len(found)} difference{plural}", "red")]
        lines += [f"  {clean(each)}" for each in found]
    columns = (Column("TERM"), Column("BYTES", right=True), Column("", right=True))
    cells = [(name, count(value), size(value)) for name, value in report["terms"].items()]
    return "\n".join([*lines, "", table(columns, cells, look)])


class Use(NamedTuple):
    """A use of the budget that is not 0: its part of the bar, and its name and meaning."""

    part: Part
    name: str
    meaning: str


def uses(accounting: Report, look: Look) -> list[Use]:
    """What the budget is used for, in the order of the bar."""
    return [
        Use(
            Part(
                accounting[share.key],
                share.character if look.unicode else share.plain,
                share.colour,
            ),
            share.name,
            share.meaning,
        )
        for share in _SHARES
        if accounting[share.key]
    ]


def _memory(accounting: Report, look: Look) -> list[str]:
    budget = accounting["budget_bytes"]
    used = uses(accounting, look)
    legend = [
        f"  {look.paint(part.character, part.colour)} {name:<11}"
        f"{size(part.size):>10}  {percent(part.size, budget):>7}  {meaning}"
        for part, name, meaning in used
    ]
    width = min(look.width, 100) - 4
    painted = bar([use.part for use in used], width, look)
    if promised := accounting["promised_bytes"]:
        legend.append(f"    of that, {size(promised)} is promised: what is missing of minima")
    return [f"memory     {size(budget)}", f"  [{painted}]", *legend]
