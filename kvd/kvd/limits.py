"""How much memory is left before the operating system refuses, or kills.

Covers the three limits that backing shared memory can run into: the machine's memory, the cgroup's
and that of /dev/shm. Only the last one would be an error; to go beyond one of the others is an OOM
kill (of us, or of somebody else), so they are looked up before memory is backed.
Does not cover kvd's own budget (kvd.core), nor the backing (arena.py).

A cgroup's limit is read under cgroup v2, and where memory is still a hierarchy of v1. If no cgroup
has one, it counts as unlimited.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

# What is left to everybody else at the least. The numbers are a snapshot, and the daemon's own heap
# and its clients allocate beside it.
RESERVE_BYTES = 64 * 1024 * 1024


class NotEnoughRoom(Exception):
    """Backing `needed` bytes would go beyond the limit that `limit` names; it left `available`."""

    def __init__(self, limit: str, needed: int, available: int) -> None:
        super().__init__(f"{needed} bytes are needed, but {limit} leaves {available}")
        self.limit = limit
        self.needed = needed
        self.available = available


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the numbers are read."""

    meminfo: str = "/proc/meminfo"
    own_cgroup: str = "/proc/self/cgroup"
    cgroup_root: str = "/sys/fs/cgroup"
    shm: str = "/dev/shm"


SYSTEM = Sources()


class _Files(NamedTuple):
    """How a version of cgroups calls what we read in each cgroup's directory."""

    limit: str
    usage: str
    inactive: bytes
    """In memory.stat: file pages that were not used lately."""


_V2 = _Files("memory.max", "memory.current", b"inactive_file ")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file ")
_NO_LIMIT = 1 << 62
"""What v1 says instead of nothing is the largest number of whole pages, about 2^63."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """Bytes that are left at this moment, never below 0; None is unlimited.

    `machine` is MemAvailable. `cgroup` is the least of limit - usage over our cgroup and its
    ancestors, and `cgroup_path` the directory of the one that sets it ("" if none does).
    `shm` is what /dev/shm has free.
    """

    machine: int
    cgroup: int | None
    cgroup_path: str
    shm: int | None


def memory_headroom(*, count_file_cache: bool = False, sources: Sources = SYSTEM) -> Headroom:
    """What is left now. Costs about 30 us, and up to 15 us for each cgroup from ours to the root.

    With `count_file_cache` the file pages that a cgroup has not used lately (inactive_file) count
    as left in it, since the kernel drops them before it kills; that costs one more file each, and
    a large one. MemAvailable always counts them.
    """
    cgroup: int | None = None
    cgroup_path = ""
    files = _files(sources)
    for directory in _own_cgroups(sources):
        left = _left_in_cgroup(directory, files, count_file_cache)
        if left is not None and (cgroup is None or left < cgroup):
            cgroup, cgroup_path = left, directory
    return Headroom(_meminfo(sources, b"MemAvailable:"), cgroup, cgroup_path, _left_in_shm(sources))


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What there is at most, whoever has it at this moment, in bytes; None is unlimited.

    `cgroup` is the least limit of our cgroup and its ancestors, and `cgroup_path` the
    directory of the one that has it. `shm` is the size of /dev/shm. `machine` is MemTotal.
    """

    machine: int
    cgroup: int | None
    cgroup_path: str
    shm: int | None


def ceilings(sources: Sources = SYSTEM) -> Ceilings:
    """What there is at most."""
    cgroup: int | None = None
    cgroup_path = ""
    files = _files(sources)
    for directory in _own_cgroups(sources):
        limit = _cgroup_limit(directory, files)
        if limit is not None and (cgroup is None or limit < cgroup):
            cgroup, cgroup_path = limit, directory
    found = os.statvfs(sources.shm)
    shm = found.f_blocks * found.f_frsize or None
    return Ceilings(_meminfo(sources, b"MemTotal:"), cgroup, cgroup_path, shm)


