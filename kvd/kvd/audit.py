"""What `verify` compares the core with: the bytes in the directories and indexes, in steps, and the
checksums of the blocks' bytes, in the copier's thread.

What the operating system says: reports.py. A torn record or pin counts as absent for whoever reads
the directory; nobody writes one, so here it is a difference.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

from kvd.core.accounting import AccountingError
from kvd.core.arenas import Arena
from kvd.core.cache import Cache
from kvd.core.events import CheckItem
from kvd.core.recount import STEP_BLOCKS, check_in_steps, check_totals
from kvd.core.tree import ADOPTED, SEALED, Block
from kvd.directory import Directory
from kvd.index import Index
from kvd.store import Store
from kvd.stored import StoredArena
from kvd_proto import layout
from kvd_proto.index import prefix_of

CHECK_BYTES = 4 << 20
"""Compared in one job, or one block: whoever wants memory waits for that, half a millisecond."""
SCAN_SLOTS = 4096
"""Looked through for blocks to compare, at most, before the loop gets its turn."""


def recount(cache: Cache, store: Store) -> Generator[None, None, list[str]]:
    """Find what is wrong in the core's trees and in the directories, in steps of less than a
    millisecond. Returns an empty list if they agree."""
    differences: list[str] = []
    try:
        yield from check_in_steps(cache)
    except AccountingError as error:
        differences.append(f"core: {error}")
    for arena in list(cache.budget.arenas.values()):
        stored = store.arenas.get(arena.number)
        if stored is None:
            continue  # given up meanwhile
        differences += _recount_header(arena, stored.directory)
        for recount_some, n_places in (
            (_recount_pins, stored.directory.pin_places),
            (_recount_records, stored.directory.backed_slots),
            (partial(_recount_index, stored.index), stored.directory.backed_slots),
        ):
            first = 0
            while store.arenas.get(arena.number) is stored and first < n_places:
                some = range(first, min(first + STEP_BLOCKS, n_places))
                differences += recount_some(arena, stored.directory, some)
                first += STEP_BLOCKS
                yield
    return differences


def recount_at_once(cache: Cache, store: Store) -> list[str]:
    """All of it, while everybody waits."""
    steps = recount(cache, store)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return [*stop.value, *recount_totals(cache)]


def recount_totals(cache: Cache) -> list[str]:
    """What is wrong in the core's totals, at this moment."""
    try:
        check_totals(cache)
    except AccountingError as error:
        return [f"core: {error}"]
    return []


def _recount_header(arena: Arena, directory: Directory) -> list[str]:
    """The header must say what it said when it was made, and which life of it this is."""
    buffer, wanted = directory.segment.buffer, directory.header
    found = layout.read_header(buffer)
    if found is None:
        return [f"{arena.name}: the header of its directory is torn"]
    told, kept = ({**each._asdict(), **each.registration} for each in (found, wanted))
    del kept["registration"]
    return _terms(
        f"{arena.name}: the header of its directory",
        *((name, told.get(name), value) for name, value in kept.items()),
        ("life", layout.read_life(buffer), directory.life),
    )


def _recount_pins(arena: Arena, directory: Directory, places: range) -> list[str]:
    """The directory must hold exactly the pins."""
    differences = []
    kept = {pin.place: pin for pin in arena.pins.pins.values() if pin.place in places}
    for place in places:
        where = f"{arena.name}: place {place} of its pins"
        found, pin = directory.pin(place), kept.get(place)
        if found is None:
            if not directory.pin_is_absent(place):
                differences.append(f"{where} is torn")
            elif pin is not None:
                differences.append(f"{where} has none, and should have that of {pin.owner!r}")
        elif pin is None:
            differences.append(f"{where} has a pin of {found.owner!r}, which is none")
        else:
            differences += _terms(
                where,
                ("key", found.key.hex(), pin.block.key.hex()),
                ("owner", found.owner, pin.owner),
                ("end", found.expires, pin.expires),
            )
    return differences


