"""Processes of other users, for what the kernel enforces between them. Needs root.

They are forks of the test's process that change their user: an interpreter in root's home, as
pyenv puts it, could not be started by anybody else.
"""

import contextlib
import ctypes
import multiprocessing
import os
import tempfile
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvd import cli
from tests.support import is_listening

GROUP = 52_000
_LIBC = ctypes.CDLL(None)
_PR_SET_DUMPABLE = 4
SECONDS = 30.0

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="NOT TESTED: what the kernel enforces between users, without root"
)


class User(NamedTuple):
    """A user that need not be known to the system, with a group of its own beside `groups`."""

    uid: int
    groups: tuple[int, ...] = ()

    def become(self) -> None:
        """Turn this process into one of that user, for good."""
        os.setgroups(self.groups)
        os.setresgid(self.uid, self.uid, self.uid)
        os.setresuid(self.uid, self.uid, self.uid)
        # A process that has changed its user is closed to all others, even its own /proc/self/fd.
        # One that was started by that user, as in real life, is not, and must be as safe.
        assert _LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0) == 0


SERVICE = User(51_001, (GROUP,))
ALICE = User(51_002, (GROUP,))
BOB = User(51_003, (GROUP,))
STRANGER = User(51_004)


@dataclass
class Running:
    """A function that runs as another user. `pipe` leads to its argument."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection

    def hear(self) -> Any:
        """What it sends or, at last, returns. Fails with its trace if it has raised."""
        assert self.pipe.poll(SECONDS), "nothing was heard of the other user's process"
        said = self.pipe.recv()
        if isinstance(said, _Raised):
            raise AssertionError(f"in the other user's process:\n{said.trace}")
        return said


@contextlib.contextmanager
def running_as(user: User, function: Callable[[Connection], Any]) -> Iterator[Running]:
    """Run `function` in a fork as `user`; afterwards it is killed if it has not ended."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_run, args=(user, function, theirs))
    with warnings.catch_warnings():
        # Of threads that are there: the child uses nothing of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    try:
        yield Running(process, ours)
    finally:
        ours.close()
        process.kill()
        process.join()


def run_as(user: User, function: Callable[[], Any]) -> Any:
    """What `function` returns when it runs as `user`."""
    with running_as(user, lambda _: function()) as running:
        return running.hear()


class _Raised(NamedTuple):
    trace: str


def _run(user: User, function: Callable[[Connection], Any], pipe: Connection) -> None:
    try:
        user.become()
        pipe.send(function(pipe))
    except BaseException:
        pipe.send(_Raised(traceback.format_exc()))


@dataclass
class ServiceDaemon:
    """A daemon of SERVICE, in a directory that root gave it."""

    runtime_dir: Path
    instance: str
    pid: int


@contextlib.contextmanager
def daemon_of_service(*flags: str, mode: int = 0o700) -> Iterator[ServiceDaemon]:
    """`kvd serve` as SERVICE, in a new directory under a place that only root can write to."""
    instance = f"test-{uuid.uuid4().hex[:12]}"
    with tempfile.TemporaryDirectory(prefix="kvd-users-") as place:
        os.chmod(place, 0o755)
        runtime_dir = Path(place, "run")
        runtime_dir.mkdir(mode=mode)
        os.chown(runtime_dir, SERVICE.uid, SERVICE.uid)
        arguments = ["serve", "--instance", instance, "--runtime-dir", str(runtime_dir)]
        arguments += ["--no-keep-on-stop", *flags]
        with running_as(SERVICE, lambda _: cli.main(arguments)) as running:
            pid = running.process.pid
            assert pid is not None
            deadline = time.monotonic() + SECONDS
            while not is_listening(runtime_dir):
                if running.pipe.poll():
                    raise AssertionError(f"the daemon ended: {running.hear()}")
                assert time.monotonic() < deadline
                time.sleep(0.01)
            try:
                yield ServiceDaemon(runtime_dir, instance, pid)
            finally:
                running.process.terminate()
                assert running.hear() == 0
        left = list(Path("/dev/shm").glob(f"kvd-{SERVICE.uid}-{instance}.*"))
        assert not left, f"segments left behind: {left}"
