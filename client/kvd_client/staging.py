"""The client's side of its staging: giving out ranges, and taking them back when commits finish.

Covers extents of the memfd behind its header page. What is written into them, and when a commit's
number is known: context.py and session.py. The daemon's side: kvd.staging.
"""

import mmap
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from kvd_client.errors import StagingFull
from kvd_proto.geometry import PAGE_BYTES, round_up


@dataclass(slots=True, eq=False)
class Staged:
    """Ranges of the staging for the payloads of consecutive blocks, 4 KiB aligned.

    `offsets` and `sizes` are one for each block, in bytes. Write through `block`, or into `buffer`
    (the whole staging) at an offset; the memory is the owner's until it is committed or given
    back, and its content is arbitrary at first. After the session's end it can be written as
    before, and is nobody's; what was in it may be lost.
    """

    offsets: list[int]
    sizes: list[int]
    buffer: memoryview
    kept: bool = False
    """Its owner goes on reading it after the commit: that the commit has ended frees nothing."""
    spent: bool = False
    """Committed or given back."""

    def block(self, index: int) -> memoryview:
        """A writable view of block `index`. Do not keep it beyond the commit."""
        start = self.offsets[index]
        return self.buffer[start : start + self.sizes[index]]


class StagingArea:
    """First-fit extents of one mapped staging. Not thread-safe: the client's lock is held."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self.buffer = memoryview(mapping)
        self.size = len(self.buffer)
        self._free: list[tuple[int, int]] = [(PAGE_BYTES, self.size)]
        """(start, end) of free extents, sorted, no two adjacent."""
        self._busy: list[tuple[int, Staged]] = []
        """(commit, what it uses), in the order of the replies."""
        self._completed = np.frombuffer(self.buffer, dtype="<u8", count=1)
        self.changes = 0
        """Counts everything that may have made room."""

    @property
    def completed(self) -> int:
        """The highest commit number up to which everything is finished."""
        return int(self._completed[0])

    @property
    def oldest_commit(self) -> int | None:
        """The commit to wait for when there is no room; None if no commit uses the staging."""
        return min((commit for commit, _ in self._busy), default=None)

    def has_commits(self) -> bool:
        """Whether a commit uses the staging."""
        return bool(self._busy)

    def take(self, sizes: list[int]) -> Staged | None:
        """Room for blocks of these sizes, or None until a commit has finished.

        Raises StagingFull if the blocks could never fit.
        """
        self._reclaim()
        total = sum(round_up(size) for size in sizes)
        if total > self.size - PAGE_BYTES:
            raise StagingFull(
                "the blocks are larger than the whole staging: commit fewer at a time",
                asked_bytes=total,
                staging_bytes=self.size - PAGE_BYTES,
            )
        offsets: list[int] = []
        for size in sizes:
            offset = self._take_one(round_up(size))
            if offset is None:
                self.give_back(Staged(offsets, sizes[: len(offsets)], self.buffer))
                return None
            offsets.append(offset)
        return Staged(offsets, sizes, self.buffer)

    def is_unspent(self, staged: Staged) -> bool:
        """Whether it is of this staging, and neither committed nor given back."""
        return staged.buffer is self.buffer and not staged.spent

    def committed(self, staged: Staged, commit: int) -> None:
        """`staged` is free again when `commit` is finished."""
        self._busy.append((commit, staged))
        self.changes += 1

    def give_back(self, staged: Staged) -> None:
        """`staged` is free now: no commit uses it. Does nothing while it is `kept`."""
        if staged.kept:
            return
        for offset, size in zip(staged.offsets, staged.sizes, strict=True):
            self._release(offset, offset + round_up(size))
        self.changes += 1

    def close(self) -> None:
        """Let go of the mapping. Who still writes through a view keeps it, and hurts nobody."""
        self.buffer = memoryview(b"")
        self._completed = np.zeros(1, dtype="<u8")
        self._busy.clear()

    def _take_one(self, size: int) -> int | None:
        for index, (start, end) in enumerate(self._free):
            if end - start > size:
                self._free[index] = (start + size, end)
                return start
            if end - start == size:
                del self._free[index]
                return start
        return None

    def _release(self, start: int, end: int) -> None:
        index = bisect_left(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))

    def _reclaim(self) -> None:
        completed = self.completed
        finished = [staged for commit, staged in self._busy if commit <= completed]
        self._busy = [entry for entry in self._busy if entry[0] > completed]
        for staged in finished:
            self.give_back(staged)
