"""Write docs/commands.md: the help of every command, as the commands themselves give it.

Run by `make docs`; tests/project/test_commands.py compares.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "docs" / "commands.md"
HEAD = """# Commands

What `--help` says of each, at 80 columns. Written by `make docs`: change it where the command is.

`kvctl` looks after a running daemon; `kvd` is the daemon. What `--json` prints: [json.md](json.md).
"""


def paper() -> str:
    """The whole text."""
    from kvd.cli import make_parser as make_kvd
    from kvd_client.kvctl.main import make_parser as make_kvctl

    os.environ["COLUMNS"] = "80"
    parts = [HEAD]
    for parser in (make_kvctl(), make_kvd()):
        for level, each in _all(parser, 2):
            text = each.format_help().rstrip()
            parts.append(f"{'#' * level} {each.prog}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def _all(
    parser: argparse.ArgumentParser, level: int
) -> Iterator[tuple[int, argparse.ArgumentParser]]:
    """The parser, and those of its commands."""
    yield level, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _all(each, level + 1)


if __name__ == "__main__":
    PAPER.write_text(paper())
    sys.stdout.write(f"{PAPER.relative_to(ROOT)} is written\n")