def longest_segment(sources: Sources = SYSTEM) -> int:
    """How long a sparse segment may be of use: as /dev/shm is, or the machine's memory if that has
    no size."""
    most = ceilings(sources)
    return most.machine if most.shm is None else most.shm


def check_room(
    n_bytes: int, *, in_shm: bool = True, reserve: int = RESERVE_BYTES, sources: Sources = SYSTEM
) -> Headroom:
    """Raise NotEnoughRoom unless `n_bytes` can be backed now and leave `reserve` bytes of the
    machine's and of the cgroup's memory; return what was left before. A memfd is not `in_shm`: it
    lies in a file system of the kernel's own, which has no size. Nothing is reserved: whoever
    asks and then backs must be the only one who does."""
    room = memory_headroom(sources=sources)
    if room.cgroup is not None and room.cgroup < n_bytes + reserve:
        # A cgroup that reads files, model files for instance, is always full, of their pages.
        room = memory_headroom(count_file_cache=True, sources=sources)
    if in_shm and room.shm is not None and room.shm < n_bytes:
        raise NotEnoughRoom(f"the size of {sources.shm}", n_bytes, room.shm)
    if room.cgroup is not None and room.cgroup < n_bytes + reserve:
        name = _files(sources).limit
        limit = f"{name} of {room.cgroup_path}, with {reserve} bytes in reserve,"
        raise NotEnoughRoom(limit, n_bytes, max(room.cgroup - reserve, 0))
    if room.machine < n_bytes + reserve:
        limit = f"MemAvailable, with {reserve} bytes in reserve,"
        raise NotEnoughRoom(limit, n_bytes, max(room.machine - reserve, 0))
    return room


def _meminfo(sources: Sources, name: bytes) -> int:
    for line in _read(sources.meminfo).splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"{sources.meminfo} has no {name.decode()}")


def _left_in_shm(sources: Sources) -> int | None:
    found = os.statvfs(sources.shm)
    if found.f_blocks == 0:  # a tmpfs that was mounted without a limit
        return None
    return found.f_bavail * found.f_frsize


def _files(sources: Sources) -> _Files:
    return _V2 if os.path.exists(f"{sources.cgroup_root}/cgroup.controllers") else _V1


def _own_cgroups(sources: Sources) -> list[str]:
    """The directories of our cgroup and of its ancestors as far as we can see them. In a container
    the root is the container's own cgroup, and may have a limit, too."""
    root, begins = sources.cgroup_root, b"0::/"
    if _files(sources) is _V1:
        root, begins = f"{root}/memory", b":memory:/"
    path = ""
    for line in _read(sources.own_cgroup).splitlines():
        number, begin, rest = line.partition(begins)
        if begin and (not number or number.isdigit()):
            path = os.fsdecode(rest)
    if ".." in path.split("/"):  # outside of our cgroup namespace: only its root can be seen
        path = ""
    directories = [root]
    for part in path.split("/"):
        if part:
            directories.append(f"{directories[-1]}/{part}")
    return directories


def _left_in_cgroup(directory: str, files: _Files, count_file_cache: bool) -> int | None:
    limit = _cgroup_limit(directory, files)
    if limit is None:
        return None
    try:
        left = limit - int(_read(f"{directory}/{files.usage}"))
        if count_file_cache:
            left += _inactive_file(directory, files)
    except FileNotFoundError:  # just removed
        return None
    return max(left, 0)


def _cgroup_limit(directory: str, files: _Files) -> int | None:
    try:
        limit = _read(f"{directory}/{files.limit}").strip()
    except FileNotFoundError:  # the root of all, a cgroup without this controller, one just removed
        return None
    return None if limit == b"max" or int(limit) >= _NO_LIMIT else int(limit)


def _inactive_file(directory: str, files: _Files) -> int:
    for line in _read(f"{directory}/memory.stat").splitlines():
        if line.startswith(files.inactive):
            return int(line.split()[1])
    return 0


def _read(path: str) -> bytes:
    # os.open and os.read: a file object costs as much again as the reading.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = b""
        while part := os.read(fd, 65536):
            content += part
        return content
    finally:
        os.close(fd)
