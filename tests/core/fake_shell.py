"""A shell without memory: what lies in each slot is the path of the block that was copied there.

Carries out effects like the real one: records at once, `Back`, `Copy`, `Check` and `Punch` later,
in any order in which they may come. It asserts what must never happen to memory, and knows nothing
of the cache's rules. What outlives a crash: restarts.py.
"""

from collections import deque
from dataclasses import dataclass, field

import xxhash

from kvd.core.events import (
    Back,
    Backed,
    BackPins,
    Check,
    Checked,
    CloseStaging,
    Copied,
    Copy,
    CopyResult,
    CreateArena,
    DropPin,
    DropRecord,
    OpenStaging,
    Punch,
    RemoveArena,
    RenewPin,
    WritePin,
    WriteRecord,
)
from kvd_proto.errors import BadPayload, NoSpace
from kvd_proto.layout import PIN_BYTES
from tests.core.reference import Path

EMPTY = "nothing"
HOLED = "memory in part"

Job = Back | BackPins | Check | Copy | Punch | RemoveArena


@dataclass
class Slots:
    """An arena: which slots have memory, and what is in it."""

    memory: dict[int, Path | str] = field(default_factory=dict)
    records: dict[int, WriteRecord] = field(default_factory=dict)
    pins: dict[int, WritePin] = field(default_factory=dict)
    """By place."""
    pins_backed: int = 0
    """Bytes of the pins that have memory."""


class FakeShell:
    def __init__(self) -> None:
        self.arenas: dict[int, Slots] = {}
        self.stagings: dict[bytes, dict[int, Path]] = {}
        """By session: what its client has staged where."""
        self.headers: dict[bytes, int] = {}
        """By session: the completed number."""
        self.queue: deque[Job] = deque()

    def moment(self) -> None:
        """A crash may come here."""

    def create_arena(self, effect: CreateArena) -> None:
        assert effect.arena not in self.arenas
        self.arenas[effect.arena] = Slots()

    def remove_arena(self, effect: RemoveArena) -> None:
        """Its names go now; its memory behind the jobs that it has still."""
        jobs = [job for job in self.queue if isinstance(job, Back | Copy)]
        assert all(job.arena != effect.arena for job in jobs), "somebody uses it"
        self.submit(effect)

    def open_staging(self, effect: OpenStaging) -> None:
        assert effect.session not in self.stagings
        self.stagings[effect.session] = {}
        self.headers[effect.session] = 0

    def close_staging(self, effect: CloseStaging) -> None:
        readers = [job for job in self.queue if isinstance(job, Copy)]
        assert all(job.session != effect.session for job in readers), "closed under a copy"
        del self.stagings[effect.session]
        del self.headers[effect.session]

    def complete(self, session: bytes, commit: int) -> None:
        assert commit > self.headers[session], "a completed number only rises"
        self.headers[session] = commit

    def write_record(self, effect: WriteRecord) -> None:
        slots = self.arenas[effect.arena]
        assert effect.slot not in slots.records, "the slot has a record already"
        assert slots.memory.get(effect.slot, EMPTY) != EMPTY, "sealed without a copy"
        slots.records[effect.slot] = effect

    def drop_record(self, effect: DropRecord) -> None:
        del self.arenas[effect.arena].records[effect.slot]

    def write_pin(self, effect: WritePin) -> None:
        slots = self.arenas[effect.arena]
        assert effect.place not in slots.pins, "the place has a pin already"
        assert (effect.place + 1) * PIN_BYTES <= slots.pins_backed, "the pin has no memory"
        assert effect.key in {record.key for record in slots.records.values()}, "pinned nothing"
        slots.pins[effect.place] = effect

    def renew_pin(self, effect: RenewPin) -> None:
        pins = self.arenas[effect.arena].pins
        pins[effect.place] = pins[effect.place]._replace(expires=effect.expires)

    def drop_pin(self, effect: DropPin) -> None:
        del self.arenas[effect.arena].pins[effect.place]

    def submit(self, job: Job) -> None:
        self.queue.append(job)

    def work(self, fails: int, which: int = 0) -> Backed | Checked | Copied | None:
        """Do a job of the queue, that of number `which` of those whose turn it can be; bit i of
        `fails` spoils its item i (or all of a Back)."""
        job = self.next_job(which)
        self.queue.remove(job)
        slots = self.arenas[job.arena]
        if isinstance(job, RemoveArena):
            del self.arenas[job.arena]
            return None
        if isinstance(job, Punch):
            for slot in job.slots:
                assert slot not in slots.records, "punched under a record"
                slots.memory[slot] = HOLED
                self.moment()
                del slots.memory[slot]
            return None
        if isinstance(job, BackPins):
            if fails:
                return Backed(job.job, NoSpace("no memory"))
            slots.pins_backed = max(slots.pins_backed, job.n_bytes)
            return Backed(job.job, None)
        if isinstance(job, Back):
            assert not slots.memory.keys() & set(job.slots), "backed twice"
            if fails:
                return Backed(job.job, NoSpace("no memory"))
            for slot in job.slots:
                slots.memory[slot] = HOLED
                self.moment()
                slots.memory[slot] = EMPTY
            return Backed(job.job, None)
        if isinstance(job, Check):
            return Checked(
                job.job, [checksum(slots.memory[item.slot]) == item.checksum for item in job.items]
            )
        results = []
        for index, item in enumerate(job.items):
            assert item.slot in slots.memory, "copied into a hole"
            assert item.slot not in slots.records, "copied over a sealed block"
            bad = bool(fails >> index & 1)
            # The client may have written over it, if the block is not wanted any more.
            staged = self.stagings[job.session].get(item.offset, EMPTY)
            slots.memory[item.slot] = EMPTY
            self.moment()
            content = slots.memory[item.slot] = EMPTY if bad else staged
            error = BadPayload("spoilt") if bad else None
            results.append(CopyResult(checksum(content), error))
        return Copied(job.job, results)

    def next_job(self, which: int = 0) -> Job:
        """Of the queue that of number `which` of those whose turn it can be (kvd.turns): all
        copies; and of what comes before the first check the first that gives memory back, or any
        Back if none waits, or else that check."""
        copies = [job for job in self.queue if isinstance(job, Copy)]
        memory = [job for job in self.queue if not isinstance(job, Copy)]
        checks = [job for job in memory if isinstance(job, Check)]
        before = memory[: memory.index(checks[0])] if checks else memory
        frees = [job for job in before if isinstance(job, Punch | RemoveArena)]
        may = copies + (frees or before or checks)[: 1 if frees or not before else None]
        return may[which % len(may)]


def checksum(content: Path | str) -> int:
    """Of what lies in a slot."""
    return xxhash.xxh3_64_intdigest(repr(content).encode())
