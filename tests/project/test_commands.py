"""The paper of commands is what the commands say of themselves."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "docs" / "commands.md"


def test_the_paper_is_what_the_commands_say() -> None:
    """In a process of its own, with a width and an environment that must not matter."""
    program = "import commands; print(commands.paper(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'scripts'); {program}"],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "COLUMNS": "33", "KVD_INSTANCE": "another", "KVD_RUNTIME_DIR": "/else"},
    )  # fmt: skip
    assert done.stdout == PAPER.read_text(), "run `make docs`"


def test_it_has_every_command_its_exit_codes_and_no_long_line() -> None:
    text = PAPER.read_text()
    for command in ("kvctl status", "kvctl events", "kvctl top", "kvd serve", "kvd config check"):
        assert f"# {command}\n" in text
    assert text.count("exit codes:") == 2
    blocks = text.split("```")[1::2]
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 80
