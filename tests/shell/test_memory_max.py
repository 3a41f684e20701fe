"""memory.max near: beyond it is an OOM kill and no error, so it is looked up, and refused before.

With a real limit where this machine lets us set one, and everywhere with files in the kernel's
format where the daemon looks for its cgroup: what it reads is then as we like, and the rest is
real.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.limits import RESERVE_BYTES
from kvd_proto import errors
from tests.shell.raw import Raw, make_alloc, many_tokens, raw_client
from tests.shell.test_full import MANY, STAGING, commit, needs_mount
from tests.support import Daemon, running_daemon

MIB = 1 << 20
ROOT = Path("/sys/fs/cgroup")
PRETEND = f"""
mount -t tmpfs tmpfs {ROOT} && cd {ROOT} && echo memory >cgroup.controllers &&
echo {1024 * MIB} >memory.max && echo 0 >memory.current && echo inactive_file 0 >memory.stat &&
exec "$0" "$@\"
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """In a cgroup that is as full as `fill` says."""
    prefix = ("unshare", "--mount", "sh", "-c", PRETEND)
    flags = ("--max-memory", "64MiB")
    with running_daemon(*flags, runtime_dir=tmp_path / "rt", prefix=prefix) as running:
        yield running


def leave(daemon: Daemon, n_bytes: int) -> None:
    """Let the cgroup have so much left, beside what is kept in reserve."""
    current = Path(f"/proc/{daemon.process.pid}/root{ROOT}/memory.current")
    current.write_text(f"{1024 * MIB - RESERVE_BYTES - n_bytes}\n")


@needs_mount
def test_a_full_cgroup_is_an_answer_and_room_that_comes_is_used(daemon: Daemon) -> None:
    with raw_client(daemon, staging_bytes=STAGING) as client:
        context = client.open()
        assert commit(client, context, 0).stored == MANY
        before = client.status()["accounting"]
        leave(daemon, MIB)
        refused = commit(client, context, 10_000)
        assert type(refused) is errors.NoSpace
        assert "memory.max of /sys/fs/cgroup" in str(refused)
        reserve = make_alloc(context, b"", reserve=300 * 8)
        assert type(client.ask(reserve)) is errors.NoSpace
        with pytest.raises(errors.NoSpace, match=r"memory\.max"):
            Raw(daemon, staging_bytes=2 * MIB)
        # Nothing is lost, what fits is had, and what needs no memory works.
        after = client.status()["accounting"]
        for name in (
            "cached_bytes",
            "free_bytes",
            "filling_bytes",
            "active_bytes",
            "staging_bytes",
        ):
            assert after[name] == before[name], name
        assert client.verify()["differences"] == []
        assert client.alloc(context, many_tokens(0, 8 * MANY)).matched_tokens == 8 * MANY
        assert commit(client, context, 20_000, n_blocks=10).stored == 10
        leave(daemon, 100 * MIB)
        assert commit(client, context, 10_000).stored == MANY
        with raw_client(daemon, staging_bytes=2 * MIB) as other:
            assert other.status()["clients"] == 2
        assert client.verify()["ok"]


@contextlib.contextmanager
def cgroup() -> Iterator[Path]:
    """A new cgroup with a memory limit of its own."""
    path = ROOT / f"kvd-test-{os.getpid()}"
    path.mkdir()
    try:
        (path / "memory.max").write_text(str(192 * MIB))
        yield path
    finally:
        path.rmdir()


def may_limit() -> bool:
    """Whether there is a cgroup v2 here whose memory controller we may use."""
    try:
        with cgroup():
            return True
    except OSError:
        return False


@pytest.mark.skipif(
    not may_limit(), reason="a memory.max of its own takes a writable cgroup v2: NOT TESTED HERE"
)
def test_a_daemon_under_a_real_limit_refuses_and_is_not_killed(tmp_path: Path) -> None:
    with cgroup() as path:
        prefix = ("sh", "-c", f'echo $$ >{path}/cgroup.procs && exec "$0" "$@"')
        flags = ("--max-memory", "1GiB")
        with (
            running_daemon(*flags, runtime_dir=tmp_path / "rt", prefix=prefix) as daemon,
            raw_client(daemon) as client,
        ):
            context = client.open()
            held = client.alloc(context, b"", reserve=8 * 1024)  # 4 MiB
            refused = client.ask(make_alloc(context, b"", reserve=8 * 48 * 1024))  # 192 MiB
            assert type(refused) is errors.NoSpace
            client.release(context, held)
            assert daemon.process.poll() is None
            assert client.verify()["ok"]
