"""A world whose daemon may die between any two effects, and in the midst of a job or a record.

What outlives it is what shared memory would hold: the slots' contents, and directories as real
bytes (kvd_proto.layout), in which a write may have stopped after any of its stores. The next daemon
is told of it as kvd/adoption.py would tell it; clients of the one before may read on for a while.

Compared are, beside all that world.py compares: what is adopted with what was recorded; the order
of eviction with that of before; what is served with what has been checked; and the memory that a
client of before has leased with what was in it.
"""

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from kvd.core.cache import Checking
from kvd.core.events import (
    NO_SLOT,
    ArenaAdopted,
    ArenaFailed,
    ArenaFound,
    ArenaRefused,
    Back,
    Check,
    Checked,
    CreateArena,
    DropPin,
    DropRecord,
    Effect,
    Event,
    FoundPin,
    FoundRecord,
    ReadersGone,
    RemoveArena,
    RenewPin,
    UseRecord,
    WritePin,
    WriteRecord,
)
from kvd_proto import errors, layout
from kvd_proto.messages import Alloc, Pin, Pinned
from tests.core.fake_shell import HOLED, FakeShell, Slots, checksum
from tests.core.reference import Arena, Context, Path, Sequence, Session, Wanted, packed
from tests.core.world import (
    DIRECTORY,
    KINDS,
    PAGE,
    SHARES,
    Kind,
    Shares,
    Waiting,
    World,
    _fails,
    _path,
    _tokens,
)

LATEST_USE = 1 << 62
"""What is later was not written by any clock."""


class Crashed(Exception):
    """The daemon has died. Everything but shared memory is lost."""


class Recorded(NamedTuple):
    """What a record that was written to its end says."""

    path: Path
    last_use: int


class DeferredPin(NamedTuple):
    """A pin that waits for a check."""

    session: Session
    kind: Kind
    tokens: Path
    owner: str
    seconds: float


@dataclass(eq=False)
class Disk:
    """An arena's two segments."""

    made: CreateArena
    directory: bytearray
    slots: Slots = field(default_factory=Slots)
    backed: int = 0
    """Of the directory."""
    recorded: dict[int, Recorded] = field(default_factory=dict)
    """By slot: what must be read from the directory."""
    pinned: dict[int, layout.PinEntry] = field(default_factory=dict)
    """By place: the same for pins."""
    is_removed: bool = False
    has_readers: bool = False
    """Whether the daemon believes that clients of one before can read it."""

    @property
    def pins_offset(self) -> int:
        return layout.pins_offset(self.made.slots, self.made.block_tokens)

    def pin_offset(self, place: int) -> int:
        return self.pins_offset + place * layout.PIN_BYTES

    def has_memory(self, where: slice) -> bool:
        """Of the directory."""
        start = self.pins_offset
        in_pins = start <= where.start and where.stop <= start + self.slots.pins_backed
        return where.stop <= self.backed or in_pins


@dataclass(eq=False)
class Reader:
    """A client of a former life, and what it has leased: it may read that at any time."""

    leases: dict[Disk, dict[int, Path | str]]


