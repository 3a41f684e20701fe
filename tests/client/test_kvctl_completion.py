"""kvctl completion, asked as a shell asks it: what it offers for a line that is half typed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvd_client.kvctl import completion
from kvd_client.kvctl.main import MODULES, make_parser
from kvd_proto.happenings import Kind
from tests.client.terminal import Terminal

COMMANDS = {command.name for module in MODULES for command in module.COMMANDS}
COMMON = {"-h", "--help", "--runtime-dir", "--instance", "--timeout", "--json"}


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A folder with the script for each shell, as kvctl prints it, and some files."""
    for shell in completion.SHELLS:
        done = subprocess.run(
            [sys.executable, "-m", "kvd_client.kvctl", "completion", shell],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (tmp_path / f"kvctl.{shell}").write_text(done.stdout)
    (tmp_path / "prompt.json").touch()
    (tmp_path / "folder").mkdir()
    return tmp_path


def in_bash(scripts: Path, line: str) -> set[str]:
    """What bash gets for the last word of a line."""
    program = (
        'set -u; source kvctl.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _kvctl; '
        "printf '%s\\n' ${COMPREPLY[@]+\"${COMPREPLY[@]}\"}"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", *line.split(" ")],
        capture_output=True, text=True, check=True, cwd=scripts,
    )  # fmt: skip
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_offers_commands_options_values_and_files(scripts: Path) -> None:
    def bash(line: str) -> set[str]:
        return in_bash(scripts, line)

    assert bash("kvctl ") == COMMANDS
    assert bash("kvctl p") == {"pin", "pins", "ping"}
    assert bash("kvctl -") == {*COMMON, "--version"}
    assert bash("kvctl --instance x stat") == {"status"}
    assert bash("kvctl --json events --ki") == {"--kind"}
    assert bash("kvctl events --kind ") == set(Kind)
    assert bash("kvctl events --kind session-") == {
        "session-opened", "session-refused", "session-gone",
    }  # fmt: skip
    assert {"--model", "--follow", "-f", *COMMON} < bash("kvctl events -")
    assert bash("kvctl completion ") == set(completion.SHELLS)
    assert bash("kvctl completion -") == {"-h", "--help", "--json"}
    assert bash("kvctl pin --model m pro") == {"prompt.json"}
    assert bash("kvctl --runtime-dir ") == {"folder"}
    assert bash("kvctl pin --model ") == set(), "nobody knows"
    assert bash("kvctl status ") == set()


def test_each_command_and_option_is_offered_by_each_shell(scripts: Path) -> None:
    """The three scripts are of one parser; what a name is for stands beside it."""
    for shell in completion.SHELLS:
        script = (scripts / f"kvctl.{shell}").read_text()
        assert script == completion.script_of(make_parser(), shell) + "\n"
        for name in COMMANDS:
            assert name in script
        for name in ("runtime-dir", "kind", "owner", "follow"):
            assert name in script
        assert shell == "bash" or "open and waiting sequences" in script


# --- the other shells, where they are installed; bash is everywhere


def check_fish(scripts: Path, line: str, offered: set[str]) -> None:
    done = subprocess.run(
        ["fish", "-c", f"source kvctl.fish; complete -C '{line}'"],
        capture_output=True, text=True, check=True, cwd=scripts,
        env={**os.environ, "HOME": str(scripts)},
    )  # fmt: skip
    assert {each.split("\t")[0] for each in done.stdout.splitlines()} == offered


def check_zsh(scripts: Path, line: str, offered: set[str]) -> None:
    """On a terminal: zsh answers to nobody else."""
    (scripts / ".zshrc").write_text(
        f"PS1='> '; cd {scripts}; autoload -Uz compinit; compinit -u -D\n"
        "source kvctl.zsh; print rea''dy\n"
    )
    screen = Terminal(["env", f"HOME={scripts}", f"ZDOTDIR={scripts}", "zsh", "-i"])
    try:
        screen.shows("^ready")
        screen.type(f"{line}\t")
        screen.until(lambda text: all(each in text for each in offered))
    finally:
        screen.close()


def check_bash(scripts: Path, line: str, offered: set[str]) -> None:
    assert in_bash(scripts, line) == offered


@pytest.mark.parametrize("shell", [each for each in completion.SHELLS if shutil.which(each)])
def test_each_shell_that_is_here(scripts: Path, shell: str) -> None:
    check = {"bash": check_bash, "zsh": check_zsh, "fish": check_fish}[shell]
    check(scripts, "kvctl ev", {"events", "evict"})
    check(
        scripts,
        "kvctl events --kind session-",
        {"session-opened", "session-refused", "session-gone"},
    )
    check(scripts, "kvctl completion ", set(completion.SHELLS))
    check(scripts, "kvctl pin --own", {"--owner"})
    check(scripts, "kvctl pin --model m pro", {"prompt.json"})
