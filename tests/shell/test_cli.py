"""`kvd serve` as the system sees it: exit codes, readiness, signs of life, and its end."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shell.raw import raw_client
from tests.support import Daemon, start_daemon


def kvd(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kvd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--max-memory", "lots"], "max_memory = 'lots'"),
        (["serve", "--instance", "A B"], "instance = 'A B'"),
        (["serve", "--config", "/nowhere/kvd.toml"], "No such file"),
        (["serve", "--frobnicate"], "unrecognized arguments"),
        ([], "COMMAND"),
    ],
)
def test_bad_usage_is_2_and_says_why(arguments: list[str], message: str) -> None:
    done = kvd(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_runtime_directory_of_another_kind_is_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = kvd("serve", "--instance", "test-cli-1", "--runtime-dir", str(tmp_path / "file"))
    assert done.returncode == 1
    assert "file" in done.stderr


def test_version() -> None:
    assert kvd("--version").stdout.startswith("kvd ")


class Manager:
    """What a service manager hears of a daemon."""

    def __init__(self, path: Path, **environ: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path / "notify"))
        self.socket.settimeout(20)
        command = [sys.executable, "-m", "kvd", "serve", "--instance", "test-cli-notify"]
        command += ["--runtime-dir", str(path / "rt"), "--log-level", "error"]
        environ = {**os.environ, "NOTIFY_SOCKET": str(path / "notify"), **environ}
        self.process = subprocess.Popen(command, env=environ)

    def wait_for(self, beginning: str) -> str:
        while not (heard := self.socket.recv(4096).decode()).startswith(beginning):
            pass
        return heard

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    started = Manager(tmp_path, WATCHDOG_USEC="200000")
    yield started
    started.close()


def test_readiness_status_signs_of_life_and_the_end_are_told(manager: Manager) -> None:
    manager.wait_for("READY=1")
    assert "0 clients, 0 sequences" in manager.wait_for("STATUS=")
    for _ in range(3):
        manager.wait_for("WATCHDOG=1")
    manager.process.send_signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1")
    assert manager.process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly_when_told_to(tmp_path: Path, number: int) -> None:
    daemon = start_daemon(runtime_dir=tmp_path / "rt")
    daemon.process.send_signal(number)
    assert daemon.process.wait(20) == 0
    assert daemon.segments() == []


def test_a_private_daemon_stops_some_time_after_its_last_client(tmp_path: Path) -> None:
    flags = ("--linger-seconds", "1")
    daemon: Daemon = start_daemon(*flags, runtime_dir=tmp_path / "rt")
    with raw_client(daemon, staging_bytes=0), pytest.raises(subprocess.TimeoutExpired):
        daemon.process.wait(1.5)  # as long as somebody is there it stays
    assert daemon.process.wait(20) == 0
    assert "no client for linger_seconds" in daemon.log.read_text()
