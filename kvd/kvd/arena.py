"""One named shared-memory segment: created sparse, backed and punched out range by range.

Covers what the daemon does to a segment it owns: create it or adopt one that a daemon before it
made, back a range before its first use, punch it out, say what the operating system has backed and
who still reads, hand out read-only descriptors, let go; and the search for segments that a dead
daemon left behind.
Does not cover which range holds which block (kvd.core), the asking of limits before backing
(limits.py), the thread that does the slow part (copier.py), nor whose leftovers may be removed
(instance.py).

    file    |<- page ->|                                                      size (sparse)
            [ backed ][ hole                 ][ backed              ][ hole  ]
              ^ reads and writes are safe: the pages are there, and they are counted in st_blocks
                        ^ nobody may touch this: even a read through a read-only mapping fills it

Needs Linux 5.14 (MADV_POPULATE_WRITE). The page size is taken to be PAGE, 4 KiB.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import resource_tracker, shared_memory
from typing import NamedTuple, NoReturn

PAGE = 4096
SHM_DIR = "/dev/shm"  # where shm_open(3) keeps its names on Linux

# From the kernel's headers: mmap has no name for the advice, and os no fallocate.
_MADV_DONTNEED = 4
_MADV_POPULATE_WRITE = 23
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid

# Called through ctypes rather than mmap.madvise because a CDLL call releases the GIL.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class NoSpace(Exception):
    """The operating system could not back a range. Nothing was left backed by the attempt.

    `segment`, `offset` and `length` say what was asked; `backed_bytes` is what the segment has, and
    `free_bytes` what the file system had left (0 also when it keeps no count).
    """

    def __init__(
        self, segment: str, offset: int, length: int, backed_bytes: int, free_bytes: int
    ) -> None:
        super().__init__(
            f"no space to back {length} bytes at {offset} of segment {segment}, which has "
            f"{backed_bytes} bytes backed: {free_bytes} bytes are free in {SHM_DIR}"
        )
        self.segment = segment
        self.offset = offset
        self.length = length
        self.backed_bytes = backed_bytes
        self.free_bytes = free_bytes


class MappingInUse(Exception):
    """A mapping cannot be closed while views of it (slices, NumPy arrays) are alive. `name` is its
    name. Nothing was changed: the mapping goes on as it was."""

    def __init__(self, name: str) -> None:
        super().__init__(f"views of {name} are still alive: drop them before it is closed")
        self.name = name


class ByteRange(NamedTuple):
    """`length` bytes of a segment from `offset`."""

    offset: int
    length: int


class Segment:
    """A sparse shared-memory segment that this process alone writes.

    `buffer` is a writable memoryview of all of it. Touch only ranges that are backed: an access to
    a hole fills it, uncounted, and kills the process with SIGBUS if there is no memory. Views of
    `buffer` must be gone before close().

    back() and punch() may run in another thread than the one that uses `buffer`; close() may not
    run beside them.
    """

    def __init__(self, name: str, fd: int, size: int) -> None:
        """Takes over `fd`. Use Segment.create() or Segment.adopt()."""
        self._fd = fd
        self._mapping = mmap.mmap(fd, size)
        self._buffer = memoryview(self._mapping)
        self._closed = False
        self.name = name
        self.size = size

    @classmethod
    def create(cls, name: str, size: int) -> "Segment":
        """A new segment of `size` bytes (a multiple of PAGE), of which none is backed, mode 0600.

        No resource tracker learns of it and none is started, so it outlives this process unless
        close(unlink=True) is called. FileExistsError if the name is taken: what is there is left
        alone. Any other OSError leaves nothing behind.
        """
        _check_name(name)
        if size <= 0 or size % PAGE or size > sys.maxsize:
            raise ValueError(f"a segment's size is a positive multiple of {PAGE}, not {size}")
        _create_untracked(name, size).close()
        try:
            # A descriptor of our own: the class keeps its one private.
            fd = _open_segment(name)
            try:
                # 0600 whatever the umask: a stricter one would keep the daemon from its own segment
                # after a restart.
                os.fchmod(fd, 0o600)
                return cls(name, fd, size)
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            os.unlink(f"{SHM_DIR}/{name}")
            raise

    @classmethod
    def adopt(cls, name: str) -> "Segment":
        """A segment that a daemon before this one made, with what it has backed.

        Never with SharedMemory(name), which unlinks the segment when attaching fails.
        PermissionError if it is not this user's regular file of mode 0600; any OSError leaves it as
        it is.
        """
        _check_name(name)
        fd = _open_segment(name)
        try:
            found = os.fstat(fd)
            kept = stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
            if not kept or found.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "not a segment of this user's, mode 0600", name)
            if found.st_size <= 0 or found.st_size % PAGE:
                raise OSError(errno.EINVAL, f"a segment has whole pages, not {found.st_size} bytes")
            return cls(name, fd, found.st_size)
        except BaseException:
            os.close(fd)
            raise

    @property
    def buffer(self) -> memoryview:
        """All of the segment, writable. Valid until close()."""
        self._check_open()
        return self._buffer

    def back(self, offset: int, length: int) -> None:
        """Give a range memory, faulted into this process's mapping and zero, so that no later
        access of anybody's can fail.

        The range must be a hole, in whole pages. Raises NoSpace, and then, as after any other
        OSError, none of the range is backed. Costs about 0.5 ms per MiB; the GIL is released.
        """
        self._check_range(offset, length)
        # Holding a view keeps a close() in another thread from unmapping under the system call.
        with self._buffer[offset : offset + length] as view:
            try:
                os.posix_fallocate(self._fd, offset, length)
            except OSError as error:
                # The kernel takes back what it gave before it ran out.
                self._raise_no_space(error, offset, length)
            try:
                # Not only for speed: until they are written for the first time, pages that
                # fallocate gave look like a hole to SEEK_DATA, and backed_ranges() would miss them.
                address = ctypes.addressof(ctypes.c_char.from_buffer(view))
                _call(_libc.madvise, address, length, _MADV_POPULATE_WRITE)
            except OSError as error:
                self.punch(offset, length)
                self._raise_no_space(error, offset, length)

    def check_free(self, offset: int, length: int) -> None:
        """Raise NoSpace unless the file system has room for a range of `length` bytes now."""
        self._check_range(offset, length)
        file_system = os.fstatvfs(self._fd)
        free = file_system.f_bavail * file_system.f_frsize
        if file_system.f_blocks and free < length:
            raise NoSpace(self.name, offset, length, self.backed_bytes(), free)

    def punch(self, offset: int, length: int) -> None:
        """Give a range's memory back, in whole pages. Its bytes are lost and read as zeros, but
        nobody may read them, since that would fill the hole again. Punching a hole does nothing.
        Costs about 0.2 ms per MiB; the GIL is released."""
        self._check_range(offset, length)
        punch_hole(self._fd, offset, length)

    def backed_bytes(self) -> int:
        """The bytes that the operating system has backed, foreign fills included (st_blocks)."""
        self._check_open()
        return os.fstat(self._fd).st_blocks * 512

    def backed_ranges(self) -> list[ByteRange]:
        """The backed ranges, in order and maximal, foreign fills included; their lengths add up to
        backed_bytes(). Fills nothing. Costs about 15 us per backed MiB, since the kernel looks at
        every page, and keeps the core that it is on meanwhile: for a start, where nobody waits."""
        self._check_open()
        ranges: list[ByteRange] = []
        position = 0
        while position < self.size and (start := self.next_backed(position)) is not None:
            position = self.next_hole(start)
            ranges.append(ByteRange(start, position - start))
        return ranges

    def next_backed(self, offset: int) -> int | None:
        """Where the first page from `offset` on is that has memory, foreign fills included; None if
        there is none. Fills nothing, and costs what the hole before it does: next to nothing."""
        self._check_open()
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return None
            raise

    def next_hole(self, offset: int) -> int:
        """Where the first page from `offset` on is that has no memory, or the segment's end. Costs
        15 us for each MiB that has memory before it."""
        self._check_open()
        return os.lseek(self._fd, offset, os.SEEK_HOLE)

    def open_reader(self, life: int) -> int:
        """A new O_RDONLY descriptor of the segment, for handing to a client; the caller closes it.
        Works even when somebody else has unlinked the name.

        Whoever has that descriptor, or a mapping made with it, is a reader of `life` (from 0) until
        the last of both is gone: the kernel keeps count, see has_readers_before().
        """
        # Opened anew, not duplicated: a lock belongs to an opening, and so does a client.
        fd = self.open_read_only()
        try:
            lock = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, life, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open_read_only(self) -> int:
        """The same without keeping count of who has it."""
        self._check_open()
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def has_readers_before(self, life: int) -> bool:
        """Whether any process can still read the segment through a descriptor of a life before
        `life`."""
        self._check_open()
        if not life:
            return False
        lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, life, 0)
        found = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, lock))
        return bool(found[0] != fcntl.F_UNLCK)

    def close(self, *, unlink: bool) -> None:
        """Unmap, and with `unlink` remove the name, too, if it still means this segment. Clients
        keep what they have mapped. Closing again does nothing.

        Raises MappingInUse, and changes nothing, while views of `buffer` are alive.
        """
        if self._closed:
            return
        try:
            self._buffer.release()
            self._mapping.close()
        except BufferError as error:
            self._buffer = memoryview(self._mapping)
            raise MappingInUse(f"segment {self.name}") from error
        self._closed = True
        if unlink:
            self._unlink()
        os.close(self._fd)

    def unlink(self) -> None:
        """Remove the name, if it still means this segment. All who have it open go on as before."""
        self._check_open()
        self._unlink()

    def _unlink(self) -> None:
        path = f"{SHM_DIR}/{self.name}"
        try:
            found = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return
        if os.path.samestat(found, os.fstat(self._fd)):
            # Not SharedMemory.unlink(): before 3.13 that talks to the resource tracker.
            os.unlink(path)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"segment {self.name} is closed")

    def _check_range(self, offset: int, length: int) -> None:
        self._check_open()
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are not inside of {self.size} bytes")
        if offset % PAGE or length % PAGE:
            raise ValueError(f"{length} bytes at {offset} are not whole pages of {PAGE} bytes")

    def _raise_no_space(self, error: OSError, offset: int, length: int) -> NoReturn:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise error
        file_system = os.fstatvfs(self._fd)
        free = file_system.f_bavail * file_system.f_frsize
        raise NoSpace(self.name, offset, length, self.backed_bytes(), free) from error


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the memory of a range of a file back, whoever has it mapped. The GIL is released."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    _call(_libc.fallocate, fd, mode, offset, length)


def byte_ranges(slots: Iterable[int], stride: int) -> list[ByteRange]:
    """The slots' bytes as few ranges: neighbours together, so that one system call does for
    them."""
    ordered = sorted(slots)
    starts = [slot for before, slot in pairwise([-2, *ordered]) if slot != before + 1]
    ends = [slot + 1 for slot, after in pairwise([*ordered, -2]) if after != slot + 1]
    return [
        ByteRange(start * stride, (end - start) * stride)
        for start, end in zip(starts, ends, strict=True)
    ]


def drop_pages(view: memoryview) -> None:
    """Take the pages of `view` (whole pages of a shared mapping, writable) out of the mapping; the
    file keeps them, and a later access brings them back. The GIL is released."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    _call(_libc.madvise, address, view.nbytes, _MADV_DONTNEED)


