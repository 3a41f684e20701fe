"""`kvd serve` as the system sees it: exit codes, readiness, signs of life, and its end."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest

from kvd_proto.messages import Evict, OpenContext, RegisterModel
from tests.shell.raw import make_append, many_tokens, raw_client
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

    def __init__(self, path: Path, *flags: str, **environ: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path / "notify"))
        self.socket.settimeout(20)
        command = [sys.executable, "-m", "kvd", "serve", "--instance", "test-cli-notify"]
        command += ["--runtime-dir", str(path / "rt"), "--log-level", "error"]
        command += ["--no-keep-on-stop", *flags]
        environ = {**os.environ, "NOTIFY_SOCKET": str(path / "notify"), **environ}
        self.process = subprocess.Popen(command, env=environ)

    def wait_for(self, beginning: str) -> str:
        while not (heard := self.socket.recv(4096).decode()).startswith(beginning):
            pass
        return heard

    def drain(self) -> None:
        """Forget what has been heard so far."""
        while select.select([self.socket], [], [], 0)[0]:
            self.socket.recv(4096)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
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


def test_it_gives_signs_of_life_while_it_evicts_everything(tmp_path: Path) -> None:
    """Something is due at any time then. The service manager would end the daemon for it."""
    manager = Manager(tmp_path, "--max-memory", "256MiB", WATCHDOG_USEC="10000")
    with contextlib.closing(manager):
        manager.wait_for("READY=1")
        daemon = Daemon(manager.process, tmp_path / "rt", "test-cli-notify", tmp_path / "log")
        with raw_client(daemon) as client:
            layers = [["f16", 64, "f16", 64]]
            model = client.call(RegisterModel("small", bytes(32), "array", 8, layers)).model
            context = client.call(OpenContext(model, 1, [])).context
            for number in range(160):
                sequence = client.alloc(context, b"")
                prompt = many_tokens(number << 16, 8 * 256)
                staged = pack("<256Q", *[4096] * 256)
                client.call(make_append(context, sequence, 0, prompt, staged))
                client.release(context, sequence)
            while client.status()["models"][0]["blocks"]["cached"] < 40 * 1024:
                pass
            manager.drain()
            client.post(Evict("", 0))
            signs = 0
            while not client.dealer.poll(0):
                manager.wait_for("WATCHDOG=1")
                signs += 1
            assert client.receive().body.blocks == 40 * 1024
            assert signs > 3


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
