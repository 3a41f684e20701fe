"""One picture of kvctl top: lines of text for a terminal of some size. What is in it: samples.py.

kvd 0.1.0, instance default, up 3 h 12 min, answers in 0.31 ms
[bar of the memory by state], what the parts are
hit rate, tokens, blocks and requests a second
models, clients and sequences, as many of each as there is room for
keys
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvd_client.kvctl.samples import Rates, Sample
from kvd_client.kvctl.screen import Size
from kvd_client.kvctl.tables import (
    Column,
    Look,
    bar,
    clean,
    clip,
    count,
    duration,
    percent,
    size,
    table,
    width_of_painted,
)
from kvd_client.kvctl.views import STATE_COLOURS, uses

Row = Mapping[str, Any]

ORDERS = ("memory", "tokens", "idle", "name")
"""Of clients and sequences, by the key that begins each."""
_ROOM_FOR_LEGEND = 16
"""Lines: on a shorter screen what happens is more than what the colours of the bar mean."""
KEYS = "q quit  p pause  m t i n sort  + - pace  h help"
HELP = (
    "q  quit                        p  pause, and go on",
    "m  sort by memory              t  sort by tokens",
    "i  sort by idle time           n  sort by name",
    "+  look more often             -  look less often",
    "h  this help, and back",
    "",
    "Rates and the first hit rate are of the last 10 seconds. Memory",
    "counts what is set aside for the daemon; a block that several",
    "clients lease is in each one's LEASED, and in ALONE if only one",
    "does. kvctl status, clients and seqs have more.",
)


class View(NamedTuple):
    """What is to be seen, and how."""

    sample: Sample | None
    rates: Rates
    error: str = ""
    order: str = ORDERS[0]
    is_paused: bool = False
    wants_help: bool = False
    interval: float = 2.0


def draw(view: View, room: Size, look: Look) -> list[str]:
    """As many lines as there is room for; the last one has the keys."""
    head = _head(view, look, has_legend=room.lines >= _ROOM_FOR_LEGEND)
    keys = look.paint(f"{'PAUSED  ' if view.is_paused else ''}{KEYS}", "dim")
    if view.wants_help:
        lines = [*head[:1], "", *HELP]
    else:
        lines = head[: room.lines - 1]
        lines += _tables(view, room.lines - 1 - len(lines), look)
    lines = lines[: room.lines - 1]
    lines += [""] * (room.lines - 1 - len(lines))
    return [clip(line, room.columns) for line in [*lines, keys]]


def whole(view: View, look: Look) -> str:
    """Everything, however long it is, without keys."""
    lines = [*_head(view, look, has_legend=True), *_tables(view, 1 << 30, look)]
    return "\n".join(clip(line, look.width) for line in lines)


def _head(view: View, look: Look, *, has_legend: bool) -> list[str]:
    sample = view.sample
    lines = []
    if view.error:
        age = f", as of {duration(time.time() - sample.when)} ago" if sample else ""
        lines.append(look.paint(f"no daemon: waiting{age}", "red"))
        lines += _wrapped([clean(view.error)], look.width)
    if sample is None:
        return lines or ["waiting for the first answer"]
    status, rates = sample.status, view.rates
    if not view.error:
        words = [
            look.paint(f"kvd {status['version']}", "bold") + ",",
            f"instance {status['instance']},",
            f"up {duration(status['uptime_seconds'])},",
            f"answers in {sample.round_trip * 1000:.2f} ms",
        ]
        lines += _wrapped(words, look.width)
    accounting = status["accounting"]
    used = uses(accounting, look)
    lines.append(f"[{bar([use.part for use in used], look.width - 2, look)}]")
    legend = [
        f"{look.paint(part.character, part.colour)} {name} {size(part.size)}"
        for part, name, _ in used
    ]
    if has_legend:
        lines += _wrapped([f"memory {size(accounting['budget_bytes'])}:", *legend], look.width)
    drift = accounting["drift_bytes"]
    if drift:
        lines.append(look.paint(f"{size(drift)} off the accounts: see kvctl verify", "red"))
    counters, sequences = status["counters"], status["sequences"]
    a_second = {name: count(round(value)) for name, value in rates.per_second.items()}
    recent = rates.per_second.get("hit_tokens", 0.0), rates.per_second.get("queried_tokens", 0.0)
    stopped = status["stopped_clients"]
    groups = [
        [
            f"hit rate {look.paint(percent(*recent), 'bold')} now,",
            f"{percent(counters['hit_tokens'], counters['queried_tokens'])} since the start",
        ],
        [
            f"tokens/s {a_second['queried_tokens']} asked,",
            f"{a_second['hit_tokens']} hit;",
            f"allocs/s {a_second['allocs']};",
            f"requests/s {a_second['requests']}, {a_second['refused']} refused",
        ],
        [
            f"blocks/s {a_second['stored_blocks']} stored,",
            f"{a_second['evicted_blocks']} evicted;",
            f"sequences {sequences['in_use']} of {sequences['max']},",
            f"{sequences['waiting']} waiting;",
            f"clients {status['clients']}"
            + (look.paint(f", {stopped} stopped", "red") if stopped else ""),
        ],
    ]
    for group in groups:
        lines += _wrapped(group, look.width)
    return lines


def _tables(view: View, room: int, look: Look) -> list[str]:
    """Models, clients and sequences. Those that are short leave room for the others."""
    if view.sample is None:
        return []
    order = ORDERS.index(view.order)
    tables = [
        _models(view.sample.status["models"], look),
        _clients(sorted(view.sample.clients, key=lambda row: _client_keys(row)[order]), look),
        _sequences(sorted(view.sample.sequences, key=lambda row: _seq_keys(row)[order]), look),
    ]
    tables = [each for each in tables if len(each) > 1]
    lines: list[str] = []
    for index, each in enumerate(tables):
        mine = (room - len(lines)) // (len(tables) - index) - 1
        if mine < 2:
            continue
        shown = each[:mine]
        if len(shown) < len(each):
            left = len(each) - len(shown) + 1
            shown[-1] = look.paint(f"and {count(left)} more", "dim")
        lines += ["", *shown]
    return lines


def _models(rows: Sequence[Row], look: Look) -> list[str]:
    columns = (
        Column("MODEL", elastic=True),
        Column("MEMORY", right=True),
        Column("ACTIVE", right=True),
        Column("CACHED", right=True),
        Column("PINNED", right=True),
        Column("FREE", right=True),
        Column("TOKEN", right=True),
    )
    cells = [
        (
            row["name"],
            size(row["blocks"]["total"] * row["stride_bytes"]),
            count(row["blocks"]["active"]),
            count(row["blocks"]["cached"]),
            count(row["blocks"]["pinned"]),
            count(row["blocks"]["free"] + row["blocks"]["filling"]),
            size(row["bytes_per_token"]),
        )
        for row in rows
    ]
    return _fitting(columns, cells, look)


def _clients(rows: Sequence[Row], look: Look) -> list[str]:
    columns = (
        Column("CLIENT", elastic=True),
        Column("PID", right=True),
        Column("LEASED", right=True),
        Column("SEQS", right=True),
        Column("IDLE", right=True),
        Column("ALONE", right=True),
        Column("STAGING", right=True),
        Column("TENANT", elastic=True),
    )
    cells = [
        (
            row["client"],
            row["pid"],
            size(row["leased_bytes"]),
            row["sequences"],
            "stopped" if row["stopped"] else duration(row["idle_seconds"]),
            size(row["alone_bytes"]),
            size(row["staging_bytes"]),
            row["tenant"],
        )
        for row in rows
    ]
    return _fitting(columns, cells, look)


def _sequences(rows: Sequence[Row], look: Look) -> list[str]:
    columns = (
        Column("SEQUENCE", elastic=True),
        Column("TOKENS", right=True),
        Column("STATE", colour_of=lambda state: STATE_COLOURS.get(state, "")),
        Column("IDLE", right=True),
        Column("BLOCKS", right=True),
        Column("MODEL", elastic=True),
        Column("REQUEST", elastic=True),
    )
    cells = [
        (
            f"{row['client']} {'-' if row['seq_id'] is None else row['seq_id']}",
            count(row["tokens"]),
            row["state"],
            duration(row["idle_seconds"]),
            count(row["leased_blocks"] + row["reserved_blocks"]),
            row["model"],
            row["request"],
        )
        for row in rows
    ]
    return _fitting(columns, cells, look)


def _client_keys(row: Row) -> tuple[Any, ...]:
    """One for each of ORDERS."""
    memory = row["leased_bytes"] + row["reserved_bytes"] + row["staging_bytes"]
    return -memory, -row["leased_tokens"], -row["idle_seconds"], row["client"]


def _seq_keys(row: Row) -> tuple[Any, ...]:
    blocks = row["leased_blocks"] + row["reserved_blocks"]
    return -blocks, -row["tokens"], -row["idle_seconds"], row["client"]


def _fitting(columns: Sequence[Column], cells: Sequence[Sequence[object]], look: Look) -> list[str]:
    """A table, without the last columns if there is no room for them; [] without rows."""
    if not cells:
        return []
    for n in range(len(columns), 0, -1):
        lines = table(columns[:n], [row[:n] for row in cells], look).split("\n")
        if max(map(width_of_painted, lines)) <= look.width:
            break
    return lines


def _wrapped(words: Sequence[str], width: int) -> list[str]:
    """Words on as few lines as they fit on."""
    lines: list[str] = []
    for word in words:
        if lines and width_of_painted(lines[-1]) + 1 + width_of_painted(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
