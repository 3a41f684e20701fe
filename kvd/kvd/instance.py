"""One daemon for one instance name: where it lives, the locks that prove it, and what it may sweep.

Covers the instance's name, its runtime directory, its two locks, the names of its shared memory,
and the removal of shared memory that a dead daemon of this instance left.
Does not cover the sockets in the runtime directory (lifeline.py, server.py), what the segments
hold (arena.py), nor which of them are of use still (adoption.py).

Two locks, because an instance holds two places that others could claim: a runtime directory, and
the names in /dev/shm, which follow from user and instance name alone.

    <runtime_dir>/kvd.lock              another daemon in the same runtime directory
    /dev/shm/kvd-<uid>-<instance>.lock  a daemon of the same instance in another runtime directory
    /dev/shm/kvd-<uid>-<instance>.*     this instance's segments

Instance names hold no dot, so that the segments of instance `a` and those of `a-b` cannot be taken
for one another. The kernel drops a lock with the process that holds it, however that ends.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kvd.arena import SHM_DIR, list_segments, remove_segment
from kvd.group import DIRECTORY_MODE, admit

DEFAULT_INSTANCE = "default"

_INSTANCE = re.compile(r"[a-z0-9-]{1,32}")
_SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LOCK_SUFFIX = "lock"


class InstanceBusy(Exception):
    """Another daemon holds the lock at `path`; `pid` is its process as far as it is known."""

    def __init__(self, path: str, pid: int | None) -> None:
        holder = "another process" if pid is None else f"process {pid}"
        super().__init__(f"{holder} already serves this instance: it holds {path}")
        self.path = path
        self.pid = pid


class UnsafePath(Exception):
    """Somebody else could tamper with what is at `path`; `reason` says how."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


def check_instance(instance: str) -> None:
    """ValueError unless `instance` is 1 to 32 of a-z, 0-9 and '-'."""
    if _INSTANCE.fullmatch(instance) is None:
        raise ValueError(f"an instance's name is 1 to 32 of a-z, 0-9 and '-', not {instance!r}")


def segment_prefix(instance: str) -> str:
    """What the names of this user's shared memory begin with for `instance`, up to the dot."""
    check_instance(instance)
    return f"kvd-{os.geteuid()}-{instance}"


def default_runtime_dir(
    instance: str, environ: Mapping[str, str] = os.environ, *, system_dir: Path = Path("/run")
) -> Path:
    """Where `instance` lives unless it is told: $KVD_RUNTIME_DIR as it is; else `kvd` (for another
    instance than the default one `kvd-<instance>`) in /run, if it is there and this user's, which
    is how a service is started; else in $XDG_RUNTIME_DIR; else in /tmp, with the user's number."""
    check_instance(instance)
    if environ.get("KVD_RUNTIME_DIR"):
        return Path(environ["KVD_RUNTIME_DIR"])
    ending = "" if instance == DEFAULT_INSTANCE else f"-{instance}"
    system = system_dir / f"kvd{ending}"
    with contextlib.suppress(OSError):
        if system.stat().st_uid == os.geteuid():
            return system
    if environ.get("XDG_RUNTIME_DIR"):
        return Path(environ["XDG_RUNTIME_DIR"]) / f"kvd{ending}"
    return Path(f"/tmp/kvd-{os.geteuid()}{ending}")


