"""A shell without memory: what lies in each slot is the path of the block that was copied there.

Carries out effects like the real one: records at once, `Back`, `Copy` and `Punch` later, in
any order in which they may come. It asserts what must never happen to memory, and knows nothing of
the cache's rules.
"""

from collections import deque
from dataclasses import dataclass, field

from kvd.core.events import (
    Back,
    Backed,
    CloseStaging,
    Copied,
    Copy,
    CopyResult,
    CreateArena,
    DropRecord,
    OpenStaging,
    Punch,
    WriteRecord,
)
from kvd_proto.errors import BadPayload, NoSpace
from tests.core.reference import Path

EMPTY = "nothing"


@dataclass
class Slots:
    """An arena: which slots have memory, and what is in it."""

    memory: dict[int, Path | str] = field(default_factory=dict)
    records: dict[int, WriteRecord] = field(default_factory=dict)


class FakeShell:
    def __init__(self) -> None:
        self.arenas: dict[int, Slots] = {}
        self.stagings: dict[bytes, dict[int, Path]] = {}
        """By session: what its client has staged where."""
        self.headers: dict[bytes, int] = {}
        """By session: the completed number."""
        self.queue: deque[Back | Copy | Punch] = deque()

    def create_arena(self, effect: CreateArena) -> None:
        assert effect.arena not in self.arenas
        self.arenas[effect.arena] = Slots()

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

    def submit(self, job: Back | Copy | Punch) -> None:
        self.queue.append(job)

    def work(self, fails: int, which: int = 0) -> Backed | Copied | None:
        """Do a job of the queue, that of number `which` of those whose turn it can be; bit i of
        `fails` spoils its item i (or all of a Back)."""
        may = self._runnable()
        job = may[which % len(may)]
        self.queue.remove(job)
        slots = self.arenas[job.arena]
        if isinstance(job, Punch):
            for slot in job.slots:
                assert slot not in slots.records, "punched under a record"
                del slots.memory[slot]
            return None
        if isinstance(job, Back):
            assert not slots.memory.keys() & set(job.slots), "backed twice"
            if fails:
                return Backed(job.job, NoSpace("no memory"))
            slots.memory.update(dict.fromkeys(job.slots, EMPTY))
            return Backed(job.job, None)
        results = []
        for index, item in enumerate(job.items):
            assert item.slot in slots.memory, "copied into a hole"
            assert item.slot not in slots.records, "copied over a sealed block"
            bad = bool(fails >> index & 1)
            # The client may have written over it, if the block is not wanted any more.
            staged = self.stagings[job.session].get(item.offset, EMPTY)
            slots.memory[item.slot] = EMPTY if bad else staged
            results.append(CopyResult(item.slot, BadPayload("spoilt") if bad else None))
        return Copied(job.job, results)

    def _runnable(self) -> list[Back | Copy | Punch]:
        """What may be next (kvd.turns): all copies, and the first punch, or any Back if none
        waits."""
        punches = [job for job in self.queue if isinstance(job, Punch)]
        return [
            job
            for job in self.queue
            if isinstance(job, Copy) or (job is punches[0] if punches else isinstance(job, Back))
        ]

    def backed_slots(self, arena: int) -> int:
        return len(self.arenas[arena].memory)
