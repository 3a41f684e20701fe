"""The worker thread for what takes long: backing, punching, copying, checksumming, counting.

Covers the queue of jobs, their execution in order, and results that wake an epoll loop.
Does not cover what to back or copy and what follows from a result (server.py, kvd.core), the
system calls (arena.py), nor the rules of a payload: those come with the item, as `check`.

A copy is checked and checksummed where it lies in the arena, where only the daemon writes. The
source may change under our hands at any time, so nothing that was read from it proves anything.

Every long step (fallocate, madvise, np.copyto, xxhash) releases the GIL.
"""

import contextlib
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TypeAlias

import numpy as np
import xxhash

from kvd.arena import ByteRange, Segment

# Each slice is hashed right after it was copied, while it is in the CPU's cache. Measured over
# 256 MiB (2 MiB of L2, 32 MiB of L3; medians of 7): in slices of 64 KiB 34-44 ms, of 256 KiB
# 31-33 ms, of 1 MiB 31-35 ms; in one pass 33 ms when the payload is 0.7 MB, 39 ms when it is 32 MiB
# and so leaves the cache before it is hashed. The copy alone takes 32 ms, the hash alone 10 ms.
SLICE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class BackJob:
    """Back all of `ranges`, which are holes, or none of them.

    `prepare` is called before, in the worker thread; if it raises, none of them is backed.
    """

    job_id: int
    segment: Segment
    ranges: Sequence[ByteRange]
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class PunchJob:
    """Punch out all of `ranges`."""

    job_id: int
    segment: Segment
    ranges: Sequence[ByteRange]


@dataclass(frozen=True, slots=True)
class CopyItem:
    """Copy `length` bytes of `source` from `source_offset` to `offset` of `segment`.

    `check` is then called with a read-only view of the copy, in the worker thread, and raises
    ValueError if the payload is bad; it must not keep the view. The destination must be backed.
    ValueError at once if the bytes are not inside of source and segment.
    """

    source: memoryview
    source_offset: int
    segment: Segment
    offset: int
    length: int
    check: Callable[[memoryview], None] | None = None

    def __post_init__(self) -> None:
        for name, start, size in (
            ("source", self.source_offset, self.source.nbytes),
            (f"segment {self.segment.name}", self.offset, self.segment.size),
        ):
            if start < 0 or self.length <= 0 or start + self.length > size:
                raise ValueError(
                    f"{self.length} bytes at {start} are not inside of the {size} bytes of {name}"
                )


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Copy all of `items`; a bad one does not keep the others from being copied."""

    job_id: int
    items: Sequence[CopyItem]


@dataclass(frozen=True, slots=True)
class CallJob:
    """Call `work` in the worker thread; what it returns is the result's `value`."""

    job_id: int
    work: Callable[[], object]


Job: TypeAlias = BackJob | PunchJob | CopyJob | CallJob


@dataclass(frozen=True, slots=True)
class ItemResult:
    """One item's end: `checksum` (xxh3_64 of the copy), or `error`. A ValueError is the check's
    verdict on the payload; anything else is a fault of ours. After an error the destination holds
    bytes that mean nothing."""

    checksum: int | None
    error: Exception | None


@dataclass(frozen=True, slots=True)
class JobResult:
    """One job's end. `error` is None if it was done. A BackJob's may be NoSpace: then none of its
    ranges is backed. `items` are a CopyJob's, in its order (empty for other jobs), and `value` is
    what a CallJob's work returned."""

    job_id: int
    error: Exception | None
    items: tuple[ItemResult, ...] = ()
    value: object = None