def list_segments(prefix: str) -> list[str]:
    """The names of this user's segments (regular files only) that begin with `prefix`, sorted."""
    names: list[str] = []
    with os.scandir(SHM_DIR) as entries:
        names.extend(
            entry.name
            for entry in entries
            if entry.name.startswith(prefix) and _is_own_file(f"{SHM_DIR}/{entry.name}")
        )
    return sorted(names)


def remove_segment(name: str) -> bool:
    """Remove a name; False if this user has no segment (regular file) of that name. Whoever has it
    mapped keeps his mapping, so make sure that its owner is dead."""
    _check_name(name)
    path = f"{SHM_DIR}/{name}"
    if not _is_own_file(path):
        return False
    os.unlink(path)
    return True


def _open_segment(name: str) -> int:
    return os.open(f"{SHM_DIR}/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)


def _check_name(name: str) -> None:
    if not name or name in (".", "..") or "/" in name or "\0" in name or len(name) > 255:
        raise ValueError(f"not a name for a segment: {name!r}")


def _is_own_file(path: str) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


def _call(function: Callable[..., int], *arguments: int) -> None:
    """A libc call that returns -1 and sets errno: raises that as OSError, repeats after EINTR."""
    while function(*arguments) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


if sys.version_info >= (3, 13):

    def _create_untracked(name: str, size: int) -> shared_memory.SharedMemory:
        return shared_memory.SharedMemory(name, create=True, size=size, track=False)

else:

    class _TrackerDeafTo:
        """Stands in for the module resource_tracker, and passes on all that is not about `name`."""

        def __init__(self, name: str) -> None:
            self._name = name

        def register(self, name: str, rtype: str) -> None:
            if name != self._name:
                resource_tracker.register(name, rtype)

        def unregister(self, name: str, rtype: str) -> None:
            if name != self._name:
                resource_tracker.unregister(name, rtype)

    _hook_lock = threading.Lock()

    @contextmanager
    def _tracker_kept_off(name: str) -> Iterator[None]:
        # The class looks its tracker up in its module each time it registers (and, when creation
        # fails, unregisters) a name, and has no switch for it before 3.13. Registering and then
        # unregistering would not do: both start a tracker process, and if the daemon dies between
        # them that process unlinks the segment.
        with _hook_lock:
            shared_memory.resource_tracker = _TrackerDeafTo(name)  # type: ignore[attr-defined]
            try:
                yield
            finally:
                shared_memory.resource_tracker = resource_tracker  # type: ignore[attr-defined]

    def _create_untracked(name: str, size: int) -> shared_memory.SharedMemory:
        with _tracker_kept_off(f"/{name}"):
            return shared_memory.SharedMemory(name, create=True, size=size)
