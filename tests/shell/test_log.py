"""Log lines: one line an event, whatever its values are, and fields that can be split again. And
whatever becomes of standard error, the daemon goes on."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.log import MAX_QUEUED
from tests.shell.raw import lifeline, many_tokens, raw_client, until
from tests.support import Daemon, running_daemon

PROGRAM = """
import sys
from kvd import log
log.set_up(sys.argv[1])
log.debug("quiet")
log.info("client connected", pid=7, name=sys.argv[2])
try:
    1 / 0
except ZeroDivisionError as error:
    log.error("fault", error)
log.close()
"""


def lines(level: str, name: str = "x", **environ: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, level, name]
    inherited = {key: value for key, value in os.environ.items() if key != "JOURNAL_STREAM"}
    env = {**inherited, **environ}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    "name", ["plain", "two words", 'a="b"', "line\nbreak", "\x1b[31m", "", "ü"]
)
def test_a_value_is_one_field_of_one_line(name: str) -> None:
    connected, _ = lines("info", name, JOURNAL_STREAM="1:2")
    begin = "info client connected pid=7 name="
    assert connected.startswith(begin)
    assert connected.isprintable()
    shown = connected.removeprefix(begin)
    assert name == (json.loads(shown) if shown.startswith('"') else shown)


def test_the_level_can_be_changed_while_it_runs() -> None:
    program = (
        "from kvd import log\n"
        "log.set_up('warning')\n"
        "log.info('before')\n"
        "log.set_level('debug')\n"
        "log.debug('after', everything=log.everything)\n"
        "log.set_level('error')\n"
        "log.warning('at last', everything=log.everything)\n"
        "log.error('end', everything=log.everything)\n"
        "log.close()\n"
    )
    env = {**os.environ, "JOURNAL_STREAM": "1:2"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    )
    assert done.stderr.splitlines() == ["debug after everything=True", "error end everything=False"]


def test_levels_and_traces() -> None:
    assert [line.split()[0] for line in lines("debug", JOURNAL_STREAM="1:2")] == [
        "debug",
        "info",
        "error",
    ]
    (fault,) = lines("error", JOURNAL_STREAM="1:2")
    assert "ZeroDivisionError" in json.loads(fault.partition("trace=")[2])


def test_the_time_is_in_front_unless_the_journal_adds_it() -> None:
    stamped, _ = lines("info")
    time, level, *_ = shlex.split(stamped)
    assert level == "info"
    assert time.endswith("Z")
    assert len(time) == len("2026-01-01T00:00:00.000Z")


# --- a standard error that does not take what it is given


class ErrorPipe:
    """What a daemon under `command` has as standard error, and we read when we like."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.redirect = ("sh", "-c", f'exec "$0" "$@" 2>{shlex.quote(str(path))}')
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.text = ""

    def read(self) -> str:
        """All that was written so far."""
        while True:
            try:
                part = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return self.text
            if not part:
                return self.text
            self.text += part.decode()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[ErrorPipe]:
    opened = ErrorPipe(tmp_path / "stderr")
    yield opened
    opened.close()


def connect_and_leave(daemon: Daemon, times: int) -> None:
    """Two lines in the log each: somebody came, and went."""
    for _ in range(times):
        with raw_client(daemon, staging_bytes=0) as client:
            assert client.status()["clients"] == 1
        until(lambda: n_clients(daemon) == 0)


def n_clients(daemon: Daemon) -> int:
    with raw_client(daemon, staging_bytes=0) as client:
        return client.status()["clients"] - 1


def flood(daemon: Daemon, lines: int) -> None:
    """Have the daemon log so many lines, and more bytes than a pipe holds."""
    for _ in range(lines):
        with lifeline(daemon) as sock:
            sock.send(b"nonsense")  # "client refused", with the reason
            while sock.recv(1 << 16):
                pass


