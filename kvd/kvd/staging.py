"""A session's staging: the memory a client writes into, and the daemon copies from.

Covers the memfd, its seals, the daemon's mapping and the completion number in its header.
Does not cover what is inside: the client gives out the pages after the header as it likes, and a
commit names the bytes it means (kvd.core checks those bounds). How the descriptor reaches the
client: lifeline.py. Who copies out of it: copier.py.

    0            8                     4096                                        size
    | completed  | reserved, zero      | pages, given out by the client            |
      u64 LE: every commit of the session up to this number is finished

Nothing read from here can be trusted: the client may write at any time, and may punch holes, which
then read as zeros. What it cannot do, because of the seals, is to shrink the file under the daemon
(SIGBUS). So check and checksum the copy, never the original.
"""

import fcntl
import mmap
import os
from collections.abc import Generator
from typing import cast

import numpy as np

from kvd.arena import PAGE, MappingInUse, drop_pages, punch_hole

STEP_BYTES = 4 << 20
"""A millisecond of taking memory."""
UNMAP_STEP_BYTES = 64 << 20
HEADER_BYTES = PAGE  # a whole page, so that everything behind it is page-aligned, too


class Staging:
    """One memfd, complete in memory from the start, mapped read-write by the daemon.

    `fd` is the descriptor to hand to the client; it stays the staging's own, and is closed with it.
    `buffer` is a memoryview of all of it; views of that must be gone before close().
    """

    def __init__(self, fd: int, size: int) -> None:
        """Takes over `fd`. Use Staging.create()."""
        self.fd = fd
        self.size = size
        self._mapping = mmap.mmap(fd, size)
        self._buffer = memoryview(self._mapping)
        self._completed = 0
        self._closed = False

    @classmethod
    def create(cls, size: int) -> "Staging":
        """As `making`, at once."""
        steps = cls.making(size)
        while True:
            try:
                next(steps)
            except StopIteration as made:
                return cast(Staging, made.value)

    @classmethod
    def making(cls, size: int) -> Generator[int, None, "Staging"]:
        """A new staging of `size` bytes (a multiple of PAGE, larger than the header), all zero; in
        steps, each of which yields the bytes that it took.

        OSError (ENOSPC, ENOMEM) if there is no memory for it; then nothing is left behind. Ask
        limits.check_room() before: beyond a cgroup's limit this is an OOM kill and no error.
        """
        if size <= HEADER_BYTES or size % PAGE:
            raise ValueError(f"a staging's size is a multiple of {PAGE} above one, not {size}")
        fd = os.memfd_create("kvd-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # A memfd is born 0777. With 0600 a client of another user cannot open it a second time
            # through /proc/self/fd, for instance after it has passed a read-only one on.
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, size)
            for start in range(0, size, STEP_BYTES):
                length = min(STEP_BYTES, size - start)
                os.posix_fallocate(fd, start, length)
                yield length
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return cls(fd, size)
        except BaseException:
            os.close(fd)
            raise

    @property
    def buffer(self) -> memoryview:
        """All of the staging, header included. Valid until close()."""
        self._check_open()
        return self._buffer

    def set_completed(self, number: int) -> None:
        """Publish that every commit up to `number` is finished. It never goes back (ValueError)."""
        self._check_open()
        if number < self._completed:
            raise ValueError(f"completed goes back from {self._completed} to {number}")
        # One aligned store of eight bytes. struct.pack_into() clears them first, and a client that
        # reads in between sees the number go back to 0.
        np.frombuffer(self._buffer, dtype="<u8", count=1)[0] = number
        self._completed = number

    def completed(self) -> int:
        """The number that the header shows. The client can forge it: decide nothing by it."""
        self._check_open()
        return int(np.frombuffer(self._buffer, dtype="<u8", count=1)[0])

    def backed_bytes(self) -> int:
        """What the operating system has backed: `size`, less what the client has punched out."""
        self._check_open()
        return os.fstat(self.fd).st_blocks * 512

    def ending(self) -> Generator[int, None, None]:
        """The session has ended: take the memory back, also from a client that has it open still,
        and close; in steps. What such a client writes from now on is memory of its own."""
        for start in range(0, self.size, STEP_BYTES):
            punch_hole(self.fd, start, min(STEP_BYTES, self.size - start))
            yield 0
        # The pages are taken out of the mapping before that is removed: mmap.close() does both with
        # the GIL held, 5 ms for a GiB.
        for start in range(0, self.size, UNMAP_STEP_BYTES):
            drop_pages(self._buffer[start : start + UNMAP_STEP_BYTES])
            yield 0
        self.close()

    def close(self) -> None:
        """Unmap and close; the memory is free when the client has let go of it, too: for the end of
        the daemon, whose clients go on. Closing again does nothing. Raises MappingInUse, and
        changes nothing, while views are alive."""
        if self._closed:
            return
        try:
            self._buffer.release()
            self._mapping.close()
        except BufferError as error:
            self._buffer = memoryview(self._mapping)
            raise MappingInUse("a staging") from error
        self._closed = True
        os.close(self.fd)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the staging is closed")
