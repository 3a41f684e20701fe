"""What an earlier daemon of this instance left in shared memory, and whether it can be used.

Covers finding arenas with their directories, checking that both are whole and of this machine's
present boot, giving back all memory that no record speaks for, unless somebody may still read what
was there (a block that was found damaged, or what was below it), and removing the rest. Which
records form a tree is the core's decision (core/adopting.py); that a block's bytes are right is
checked later, before it is served (core/checking.py). Which pins go on is the core's decision, too.

Whatever does not fit together is removed with a line in the log that says why: then the start is a
cold one.

    dir-<token>     header, a record for each sealed block, pins   } of one token: one arena
    arena-<token>   the slots                                      }
    index-<token>   which keys are there: made anew, and not read  }
"""

from bisect import bisect_right
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from kvd import log
from kvd.arena import ByteRange, NoSpace, Segment
from kvd.core.events import ArenaFound, CreateArena, FoundPin, FoundRecord
from kvd.directory import Directory, Entry
from kvd.index import Index, remove_left
from kvd.instance import InstanceLock
from kvd_proto import codec
from kvd_proto.errors import KvdError
from kvd_proto.geometry import Geometry
from kvd_proto.messages import RegisterModel
from kvd_proto.payload import make_format

DIRECTORY, ARENA, INDEX = "dir-", "arena-", "index-"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Found(NamedTuple):
    """An arena whose slots and directory are whole; the memory of its slots is that of its records,
    and of `unrecorded` slots that a client of the daemon before may have a lease on."""

    segment: Segment
    directory: Directory
    new_index: Index
    """Without keys."""
    arena: CreateArena
    """As it would be made; its number is not known yet."""
    records: list[FoundRecord]
    unrecorded: list[int]
    pins: list[FoundPin]
    has_readers: bool
    """Whether clients of a daemon before could still read it when it was found. Asked once: who has
    a descriptor can lock and unlock what it likes, and all must go by the same answer."""

    def event(self, number: int) -> ArenaFound:
        """To tell the core; `number` is the arena's from now on."""
        arena = self.arena
        return ArenaFound(
            number,
            arena.tenant,
            arena.name,
            arena.fingerprint,
            arena.payload_format,
            arena.block_tokens,
            arena.layers,
            arena.slots,
            arena.stride_bytes,
            self.has_readers,
            self.records,
            self.unrecorded,
            self.pins,
        )


def boot_id() -> bytes:
    """16 bytes that are others after each boot of the machine."""
    return bytes.fromhex(_BOOT_ID.read_text().strip().replace("-", ""))


def find(lock: InstanceLock, tenants: Collection[str]) -> list[Found]:
    """All arenas of these tenants that can be used. What else is left of this instance is
    removed."""
    found: list[Found] = []
    boot = boot_id()
    names = lock.segments()
    for name in names:
        ending = name.removeprefix(f"{lock.prefix}.")
        if not ending.startswith(DIRECTORY):
            continue
        try:
            token = ending[len(DIRECTORY) :]
            arena_name, index_name = (
                lock.segment_name(ARENA + token),
                lock.segment_name(INDEX + token),
            )
            found.append(_open(name, arena_name, index_name, boot, tenants))
        except (NoSpace, OSError, ValueError) as error:
            log.warning("cold start", segment=name, reason=error)
        except Exception as error:  # a fault of ours, which costs the others nothing
            log.error("cold start", error, segment=name)
    kept = [
        segment.name
        for each in found
        for segment in (each.directory.segment, each.segment, each.new_index.segment)
    ]
    removed = lock.sweep(kept)
    if removed:
        log.info("removed what cannot be used", segments=len(removed))
    return found