def test_a_log_that_nobody_reads_holds_nobody_up(pipe: ErrorPipe, tmp_path: Path) -> None:
    """And what was lost is told when somebody reads again."""
    runtime_dir = tmp_path / "rt"
    with running_daemon(runtime_dir=runtime_dir, prefix=pipe.redirect) as daemon:
        flood(daemon, 3 * MAX_QUEUED)
        with raw_client(daemon) as client:
            client.store(client.open(), many_tokens(0, 8))
            assert client.verify()["ok"]
            until(lambda: "log lost" in pipe.read())
            (lost,) = [line for line in pipe.text.splitlines() if "log lost" in line]
            n_lost = int(lost.rpartition("lines=")[2])
            assert 0 < n_lost < 3 * MAX_QUEUED
            # ready, refused so often, connected, model registered, and that lines were lost
            n_lines = 1 + 3 * MAX_QUEUED + 2 - n_lost + 1
            until(lambda: len(pipe.read().splitlines()) == n_lines)
            flood(daemon, 1)
            until(lambda: len(pipe.read().splitlines()) == n_lines + 1)
        assert all(line.split()[1] in ("info", "warning") for line in pipe.text.splitlines())


def test_a_daemon_whose_log_nobody_reads_stops_when_it_is_told(
    pipe: ErrorPipe, tmp_path: Path
) -> None:
    with running_daemon(runtime_dir=tmp_path / "rt", prefix=pipe.redirect) as daemon:
        flood(daemon, 2 * MAX_QUEUED)
        assert daemon.stop() == 0
        assert daemon.segments() == []


def test_a_closed_pipe_ends_nobody(pipe: ErrorPipe, tmp_path: Path) -> None:
    with running_daemon(runtime_dir=tmp_path / "rt", prefix=pipe.redirect) as daemon:
        pipe.close()
        flood(daemon, 3)
        connect_and_leave(daemon, 2)
        assert daemon.stop() == 0


def test_a_standard_error_that_is_closed_from_the_start(tmp_path: Path) -> None:
    """Its number is another file's then, which no line may get into."""
    prefix = ("sh", "-c", 'exec "$0" "$@" 2>&-')
    with running_daemon(runtime_dir=tmp_path / "rt", prefix=prefix) as daemon:
        flood(daemon, 3)
        connect_and_leave(daemon, 2)
        lock = daemon.runtime_dir / "kvd.lock"
        assert lock.read_text() == f"{daemon.process.pid}\n"
        assert daemon.stop() == 0


def may_mount() -> bool:
    probe = ["unshare", "--mount", "true"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(
    not may_mount(), reason="a small file system of its own takes root: NOT TESTED HERE"
)
def test_a_full_log_disk_ends_nobody_and_is_used_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=64k tmpfs {disk} && exec 3>{disk}/filler 2>{disk}/log && "
        f'exec "$0" "$@"'
    )
    prefix = ("unshare", "--mount", "sh", "-c", script)
    with running_daemon(runtime_dir=tmp_path / "rt", prefix=prefix) as daemon:
        # The file system is in the daemon's mount namespace: we reach it through its process.
        inside = Path(f"/proc/{daemon.process.pid}/root{disk}")
        fill(inside / "filler")
        flood(daemon, 100)
        connect_and_leave(daemon, 2)
        before = (inside / "log").read_text()
        os.truncate(inside / "filler", 0)
        flood(daemon, 1)
        until(lambda: "log lost" in (inside / "log").read_text())
        until(lambda: (inside / "log").read_text().endswith("\n"))
        after = (inside / "log").read_text().removeprefix(before)
        assert all(len(line.split()) > 2 for line in after.splitlines() if line)
        assert daemon.stop() == 0


def fill(path: Path) -> None:
    """Write until nothing more goes into the file system."""
    fd = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            write_for_ever(fd)
    finally:
        os.close(fd)


def write_for_ever(fd: int) -> None:
    while True:
        os.write(fd, bytes(4096))
