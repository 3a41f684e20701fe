"""Who may connect, and what another user's process can do to memory that it was handed: read it.

Real processes of real users; the kernel is what is tested. What a client checks before it believes
a daemon: tests/client/test_place.py.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvd_client
from kvd.group import admit, group_id
from kvd.instance import InstanceLock
from kvd_client.errors import Unavailable
from tests.shell.raw import Raw, expected_blocks, many_tokens, until
from tests.support import running_daemon
from tests.users import (
    ALICE,
    BOB,
    GROUP,
    SERVICE,
    STRANGER,
    ServiceDaemon,
    daemon_of_service,
    needs_root,
    run_as,
    running_as,
)

TOKENS = many_tokens(1000, 24)
LIBC = ctypes.CDLL(None, use_errno=True)
PTRACE_ATTACH, PIDFD_GETFD = 16, 438
F_OFD_SETLK = 37


@pytest.fixture(scope="module")
def daemon() -> Iterator[ServiceDaemon]:
    with daemon_of_service("--socket-group", str(GROUP), "--max-memory", "16MiB") as running:
        yield running


def modes(directory: Path) -> dict[str, tuple[str, int, int]]:
    """Mode, uid and gid of a directory and of what is in it."""
    found = {}
    for path in [directory, *directory.iterdir()]:
        seen = path.stat(follow_symlinks=False)
        mode = f"{stat.S_IMODE(seen.st_mode):04o}"
        found["." if path == directory else path.name] = (mode, seen.st_uid, seen.st_gid)
    return found


# --- who gets in


@needs_root
def test_the_directory_and_both_sockets_are_the_groups_and_nothing_else_is(
    daemon: ServiceDaemon,
) -> None:
    own = SERVICE.uid
    assert modes(daemon.runtime_dir) == {
        ".": ("0750", own, GROUP),
        "kvd.lock": ("0600", own, own),
        "lifeline.sock": ("0660", own, GROUP),
        "requests.sock": ("0660", own, GROUP),
    }
    for path in Path("/dev/shm").glob(f"kvd-{own}-{daemon.instance}.*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_without_a_group_nobody_else_gets_to_the_sockets(tmp_path: Path, mode: int) -> None:
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=mode)
    with running_daemon(runtime_dir=runtime_dir):
        found = modes(runtime_dir)
        assert [found[name][0] for name in ("kvd.lock", "lifeline.sock", "requests.sock")] == [
            "0600"
        ] * 3
        assert found["."][0] == f"{mode:04o}"  # an administrator's own choice


@needs_root
def test_a_member_works_and_others_are_refused_by_the_kernel(daemon: ServiceDaemon) -> None:
    def use() -> str:
        with kvd_client.connect(daemon.runtime_dir, staging_bytes=0, fail_open=False) as client:
            return client.ping().instance

    def try_to() -> str:
        with pytest.raises(Unavailable) as refused:
            use()
        return str(refused.value)

    assert run_as(ALICE, use) == daemon.instance
    assert run_as(SERVICE, use) == daemon.instance
    assert use() == daemon.instance  # root
    assert "Permission denied" in run_as(STRANGER, try_to)


@needs_root
def test_a_daemon_that_is_no_member_of_the_group_says_so_and_opens_nothing() -> None:
    with (
        pytest.raises(AssertionError, match="the daemon ended: 1"),
        daemon_of_service("--socket-group", str(GROUP + 1)),
    ):
        pass

    def lock(path: Path) -> str:
        with pytest.raises(PermissionError) as refused:
            InstanceLock(path, "test-group", GROUP + 1)
        assert not list(path.iterdir())
        return str(refused.value)

    with contextlib.ExitStack() as stack:
        place = Path("/tmp", f"kvd-group-{os.getpid()}")
        place.mkdir(mode=0o700)
        stack.callback(place.rmdir)
        os.chown(place, SERVICE.uid, SERVICE.uid)
        assert f"group {GROUP + 1}, of which it is no member" in run_as(
            SERVICE, partial(lock, place)
        )
        assert modes(place) == {".": ("0700", SERVICE.uid, SERVICE.uid)}


@needs_root
def test_nothing_that_is_right_already_is_changed(tmp_path: Path) -> None:
    """Under a seccomp filter that forbids chown a service must be able to start."""
    path = tmp_path / "file"
    path.touch()
    os.chown(path, -1, GROUP)
    path.chmod(0o660)
    before = path.stat().st_ctime_ns
    admit(path, GROUP, 0o660)
    assert path.stat().st_ctime_ns == before
    admit(path, GROUP + 1, 0o660)
    assert (path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (GROUP + 1, 0o660)


def test_what_is_no_group() -> None:
    for group in ("no-such-group", -1, (1 << 32) - 1, True, None, 1.5):
        with pytest.raises(ValueError, match="group"):
            group_id(group)  # type: ignore[arg-type]


# --- what a client of another user can do to memory


def outcome(attack: Callable[[], Any]) -> str:
    """The name of the error that an attack ends with; what it returned if it does not."""
    try:
        return f"it worked: {attack()!r}"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def call(function: Callable[..., int], *arguments: Any) -> int:
    """A libc call; raises its errno."""
    found = function(*arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), "")
    return found


def address_of(mapping: mmap.mmap) -> ctypes.c_void_p:
    """Where a read-only mapping lies: mmap itself tells it only for writable ones."""
    return ctypes.c_void_p(np.frombuffer(mapping, np.uint8).ctypes.data)


def attacks_on_an_arena(fd: int, arena: mmap.mmap, name: str) -> dict[str, str]:
    path = f"/dev/shm/{name}"
    reopen = f"/proc/self/fd/{fd}"
    size = ctypes.c_size_t(4096)
    whole = ctypes.c_int64(4096)
    lock = fcntl.LOCK_EX | fcntl.LOCK_NB
    return {
        "map it writable": outcome(lambda: mmap.mmap(fd, 4096)),
        "make the mapping writable": outcome(
            lambda: call(LIBC.mprotect, address_of(arena), size, mmap.PROT_READ | mmap.PROT_WRITE)
        ),
        "drop its pages": outcome(
            lambda: call(LIBC.madvise, address_of(arena), size, mmap.MADV_REMOVE)
        ),
        "reopen it writable": outcome(lambda: os.open(reopen, os.O_RDWR)),
        "reopen it": outcome(lambda: os.open(reopen, os.O_RDONLY)),
        "truncate it by its link": outcome(lambda: os.truncate(reopen, 0)),
        "open its name writable": outcome(lambda: os.open(path, os.O_RDWR)),
        "open its name": outcome(lambda: os.open(path, os.O_RDONLY)),
        "remove its name": outcome(lambda: os.unlink(path)),
        "take its name": outcome(lambda: os.rename(path, path + "x")),
        "write to it": outcome(lambda: os.pwrite(fd, b"x", 0)),
        "shorten it": outcome(lambda: os.ftruncate(fd, 0)),
        "punch it": outcome(lambda: call(LIBC.fallocate, fd, 3, ctypes.c_int64(0), whole)),
        "fill it": outcome(lambda: os.posix_fallocate(fd, 0, 4096)),
        "lock it": outcome(lambda: fcntl.lockf(fd, lock)),
        "change its mode": outcome(lambda: os.fchmod(fd, 0o666)),
        "change its owner": outcome(lambda: os.fchown(fd, BOB.uid, -1)),
        "seal it": outcome(lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)),
    }


def attacks_on_a_process(pid: int) -> dict[str, str]:
    buffer = (ctypes.c_char * 8)()
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)

    def steal_descriptor() -> int:
        pidfd = os.pidfd_open(pid)
        return call(LIBC.syscall, PIDFD_GETFD, pidfd, 3, 0)

    return {
        "its descriptors": outcome(lambda: os.listdir(f"/proc/{pid}/fd")),
        "its mappings": outcome(lambda: os.open(f"/proc/{pid}/maps", os.O_RDONLY)),
        "its memory": outcome(lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR)),
        "reading it": outcome(lambda: call(LIBC.process_vm_readv, pid, vector, 1, vector, 1, 0)),
        "writing it": outcome(lambda: call(LIBC.process_vm_writev, pid, vector, 1, vector, 1, 0)),
        "one of its descriptors": outcome(steal_descriptor),
        "tracing it": outcome(lambda: call(LIBC.ptrace, PTRACE_ATTACH, pid, None, None)),
        "ending it": outcome(lambda: os.kill(pid, signal.SIGKILL)),
    }


@needs_root
def test_another_user_reads_an_arena_and_can_do_nothing_else_to_it(daemon: ServiceDaemon) -> None:
    """ALICE stores; BOB reads what she stored, and attacks the arena, the daemon and ALICE, whose
    staging is hers and the daemon's alone."""

    def alice(pipe: Connection) -> None:
        client = Raw(daemon)  # type: ignore[arg-type]
        context = client.open()
        sequence = client.store(context, TOKENS, fill=5)
        pipe.send(None)
        pipe.recv()
        pipe.send((client.read(context, sequence), client.verify()["ok"], outcome_own(client)))

    def outcome_own(client: Raw) -> list[str]:
        """Her own staging is the daemon's file: what she was handed is all that she gets."""
        link = f"/proc/self/fd/{client.staging_fd}"
        return [
            outcome(lambda: os.open(link, os.O_RDWR)),
            outcome(lambda: os.ftruncate(client.staging_fd, 0)),
            outcome(lambda: os.ftruncate(client.staging_fd, 1 << 30)),
            outcome(lambda: os.fchmod(client.staging_fd, 0o666)),
        ]

    def bob(_: Connection) -> Any:
        client = Raw(daemon, name="bob")  # type: ignore[arg-type]
        context = client.open()
        sequence = client.alloc(context, TOKENS)
        assert sequence.matched_tokens == 24
        read = client.read(context, sequence)
        attacks = attacks_on_an_arena(client.arena_fd, client.arena, arena)
        with mmap.mmap(client.index_fd, 4096, prot=mmap.PROT_READ) as index:
            of_index = arena.replace(".arena-", ".index-")
            assert attacks_on_an_arena(client.index_fd, index, of_index) == attacks
        on_daemon = attacks_on_a_process(daemon.pid)
        on_alice = attacks_on_a_process(alices_pid)
        again = client.read(context, sequence)
        return read, attacks, on_daemon, on_alice, again, client.verify()["ok"]

    with running_as(ALICE, alice) as first:
        first.hear()
        alices_pid = first.process.pid
        assert alices_pid is not None
        names = sorted(
            path.name for path in Path("/dev/shm").glob(f"kvd-*-{daemon.instance}.arena-*")
        )
        arena = names[0]
        with running_as(BOB, bob) as second:
            read, on_arena, on_daemon, on_alice, again, ok = second.hear()
        first.pipe.send(None)
        hers, still_ok, on_her_own = first.hear()
    assert read == again == hers == expected_blocks(3, fill=5)
    assert ok
    assert still_ok
    assert on_arena == {
        "map it writable": "EACCES",
        "make the mapping writable": "EACCES",
        "drop its pages": "EACCES",
        "reopen it writable": "EACCES",
        "reopen it": "EACCES",
        "truncate it by its link": "EACCES",
        "open its name writable": "EACCES",
        "open its name": "EACCES",
        "remove its name": "EPERM",
        "take its name": "EPERM",
        "write to it": "EBADF",
        "shorten it": "EINVAL",
        "punch it": "EBADF",
        "fill it": "EBADF",
        "lock it": "EBADF",
        "change its mode": "EPERM",
        "change its owner": "EPERM",
        "seal it": "EPERM",
    }
    refused = {
        "its descriptors": "EACCES",
        "its mappings": "EACCES",
        "its memory": "EACCES",
        "reading it": "EPERM",
        "writing it": "EPERM",
        "one of its descriptors": "EPERM",
        "tracing it": "EPERM",
        "ending it": "EPERM",
    }
    assert on_daemon == refused
    assert on_alice == refused
    assert on_her_own == ["EACCES", "EPERM", "EPERM", "EPERM"]
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client:
        until(lambda: len(client.clients()) == 1)


def test_the_flag_and_the_variable_are_the_setting(tmp_path: Path) -> None:
    environ = {**os.environ, "KVD_SOCKET_GROUP": "no-such-group"}
    command = [sys.executable, "-m", "kvd", "serve", "--runtime-dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "KVD_SOCKET_GROUP: socket_group = 'no-such-group'" in done.stderr
    done = subprocess.run(
        [*command, "--socket-group", "-5x"], env=environ, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
