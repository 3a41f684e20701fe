"""`kvd config check` and `kvd config show`: what the settings are, and what is wrong with them.

Neither needs a daemon, nor changes anything. What a running daemon uses: `kvctl config`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvd import advice
from kvd.configuration import DEFAULT_FILE, Configuration, Row, load, rows


def add_commands(
    parser: argparse.ArgumentParser, add_settings: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Of `kvd config`. `add_settings` adds `--config` and the flags of all settings."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    checking = commands.add_parser(
        "check",
        help="whether a file is right",
        description="Look for all that is wrong in a file. Exit code 0 if a daemon would start "
        "with it, 2 if not; warnings do not count. Variables KVD_* are left out of it.",
    )
    checking.add_argument(
        "file", nargs="?", type=Path, default=DEFAULT_FILE, metavar="FILE", help=str(DEFAULT_FILE)
    )
    showing = commands.add_parser(
        "show",
        help="every value in effect, and where it comes from",
        description="Every value with which `kvd serve` would start here, given the same flags "
        "and variables, its default, and where it comes from.",
    )
    showing.add_argument("--json", action="store_true", help="print it for programs")
    add_settings(showing)


def check(file: Path) -> int:
    """Say what is wrong with a file; returns the exit code."""
    configuration = load(file, {}, {})
    warnings = [*configuration.warnings, *find_warnings(configuration)]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{file}: right; settings: {len(configuration.origins)}, warnings: {len(warnings)}")
    return 0


def show(configuration: Configuration, *, as_json: bool) -> int:
    """Print every value in effect; returns the exit code."""
    found = rows(configuration)
    if as_json:
        print(json.dumps(report(found), indent=2))
    else:
        print(table(found))
    for warning in configuration.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def run(options: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """One of these commands. Raises BadSetting."""
    if options.what == "check":
        return check(options.file)
    return show(load(options.config, flags), as_json=options.json)


def find_warnings(configuration: Configuration) -> list[str]:
    """What the machine, and the models that the instance has, say to the settings."""
    settings = configuration.settings
    found = advice.of_machine(settings)
    for model in advice.known_models(settings.instance):
        warning = advice.of_model(settings, model, settings.max_memory)
        if warning is not None:
            found.append(warning)
    return found


def report(found: list[Row]) -> dict[str, Any]:
    """The rows for programs."""
    return {"settings": [each._asdict() for each in found]}


def table(found: list[Row]) -> str:
    """The rows for people, in 80 columns unless a value is longer."""
    cells = [("setting", "value", "default", "from")]
    cells += [
        (each.name, each.text, each.default_text, each.where or each.origin) for each in found
    ]
    widths = [max(len(row[index]) for row in cells) for index in range(3)]
    lines = []
    for *first, where in cells:
        aligned = [cell.ljust(width) for cell, width in zip(first, widths, strict=True)]
        lines.append("  ".join([*aligned, where]).rstrip())
    return "\n".join(lines)
