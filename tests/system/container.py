"""A systemd of its own, booted in a container by systemd-nspawn: what the tests do in it.

The container has this machine's /usr, read-only, and everything else empty and in memory: its own
/etc, /run, /dev/shm, processes, users and network. kvd is installed there as `make install-systemd`
does, with one difference: /opt/kvd has this project's interpreter and source mounted, and no
environment of its own.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 40.0
"""For anything that systemd does, on a busy machine; all but the watchdog take below one."""
_BOOT_SECONDS = 90.0
_ROOMS = ("proto", "kvd", "client")
_ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_PROGRAM = """#!/bin/sh
# Sets nothing that a real installation would not have but where the interpreter is.
LD_LIBRARY_PATH=/opt/kvd/base/lib
PYTHONPATH=/opt/kvd/src/proto:/opt/kvd/src/kvd:/opt/kvd/src/client:/opt/kvd/src/root:/opt/kvd/site
PYTHONDONTWRITEBYTECODE=1
export LD_LIBRARY_PATH PYTHONPATH PYTHONDONTWRITEBYTECODE
exec /opt/kvd/base/bin/{python} {module} "$@"
"""


class CannotRun(Exception):
    """No container can be booted here; the reason."""


def until(look: Callable[[], T], seconds: float = SECONDS) -> T:
    """What `look` returns as soon as that is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


@dataclass
class User:
    """Somebody in the container, who need not be known to it."""

    uid: int
    groups: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """What runs a command as this user."""
        groups = f"--groups={','.join(self.groups)}" if self.groups else "--clear-groups"
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", groups, "--"]


MEMBER = User(60_001, ("kvd",))
STRANGER = User(60_002)


