"""A client's read-only mapping of an arena, and views of leased blocks in it.

The mapping comes from a descriptor that the daemon sent, never from a name. Only ranges under a
lease are touched: a read of anything else would fill a hole of the daemon's memory.
"""

import contextlib
import mmap
import os
from itertools import pairwise

from kvd_client.errors import ViewsAlive

# Linux 5.14; mmap has no name for it. Maps the pages that are there, in one call instead of a fault
# for every 64 KiB.
_MADV_POPULATE_READ = 22


class Arena:
    """One arena of the daemon, mapped when it is first read."""

    def __init__(self, fd: int, size: int) -> None:
        """Takes over `fd`."""
        self._fd = fd
        self._size = size
        self._mapping: mmap.mmap | None = None
        self._populated: set[int] = set()

    def view(self, offset: int, length: int) -> memoryview:
        """A read-only view of leased bytes. Valid as long as the lease; release it before that
        ends."""
        return memoryview(self._map())[offset : offset + length]

    def populate(self, slots: list[int], stride: int) -> None:
        """Map the pages of leased slots now, so that reading them takes no faults.

        Once for each slot: asking again for pages that are mapped costs 70 us a MiB. A slot that
        was punched and backed since then is faulted in as it is read.
        """
        mapping = self._map()
        ordered = sorted(set(slots) - self._populated)
        self._populated.update(ordered)
        starts = [slot for before, slot in pairwise([-2, *ordered]) if slot != before + 1]
        ends = [slot + 1 for slot, after in pairwise([*ordered, -2]) if after != slot + 1]
        for start, end in zip(starts, ends, strict=True):
            # An older kernel faults the pages in one by one instead.
            with contextlib.suppress(OSError):
                mapping.madvise(_MADV_POPULATE_READ, start * stride, (end - start) * stride)

    def unmap(self) -> None:
        """Unmap until the next view. Raises ViewsAlive, and changes nothing, while one is alive."""
        if self._mapping is not None:
            try:
                self._mapping.close()
            except BufferError:
                raise ViewsAlive("views of the arena are still alive: drop them first") from None
            self._mapping = None
            self._populated.clear()

    def close(self) -> None:
        """Let go. Views that are still alive keep the mapping and its bytes until they go."""
        self._mapping = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _map(self) -> mmap.mmap:
        if self._mapping is None:
            self._mapping = mmap.mmap(self._fd, self._size, mmap.MAP_SHARED, mmap.PROT_READ)
        return self._mapping
