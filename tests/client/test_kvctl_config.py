"""kvctl config and kvctl reload: what they print, for people and for programs, and how they end."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

import kvd_client
import kvd_client.aio
from tests.client.test_kvctl_json import schema, strict
from tests.support import Daemon, running_daemon

COMMAND = [sys.executable, "-m", "kvd_client.kvctl"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kvd.toml"
    path.write_text("max_memory = '16MiB'\n")
    return path


@pytest.fixture
def daemon(file: Path, tmp_path: Path) -> Iterator[Daemon]:
    flags = ("--config", str(file), "--max-pins", "5")
    with running_daemon(*flags, runtime_dir=tmp_path / "run") as running:
        yield running


def kvctl(daemon: Daemon, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [*COMMAND, "--runtime-dir", str(daemon.runtime_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_config_for_people(daemon: Daemon, file: Path) -> None:
    done = kvctl(daemon, "config")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert lines["setting"] == ["value", "default", "from", "change"]
    assert lines["max_pins"] == ["5", "1000", "--max-pins", "reload"]
    assert lines["max_memory"][:2] == ["16MiB", "4GiB"]
    assert lines["instance"][-1] == "restart"
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_config_for_programs(daemon: Daemon, file: Path) -> None:
    done = kvctl(daemon, "config", "--json")
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["settings"]}
    assert rows["max_memory"]["value"] == 16 << 20
    assert rows["max_memory"]["where"] == str(file)
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client:
        assert client.config() == report


def test_reload_tells_what_became_of_each_setting(daemon: Daemon, file: Path) -> None:
    file.write_text("max_memory = '32MiB'\nsocket_group = 0\nmax_pins = 9\n")
    done = kvctl(daemon, "reload")
    assert (done.returncode, done.stderr) == (0, "")
    changed = done.stdout.splitlines()
    assert "max_memory: 16MiB -> 32MiB" in changed
    assert 'socket_group: "" -> 0 needs a restart: the sockets were opened' in done.stdout
    assert "max_pins" not in done.stdout, "the flag is stronger"
    assert changed[-1].endswith("settings are as they were")


def test_a_reload_that_is_refused_is_1_and_says_why(daemon: Daemon, file: Path) -> None:
    file.write_text("max_memroy = 1\nlog_level = 'loud'\n")
    done = kvctl(daemon, "reload")
    assert done.returncode == 1
    head, *errors = done.stdout.splitlines()
    assert head == "nothing was changed:"
    assert len(errors) == 2
    assert errors[0].startswith(f"{file}: max_memroy: there is no setting")
    assert kvctl(daemon, "reload", "--json").returncode == 1


def test_what_is_held_beyond_a_smaller_budget_is_told(daemon: Daemon, file: Path) -> None:
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=2 << 20):
        file.write_text("max_memory = '1MiB'\n")
        done = kvctl(daemon, "reload")
        assert done.returncode == 0
        told = done.stdout.splitlines()[-1]
        assert told.startswith("max_memory is 1.0 MiB, and 2.0 MiB are held: 0 B are being evicted")
        assert kvctl(daemon, "config").stdout.splitlines()[-1] == told
        for command in ("config", "reload"):
            report = json.loads(kvctl(daemon, command, "--json").stdout)
            assert report["beyond"], "it is to be compared with the schema, too"
            jsonschema.validate(report, strict(schema(command)))
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client:
        assert client.reload()["beyond"] == []


async def _ask(daemon: Daemon) -> tuple[object, object]:
    async with kvd_client.aio.connect(daemon.runtime_dir, staging_bytes=0) as client:
        return await client.config(), await client.reload()


def test_asyncio_asks_the_same(daemon: Daemon) -> None:
    import asyncio

    config, reloaded = asyncio.run(_ask(daemon))
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client:
        assert (client.config(), client.reload()) == (config, reloaded)
