"""`kvd config check` and `kvd config show`, as somebody runs them."""

import json
import subprocess
import sys
from pathlib import Path

from kvd.configuration import load, rows
from kvd.settings import ABOUT

SALT = "a salt that nobody can guess"


def config(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kvd", "config", *arguments]
    # Nothing of what this machine's user has set.
    path = ":".join(sys.path)
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path, **environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=env)


def test_a_right_file_is_0(tmp_path: Path) -> None:
    file = tmp_path / "kvd.toml"
    file.write_text("max_memory = '64MiB'\nlinger_seconds = '5min'\n")
    done = config("check", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{file}: right; settings: 2, warnings: 0\n"


def test_a_wrong_file_is_2_with_all_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "kvd.toml"
    file.write_text("max_memroy = 1\nlinger_seconds = '5 fortnights'\n")
    done = config("check", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    one, two = done.stderr.splitlines()
    assert one.startswith(f"kvd: {file}: max_memroy: there is no setting")
    assert one.endswith("did you mean max_memory?")
    assert two.startswith(f"kvd: {file}: linger_seconds = '5 fortnights': it is a time from 0")


def test_a_file_that_is_not_there_is_2(tmp_path: Path) -> None:
    done = config("check", str(tmp_path / "none.toml"))
    assert done.returncode == 2
    assert done.stderr == f"kvd: {tmp_path}/none.toml: No such file or directory\n"


def test_a_file_is_checked_without_the_variables_of_whoever_checks(tmp_path: Path) -> None:
    file = tmp_path / "kvd.toml"
    file.write_text("max_memory = '64MiB'\n")
    assert config("check", str(file), KVD_MAX_SESSIONS="none").returncode == 0


def test_too_large_a_budget_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "kvd.toml"
    file.write_text("max_memory = '16383GiB'\n")
    done = config("check", str(file))
    assert done.returncode == 0
    assert "warning: max_memory (16383GiB) is more than /dev/shm has" in done.stderr
    assert "this machine has available" in done.stderr


def test_show_tells_each_value_its_default_and_its_source(tmp_path: Path) -> None:
    file = tmp_path / "kvd.toml"
    file.write_text(f"max_sessions = 50\n[tenants.a]\nuids = [7]\nsalt = '{SALT}'\n")
    file.chmod(0o600)
    flags = ("--config", str(file), "--max-memory", "1GiB")
    done = config("show", *flags, KVD_LOG_LEVEL="debug")
    assert (done.returncode, done.stderr) == (0, "")
    assert SALT not in done.stdout
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert lines["setting"] == ["value", "default", "from"]
    assert lines["max_sessions"] == ["50", "256", str(file)]
    assert lines["max_memory"] == ["1GiB", "4GiB", "--max-memory"]
    assert lines["log_level"] == ["debug", "info", "KVD_LOG_LEVEL"]
    assert lines["max_reserved"] == ["512MiB", "2GiB", "default"]
    assert lines["tenants.a.salt"] == ["(secret)", "none", str(file)]
    assert set(ABOUT) <= set(lines)

    report = json.loads(config("show", *flags, "--json", KVD_LOG_LEVEL="debug").stdout)
    expected = rows(load(file, {"max_memory": "1GiB"}, {"KVD_LOG_LEVEL": "debug"}))
    assert report == {"settings": [row._asdict() for row in expected]}
    assert SALT not in str(report)


def test_show_warns_of_a_variable_that_is_not_read() -> None:
    done = config("show", KVD_MAX_MEMROY="1GiB")
    assert done.returncode == 0
    assert done.stderr == "warning: KVD_MAX_MEMROY is not read: did you mean KVD_MAX_MEMORY?\n"


def test_each_setting_has_a_flag_and_its_default_in_the_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvd", "serve", "--help"], capture_output=True, text=True
    )
    text = " ".join(done.stdout.split())
    for name, about in ABOUT.items():
        if not about.kind.is_table:
            assert f"--{name.replace('_', '-')}" in text
            assert f"{about.meaning} (default: " in text
