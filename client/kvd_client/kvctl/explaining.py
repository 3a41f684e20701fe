"""kvctl explain: why a prompt is not cached, in words."""

import argparse
from typing import Any

from kvd_client.client import Client
from kvd_client.kvctl.answer import Answer
from kvd_client.kvctl.command import Command, asking
from kvd_client.kvctl.prompts import FILE_HELP, MODEL_HELP, find_model, read_tokens
from kvd_client.kvctl.tables import Look, clean, count, duration

_WHY = {
    "filling": "it is being stored at this moment",
    "unchecked": "an earlier daemon left it, and it is checked before it is served: the next alloc "
    "waits for that",
    "too_short": "it is shorter than a block, and nobody has stored it as an open tail",
}
_REASONS = {
    "room": "there was no room in the budget, and it was unused for longest",
    "quota": "its tenant's quota had no room, and it was unused for longest",
    "reduced": "the budget, or its tenant's quota, was made smaller",
    "command": "somebody asked for it",
    "superseded": "a longer block took its place",
    "damaged": "its bytes, or those of a block before it, had changed while no daemon ran",
    "orphaned": "a block before it could not be stored",
    "arena": "its model gave way to another",
}
_FINGERPRINT_SHOWN = 12
"""Hex digits: enough to be given as --model."""


def _explain(client: Client, options: argparse.Namespace) -> Answer:
    model = find_model(client, options.model)
    tenant = model.whose(options.tenant)
    tokens = read_tokens(options.file)
    report = client.explain(model.fingerprint, tokens, tenant=tenant)
    return Answer(report, lambda look: text(report, look))


def text(report: dict[str, Any], look: Look) -> str:
    """The report of `explain` for people."""
    asked, matched = report["asked_tokens"], report["matched_tokens"]
    if report["model"] is None:
        lines = [f"tenant {report['tenant']} has no model of this fingerprint"]
    elif not matched:
        lines = [f"none of {count(asked)} tokens is cached"]
    else:
        blocks = report["matched_blocks"]
        lines = [
            f"{count(matched)} of {count(asked)} tokens are cached, in {count(blocks)} "
            f"block{'s' if blocks != 1 else ''} of {count(report['block_tokens'])}"
        ]
    if report["missing"]:
        lines += _missing(report, report["missing"])
    if report["model_dropped_seconds"] is not None:
        ago = duration(report["model_dropped_seconds"])
        lines.append(f"all blocks of this model went {ago} ago, when it gave way to another")
    for row in report["others"]:
        lines += _other(row)
    if report["another_tenant"]:
        lines.append("another tenant has more of these tokens; tenants do not share")
    return "\n".join(clean(line) for line in lines)


def _missing(report: dict[str, Any], missing: dict[str, Any]) -> list[str]:
    start, end, why = missing["start"], missing["end"], missing["why"]
    lines = [f"block {count(missing['block'])} is not: tokens {count(start)} to {count(end - 1)}"]
    if why == "evicted":
        ago = duration(missing["seconds_ago"])
        lines.append(f"  it was evicted {ago} ago: {_REASONS[missing['reason']]}")
        if missing["tokens"] < end - start:
            lines.append(f"  {count(missing['tokens'])} of its tokens had been stored")
    elif why == "not_known":
        memory = report["memory_seconds"]
        since = "the daemon's start" if memory is None else f"{duration(memory)} ago"
        lines.append(f"  it was never stored, or was gone before {since}")
    else:
        lines.append(f"  {_WHY[why]}")
    if why in ("not_known", "too_short") and (n := report["sequences_not_stored"]):
        lines.append(
            f"  {count(n)} sequence{'s' if n != 1 else ''} since then asked that nothing is stored"
        )
    return lines


def _other(row: dict[str, Any]) -> list[str]:
    """Another model that has more."""
    name = f"{row['model']} {row['fingerprint'][:_FINGERPRINT_SHOWN]}"
    lines = [f"another model, {name}, has {count(row['tokens'])} of these tokens; it differs in"]
    lines += [
        f"  {each['name']}: {_value(each['there'])} there, {_value(each['here'])} here"
        for each in row["differs"]
    ]
    if not row["traits_known"]:
        lines.append("  what its client, or this one's, has not told since the daemon's start")
    return lines


def _value(text: str | None) -> str:
    return "none" if text is None else text or '""'


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="NAME", help=MODEL_HELP)
    command.add_argument(
        "--tenant", default="", metavar="NAME", help="as this tenant's clients would find it"
    )
    command.add_argument("file", nargs="?", default="-", metavar="FILE", help=FILE_HELP)


COMMANDS = (
    Command(
        "explain",
        "how much of a prompt is cached, and why not the rest",
        asking(_explain),
        _add_options,
    ),
)
