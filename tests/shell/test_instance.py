"""One daemon per instance: locks between real processes, and what may be swept."""

import contextlib
import fcntl
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.arena import PAGE, SHM_DIR, Segment
from kvd.instance import (
    InstanceBusy,
    InstanceLock,
    UnsafePath,
    check_instance,
    default_runtime_dir,
    segment_prefix,
)

INSTANCE = f"kvdtest-{os.getpid()}"
PREFIX = f"kvd-{os.geteuid()}-{INSTANCE}"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(autouse=True)
def clean_shm() -> Iterator[None]:
    yield
    left = [name for name in os.listdir(SHM_DIR) if name.startswith(PREFIX)]
    for name in left:
        os.unlink(f"{SHM_DIR}/{name}")
    assert left == []


@contextlib.contextmanager
def other_daemon(runtime_dir: Path, code: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the instance's lock, runs `code`, and lets go at the end."""
    begin = """
    import sys
    from kvd.arena import Segment
    from kvd.instance import InstanceLock
    lock = InstanceLock(sys.argv[1], sys.argv[2])
    """
    end = "\nprint('holding', flush=True)\nsys.stdin.read()\nlock.release()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(begin) + code + end, str(runtime_dir), INSTANCE],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holding\n"
            yield process
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)
        finally:
            process.kill()


def test_lock_makes_a_private_directory_and_goes_without_a_trace(tmp_path: Path):
    runtime_dir = tmp_path / "run"
    with InstanceLock(runtime_dir, INSTANCE) as lock:
        assert lock.runtime_dir == runtime_dir
        assert (lock.instance, lock.prefix) == (INSTANCE, PREFIX)
        assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700
        for path in (runtime_dir / "kvd.lock", Path(SHM_DIR, f"{PREFIX}.lock")):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path.read_text() == f"{os.getpid()}\n"
    assert os.listdir(runtime_dir) == []
    lock.release()
    with InstanceLock(runtime_dir, INSTANCE):
        pass


def test_second_daemon_is_refused_and_told_who_holds_it(tmp_path: Path):
    with other_daemon(tmp_path / "run") as first:
        with pytest.raises(InstanceBusy, match=str(first.pid)) as caught:
            InstanceLock(tmp_path / "run", INSTANCE)
        assert caught.value.pid == first.pid
        assert caught.value.path == str(tmp_path / "run" / "kvd.lock")
        # Another instance in the same directory would take its sockets.
        with pytest.raises(InstanceBusy, match=str(first.pid)):
            InstanceLock(tmp_path / "run", f"{INSTANCE}-b")
        # The same instance in another directory would take its segments.
        with pytest.raises(InstanceBusy) as caught:
            InstanceLock(tmp_path / "other", INSTANCE)
        assert (caught.value.pid, caught.value.path) == (first.pid, f"{SHM_DIR}/{PREFIX}.lock")
        assert os.listdir(tmp_path / "other") == []  # the first of its locks was given back
        with InstanceLock(tmp_path / "other", f"{INSTANCE}-b"):
            pass
        assert (tmp_path / "run" / "kvd.lock").read_text() == f"{first.pid}\n"


def test_sigkill_frees_the_lock(tmp_path: Path):
    with other_daemon(tmp_path / "run") as first:
        first.kill()
        first.wait(30)
        with InstanceLock(tmp_path / "run", INSTANCE):
            assert (tmp_path / "run" / "kvd.lock").read_text() == f"{os.getpid()}\n"


def test_lock_is_never_held_twice_while_files_come_and_go(tmp_path: Path):
    code = """
    import os, sys
    from kvd.instance import InstanceBusy, InstanceLock
    runtime_dir, instance = sys.argv[1:]
    inside = runtime_dir + "/inside"
    held = 0
    while held < 50:
        try:
            with InstanceLock(runtime_dir, instance):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                held += 1
                os.unlink(inside)
        except InstanceBusy:
            pass
    """
    runners = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), INSTANCE],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    errors = [runner.communicate(timeout=60)[1] for runner in runners]
    assert errors == [""] * 4
    assert [runner.returncode for runner in runners] == [0] * 4


def test_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real_flock = fcntl.flock
    removed: list[str] = []

    def flock(fd: int, operation: int) -> None:
        if not removed:  # its holder lets go between our open and our flock
            removed.append(os.readlink(f"/proc/self/fd/{fd}"))
            os.unlink(removed[0])
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with InstanceLock(tmp_path, INSTANCE):
        assert removed == [str(tmp_path / "kvd.lock")]
        with pytest.raises(InstanceBusy):
            InstanceLock(tmp_path, INSTANCE)


