"""The daemon's memory: carries out the core's effects on arenas, directories and stagings.

Covers the translation of slots and offsets into ranges of segments, and the jobs of the copier
thread, which does everything that takes long or must happen in an order: backing, punching,
copying, making and closing stagings, and asking the operating system what it has. What lies in a
slot, and when it may be used again, is the core's business; sockets are server.py's.

One queue, first in, first out. So when a job runs, the memory is exactly as the core believed when
the job was submitted, but for what the operating system has refused meanwhile (`refusals`).
"""

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TypeVar, cast

from kvd import copier, log
from kvd.arena import ByteRange, NoSpace, Segment
from kvd.copier import BackJob, CallJob, Copier, CopyJob, ItemResult, JobResult, PunchJob
from kvd.core.events import (
    Back,
    Backed,
    Copied,
    Copy,
    CopyResult,
    CreateArena,
    DropRecord,
    Event,
    Punch,
    SessionId,
    WriteRecord,
)
from kvd.directory import Directory
from kvd.limits import NotEnoughRoom, check_room
from kvd.staging import Staging
from kvd_proto import errors
from kvd_proto.geometry import Geometry
from kvd_proto.payload import PayloadFormat, make_format

T = TypeVar("T")


@dataclass(slots=True)
class StoredArena:
    """An arena's two segments, and how its payloads are checked."""

    arena: CreateArena
    segment: Segment
    directory: Directory
    format: PayloadFormat
    read_only_fd: int
    """For handing to clients: at hand, so that no client is refused for want of a descriptor."""
    growing: dict[int, int] = field(default_factory=dict)
    """By job: how long the directory will be when it has ended."""

    @property
    def directory_bytes(self) -> int:
        """What the directory has in memory when all jobs have ended well."""
        return max([self.directory.backed, *self.growing.values()])

    def close(self) -> None:
        os.close(self.read_only_fd)
        self.segment.close(unlink=True)
        self.directory.close(unlink=True)


@dataclass(slots=True, eq=False)
class StagingRoom:
    """A session's staging: `staging` is None until the copier's thread has made it."""

    n_bytes: int
    staging: Staging | None = None