@dataclass
class Container:
    """A running one. `etc` is its /etc/kvd, `leader` its first process as we see it."""

    leader: int
    etc: Path

    def command(self, *command: str, user: User | None = None) -> list[str]:
        """What runs a command in the container."""
        enter = ["nsenter", f"--target={self.leader}", "--all", "--root", "--wd", "--"]
        return [*enter, *(user.command() if user else []), *command]

    def run(
        self, *command: str, user: User | None = None, said: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command there to its end, whatever that is."""
        return subprocess.run(
            self.command(*command, user=user),
            env=_ENVIRON,
            input=said,
            capture_output=True,
            text=True,
            timeout=SECONDS * 2,
        )

    def do(self, *command: str, user: User | None = None, said: str = "") -> str:
        """Run a command there that must succeed; what it prints."""
        done = self.run(*command, user=user, said=said)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: str, text: str) -> None:
        """Write a file, and make its directory."""
        self.do("mkdir", "-p", str(Path(path).parent))
        self.do("tee", path, said=text)

    def drop_in(self, unit: str, text: str) -> None:
        """Change a unit, as `systemctl edit --runtime` does."""
        self.write(f"/run/systemd/system/{unit}.d/test.conf", text)
        self.do("systemctl", "daemon-reload")

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.do("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def pid(self, unit: str) -> int:
        """Its main process, as the container counts. 0: there is none."""
        return int(self.show(unit, "MainPID"))

    def journal(self, unit: str) -> str:
        """What it and systemd have said about it."""
        return self.do("journalctl", "--quiet", "--output=cat", f"--unit={unit}")

    def started_again(self, unit: str, pid: int) -> bool:
        """Whether it runs and is ready, with another main process than `pid`."""
        return self.show(unit, "ActiveState") == "active" and self.pid(unit) not in (0, pid)


class Worker:
    """tests/system/worker.py in the container. One request, one answer."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, env=_ENVIRON, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str) -> Any:
        """What it answers. Fails when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the worker has ended with {self._process.wait()}"
        return json.loads(line)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def worker(
    container: Container,
    *arguments: str,
    user: User | None = MEMBER,
    inside: tuple[str, ...] = (),
) -> Iterator[Worker]:
    """A worker of `user`. `inside` is what makes its namespaces before it becomes that user; None:
    it has become somebody by then."""
    program = ["/opt/kvd/bin/python", "-m", "tests.system.worker", *arguments]
    become = user.command() if user else []
    started = Worker(container.command(*inside, *become, *program))
    try:
        yield started
    finally:
        started.close()


@contextmanager
def booted(place: Path) -> Iterator[Container]:
    """A container with kvd installed and not started; `place` takes what it is made of."""
    if os.geteuid() != 0:
        raise CannotRun("only root can make one")
    for program in ("systemd-nspawn", "nsenter", "setpriv"):
        if shutil.which(program) is None:
            raise CannotRun(f"{program} is missing (Debian, Ubuntu: apt install systemd-container)")
    mounts = _install(place)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, _console(place) as console:
        told.bind(str(place / "notify"))
        told.settimeout(0.2)
        process = subprocess.Popen(
            [
                # If this process is killed, the container must not stay.
                *("setpriv", "--pdeathsig=TERM", "--"),
                *("systemd-nspawn", "--quiet", "--directory=/", "--volatile=yes", "--boot"),
                *("--register=no", "--keep-unit", "--private-network", "--notify-ready=yes"),
                # A terminal of its own would be asked for; what it prints is the evidence.
                *("--console=pipe", f"--machine=kvd-test-{os.getpid()}"),
                *mounts,
                *("systemd.unit=basic.target", "systemd.firstboot=off"),
            ],
            env={**os.environ, "NOTIFY_SOCKET": str(place / "notify")},
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
        )
        leader = 0
        try:
            leader = _wait_for_boot(process, told, place)
            yield Container(leader, place / "files/etc/kvd")
        finally:
            if leader and process.poll() is None:
                stop = ["nsenter", f"--target={leader}", "--all", "--root", "--wd", "--"]
                subprocess.run([*stop, "systemctl", "poweroff", "-ff"], capture_output=True)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _install(place: Path) -> list[str]:
    """Make what the container is to have; returns nspawn's options that mount it."""
    files = place / "files"
    subprocess.run(
        ["make", "--silent", "install-systemd", f"DESTDIR={files}"], cwd=ROOT, check=True
    )
    program = files / "opt/kvd"
    for directory in ("bin", "base", "site", "src/root/tests", *(f"src/{r}" for r in _ROOMS)):
        (program / directory).mkdir(parents=True)
    python = Path(os.path.realpath(sys.executable)).name
    for name, module in (
        ("kvd", "-m kvd"),
        ("kvctl", "-m kvd_client.kvctl"),
        ("python", "-P"),
    ):
        path = program / "bin" / name
        path.write_text(_PROGRAM.format(python=python, module=module))
        path.chmod(0o755)
    read_only = {
        files / "usr/local/lib": "/usr/local/lib",
        files / "etc/kvd": "/etc/kvd",
        program: "/opt/kvd",
        Path(sys.base_prefix): "/opt/kvd/base",
        Path(sysconfig.get_path("purelib")): "/opt/kvd/site",
        ROOT / "tests": "/opt/kvd/src/root/tests",
        **{ROOT / room: f"/opt/kvd/src/{room}" for room in _ROOMS},
    }
    # Where it is reached through, others than root must be able to pass.
    for path in (files, place):
        path.chmod(0o755)
    return [f"--bind-ro={source}:{target}" for source, target in read_only.items()]


@contextmanager
def _console(place: Path) -> Iterator[int]:
    fd = os.open(place / "console", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _wait_for_boot(process: "subprocess.Popen[bytes]", told: socket.socket, place: Path) -> int:
    """The leader, once the container has booted. What this takes has nothing to do with kvd, so
    that it does not work is the machine's fault."""
    leader = 0
    deadline = time.monotonic() + _BOOT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(TimeoutError):
            for line in told.recv(4096).decode().splitlines():
                name, _, value = line.partition("=")
                if name == "X_NSPAWN_LEADER_PID":
                    leader = int(value)
                elif name == "READY" and leader:
                    return leader
    process.kill()
    if leader:
        with suppress(ProcessLookupError):
            os.kill(leader, signal.SIGKILL)
    said = (place / "console").read_text(errors="replace").strip().splitlines()
    raise CannotRun("it does not boot: " + " / ".join(said[-3:]))
