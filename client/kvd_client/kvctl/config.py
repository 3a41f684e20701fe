"""kvctl config and reload: the settings of the running daemon, and reading them anew. What a daemon
would start with, and what is wrong with a file: `kvd config`.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from kvd_client.client import Client
from kvd_client.kvctl.answer import FAILED, OK, Answer
from kvd_client.kvctl.command import Command, asking
from kvd_client.kvctl.tables import Column, Look, clean, size, table

_CHANGED, _RESTART = "changed", "needs_restart"


def _config(client: Client, _: argparse.Namespace) -> Answer:
    report = client.config()
    return Answer(report, lambda look: _show_config(report, look))


def _reload(client: Client, _: argparse.Namespace) -> Answer:
    report = client.reload()
    return Answer(report, lambda look: _show_reload(report, look), OK if report["ok"] else FAILED)


def _show_config(report: Mapping[str, Any], look: Look) -> str:
    columns = (
        Column("setting"),
        Column("value", elastic=True),
        Column("default", elastic=True),
        Column("from", elastic=True),
        Column("change"),
    )
    rows = [
        (
            row["name"],
            row["text"],
            row["default_text"],
            row["where"] or row["origin"],
            "restart" if row["restart"] else "reload",
        )
        for row in report["settings"]
    ]
    return "\n".join([table(columns, rows, look), *_beyond(report)])


def _show_reload(report: Mapping[str, Any], look: Look) -> str:
    if not report["ok"]:
        lines = [look.paint("nothing was changed:", "red")]
        return "\n".join([*lines, *(clean(each) for each in report["errors"])])
    lines = [f"warning: {clean(each)}" for each in report["warnings"]]
    for row in report["settings"]:
        name, before, after = (clean(row[key]) for key in ("name", "before", "after"))
        if row["outcome"] == _CHANGED:
            lines.append(f"{look.paint(name, 'bold')}: {before} -> {after}")
        elif row["outcome"] == _RESTART:
            word = look.paint("needs a restart", "yellow")
            lines.append(f"{name}: {before} -> {after} {word}: {clean(row['reason'])}")
    n_unchanged = len(report["settings"]) - len(lines) + len(report["warnings"])
    lines.append(f"{n_unchanged} settings are as they were")
    return "\n".join([*lines, *_beyond(report)])


def _beyond(report: Mapping[str, Any]) -> list[str]:
    """What was made smaller than what is held."""
    return [
        f"{clean(row['name'])} is {size(row['wanted_bytes'])}, and {size(row['held_bytes'])} are "
        f"held: {size(row['evictable_bytes'])} are being evicted, and "
        f"{size(row['beyond_bytes'] - row['evictable_bytes'])} are in use until they are let go"
        for row in report["beyond"]
    ]


COMMANDS = (
    Command(
        "config", "the settings of the running daemon, and where they come from", asking(_config)
    ),
    Command("reload", "let the daemon read its configuration again", asking(_reload)),
)