def _recount_records(arena: Arena, directory: Directory, slots: range) -> list[str]:
    """The directory must hold exactly the sealed blocks."""
    differences = []
    for slot in slots:
        where = f"{arena.name}: slot {slot}"
        record = directory.record(slot)
        block = arena.blocks[slot] if slot < len(arena.blocks) else None
        if record is None and not directory.is_absent(slot):
            differences.append(f"{where}: its record is torn")
        elif block is None or block.state not in (ADOPTED, SEALED):
            if record is not None:
                differences.append(f"{where} has a record and no block")
        elif record is None:
            differences.append(f"{where} is sealed and has no record")
        else:
            differences += _compare_record(where, record, directory.last_use(slot), block)
    return differences


def _recount_index(index: Index, arena: Arena, _: Directory, slots: range) -> list[str]:
    """The index may lack a sealed block, and has nothing else."""
    differences = []
    for slot in slots:
        found = index.prefix(slot)
        block = arena.blocks[slot] if found and slot < len(arena.blocks) else None
        held = 0
        if block is not None and block.state in (ADOPTED, SEALED):
            held = prefix_of(block.key)
        if found and found != held:
            differences.append(
                f"{arena.name}: slot {slot}: its index has the key {found:#x}, which is not there"
            )
    return differences


def _compare_record(where: str, record: layout.Record, last_use: int, block: Block) -> list[str]:
    assert block.parent is not None
    return _terms(
        f"{where}: its record",
        ("start", record.start, block.start),
        ("tokens", record.tokens.hex(), block.tokens.hex()),
        ("key", record.key.hex(), block.key.hex()),
        ("parent's key", record.parent_key.hex(), block.parent.key.hex()),
        ("generation", record.generation, block.generation),
        ("checksum", record.checksum, block.checksum),
        # An adopted one may say what no clock did, and counts as never used then.
        ("last use", last_use if block.last_use else 0, block.last_use),
    )


def _terms(where: str, *terms: tuple[str, Any, Any]) -> list[str]:
    return [
        f"{where} has {name} {found}, and should have {wanted}"
        for name, found, wanted in terms
        if found != wanted
    ]


# --- checksums


class Compared(NamedTuple):
    """What a comparison of all checksums has found, over so many bytes of payload."""

    differences: list[str]
    n_bytes: int


class Checksums:
    """Compares the bytes of every sealed block with its checksum: one job after the other in the
    copier's thread. What is sealed meanwhile may be left out; what is evicted meanwhile counts
    neither way."""

    def __init__(self, cache: Cache, store: Store, then: Callable[[Compared], None]) -> None:
        """Begin; `then` gets what was found."""
        self._cache = cache
        self._store = store
        self._then = then
        self._arenas = list(cache.budget.arenas.values())
        self._slot = 0
        self._differences: list[str] = []
        self._n_bytes = 0
        self._go_on()

    def _go_on(self) -> None:
        while self._arenas:
            arena = self._arenas[-1]
            stored = self._store.arenas.get(arena.number)
            if stored is None or self._slot >= len(arena.blocks):
                self._arenas.pop()
                self._slot = 0
                continue
            self._compare(arena, stored)
            return
        self._then(Compared(self._differences, self._n_bytes))

    def _compare(self, arena: Arena, stored: StoredArena) -> None:
        """One job: of the next blocks, perhaps of none."""
        blocks: list[Block] = []
        items: list[CheckItem] = []
        n_bytes = 0
        end = min(len(arena.blocks), self._slot + SCAN_SLOTS)
        while self._slot < end and (not items or n_bytes < CHECK_BYTES):
            block = arena.blocks[self._slot]
            self._slot += 1
            if block is not None and block.state is SEALED:
                size = arena.format.size(block.n_tokens)
                items.append(CheckItem(block.slot, size, block.checksum))
                blocks.append(block)
                n_bytes += size

        def then(are_right: list[bool]) -> None:
            self._n_bytes += n_bytes
            for block, is_right in zip(blocks, are_right, strict=True):
                # If it has gone meanwhile, its slot may have been another's when it was read.
                if not is_right and block.state is SEALED:
                    self._differences.append(
                        f"{arena.name}: slot {block.slot}: the bytes of its {block.n_tokens} "
                        f"tokens from {block.start} on do not have their checksum "
                        f"{block.checksum}: evict them, and look for what has written there"
                    )
            self._go_on()

        self._store.compare(stored, items, then)