def test_sweep_takes_what_a_dead_daemon_of_this_instance_left_and_nothing_else(tmp_path: Path):
    code = "Segment.create(lock.segment_name('arena-1'), 4096)\n"
    code += "Segment.create(lock.segment_name('directory'), 4096)\n"
    with other_daemon(tmp_path / "run", code) as first:
        first.kill()
        first.wait(30)
    # Another instance whose name begins with this one's, and somebody's file.
    neighbour = Segment.create(f"{PREFIX}-b.arena-1", PAGE)
    Path(SHM_DIR, f"{PREFIX}-b.lock").touch()
    Path(SHM_DIR, f"{PREFIX}x").touch()
    try:
        with InstanceLock(tmp_path / "run", INSTANCE) as lock:
            assert lock.sweep() == [f"{PREFIX}.arena-1", f"{PREFIX}.directory"]
            assert lock.sweep() == []
            with pytest.raises(InstanceBusy), contextlib.ExitStack() as stack:
                stack.enter_context(InstanceLock(tmp_path / "other", INSTANCE))
        left = sorted(name for name in os.listdir(SHM_DIR) if name.startswith(PREFIX))
        assert left == [f"{PREFIX}-b.arena-1", f"{PREFIX}-b.lock", f"{PREFIX}x"]
    finally:
        neighbour.close(unlink=True)
        os.unlink(f"{SHM_DIR}/{PREFIX}-b.lock")
        os.unlink(f"{SHM_DIR}/{PREFIX}x")
    with pytest.raises(RuntimeError, match="not held"):
        lock.sweep()


def test_directory_that_others_could_tamper_with_is_refused(tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    for mode in (0o720, 0o702, 0o777, 0o1777):
        shared.chmod(mode)
        with pytest.raises(UnsafePath, match="written by others") as caught:
            InstanceLock(shared, INSTANCE)
        assert caught.value.path == str(shared)
    shared.chmod(0o750)
    (tmp_path / "link").symlink_to(shared)
    with pytest.raises(UnsafePath, match="symbolic link"):
        InstanceLock(tmp_path / "link", INSTANCE)
    (tmp_path / "file").touch()
    with pytest.raises(UnsafePath, match="not a directory"):
        InstanceLock(tmp_path / "file", INSTANCE)
    with pytest.raises(FileNotFoundError):
        InstanceLock(tmp_path / "missing" / "run", INSTANCE)
    assert os.listdir(shared) == []
    with InstanceLock(shared, INSTANCE):
        pass


def test_lock_file_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path: Path):
    (tmp_path / "precious").write_text("content")
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run" / "kvd.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UnsafePath, match="symbolic link"):
        InstanceLock(tmp_path / "run", INSTANCE)
    (tmp_path / "run" / "kvd.lock").unlink()
    os.symlink(tmp_path / "precious", f"{SHM_DIR}/{PREFIX}.lock")
    try:
        with pytest.raises(UnsafePath, match="symbolic link"):
            InstanceLock(tmp_path / "run", INSTANCE)
    finally:
        os.unlink(f"{SHM_DIR}/{PREFIX}.lock")
    assert (tmp_path / "precious").read_text() == "content"
    assert os.listdir(tmp_path / "run") == []


def test_what_belongs_to_another_user_is_refused(tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: only root can give a directory to another user")
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o700)
    os.chown(foreign, 12345, 12345)
    with pytest.raises(UnsafePath, match="belongs to user 12345, not to 0"):
        InstanceLock(foreign, INSTANCE)
    assert os.listdir(foreign) == []
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run" / "kvd.lock").touch(mode=0o600)
    os.chown(tmp_path / "run" / "kvd.lock", 12345, 12345)
    with pytest.raises(UnsafePath, match="belongs to user 12345"):
        InstanceLock(tmp_path / "run", INSTANCE)


@pytest.mark.parametrize("name", ["", "A", "a.b", "a_b", "a/b", "..", "a" * 33, "a\n", "ä"])
def test_instance_names_that_are_refused(tmp_path: Path, name: str):
    for function in (check_instance, segment_prefix, default_runtime_dir):
        with pytest.raises(ValueError, match="instance's name"):
            function(name)
    with pytest.raises(ValueError, match="instance's name"):
        InstanceLock(tmp_path / "run", name)
    assert os.listdir(tmp_path) == []


def test_segment_names(tmp_path: Path):
    with InstanceLock(tmp_path, INSTANCE) as lock:
        assert lock.segment_name("arena-1") == f"{PREFIX}.arena-1"
        for suffix in ("", "lock", "a.b", "a/b", "a" * 65):
            with pytest.raises(ValueError, match="ending"):
                lock.segment_name(suffix)


def test_default_runtime_dir(tmp_path: Path):
    uid = os.geteuid()
    xdg = {"XDG_RUNTIME_DIR": "/run/user/7"}

    def choose(instance: str, **environ: str) -> str:
        return str(default_runtime_dir(instance, environ, system_dir=tmp_path))

    assert choose("default") == f"/tmp/kvd-{uid}"
    assert choose("b") == f"/tmp/kvd-{uid}-b"
    assert choose("default", **xdg) == "/run/user/7/kvd"
    assert choose("b", **xdg) == "/run/user/7/kvd-b"
    (tmp_path / "kvd").mkdir()
    assert choose("default", **xdg) == f"{tmp_path}/kvd"
    assert choose("b", **xdg) == "/run/user/7/kvd-b"
    assert choose("default", **xdg, KVD_RUNTIME_DIR="/there") == "/there"
    assert choose("b", KVD_RUNTIME_DIR="/there") == "/there"
    assert choose("default", KVD_RUNTIME_DIR="") == f"{tmp_path}/kvd"
    if uid == 0:
        os.chown(tmp_path / "kvd", 12345, 12345)
        assert choose("default", **xdg) == "/run/user/7/kvd"