class Store:
    """All segments and stagings of the daemon. Used by the loop's thread only.

    `event_fd` is readable while jobs have ended: call `finish_jobs`. `refusals` counts the times
    that the operating system had no memory for what the core had planned with.
    """

    def __init__(self, segment_name: Callable[[str], str], handle: Callable[[Event], None]) -> None:
        """`segment_name` makes a name of this instance from a suffix; `handle` takes events."""
        self._segment_name = segment_name
        self._handle = handle
        self._copier = Copier()
        self._next_job = 1
        self._then: dict[int, Callable[[JobResult], None]] = {}
        self.arenas: dict[int, StoredArena] = {}
        self.stagings: dict[SessionId, StagingRoom] = {}
        self.refusals = 0
        self.event_fd = self._copier.event_fd

    # --- arenas

    def create_arena(self, effect: CreateArena) -> None:
        """Make both segments; raises NoSpace of kvd_proto.errors, leaving nothing behind."""
        try:
            stored = self._make_arena(effect)
        except errors.NoSpace:
            # What the core has just evicted for this is punched by the copier's thread, which may
            # not have come to it. Rare, and short: so the loop waits.
            punched = threading.Event()
            self._call(punched.set, _succeeded)
            punched.wait()
            stored = self._make_arena(effect)
        self.arenas[effect.arena] = stored

    def _make_arena(self, effect: CreateArena) -> StoredArena:
        try:
            directory = Directory(self._segment_name(f"dir-{effect.arena}"), effect)
        except (NoSpace, OSError) as error:
            raise errors.NoSpace(f"no memory for the model's directory: {error}") from error
        try:
            name = self._segment_name(f"arena-{effect.arena}")
            segment = Segment.create(name, effect.slots * effect.stride_bytes)
            try:
                read_only_fd = segment.read_only_fd()
            except OSError:
                segment.close(unlink=True)
                raise
        except OSError as error:
            directory.close(unlink=True)
            raise errors.NoSpace(f"no memory for the model's arena: {error}") from error
        geometry = Geometry(effect.layers)
        payload_format = make_format(effect.payload_format, geometry, effect.block_tokens)
        return StoredArena(effect, segment, directory, payload_format, read_only_fd)

    def write_record(self, effect: WriteRecord) -> None:
        self.arenas[effect.arena].directory.write(effect)

    def drop_record(self, effect: DropRecord) -> None:
        self.arenas[effect.arena].directory.drop(effect.slot)

    def back(self, effect: Back) -> None:
        """Start to give slots memory, and the directory its growth before."""
        stored = self.arenas[effect.arena]
        stride = stored.arena.stride_bytes
        n_bytes = len(effect.slots) * stride

        def prepare() -> None:
            growth = max(0, effect.directory_bytes - stored.directory.backed)
            check_room(n_bytes + growth)
            stored.directory.ensure(effect.directory_bytes)

        def then(result: JobResult) -> None:
            del stored.growing[result.job_id]
            self._handle(Backed(effect.job, self._refusal(result.error)))

        job = self._new_job(then)
        stored.growing[job] = effect.directory_bytes
        self._copier.submit(BackJob(job, stored.segment, _ranges(effect.slots, stride), prepare))

    def punch(self, effect: Punch) -> None:
        """Start to give slots back to the operating system."""
        stored = self.arenas[effect.arena]
        ranges = _ranges(effect.slots, stored.arena.stride_bytes)
        self._copier.submit(PunchJob(self._new_job(_succeeded), stored.segment, ranges))

    def copy(self, effect: Copy) -> None:
        """Start to copy blocks from a session's staging, checking each copy."""
        stored = self.arenas[effect.arena]
        source = self._open_staging(effect.session).buffer
        items = [
            copier.CopyItem(
                source,
                item.offset,
                stored.segment,
                item.slot * stored.arena.stride_bytes,
                item.n_bytes,
                partial(_check, stored.format, item.start, item.n_tokens),
            )
            for item in effect.items
        ]

        def then(result: JobResult) -> None:
            _succeeded(result)
            self._handle(Copied(effect.job, [_copy_result(item) for item in result.items]))

        self._copier.submit(CopyJob(self._new_job(then), items))

    # --- stagings

    def open_staging(
        self, session: SessionId, n_bytes: int, then: Callable[[errors.KvdError | None], None]
    ) -> None:
        """Start to make a session's staging; `then` is told when it is there, or why it is not."""
        room = self.stagings[session] = StagingRoom(n_bytes)

        def make() -> None:
            check_room(n_bytes, in_shm=False)
            room.staging = Staging.create(n_bytes)

        self._call(make, lambda result: then(self._refusal(result.error)))

    def set_completed(self, session: SessionId, commit: int) -> None:
        """Tell a session through its staging that its commits up to `commit` are finished."""
        self._open_staging(session).set_completed(commit)

    def staging_buffer(self, session: SessionId) -> memoryview | None:
        """The staging of a session that has one. Do not keep it."""
        room = self.stagings.get(session)
        return None if room is None or room.staging is None else room.staging.buffer

    def close_staging(self, session: SessionId) -> None:
        """Unmap it, once the jobs before have ended. Nothing happens if it has none."""
        room = self.stagings.pop(session, None)
        if room is not None:
            self._call(partial(_close, room), _succeeded)

    def _open_staging(self, session: SessionId) -> Staging:
        staging = self.stagings[session].staging
        assert staging is not None, "a session commits after it was welcomed"
        return staging

    # --- jobs

    def ask(
        self, question: Callable[[], T], then: Callable[[T | None, Exception | None], None]
    ) -> None:
        """Let the copier's thread answer a question about the memory, after all jobs that were
        submitted before; `then` gets the answer, or what was raised."""
        self._call(question, lambda result: then(cast(T | None, result.value), result.error))

    def finish_jobs(self) -> None:
        """Carry out what follows from jobs that have ended since the last call. Never blocks."""
        for result in self._copier.results():
            self._then.pop(result.job_id)(result)

    def close(self) -> None:
        """Finish all jobs, unmap everything and remove the segments' names."""
        self._copier.stop()
        for room in self.stagings.values():
            _close(room)
        self.stagings.clear()
        for stored in self.arenas.values():
            stored.close()
        self.arenas.clear()

    def _call(self, work: Callable[[], object], then: Callable[[JobResult], None]) -> None:
        self._copier.submit(CallJob(self._new_job(then), work))

    def _new_job(self, then: Callable[[JobResult], None]) -> int:
        """The number of a job, after whose end `then` is called on the loop."""
        job = self._next_job
        self._next_job += 1
        self._then[job] = then
        return job

    def _refusal(self, error: Exception | None) -> errors.KvdError | None:
        """What a client is told when there is no memory for it."""
        if error is None:
            return None
        self.refusals += 1
        if not isinstance(error, NoSpace | NotEnoughRoom | OSError):
            raise error  # a fault of ours
        return errors.NoSpace(str(error))


def _succeeded(result: JobResult) -> None:
    """The job cannot fail but by a fault of ours: then the daemon must not go on."""
    if result.error is not None:
        raise result.error


def _close(room: StagingRoom) -> None:
    if room.staging is not None:
        room.staging.close()


def _ranges(slots: Iterable[int], stride: int) -> list[ByteRange]:
    """The slots' bytes as few ranges: neighbours together, so that one system call does for
    them."""
    ordered = sorted(slots)
    starts = [slot for before, slot in pairwise([-2, *ordered]) if slot != before + 1]
    ends = [slot + 1 for slot, after in pairwise([*ordered, -2]) if after != slot + 1]
    return [
        ByteRange(start * stride, (end - start) * stride)
        for start, end in zip(starts, ends, strict=True)
    ]


def _check(payload_format: PayloadFormat, start: int, n_tokens: int, copy: memoryview) -> None:
    """Run in the copier's thread on the bytes in the arena, which their author cannot change."""
    try:
        payload_format.validate(copy, start, n_tokens)
    except errors.BadPayload as error:
        raise ValueError(str(error)) from error


def _copy_result(item: ItemResult) -> CopyResult:
    if item.error is None:
        return CopyResult(item.checksum or 0, None)
    if isinstance(item.error, ValueError):
        return CopyResult(0, errors.BadPayload(str(item.error)))
    log.error("copy failed", item.error)
    return CopyResult(0, errors.InternalError(f"the copy failed: {item.error}"))
