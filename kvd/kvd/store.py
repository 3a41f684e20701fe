"""The daemon's memory: carries out the core's effects on arenas, directories and stagings.

Covers the translation of slots and offsets into ranges of segments and the jobs of the copier
thread. What lies in a slot, and when it may be used again, is the core's business; sockets are
server.py's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from kvd import copier
from kvd.arena import ByteRange, NoSpace, Segment
from kvd.copier import BackJob, Copier, CopyJob, ItemResult, JobResult, PunchJob
from kvd.core.events import (
    Back,
    Backed,
    Copied,
    Copy,
    CopyResult,
    CreateArena,
    DropRecord,
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

PUNCH = 0
"""Job number of punches, whose end the core does not wait for; its own numbers begin at 1."""


@dataclass(slots=True)
class StoredArena:
    """An arena's two segments, and how its payloads are checked."""

    arena: CreateArena
    segment: Segment
    directory: Directory
    format: PayloadFormat


class Store:
    """All segments and stagings of the daemon. Used by the loop's thread only.

    `outstanding` jobs are with the copier. While `hold` is called and jobs wait, nothing new is
    submitted, so that the operating system's numbers stand still for a count.
    """

    def __init__(self, segment_name: Callable[[str], str]) -> None:
        """`segment_name` makes a name of this instance from a suffix."""
        self._segment_name = segment_name
        self._copier = Copier()
        self._held: list[copier.Job] | None = None
        self.arenas: dict[int, StoredArena] = {}
        self.stagings: dict[SessionId, Staging] = {}
        self.outstanding = 0
        self.event_fd = self._copier.event_fd

    # --- arenas

    def create_arena(self, effect: CreateArena) -> None:
        """Make both segments; raises NoSpace of kvd_proto.errors, leaving nothing behind."""
        try:
            directory = Directory(self._segment_name(f"dir-{effect.arena}"), effect)
        except (NoSpace, OSError) as error:
            raise errors.NoSpace(f"no memory for the model's directory: {error}") from error
        try:
            name = self._segment_name(f"arena-{effect.arena}")
            segment = Segment.create(name, effect.slots * effect.stride_bytes)
        except OSError as error:
            directory.close(unlink=True)
            raise errors.NoSpace(f"no memory for the model's arena: {error}") from error
        geometry = Geometry(effect.layers)
        payload_format = make_format(effect.payload_format, geometry, effect.block_tokens)
        self.arenas[effect.arena] = StoredArena(effect, segment, directory, payload_format)

    def write_record(self, effect: WriteRecord) -> None:
        self.arenas[effect.arena].directory.write(effect)

    def drop_record(self, effect: DropRecord) -> None:
        self.arenas[effect.arena].directory.drop(effect.slot)

    # --- stagings

    def open_staging(self, session: SessionId, n_bytes: int) -> Staging:
        """A session's staging; raises NoSpace of kvd_proto.errors."""
        try:
            check_room(n_bytes)
            staging = Staging.create(n_bytes)
        except (NotEnoughRoom, OSError) as error:
            raise errors.NoSpace(f"no memory for the session's staging: {error}") from error
        self.stagings[session] = staging
        return staging

    def close_staging(self, session: SessionId) -> None:
        """Unmap it; no job reads it any more. Nothing happens if it has none."""
        staging = self.stagings.pop(session, None)
        if staging is not None:
            staging.close()

    # --- jobs

    def back(self, effect: Back) -> Backed | None:
        """Start a backing; returns its end at once if there is no memory for it."""
        stored = self.arenas[effect.arena]
        stride = stored.arena.stride_bytes
        try:
            check_room(len(effect.slots) * stride)
            stored.directory.ensure(effect.directory_bytes)
        except (NotEnoughRoom, NoSpace) as error:
            return Backed(effect.job, errors.NoSpace(str(error)))
        self._submit(BackJob(effect.job, stored.segment, _ranges(effect.slots, stride)))
        return None

    def punch(self, effect: Punch) -> None:
        """Start giving slots back to the operating system."""
        stored = self.arenas[effect.arena]
        ranges = _ranges(effect.slots, stored.arena.stride_bytes)
        self._submit(PunchJob(PUNCH, stored.segment, ranges))

    def copy(self, effect: Copy) -> None:
        """Start copying blocks from a session's staging, checking each copy."""
        stored = self.arenas[effect.arena]
        source = self.stagings[effect.session].buffer
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
        self._submit(CopyJob(effect.job, items))

    def ended(self) -> list[Backed | Copied]:
        """What jobs have ended since the last call, as events for the core. Never blocks."""
        events: list[Backed | Copied] = []
        for result in self._copier.results():
            self.outstanding -= 1
            if result.job_id == PUNCH:
                if result.error is not None:
                    raise result.error  # a hole that cannot be punched is a fault of ours
            elif result.items:
                events.append(Copied(result.job_id, [_copy_result(item) for item in result.items]))
            else:
                events.append(Backed(result.job_id, _back_error(result)))
        return events

    def hold(self) -> bool:
        """Submit nothing more until `go_on`. True when no job is outstanding."""
        if self._held is None:
            self._held = []
        return self.outstanding == 0

    def go_on(self) -> None:
        """Submit what was held."""
        held, self._held = self._held or [], None
        for job in held:
            self._submit(job)

    def close(self) -> None:
        """Finish all jobs, unmap everything and remove the segments' names."""
        self.go_on()
        self._copier.stop()
        for session in list(self.stagings):
            self.close_staging(session)
        for stored in self.arenas.values():
            stored.segment.close(unlink=True)
            stored.directory.close(unlink=True)
        self.arenas.clear()

    def _submit(self, job: copier.Job) -> None:
        if self._held is not None:
            self._held.append(job)
            return
        self.outstanding += 1
        self._copier.submit(job)


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
    return CopyResult(0, errors.InternalError(f"the copy failed: {item.error}"))


def _back_error(result: JobResult) -> errors.KvdError | None:
    if result.error is None:
        return None
    return errors.NoSpace(str(result.error))