def _open(
    directory_name: str, arena_name: str, index_name: str, boot: bytes, tenants: Collection[str]
) -> Found:
    """Open a directory and its arena, and make its index. Raises NoSpace, OSError or ValueError,
    and leaves both as they are but for memory that no record speaks for."""
    directory = Directory.adopt(directory_name)
    try:
        arena = _read_registration(directory, boot)
        if arena.tenant not in tenants:
            raise ValueError(f"the configuration has no tenant {arena.tenant!r} any more")
        segment = Segment.adopt(arena_name)
        try:
            if segment.size != arena.slots * arena.stride_bytes:
                raise ValueError(f"its arena has {segment.size} bytes, not {arena.slots} slots")
            has_readers = segment.has_readers_before(directory.life + 1)
            kept = _keep_slots(segment, directory, arena.stride_bytes, has_readers)
            remove_left(index_name)
            index = Index.create(index_name, arena)
        except BaseException:
            segment.close(unlink=False)
            raise
    except BaseException:
        directory.close(unlink=False)
        raise
    records = [_record(entry) for entry in kept.entries]
    pins = directory.pins()
    return Found(segment, directory, index, arena, records, kept.unrecorded, pins, has_readers)


def _read_registration(directory: Directory, boot: bytes) -> CreateArena:
    header = directory.header
    registration: dict[str, Any] = header.registration
    try:
        if registration["boot"] != boot:
            raise ValueError("it is of another boot of this machine")
        # As strict as for a client's.
        asked = RegisterModel(
            registration["name"],
            registration["fingerprint"],
            registration["format"],
            header.block_tokens,
            registration["layers"],
        )
        model = codec.decode_request(codec.encode_request(1, asked)).message
        tenant = registration["tenant"]
        geometry = Geometry.from_wire(model.layers)
        form = make_format(model.payload_format, geometry, model.block_tokens)
    except (KeyError, TypeError, KvdError) as error:
        raise ValueError(f"its registration cannot be used: {error!r}") from error
    if type(tenant) is not str or not header.slots or header.stride_bytes < form.max_bytes:
        raise ValueError("its registration cannot be used")
    return CreateArena(
        0,
        tenant,
        model.name,
        model.fingerprint,
        model.payload_format,
        model.block_tokens,
        geometry.layers,
        form.max_bytes,
        header.stride_bytes,
        header.slots,
        directory.backed,
        b"",  # the core knows it
    )


class _Kept(NamedTuple):
    """Of slots that have all their memory: what their records say, and those that have none."""

    entries: list[Entry]
    unrecorded: list[int]


def _keep_slots(segment: Segment, directory: Directory, stride: int, has_readers: bool) -> _Kept:
    """Find the slots that have all their memory; without a record only if there are readers. All
    other memory is given back, and other records are dropped."""
    ranges = segment.backed_ranges()
    starts = [span.offset for span in ranges]

    def is_whole(slot: int) -> bool:
        index = bisect_right(starts, slot * stride) - 1
        return index >= 0 and (slot + 1) * stride <= ranges[index].offset + ranges[index].length

    kept = _Kept([], [])
    for entry in directory.entries():
        if is_whole(entry.slot):
            kept.entries.append(entry)
        else:
            directory.drop(entry.slot)
    recorded = {entry.slot for entry in kept.entries}
    if has_readers:
        slots = range(directory.backed_slots)
        kept.unrecorded.extend(slot for slot in slots if slot not in recorded and is_whole(slot))
    # Not only what has been seen: memory that was given and never written looks like a hole.
    for gap in _gaps(sorted(recorded.union(kept.unrecorded)), stride, segment.size):
        segment.punch(gap.offset, gap.length)
    n_kept = len(recorded) + len(kept.unrecorded)
    backed = segment.backed_bytes()
    if backed != n_kept * stride:
        raise ValueError(f"{n_kept} slots of {stride} bytes have {backed} bytes of memory")
    return kept


def _gaps(slots: list[int], stride: int, size: int) -> list[ByteRange]:
    """What lies between these slots, before and behind them."""
    ends = [0, *((slot + 1) * stride for slot in slots)]
    starts = [*(slot * stride for slot in slots), size]
    return [
        ByteRange(end, start - end) for end, start in zip(ends, starts, strict=True) if start > end
    ]


def _record(entry: Entry) -> FoundRecord:
    slot, record, last_use = entry
    return FoundRecord(
        slot,
        record.key,
        record.parent_key,
        record.start,
        record.tokens,
        record.generation,
        record.checksum,
        last_use,
    )
