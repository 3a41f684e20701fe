"""The worker thread for what takes long: backing, punching, copying, checksumming, counting.

Covers the jobs, their execution step by step, and results that wake an epoll loop. Whose step is
next: turns.py.
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
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import ClassVar, TypeAlias

import numpy as np
import xxhash

from kvd.arena import ByteRange, Segment
from kvd.turns import Entry, Order, Turns

Steps: TypeAlias = Generator[int, None, object]
"""A job's work in steps. It yields after each, with the bytes that it has taken from the system in
it; what it returns is the result's value."""

# Each slice is hashed right after it was copied, while it is in the CPU's cache. Measured over
# 256 MiB (2 MiB of L2, 32 MiB of L3; medians of 7): in slices of 64 KiB 34-44 ms, of 256 KiB
# 31-33 ms, of 1 MiB 31-35 ms; in one pass 33 ms when the payload is 0.7 MB, 39 ms when it is 32 MiB
# and so leaves the cache before it is hashed. The copy alone takes 32 ms, the hash alone 10 ms.
SLICE_BYTES = 256 * 1024

# How long others may wait for one step: about a millisecond, on a machine where giving memory takes
# 0.5 ms/MiB, punching 0.2 and copying 0.15; a range or an item costs 10 us whatever its length.
BACK_STEP_BYTES = 2 << 20
PUNCH_STEP_BYTES = 4 << 20
COPY_STEP_BYTES = 4 << 20
PART_COST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class BackJob:
    """Back all of `ranges`, which are holes, or none of them.

    `prepare` is called before, in the worker thread, with the bytes that other jobs have begun to
    take and not got yet; if it raises, nothing is backed.
    """

    order: ClassVar[Order] = Order.TAKE
    job_id: int
    segment: Segment
    ranges: Sequence[ByteRange]
    prepare: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class PunchJob:
    """Punch out all of `ranges`."""

    order: ClassVar[Order] = Order.FREE
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

    order: ClassVar[Order] = Order.COPY
    job_id: int
    items: Sequence[CopyItem]


@dataclass(frozen=True, slots=True)
class CallJob:
    """Call `work` in the worker thread; what it returns is the result's `value`."""

    job_id: int
    work: Callable[[], object]
    order: Order = Order.ALONE


@dataclass(frozen=True, slots=True)
class TakeJob:
    """Take `n_bytes` from the system in the steps of `work`, which is told the bytes that other
    jobs have begun to take and not got yet."""

    order: ClassVar[Order] = Order.TAKE
    job_id: int
    n_bytes: int
    work: Callable[[int], Steps]


@dataclass(frozen=True, slots=True)
class StepsJob:
    """Do the steps of `work`, in any order of jobs."""

    job_id: int
    work: Callable[[], Steps]
    order: Order


