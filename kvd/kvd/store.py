"""The daemon's memory: carries out the core's effects on arenas, directories, indexes and stagings.

Covers the translation of slots and offsets into ranges of segments, and the jobs of the copier
thread, which does everything that takes long or must happen in an order: backing, punching,
copying, making and closing stagings, and asking the operating system what it has. What lies in a
slot, and when it may be used again, is the core's business; sockets are server.py's.

Jobs of several clients take turns, see turns.py. When one of `ask` runs, the memory is exactly as
the core believed when it was submitted, but for what the operating system has refused meanwhile
(`refusals`).
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from kvd import adoption, copier, descriptors, log
from kvd.arena import NoSpace, Segment, byte_ranges
from kvd.copier import (
    BackJob,
    CallJob,
    Copier,
    CopyJob,
    ItemResult,
    JobResult,
    PunchJob,
    Steps,
    StepsJob,
    TakeJob,
)
from kvd.core.events import (
    NO_SLOT,
    ArenaAdopted,
    Back,
    Backed,
    BackPins,
    Check,
    Checked,
    CheckItem,
    Copied,
    Copy,
    CopyResult,
    CreateArena,
    DropPin,
    DropRecord,
    Event,
    Punch,
    RenewPin,
    SessionId,
    UseRecord,
    WritePin,
    WriteRecord,
)
from kvd.directory import Directory
from kvd.index import Index
from kvd.limits import NotEnoughRoom, check_room
from kvd.staging import Staging
from kvd.stored import StoredArena
from kvd.turns import Order
from kvd_proto import errors
from kvd_proto.geometry import Geometry
from kvd_proto.payload import PayloadFormat, make_format

T = TypeVar("T")

BURST_SECONDS = 0.002
"""Ended jobs are followed up for so long before the loop looks at its requests again."""


@dataclass(slots=True, eq=False)
class StagingRoom:
    """A session's staging: `staging` is None until the copier's thread has made it. The rest is
    that thread's."""

    n_bytes: int
    staging: Staging | None = None
    making: Generator[int, None, Staging] | None = None
    is_given_up: bool = False

    def make(self, promised: int) -> Steps:
        """Make it, unless it is given up before or meanwhile."""
        if self.is_given_up:
            return None
        descriptors.check()
        check_room(self.n_bytes + promised, in_shm=False)
        self.making = Staging.making(self.n_bytes)
        self.staging = yield from self.making  # None if it was closed in between
        return None

    def end(self) -> Steps:
        """Take all memory back, of which it may not have all yet."""
        self.is_given_up = True
        if self.making is not None:
            self.making.close()
        if self.staging is not None:
            yield from self.staging.ending()
        return None


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
        self._ended: deque[JobResult] = deque()
        self.arenas: dict[int, StoredArena] = {}
        self.stagings: dict[SessionId, StagingRoom] = {}
        self.refusals = 0
        self.event_fd = self._copier.event_fd

    # --- arenas

    def create_arena(self, effect: CreateArena) -> None:
        """Make all segments; raises NoSpace of kvd_proto.errors, leaving nothing behind."""
        try:
            stored = self._make_arena(effect)
        except errors.NoSpace:
            # What the core has just evicted for this is punched by the copier's thread, which may
            # not have come to it. Rare, and short: so the loop waits.
            punched = threading.Event()
            self._call(punched.set, _succeeded, Order.FREE)
            punched.wait()
            stored = self._make_arena(effect)
        self.arenas[effect.arena] = stored

    def _make_arena(self, effect: CreateArena) -> StoredArena:
        descriptors.check()
        token = os.urandom(4).hex()  # nobody can have taken the names before us
        try:
            name = self._segment_name(adoption.DIRECTORY + token)
            directory = Directory.create(name, effect, adoption.boot_id())
        except (NoSpace, OSError) as error:
            raise errors.NoSpace(f"no memory for the model's directory: {error}") from error
        try:
            name = self._segment_name(adoption.ARENA + token)
            segment = Segment.create(name, effect.slots * effect.stride_bytes)
        except OSError as error:
            directory.close(unlink=True)
            raise errors.NoSpace(f"no memory for the model's arena: {error}") from error
        try:
            index = Index.create(self._segment_name(adoption.INDEX + token), effect)
        except (NoSpace, OSError) as error:
            segment.close(unlink=True)
            directory.close(unlink=True)
            raise errors.NoSpace(f"no memory for the model's index: {error}") from error
        index.start(effect.root_key)
        return StoredArena(effect, segment, directory, index, _format(effect))

    def find_arena(self, number: int, found: adoption.Found) -> None:
        """Take over what an earlier daemon left, before the core is told of it."""
        self.arenas[number] = StoredArena(
            found.arena,
            found.segment,
            found.directory,
            found.new_index,
            _format(found.arena),
            found.has_readers,
            found=found.records,
        )

    def adopt_arena(self, effect: ArenaAdopted) -> None:
        """Serve a found arena on."""
        stored = self.arenas[effect.arena]
        stored.directory.shrink(effect.directory_bytes, effect.pins_bytes)
        stored.directory.ensure(effect.directory_bytes)
        stored.directory.ensure_pins(effect.pins_bytes)
        stored.directory.begin_life()
        stored.index.start(effect.root_key)
        try:
            stored.index.ensure(stored.index.bytes_beside(effect.directory_bytes))
        except NoSpace as error:
            # The cache is worth more than its index, which gets it with the next growth.
            log.warning("index without memory", model=stored.arena.name, reason=error)
        found, stored.found = stored.found, []
        backed = stored.directory.backed_slots
        for record in found:
            # The core has dropped what it does not take. Beyond there is no memory any more.
            if record.slot < backed and not stored.directory.is_absent(record.slot):
                stored.index.add(record.slot, record.key)
        log.info(
            "warm start",
            model=stored.arena.name,
            tenant=stored.arena.tenant,
            blocks=effect.blocks,
            n_bytes=effect.blocks * stored.arena.stride_bytes,
            life=stored.directory.life,
        )

    def refuse_arena(self, number: int) -> None:
        """Remove a found arena that the core cannot use."""
        self.arenas.pop(number).close(unlink=True)

    def find_readers_gone(self) -> list[int]:
        """The arenas that clients of an earlier daemon could read at the last call, and cannot any
        more."""
        gone = []
        for number, stored in self.arenas.items():
            life = stored.directory.life
            if stored.has_former_readers and not stored.segment.has_readers_before(life):
                stored.has_former_readers = False
                gone.append(number)
        return gone

    @property
    def has_former_readers(self) -> bool:
        """Whether clients of an earlier daemon may still read anything."""
        return any(stored.has_former_readers for stored in self.arenas.values())

    def remove_arena(self, number: int) -> None:
        """Remove what nobody uses. Its names at once, since one like it may be made at any time;
        its memory behind the jobs that it has still."""
        stored = self.arenas.pop(number)
        stored.unlink()
        log.info("model given up", model=stored.arena.name, tenant=stored.arena.tenant)
        job = StepsJob(self._new_job(_succeeded), stored.removing, Order.FREE)
        self._copier.submit(job)

    def write_record(self, effect: WriteRecord) -> None:
        stored = self.arenas[effect.arena]
        stored.directory.write(effect)
        stored.index.add(effect.slot, effect.key)

    def use_record(self, effect: UseRecord) -> None:
        self.arenas[effect.arena].directory.use(effect.slot, effect.last_use)

    def drop_record(self, effect: DropRecord) -> None:
        stored = self.arenas[effect.arena]
        if effect.heir != NO_SLOT:
            stored.directory.use(effect.heir, effect.last_use)
        stored.directory.drop(effect.slot)
        stored.index.drop(effect.slot)

    def write_pin(self, effect: WritePin) -> None:
        self.arenas[effect.arena].directory.write_pin(effect)

    def renew_pin(self, effect: RenewPin) -> None:
        self.arenas[effect.arena].directory.renew_pin(effect.place, effect.expires)

    def drop_pin(self, effect: DropPin) -> None:
        self.arenas[effect.arena].directory.drop_pin(effect.place)

    def back_pins(self, effect: BackPins) -> None:
        """Start to give a directory memory for pins."""
        stored = self.arenas[effect.arena]
        growth = max(0, effect.n_bytes - stored.directory.pins_backed)

        def make(promised: int) -> Steps:
            check_room(growth + promised)
            stored.directory.ensure_pins(effect.n_bytes)
            yield 0
            return None

        def then(result: JobResult) -> None:
            del stored.growing_pins[result.job_id]
            self._handle(Backed(effect.job, self._refusal(result.error)))

        job = self._new_job(then)
        stored.growing_pins[job] = effect.n_bytes
        self._copier.submit(TakeJob(job, growth, make), effect.session)

    def back(self, effect: Back) -> None:
        """Start to give slots memory, and directory and index their growth before."""
        stored = self.arenas[effect.arena]
        stride = stored.arena.stride_bytes
        n_bytes = len(effect.slots) * stride

        def prepare(promised: int) -> None:
            check_room(n_bytes + stored.growth_to(effect.directory_bytes) + promised)
            stored.ensure(effect.directory_bytes)

        def then(result: JobResult) -> None:
            del stored.growing[result.job_id]
            self._handle(Backed(effect.job, self._refusal(result.error)))

        job = self._new_job(then)
        stored.growing[job] = effect.directory_bytes
        ranges = byte_ranges(effect.slots, stride)
        self._copier.submit(BackJob(job, stored.segment, ranges, prepare), effect.session)

    def punch(self, effect: Punch) -> None:
        """Start to give slots back to the operating system."""
        stored = self.arenas[effect.arena]
        ranges = byte_ranges(effect.slots, stored.arena.stride_bytes)
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

        self._copier.submit(CopyJob(self._new_job(then), items), effect.session)

    def check(self, effect: Check) -> None:
        """Start to compare slots with their checksums."""

        def then(are_right: list[bool]) -> None:
            self._handle(Checked(effect.job, are_right))

        self.compare(self.arenas[effect.arena], effect.items, then)

    def compare(
        self,
        stored: StoredArena,
        items: Sequence[CheckItem],
        then: Callable[[list[bool]], None],
    ) -> None:
        """Start to compare slots that have memory with checksums; `then` gets whether each is
        right."""
        stride = stored.arena.stride_bytes

        def work() -> Steps:
            buffer = stored.segment.buffer
            found = []
            for slot, n_bytes, checksum in items:
                with buffer[slot * stride : slot * stride + n_bytes] as payload:
                    found.append(copier.checksum(payload) == checksum)
                yield 0
            return found

        def ended(result: JobResult) -> None:
            _succeeded(result)
            then(cast(list[bool], result.value))

        # Ahead of what gives these slots' memory back, should they be evicted meanwhile: a read of
        # a hole would fill it.
        self._copier.submit(StepsJob(self._new_job(ended), work, Order.FREE))

    # --- stagings

    def open_staging(
        self, session: SessionId, n_bytes: int, then: Callable[[errors.KvdError | None], None]
    ) -> None:
        """Start to make a session's staging; `then` is told when it is there, or why it is not."""
        room = self.stagings[session] = StagingRoom(n_bytes)
        job = self._new_job(lambda result: then(self._refusal(result.error)))
        self._copier.submit(TakeJob(job, n_bytes, room.make), session)

    def set_completed(self, session: SessionId, commit: int) -> None:
        """Tell a session through its staging that its commits up to `commit` are finished."""
        self._open_staging(session).set_completed(commit)

    def staging_buffer(self, session: SessionId) -> memoryview | None:
        """The staging of a session that has one. Do not keep it."""
        room = self.stagings.get(session)
        return None if room is None or room.staging is None else room.staging.buffer

    def close_staging(self, session: SessionId) -> None:
        """Take its memory back, before anybody takes any that the core has not given yet. Nothing
        happens if it has none."""
        room = self.stagings.pop(session, None)
        if room is not None:
            self._copier.submit(StepsJob(self._new_job(_succeeded), room.end, Order.FREE))

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

    def finish_jobs(self) -> bool:
        """Carry out what follows from jobs that have ended, for BURST_SECONDS or a little longer;
        whether there are more. Never blocks."""
        self._ended.extend(self._copier.results())
        until = time.monotonic() + BURST_SECONDS
        while self._ended:
            result = self._ended.popleft()
            self._then.pop(result.job_id)(result)
            if time.monotonic() >= until:
                break
        return bool(self._ended)

    def close(self, *, keep_arenas: bool) -> None:
        """Finish all jobs and unmap everything. The arenas' segments are kept for the next daemon,
        or their names removed."""
        self._copier.stop()
        for room in self.stagings.values():
            if room.staging is not None:
                room.staging.close()
        self.stagings.clear()
        for stored in self.arenas.values():
            stored.close(unlink=not keep_arenas)
        self.arenas.clear()

    def _call(
        self,
        work: Callable[[], object],
        then: Callable[[JobResult], None],
        order: Order = Order.ALONE,
    ) -> None:
        self._copier.submit(CallJob(self._new_job(then), work, order))

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
        if isinstance(error, errors.NoSpace):
            return error
        if not isinstance(error, NoSpace | NotEnoughRoom | OSError):
            raise error  # a fault of ours
        return errors.NoSpace(str(error))


def _succeeded(result: JobResult) -> None:
    """The job cannot fail but by a fault of ours: then the daemon must not go on."""
    if result.error is not None:
        raise result.error


def _format(arena: CreateArena) -> PayloadFormat:
    return make_format(arena.payload_format, Geometry(arena.layers), arena.block_tokens)


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