class Copier:
    """One thread that does jobs in the order of submit().

    `event_fd` is readable while results wait: put it into the epoll loop and call results().
    Buffers and segments of a job must stay open until its result is there; from then on the
    copier has no views of them left.
    """

    def __init__(self) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
        self._stopped = False
        # A daemon thread: a crash of the loop must end the process, not hang it.
        self._thread = threading.Thread(target=self._work, name="kvd-copier", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; never blocks. RuntimeError after stop()."""
        if self._stopped:
            raise RuntimeError(f"the copier is stopped, job {job.job_id} cannot be done")
        self._jobs.put(job)

    def results(self) -> list[JobResult]:
        """Take all results that are there, oldest first, and clear `event_fd`; never blocks."""
        if not self._stopped:
            with contextlib.suppress(BlockingIOError):  # nothing was signalled
                # Before the queue is emptied: a result that comes meanwhile signals once more, and
                # at worst the loop wakes up for nothing.
                os.eventfd_read(self.event_fd)
        return self._take_results()

    def stop(self) -> list[JobResult]:
        """Do all jobs that are queued, end the thread, close `event_fd`, and return the results
        nobody has taken. Blocks until then. Stopping again returns nothing."""
        if not self._stopped:
            self._stopped = True
            self._jobs.put(None)
            self._thread.join()
            os.close(self.event_fd)
        return self._take_results()

    def _take_results(self) -> list[JobResult]:
        taken: list[JobResult] = []
        with contextlib.suppress(queue.Empty):
            while True:
                taken.append(self._results.get_nowait())
        return taken

    def _work(self) -> None:
        # Signals are the main thread's: one that is delivered here would not interrupt its epoll.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (job := self._jobs.get()) is not None:
            result = _do(job)
            # Whoever sees the result may close the buffers, so no reference to them may be left:
            # neither here nor in the frames that a kept exception holds on to.
            del job
            _drop_frames(result)
            self._results.put(result)
            os.eventfd_write(self.event_fd, 1)


def checksum(payload: memoryview) -> int:
    """xxh3_64 of `payload`, as every block's checksum is. Releases the GIL."""
    digest = xxhash.xxh3_64()
    digest.update(payload)  # xxh3_64_intdigest() held the GIL in xxhash 3
    return digest.intdigest()


def _do(job: Job) -> JobResult:
    try:
        if isinstance(job, CopyJob):
            return JobResult(job.job_id, None, tuple(_copy(item) for item in job.items))
        if isinstance(job, CallJob):
            return JobResult(job.job_id, None, value=job.work())
        if isinstance(job, BackJob):
            _back(job)
        else:
            for span in job.ranges:
                job.segment.punch(span.offset, span.length)
    except Exception as error:  # whatever it is, the loop has to hear of it
        return JobResult(job.job_id, error)
    return JobResult(job.job_id, None)


def _back(job: BackJob) -> None:
    if job.prepare is not None:
        job.prepare()
    backed: list[ByteRange] = []
    try:
        for span in job.ranges:
            job.segment.back(span.offset, span.length)
            backed.append(span)
    except Exception:
        for span in backed:
            job.segment.punch(span.offset, span.length)
        raise


def _copy(item: CopyItem) -> ItemResult:
    try:
        digest = _copy_and_hash(item)
        if item.check is not None:
            copy = item.segment.buffer[item.offset : item.offset + item.length]
            item.check(copy.toreadonly())
    except Exception as error:
        return ItemResult(None, error)
    return ItemResult(digest, None)


def _copy_and_hash(item: CopyItem) -> int:
    source = np.frombuffer(item.source, np.uint8, item.length, item.source_offset)
    copy = np.frombuffer(item.segment.buffer, np.uint8, item.length, item.offset)
    digest = xxhash.xxh3_64()
    for start in range(0, item.length, SLICE_BYTES):
        part = copy[start : start + SLICE_BYTES]
        np.copyto(part, source[start : start + SLICE_BYTES])
        digest.update(part.data)
    return digest.intdigest()


def _drop_frames(result: JobResult) -> None:
    """Clear the local variables of all frames that the result's exceptions hold, their callers'
    included (traceback.clear_frames leaves those out); where each exception was raised stays
    known, for the log."""
    errors: list[BaseException | None] = [result.error, *(item.error for item in result.items)]
    seen: set[int] = set()
    while errors:
        error = errors.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        for top, _ in traceback.walk_tb(error.__traceback__):
            frame: FrameType | None = top
            while frame is not None:
                with contextlib.suppress(RuntimeError):  # it is still running
                    frame.clear()
                frame = frame.f_back
        errors += [error.__cause__, error.__context__]