Job: TypeAlias = BackJob | PunchJob | CopyJob | CallJob | TakeJob | StepsJob


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
    """One thread that does jobs, step by step, in the order of turns.py.

    `event_fd` is readable while results wait: put it into the epoll loop and call results().
    Buffers and segments of a job must stay open until its result is there; from then on the
    copier has no views of them left.
    """

    def __init__(self) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._jobs: queue.SimpleQueue[tuple[Job, Hashable] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
        self._stopped = False
        # A daemon thread: a crash of the loop must end the process, not hang it.
        self._thread = threading.Thread(target=self._work, name="kvd-copier", daemon=True)
        self._thread.start()

    def submit(self, job: Job, lane: Hashable = None) -> None:
        """Queue a job; never blocks. `lane` is for whom: lanes take turns. RuntimeError after
        stop()."""
        if self._stopped:
            raise RuntimeError(f"the copier is stopped, job {job.job_id} cannot be done")
        self._jobs.put((job, lane))

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
        turns: Turns[_Running] = Turns()
        stopping = False
        while True:
            # Before the choice: who has just come is among those who take turns.
            stopping = self._take_jobs(turns, wait=not stopping and turns.is_empty) or stopping
            entry = turns.next()
            if entry is None:
                if stopping:
                    return
                continue
            result = _step(entry, turns)
            # Whoever sees the result may close the buffers, so no reference to them may be left:
            # neither here nor in the frames that a kept exception holds on to.
            del entry
            if result is not None:
                _drop_frames(result)
                self._results.put(result)
                del result
                os.eventfd_write(self.event_fd, 1)

    def _take_jobs(self, turns: "Turns[_Running]", *, wait: bool) -> bool:
        """Move what was submitted into `turns`, with `wait` one job at the least. True when the
        last one has come."""
        with contextlib.suppress(queue.Empty):
            while (queued := self._jobs.get(wait)) is not None:
                job, lane = queued
                turns.add(_Running(job), getattr(job, "order", Order.ALONE), lane)
                del job, queued
                wait = False
            return True
        return False


class _Running:
    """A job, and its steps once it has begun."""

    __slots__ = ("job", "left", "steps")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.steps: Steps | None = None
        self.left = 0
        """Bytes that it is going to take."""


def _step(entry: Entry[_Running], turns: Turns[_Running]) -> JobResult | None:
    """Do one step of a job; its result if that was the last one."""
    running = entry.job
    job_id = running.job.job_id
    try:
        if running.steps is None:
            promised = sum(each.left for each in turns.takes())
            running.left = _takes(running.job)
            running.steps = _steps_of(running.job, promised)
        running.left -= next(running.steps)
    except StopIteration as stop:
        turns.done(entry)
        return _result(running.job, job_id, stop.value)
    except Exception as error:  # whatever it is, the loop has to hear of it
        turns.done(entry)
        return JobResult(job_id, error)
    turns.pause(entry)
    return None


def _takes(job: Job) -> int:
    if isinstance(job, BackJob):
        return sum(span.length for span in job.ranges)
    return job.n_bytes if isinstance(job, TakeJob) else 0


def _steps_of(job: Job, promised: int) -> Steps:
    match job:
        case CopyJob():
            return _copy_all(job)
        case BackJob():
            return _back(job, promised)
        case TakeJob():
            return job.work(promised)
        case StepsJob():
            return job.work()
        case PunchJob():
            return punching(job.segment, job.ranges)
        case _:
            return _call(job)


def _result(job: Job, job_id: int, value: object) -> JobResult:
    if isinstance(job, CopyJob):
        assert isinstance(value, tuple)
        return JobResult(job_id, None, value)
    return JobResult(job_id, None, value=value)


def checksum(payload: memoryview) -> int:
    """xxh3_64 of `payload`, as every block's checksum is. Releases the GIL."""
    digest = xxhash.xxh3_64()
    digest.update(payload)  # xxh3_64_intdigest() held the GIL in xxhash 3
    return digest.intdigest()


def _call(job: CallJob) -> Steps:
    return job.work()
    yield


def _copy_all(job: CopyJob) -> Steps:
    results: list[ItemResult] = []
    cost = 0
    for item in job.items:
        results.append((yield from _copy(item)))
        cost += item.length % COPY_STEP_BYTES + PART_COST_BYTES
        if cost >= COPY_STEP_BYTES:
            yield 0
            cost = 0
    return tuple(results)


def punching(segment: Segment, ranges: Sequence[ByteRange]) -> Steps:
    """The steps of punching ranges out."""
    cost = 0
    for span in ranges:
        for part in _parts(span, PUNCH_STEP_BYTES):
            segment.punch(part.offset, part.length)
            cost += part.length + PART_COST_BYTES
            if cost >= PUNCH_STEP_BYTES:
                yield 0
                cost = 0
    return None


def _back(job: BackJob, promised: int) -> Steps:
    if job.prepare is not None:
        job.prepare(promised)
    backed: list[ByteRange] = []
    try:
        taken = cost = 0
        for span in job.ranges:
            # What cannot fit is refused before a part of it has filled up the file system.
            job.segment.check_free(span.offset, span.length)
            for part in _parts(span, BACK_STEP_BYTES):
                job.segment.back(part.offset, part.length)
                backed.append(part)
                taken += part.length
                cost += part.length + PART_COST_BYTES
                if cost >= BACK_STEP_BYTES:
                    yield taken
                    taken = cost = 0
    except Exception:
        for part in backed:
            job.segment.punch(part.offset, part.length)
        raise
    return None


def _parts(span: ByteRange, length: int) -> list[ByteRange]:
    """A range in parts of `length` bytes, the last one perhaps shorter."""
    end = span.offset + span.length
    return [ByteRange(start, min(length, end - start)) for start in range(span.offset, end, length)]


def _copy(item: CopyItem) -> Generator[int, None, ItemResult]:
    try:
        digest = yield from _copy_and_hash(item)
        if item.check is not None:
            copy = item.segment.buffer[item.offset : item.offset + item.length]
            item.check(copy.toreadonly())
    except Exception as error:
        return ItemResult(None, error)
    return ItemResult(digest, None)


def _copy_and_hash(item: CopyItem) -> Generator[int, None, int]:
    source = np.frombuffer(item.source, np.uint8, item.length, item.source_offset)
    copy = np.frombuffer(item.segment.buffer, np.uint8, item.length, item.offset)
    digest = xxhash.xxh3_64()
    for start in range(0, item.length, SLICE_BYTES):
        if start and start % COPY_STEP_BYTES == 0:
            yield 0
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