class InstanceLock:
    """Both locks of an instance, from construction to release() or the process's end.

    `runtime_dir` is created, 0700, if only its last part is missing; with a `group` (a gid) it is
    then 0750 for that. Raises InstanceBusy; UnsafePath if the directory or a lock is another
    user's, a symbolic link, or may be written by group or world; ValueError for a bad name;
    PermissionError as admit() does; other OSErrors. Then nothing is held.
    """

    def __init__(
        self, runtime_dir: str | os.PathLike[str], instance: str, group: int | None = None
    ) -> None:
        self.instance = instance
        self.prefix = segment_prefix(instance)
        self.runtime_dir = Path(runtime_dir)
        self._held: list[_Lock] = []
        _make_private_dir(self.runtime_dir)
        try:
            self._held.append(_take(str(self.runtime_dir / "kvd.lock")))
            self._held.append(_take(f"{SHM_DIR}/{self.prefix}.{_LOCK_SUFFIX}"))
            if group is not None:  # last: nobody else may be living in this directory
                admit(self.runtime_dir, group, DIRECTORY_MODE)
        except BaseException:
            self.release()
            raise

    def segment_name(self, suffix: str) -> str:
        """The name for a segment of this instance. ValueError unless `suffix` is 1 to 64 letters,
        digits, '_' and '-', and not 'lock'."""
        if _SUFFIX.fullmatch(suffix) is None or suffix == _LOCK_SUFFIX:
            raise ValueError(f"not an ending for a segment's name: {suffix!r}")
        return f"{self.prefix}.{suffix}"

    def segments(self) -> list[str]:
        """The names of all segments of this instance. While the locks are held nobody but this
        process and dead daemons can have made them. RuntimeError after release()."""
        self._check_held()
        return _segments(self.prefix)

    def sweep(self, keep: Iterable[str] = ()) -> list[str]:
        """Remove all segments of this instance but those in `keep`, and return their names: call it
        before the first one is created. RuntimeError after release()."""
        self._check_held()
        return _sweep(self.prefix, keep)

    def release(self) -> None:
        """Let go of both locks and remove their files. Doing it again does nothing."""
        while self._held:
            self._held.pop().release()

    def _check_held(self) -> None:
        if not self._held:
            raise RuntimeError(f"the lock of instance {self.instance} is not held")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def purge(instance: str, *, only_look: bool = False) -> list[str]:
    """Remove all segments of an instance that no daemon serves, and return their names; or only
    look which there are. Raises InstanceBusy if one does, and what InstanceLock raises."""
    prefix = segment_prefix(instance)
    lock = _take(f"{SHM_DIR}/{prefix}.{_LOCK_SUFFIX}")
    try:
        return _segments(prefix) if only_look else _sweep(prefix, ())
    finally:
        lock.release()


def _segments(prefix: str) -> list[str]:
    return [name for name in list_segments(f"{prefix}.") if name != f"{prefix}.{_LOCK_SUFFIX}"]


def _sweep(prefix: str, keep: Iterable[str]) -> list[str]:
    kept = set(keep)
    return [name for name in _segments(prefix) if name not in kept and remove_segment(name)]


@dataclass(frozen=True, slots=True)
class _Lock:
    path: str
    fd: int

    def release(self) -> None:
        # While the lock is still held, so that the file cannot be another's; see _take().
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        os.close(self.fd)


def _take(path: str) -> _Lock:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UnsafePath(path, "is a symbolic link") from error
            raise
        try:
            _check_own(path, os.fstat(fd), stat.S_ISREG, "regular file")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InstanceBusy(path, _read_pid(fd)) from error
            if _is_at(path, fd):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return _Lock(path, fd)
        except BaseException:
            os.close(fd)
            raise
        # The holder removed the file between our open and our flock: this lock guards nothing.
        os.close(fd)


def _is_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _read_pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None  # empty: the holder has not written it yet


def _make_private_dir(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.stat(follow_symlinks=False)
    if stat.S_ISLNK(found.st_mode):
        raise UnsafePath(str(path), "is a symbolic link")
    _check_own(str(path), found, stat.S_ISDIR, "directory")


def _check_own(path: str, found: os.stat_result, is_kind: Callable[[int], bool], kind: str) -> None:
    if not is_kind(found.st_mode):
        raise UnsafePath(path, f"is not a {kind}")
    if found.st_uid != os.geteuid():
        raise UnsafePath(path, f"belongs to user {found.st_uid}, not to {os.geteuid()}")
    if found.st_mode & 0o022:
        raise UnsafePath(path, f"may be written by others: mode {stat.S_IMODE(found.st_mode):04o}")