class StoreByStore:
    """A directory in which a crash may come before any store, and within a long one."""

    def __init__(self, shell: "DurableShell", disk: Disk) -> None:
        self._shell = shell
        self._disk = disk

    def __setitem__(self, where: slice, data: bytes) -> None:
        assert self._disk.has_memory(where), "the directory has no memory there"
        self._shell.moment()
        if len(data) > 8:
            middle = where.start + len(data) // 2
            self._disk.directory[where.start : middle] = data[: len(data) // 2]
            self._shell.moment()
        self._disk.directory[where] = data


class DurableShell(FakeShell):
    """A shell that dies when its `fuse` has burnt down: one moment after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = -1
        self.disks: dict[int, Disk] = {}
        self.paths: dict[bytes, Path] = {}

    def moment(self) -> None:
        self.fuse -= 1
        if self.fuse == 0:
            raise Crashed

    def create_arena(self, effect: CreateArena) -> None:
        super().create_arena(effect)
        # One page is enough for all pins that there may be.
        size = layout.pins_offset(effect.slots, effect.block_tokens) + PAGE
        disk = Disk(effect, bytearray(size), self.arenas[effect.arena], effect.directory_bytes)
        self.disks[effect.arena] = disk

    def remove_arena(self, effect: RemoveArena) -> None:
        # The arena's name first: a directory without its arena is not adopted.
        self.disks.pop(effect.arena).is_removed = True
        self.moment()
        super().remove_arena(effect)

    def write_record(self, effect: WriteRecord) -> None:
        super().write_record(effect)
        disk = self.disks[effect.arena]
        record = layout.Record(
            effect.start, effect.tokens, effect.key, effect.parent_key, effect.generation,
            effect.checksum,
        )  # fmt: skip
        buffer: Any = StoreByStore(self, disk)
        block_tokens = disk.made.block_tokens
        layout.write_record(buffer, effect.slot, block_tokens, record, effect.generation)
        disk.recorded[effect.slot] = Recorded(self.paths[effect.key], effect.generation)

    def use_record(self, effect: UseRecord) -> None:
        disk = self.disks[effect.arena]
        buffer: Any = StoreByStore(self, disk)
        layout.write_last_use(buffer, effect.slot, disk.made.block_tokens, effect.last_use)
        path, _ = disk.recorded[effect.slot]
        disk.recorded[effect.slot] = Recorded(path, effect.last_use)

    def drop_record(self, effect: DropRecord) -> None:
        if effect.heir != NO_SLOT:
            self.use_record(UseRecord(effect.arena, effect.heir, effect.last_use))
        super().drop_record(effect)
        self.erase(self.disks[effect.arena], effect.slot)

    def erase(self, disk: Disk, slot: int) -> None:
        buffer: Any = StoreByStore(self, disk)
        layout.drop_record(buffer, slot, disk.made.block_tokens)
        disk.recorded.pop(slot, None)

    def write_pin(self, effect: WritePin) -> None:
        super().write_pin(effect)
        disk = self.disks[effect.arena]
        buffer: Any = StoreByStore(self, disk)
        entry = layout.PinEntry(effect.key, effect.owner, effect.expires)
        layout.write_pin(buffer, disk.pin_offset(effect.place), entry)
        disk.pinned[effect.place] = entry

    def renew_pin(self, effect: RenewPin) -> None:
        super().renew_pin(effect)
        disk = self.disks[effect.arena]
        buffer: Any = StoreByStore(self, disk)
        layout.renew_pin(buffer, disk.pin_offset(effect.place), effect.expires)
        entry = disk.pinned[effect.place]
        disk.pinned[effect.place] = entry._replace(expires=effect.expires)

    def drop_pin(self, effect: DropPin) -> None:
        super().drop_pin(effect)
        disk = self.disks[effect.arena]
        buffer: Any = StoreByStore(self, disk)
        layout.drop_pin(buffer, disk.pin_offset(effect.place))
        del disk.pinned[effect.place]

    def work(self, fails: int, which: int = 0) -> Any:
        job = self.next_job(which)
        if isinstance(job, Back) and fails in (0, 2):
            # The directory first; the slots may fail after that.
            disk = self.disks[job.arena]
            disk.backed = max(disk.backed, min(job.directory_bytes, disk.pins_offset))
        self.moment()
        event = super().work(fails, which)
        self.moment()
        return event


def _have_ties(disks: list[Disk]) -> bool:
    """Whether two blocks have the same last use, of which none is above the other: it was spoilt,
    now or for an earlier daemon, and nothing says which one goes first."""
    last: dict[int, tuple[Disk, Path]] = {}
    everything = [(disk, each) for disk in disks for each in disk.recorded.values()]
    for disk, (path, last_use) in sorted(everything, key=lambda place: len(place[1].path)):
        above, shorter = last.setdefault(last_use, (disk, path))
        if above is not disk or path[: len(shorter)] != shorter:
            return True
        last[last_use] = disk, path
    return False


class RestartingWorld(World):
    shell: DurableShell

    def __init__(
        self,
        random: Random,
        spare_pages: int = 6,
        max_sequences: int = 5,
        spare_of_tenants: tuple[int | None, ...] = (None,),
        max_models: int = len(KINDS),
        shares: Shares = SHARES[0],
    ) -> None:
        super().__init__(spare_pages, max_sequences, spare_of_tenants, max_models, shares)
        self.random = random
        self.shell = DurableShell()
        self.shell.paths = self.paths
        self.lives = 1
        self.adopted = self.damaged = self.refused = self.kept_pins = 0
        self.readers: list[Reader] = []
        self.checks: dict[int, list[tuple[Arena, Path]]] = {}
        self.deferred: dict[int, Waiting] = {}
        """By correlation: allocs that wait for a check."""
        self.deferred_pins: dict[int, DeferredPin] = {}
        self.retrying: deque[int] = deque()
        """Those that are tried again in this step, in order."""
        self.condemned: set[tuple[int, Path]] = set()
        """What is found damaged in this step."""
        self.from_before: set[tuple[int, Path]] = set()
        """What nobody has leased in this life."""
        self.lru_before: list[tuple[Disk, Path]] = []

    # --- death and what comes after it

    def restart(self, *, damages: int = 0, spoils_uses: bool = False) -> None:
        """The daemon is dead. The next one starts, and perhaps dies of it, and another one."""
        order = self._certain_order()
        self._leave_readers()
        disks = list(self.shell.disks.values())
        for _ in range(damages):
            self._damage(self.random.choice(disks) if disks else None)
        if spoils_uses and disks:
            self._spoil_uses(self.random.choice(disks))
        uses = [each.last_use for disk in disks for each in disk.recorded.values()]
        if spoils_uses or max(uses, default=0) >= LATEST_USE or _have_ties(disks):
            order = []
        while True:
            try:
                self._start(disks)
                break
            except Crashed:
                continue
        self._check_order(order)

    def _start(self, disks: list[Disk]) -> None:
        self.lives += 1
        fuse, self.shell = self.shell.fuse, DurableShell()
        self.shell.fuse = fuse
        self.shell.paths = self.paths
        for each in (
            self.sessions, self.contexts, self.arenas, self.answers, self.askers, self.allocs,
            self.reserving, self.backing, self.copying, self.seals, self.staged, self.unheld,
            self.checks, self.deferred, self.deferred_pins, self.retrying, self.condemned,
            self.from_before, self.dropped, self.counts_for, self.ghosts, self.gave_way,
            self.not_stored,
        ):  # fmt: skip
            each.clear()
        self.evicting = False
        self.commanded = 0
        self.n_contexts += 1000
        self.core = self._new_core()
        disks = [disk for disk in disks if not disk.is_removed]
        self.random.shuffle(disks)  # their names come by chance
        # As in adoption.py: first all are opened, then the core is told of one after the other.
        records = [self._open_disk(disk) for disk in disks]
        for number, disk in enumerate(disks, 1):
            self.shell.disks[number] = disk
            self.shell.arenas[number] = disk.slots
        for number, (disk, found) in enumerate(zip(disks, records, strict=True), 1):
            self._adopt(number, disk, found)

    def _open_disk(self, disk: Disk) -> list[FoundRecord]:
        """As adoption.py does: the records of slots that have all their memory; other memory is
        given back."""
        block_tokens = disk.made.block_tokens
        buffer = memoryview(disk.directory)
        size = layout.record_bytes(block_tokens)
        n_slots = (disk.backed - layout.DIRECTORY_HEADER_BYTES) // size
        found = []
        for slot in range(min(n_slots, disk.made.slots)):
            record = layout.read_record(buffer, slot, block_tokens)
            assert (record is not None) == (slot in disk.recorded), "torn, or not torn"
            if record is None:
                continue
            assert disk.slots.memory[slot] != HOLED, "recorded without memory"
            used = layout.read_last_use(buffer, slot, block_tokens)
            assert disk.recorded[slot] == (self.paths[record.key], used)
            found.append(
                FoundRecord(
                    slot, record.key, record.parent_key, record.start, record.tokens,
                    record.generation, record.checksum, used,
                )
            )  # fmt: skip
        disk.has_readers = any(disk in reader.leases for reader in self.readers)
        for slot in disk.slots.memory.keys() - disk.recorded.keys():
            if disk.has_readers and slot < n_slots and disk.slots.memory[slot] != HOLED:
                continue  # they may have a lease on it
            disk.slots.memory[slot] = HOLED
            self.shell.moment()
            del disk.slots.memory[slot]
        for place in range(disk.slots.pins_backed // layout.PIN_BYTES):
            pin = layout.read_pin(buffer, disk.pin_offset(place))
            assert disk.pinned.get(place) == pin, "torn, or not torn"
        self._check_readers()
        return found

    def _adopt(self, number: int, disk: Disk, records: list[FoundRecord]) -> None:
        made = disk.made
        disk.slots.records = {
            each.slot: WriteRecord(
                number, each.slot, each.key, each.parent_key, each.start, each.tokens,
                each.generation, each.checksum,
            )
            for each in records
        }  # fmt: skip
        kind = self.kinds[number] = _kind_of(made)
        arena = Arena(number, made.tenant, kind.block_tokens, kind.stride)
        paths = {recorded.path for recorded in disk.recorded.values()}
        for slot, (path, _) in disk.recorded.items():
            if all(up in paths for up in arena.chain(path)):
                arena.sealed[path] = slot
        disk.slots.pins = {
            place: WritePin(number, place, *entry) for place, entry in disk.pinned.items()
        }
        for entry in disk.pinned.values():
            path = self.paths[entry.key]
            if path in arena.sealed and (not entry.expires or entry.expires > self.now):
                arena.pins[entry.owner, path] = entry.expires
        self.kept_pins += len(arena.pins)
        arena.births = dict.fromkeys(arena.sealed, 1)
        arena.unchecked = set(arena.sealed)
        arena.former = set(arena.sealed) if disk.has_readers else set()
        self.arenas[number] = arena
        self.from_before |= {(number, path) for path in arena.sealed}
        event = ArenaFound(
            number, made.tenant, made.name, made.fingerprint, made.payload_format,
            made.block_tokens, made.layers, made.slots, made.stride_bytes, disk.has_readers,
            records, sorted(disk.slots.memory.keys() - disk.recorded.keys()),
            [FoundPin(place, *entry) for place, entry in disk.pinned.items()],
        )  # fmt: skip
        effects = self._handle(event)
        if isinstance(effects[0], ArenaRefused):
            self._refused(number, disk, effects[0])
            return
        adopted = [each for each in effects if isinstance(each, ArenaAdopted)]
        assert [each.blocks for each in adopted] == [len(arena.sealed)]
        self.adopted += len(arena.sealed)
        self._settle(effects)

    def _refused(self, number: int, disk: Disk, effect: ArenaRefused) -> None:
        """Only if the budget, or its tenant's quota, has become too small for all directories: all
        else that is too much is evicted."""
        assert "directory does not fit" in effect.reason
        assert self.is_reconfigured, "there was room for all directories"
        tenant = self.core.cache.budget.tenants[disk.made.tenant]
        (quota,) = [each.quota for each in self.rules if each.name == tenant.name]
        own = sum(each.memory_beside for each in tenant.arenas)
        of_all = sum(each.memory_beside for each in self.core.cache.budget.arenas.values())
        most = DIRECTORY + PAGE
        assert of_all + most > self.n_bytes or (quota is not None and own + most > quota)
        self.shell.moment()
        self.refused += 1
        del self.arenas[number], self.shell.arenas[number], self.shell.disks[number]
        disk.recorded.clear()
        disk.pinned.clear()
        disk.is_removed = True
        for reader in self.readers:
            reader.leases.pop(disk, None)

    def _leave_readers(self) -> None:
        """Of the clients some are dead too, and some go on."""
        for session in self.sessions.values():
            if not session.models or self.random.random() < 0.5:
                continue
            leases: dict[Disk, dict[int, Path | str]] = {
                self.shell.disks[number]: {} for number in session.models
            }
            for sequence in self.known_sequences():
                if sequence.context.session is session:
                    self._note_lease(sequence, leases)
            self.readers.append(Reader(leases))

    def _note_lease(self, sequence: Sequence, leases: dict[Disk, dict[int, Path | str]]) -> None:
        arena = sequence.context.arena
        disk = self.shell.disks[arena.number]
        for path in arena.chain(sequence.leased):
            slot = arena.sealed.get(path)
            if slot is None or path in arena.unchecked or slot not in disk.recorded:
                return  # nobody has been told of it
            assert disk.slots.memory[slot] == path
            leases[disk][slot] = path

    def _damage(self, disk: Disk | None) -> None:
        """Bytes of a block have changed, whoever did it."""
        if disk is None or not disk.recorded:
            return
        slot = self.random.choice(sorted(disk.recorded))
        content = disk.slots.memory[slot] = f"damaged {disk.slots.memory[slot]}"
        for reader in self.readers:
            if slot in reader.leases.get(disk, {}):
                reader.leases[disk][slot] = content

    def _spoil_uses(self, disk: Disk) -> None:
        """Last uses are not covered by a checksum."""
        for slot, (path, _) in disk.recorded.items():
            last_use = self.random.choice(
                (0, 1, 1 << 40, (1 << 62) - 1, (1 << 63) - 1, (1 << 64) - 1)
            )
            buffer = memoryview(disk.directory)
            layout.write_last_use(buffer, slot, disk.made.block_tokens, last_use)
            disk.recorded[slot] = Recorded(path, last_use)

    # --- the order of eviction

    def _lru(self) -> list[tuple[Disk, Path]]:
        disks = self.shell.disks
        return [
            (disks[block.arena.number], _path(block))
            for block in self.core.cache.budget.oldest_first()
        ]

    def _certain_order(self) -> list[tuple[Disk, Path]]:
        """What is in the LRU and was there, in this order, before the step in which it died."""
        after = [place for place in self._lru() if place in set(self.lru_before)]
        before = iter(self.lru_before)
        certain: list[tuple[Disk, Path]] = []
        for place in after:
            if place not in before:  # consumes it: those that were used in this step come last
                break
            certain.append(place)
        return [place for place in certain if self._is_recorded(*place)]

    def _is_recorded(self, disk: Disk, path: Path) -> bool:
        """Whether it is, and all above it: a block may be sealed before its parent."""
        recorded = {each.path for each in disk.recorded.values()}
        chain = Arena(0, "", disk.made.block_tokens, 0).chain(path)
        return recorded.issuperset(chain)

    def _check_order(self, order: list[tuple[Disk, Path]]) -> None:
        found = self._lru()
        order = [place for place in order if self._is_recorded(*place)]
        common = [place for place in order if place in set(found)]
        assert [place for place in found if place in set(order)] == common
        if not any(disk.has_readers for disk in self.shell.disks.values()):
            assert len(common) == len(order), "what was cached is not cached"

    # --- clients of before

    def reader_leaves(self) -> None:
        if self.readers:
            self.readers.remove(self.random.choice(self.readers))

    def look_for_readers(self) -> None:
        """As the server does from time to time."""
        for number, disk in list(self.shell.disks.items()):
            if disk.has_readers and not any(disk in reader.leases for reader in self.readers):
                disk.has_readers = False
                self.arenas[number].former.clear()
                self._settle(self._handle(ReadersGone(number)))

    def _check_readers(self) -> None:
        for reader in self.readers:
            for disk, slots in reader.leases.items():
                for slot, content in slots.items():
                    assert disk.slots.memory[slot] == content, "changed under a reader of before"

    # --- allocs and pins that wait for a check

    def alloc(
        self,
        context: Context,
        tokens: Path,
        reserve_tokens: int = 0,
        wait_ms: int = 0,
        idle_timeout_ms: int = 0,
        use: bool = True,
        store: bool = True,
    ) -> None:
        is_wrong = reserve_tokens and not store
        if is_wrong or not use or not self._must_check(context.arena, tokens):
            super().alloc(context, tokens, reserve_tokens, wait_ms, idle_timeout_ms, use, store)
            return
        message = Alloc(
            context.number,
            "",
            packed(tokens),
            reserve_tokens,
            wait_ms,
            idle_timeout_ms,
            store=int(store),
        )
        correlation = self.n_asked + 1
        self.deferred[correlation] = Waiting(context, message, 0.0)
        self._request(context.session, message, lambda body: self._tried(correlation, body))
        assert correlation in self.deferred, "answered from what is not checked"

    def pin(
        self, session: Session, kind: Kind, tokens: Path, owner: str = "o", ttl_ms: int = 0
    ) -> None:
        arena = self.arena_of(session, kind)
        if arena is None or not self._must_check(arena, tokens):
            super().pin(session, kind, tokens, owner, ttl_ms)
            return
        message = Pin(kind.fingerprint, packed(tokens), owner, ttl_ms)
        correlation = self.n_asked + 1
        self.deferred_pins[correlation] = DeferredPin(session, kind, tokens, owner, ttl_ms / 1000)
        self._request(session, message, lambda body: self._pin_tried(correlation, body))
        assert correlation in self.deferred_pins, "answered from what is not checked"

    def _pin_tried(self, correlation: int, body: Any) -> None:
        """A deferred pin is answered."""
        self._others_wait(correlation)
        assert self.retrying.popleft() == correlation
        deferred = self.deferred_pins.pop(correlation)
        arena = self.arena_of(deferred.session, deferred.kind)
        if arena is None:
            assert isinstance(body, errors.UnknownModel), "the arena was given up meanwhile"
            return
        wanted = self._wanted_now(arena, correlation, deferred)
        if wanted is None:
            assert body == Pinned(0)
        else:
            self._pinned(arena, wanted, body)

    def _pin_waits(self, correlation: int) -> None:
        """A deferred pin was tried, and waits for memory."""
        deferred = self.deferred_pins.pop(correlation)
        arena = self.arena_of(deferred.session, deferred.kind)
        assert arena is not None
        wanted = self._wanted_now(arena, correlation, deferred)
        assert wanted is not None
        arena.wanted.append(wanted)
        self.answers[correlation] = lambda body: self._pinned(arena, wanted, body)

    def _wanted_now(self, arena: Arena, correlation: int, deferred: DeferredPin) -> Wanted | None:
        """What a deferred pin is of, now that it is tried."""
        session, _, tokens, owner, seconds = deferred
        assert not self._must_check(arena, tokens)
        path = arena.best(tokens)
        if not path:
            return None
        return Wanted(session, correlation, owner, path, arena.matched(tokens), seconds)

    def _must_check(self, arena: Arena, tokens: Path) -> bool:
        """Whether the best match would be one that is not checked yet."""
        unchecked, arena.unchecked = arena.unchecked, set()
        best = arena.best(tokens)
        arena.unchecked = unchecked
        return any(path in unchecked for path in arena.chain(best))

    def _tried(self, correlation: int, body: Any) -> None:
        """A deferred alloc is answered."""
        context, message, _ = self.deferred[correlation]
        must_wait = self._must_wait(context)
        self._turn_comes(correlation)
        if must_wait:
            del self.allocs[correlation]
            assert isinstance(body, errors.SequenceLimit | errors.NoSequenceFree)
            assert not message.wait_ms
            return
        self._allocated(correlation, body)

    def _must_wait(self, context: Context) -> bool:
        full = len(self.sequences()) >= self.max_sequences
        before = any(alloc.context is context for alloc in self.allocs.values())
        return full or before or not context.free_ids

    def _turn_comes(self, correlation: int) -> None:
        """From now on it is an alloc like others."""
        self._others_wait(correlation)
        assert self.retrying.popleft() == correlation
        context, message, _ = self.deferred.pop(correlation)
        assert not self._must_check(context.arena, _tokens(message.tokens))
        self.allocs[correlation] = Waiting(context, message, self.now + message.wait_ms / 1000)

    def _others_wait(self, until: int | None) -> None:
        """Those that were tried before and heard nothing wait for an id, or for another check."""
        while self.retrying and self.retrying[0] != until:
            correlation = self.retrying.popleft()
            if correlation in self.deferred_pins and not self._is_checked_for(correlation):
                self._pin_waits(correlation)
            if correlation not in self.deferred or self._is_checked_for(correlation):
                continue
            context, message, _ = self.deferred.pop(correlation)
            assert message.wait_ms
            assert self._must_wait(context)
            self.allocs[correlation] = Waiting(context, message, self.now + message.wait_ms / 1000)
            self.answers[correlation] = self._answer_of(correlation)

    def _answer_of(self, correlation: int) -> Any:
        return lambda body: self._allocated(correlation, body)

    def _is_checked_for(self, correlation: int) -> bool:
        return any(
            waiting.correlation == correlation
            for job in self.core.cache.jobs.values()
            if isinstance(job, Checking)
            for waiting in job.deferred
        )

    def _open(self, correlation: int, body: Any) -> Sequence:
        if correlation in self.deferred:
            assert not self._must_wait(self.deferred[correlation].context)
            self._turn_comes(correlation)
        return super()._open(correlation, body)

    def disconnect(self, session: Session) -> None:
        for correlation, alloc in list(self.deferred.items()):
            if alloc.context.session is session:
                del self.deferred[correlation]
        for correlation, pin in list(self.deferred_pins.items()):
            if pin.session is session:
                del self.deferred_pins[correlation]
        super().disconnect(session)

    def close_context(self, context: Context) -> None:
        for correlation, alloc in list(self.deferred.items()):
            if alloc.context is context:
                del self.deferred[correlation]
                self.answers[correlation] = _fails(errors.UnknownContext)
        super().close_context(context)

    # --- no memory for an arena

    def register_in_vain(self, session: Session, kind: Kind) -> None:
        """As `register`, but there is no memory for the directory."""
        if any(
            self._kind(each.number) is kind and each.tenant == session.tenant
            for each in self.arenas.values()
        ):
            return
        self.registering = f"tenant {session.tenant}"
        effects = self._send(session, kind.message, lambda body: None)
        made = [each for each in effects if isinstance(each, CreateArena)]
        if made:
            # What comes before it is carried out, and nothing of what follows.
            effects = effects[: effects.index(made[0])]
            del self.answers[self.n_asked], self.askers[self.n_asked]
            effects += self._handle(ArenaFailed(made[0].arena))
            self.returned = made[0].directory_bytes
            self.in_vain = self._taker(session.tenant, made[0].name)
        self._settle(effects)
        self.returned = 0
        self.in_vain = ""
        self.registering = ""

    # --- what world.py does, and more

    def _handle(self, event: Event) -> list[Effect]:
        if self.shell.fuse > 0:
            self.lru_before = self._lru()
        return super()._handle(event)

    def work(self, fails: int = 0, which: int = 0) -> bool:
        if self.shell.fuse > 0:
            self.lru_before = self._lru()
        return super().work(fails, which)

    def _job_ended(self, event: Event) -> None:
        if not isinstance(event, Checked):
            super()._job_ended(event)
            return
        job = self.core.cache.jobs[event.job]
        assert isinstance(job, Checking)
        self.retrying.extend(waiting.correlation for waiting in job.deferred)
        for (arena, path), is_right in zip(self.checks.pop(event.job), event.results, strict=True):
            if path not in arena.unchecked:
                continue  # gone meanwhile
            if is_right:
                arena.unchecked.discard(path)
                continue
            self.damaged += 1
            below = {each for each in arena.sealed if path in arena.chain(each)}
            self.condemned |= {(arena.number, each) for each in below}
            arena.unchecked -= below
            arena.former -= below
            arena.pins = {key: due for key, due in arena.pins.items() if key[1] not in below}
            arena.remove(path, self.sequences())

    def _settle(self, effects: list[Effect], evicting: list[Arena] | None = None) -> None:
        super()._settle(effects, evicting)
        self.condemned.clear()

    def _apply(self, effect: Effect, evicted: list[tuple[int, Path]]) -> None:
        self.shell.moment()
        match effect:
            case UseRecord():
                self.shell.use_record(effect)
            case Check():
                self._check(effect)
                self.shell.submit(effect)
            case ArenaAdopted(number, _, directory_bytes, pins_bytes):
                disk = self.shell.disks[number]
                disk.backed = min(directory_bytes, disk.pins_offset)
                disk.slots.pins_backed = pins_bytes
            case ArenaRefused():
                raise AssertionError(effect)
            case DropRecord(number, slot) if self._is_lost(number, slot):
                self.shell.drop_record(effect)
            case _:
                super()._apply(effect, evicted)

    def _is_lost(self, number: int, slot: int) -> bool:
        """Whether a record that was found was not taken."""
        path = self.paths[self.shell.arenas[number].records[slot].key]
        return path not in self.arenas[number].sealed

    def _check(self, effect: Check) -> None:
        arena = self.arenas[effect.arena]
        paths = {slot: path for path, slot in arena.sealed.items()}
        checked: list[tuple[Arena, Path]] = []
        running = [place for job in self.checks.values() for place in job]
        for item in effect.items:
            path = paths[item.slot]
            assert path in arena.unchecked
            assert (arena, path) not in running, "checked twice"
            assert item.checksum == checksum(path)
            checked.append((arena, path))
        self.checks[effect.job] = checked

    def _drop_block(self, number: int, slot: int, evicted: list[tuple[int, Path]]) -> None:
        path = self.paths[self.shell.arenas[number].records[slot].key]
        found: list[tuple[int, Path]] = []
        super()._drop_block(number, slot, found)
        self.arenas[number].unchecked.discard(path)
        # Its place among those that nobody has leased in this life is checked when it restarts.
        evicted += set(found) - self.condemned - self.from_before

    def _is_damaged(self, number: int, path: Path) -> bool:
        return (number, path) in self.condemned

    def _check_eviction(
        self,
        evicted: list[tuple[int, Path]],
        all_arenas: dict[int, Arena],
        evicting: list[Arena] | None,
    ) -> None:
        self._others_wait(None)
        super()._check_eviction(evicted, all_arenas, evicting)

    def _compare(self) -> None:
        for arena in self.arenas.values():
            leased = arena.leased(self.sequences())
            self.from_before -= {(arena.number, path) for path in leased}
        super()._compare()
        self._check_readers()
        if not self.shell.queue:
            assert not self.deferred, "an alloc was forgotten"
            assert not self.deferred_pins, "a pin was forgotten"
            assert not any(arena.unchecked for arena in self.arenas.values())

    def _compare_arena(self, arena: Arena) -> None:
        super()._compare_arena(arena)
        real = self.core.cache.budget.arenas[arena.number]
        recorded = self.shell.disks[arena.number].recorded
        for block in real.root.below():
            if block.slot in recorded and (path := _path(block)) in arena.sealed:
                used = recorded[block.slot].last_use
                assert recorded[block.slot].path == path
                assert block.last_use == used or used >= LATEST_USE
        assert {_path(block) for block in real.former} == arena.former

    def finish(self) -> None:
        self.shell.fuse = -1
        self.readers.clear()
        self.look_for_readers()
        super().finish()


def _kind_of(made: CreateArena) -> Kind:
    return next(kind for kind in KINDS if kind.name == made.name)
