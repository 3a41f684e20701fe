"""A client's read-only mappings of an arena and of its index, and views of leased blocks.

The mappings come from descriptors that the daemon sent, never from a name. Only ranges under a
lease are touched: a read of anything else would fill a hole of the daemon's memory. Of the index,
what is in use: see kvd_proto.index.
"""

import gc
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple, cast
from weakref import ref

import numpy as np
import numpy.typing as npt

from kvd_client.errors import ViewsAlive
from kvd_proto.index import IndexReader

# Linux 5.14; mmap has no name for it. Maps the pages that are there, in one call instead of a fault
# for every 64 KiB.
_MADV_POPULATE_READ = 22


class Arena:
    """One arena of the daemon, mapped when it is first read, and its index."""

    def __init__(self, fd: int, size: int, index_fd: int) -> None:
        """Takes over both descriptors. Raises OSError or ValueError if the index cannot be
        mapped."""
        self._fd = fd
        self.size = size
        self.index: IndexReader | None = None
        """Which keys it holds; may be read from any thread. None once it is closed."""
        try:
            mapping = mmap.mmap(index_fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
            self.index = IndexReader(memoryview(mapping))
        finally:
            os.close(index_fd)
        self._mapping: mmap.mmap | None = None
        self._populated: set[int] = set()

    def read(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        """A read-only array over leased bytes, without a copy. Valid as long as the lease."""
        return np.frombuffer(self._map(), np.uint8, length, offset)

    def populate(self, slots: Sequence[int], stride: int) -> None:
        """Map the pages of leased slots now, so that reading them takes no faults.

        A slot that was mapped before is passed over: its pages are still mapped, unless the slot
        has had other memory since, and then reading it takes faults, and nothing else.
        """
        if self._populated.issuperset(slots):
            return
        new = sorted(set(slots).difference(self._populated))
        mapping = self._map()
        starts = [slot for before, slot in pairwise([-2, *new]) if slot != before + 1]
        ends = [slot + 1 for slot, after in pairwise([*new, -2]) if after != slot + 1]
        for start, end in zip(starts, ends, strict=True):
            # An older kernel faults the pages in one by one instead.
            with suppress(OSError):
                mapping.madvise(_MADV_POPULATE_READ, start * stride, (end - start) * stride)
        self._populated.update(new)

    def unmap(self) -> None:
        """Unmap until the next read. Raises ViewsAlive, and changes nothing, while a view lives."""
        if self._mapping is not None:
            try:
                self._mapping.close()
            except BufferError:
                raise ViewsAlive("views of the arena are still alive: drop them first") from None
            self._mapping = None
            self._populated.clear()

    def close(self) -> None:
        """Let go. Views that are still alive keep the mapping and its bytes until they go."""
        self._mapping = self.index = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _map(self) -> mmap.mmap:
        if self._fd < 0:
            # Without this check we would map zeros: mmap takes -1 for no file at all.
            raise ValueError("the arena is closed")
        if self._mapping is None:
            self._mapping = mmap.mmap(self._fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ)
        return self._mapping


class _Given(NamedTuple):
    """A view that was handed out, and the array below it, as long as they live."""

    block: int
    payload: ref[npt.NDArray[np.uint8]]
    view: ref[memoryview]


class Views:
    """The views of one sequence's blocks that were handed out.

    A memoryview can be made invalid, and whoever uses it then gets a ValueError. Slices of it and
    arrays over it cannot; but they keep the array below them alive, which tells that they exist.
    """

    def __init__(self) -> None:
        self._given: list[_Given] = []
        self._prune_at = 64

    def __len__(self) -> int:
        """Payloads over which something is alive."""
        self._prune()
        return len(self._given)

    def hand_out(self, block: int, payload: npt.NDArray[np.uint8]) -> memoryview:
        """A view of a block's payload."""
        view = memoryview(cast(Any, payload))
        self._given.append(_Given(block, ref(payload), ref(view)))
        if len(self._given) > self._prune_at:
            self._prune()
            self._prune_at = 2 * len(self._given) + 64
        return view

    def invalidate(self, first_block: int = 0) -> bool:
        """Make the memoryviews from block `first_block` on invalid. False if there are slices of
        them or arrays over them: those stay as they are."""
        if not self._given:
            return True
        for given in self._given:
            if given.block >= first_block:
                _release(given.view)
        if self._is_alive(first_block):
            # Perhaps only in a cycle, of an exception's frames for instance.
            gc.collect()
        return not self._is_alive(first_block)

    def _prune(self) -> None:
        self._given = [given for given in self._given if given.payload() is not None]

    def _is_alive(self, first_block: int) -> bool:
        self._prune()
        return any(given.block >= first_block for given in self._given)


def _release(view: ref[memoryview]) -> None:
    found = view()
    if found is not None:
        with suppress(BufferError):
            found.release()
