"""An arena's directory: a segment of its own beside the arena, with one record for each sealed
block.

Covers making it or finding it again, giving its growth memory, and writing and reading records. The
layout is kvd_proto.layout's; which record is written when is the core's decision, and which
directory is adopted is adoption.py's.
"""

from typing import NamedTuple

from kvd.arena import Segment
from kvd.core.budget import directory_bytes_for
from kvd.core.events import CreateArena, WriteRecord
from kvd_proto import layout

_LAST_LIFE = 1 << 62
"""A life is a place in a file for the kernel's locks (arena.py), which are signed."""


class Entry(NamedTuple):
    """A record that was found in a slot, and when its block was used last."""

    slot: int
    record: layout.Record
    last_use: int


class Directory:
    """The records of one arena. Only the daemon maps it.

    Records are written and read on the loop; `ensure` may run in the copier's thread meanwhile.
    `backed` bytes from the start have memory.
    """

    def __init__(self, segment: Segment, header: layout.Header, backed: int) -> None:
        """Takes over `segment`. Use Directory.create() or Directory.adopt()."""
        self._block_tokens = header.block_tokens
        self._slots = header.slots
        self.segment = segment
        self.header = header
        self.backed = backed

    @classmethod
    def create(cls, name: str, arena: CreateArena, boot: bytes) -> "Directory":
        """Create the segment and its header. Raises arena.NoSpace or OSError, leaving nothing."""
        registration = {
            "tenant": arena.tenant,
            "name": arena.name,
            "fingerprint": arena.fingerprint,
            "format": arena.payload_format,
            "layers": arena.layers,
            "boot": boot,
        }
        header = layout.Header(arena.block_tokens, arena.slots, arena.stride_bytes, registration)
        segment = Segment.create(name, directory_bytes_for(arena.slots, arena.block_tokens))
        directory = cls(segment, header, 0)
        try:
            directory.ensure(arena.directory_bytes)
            layout.write_life(segment.buffer, 1)
            layout.write_header(segment.buffer, header)
        except BaseException:
            directory.close(unlink=True)
            raise
        return directory

    @classmethod
    def adopt(cls, name: str) -> "Directory":
        """The directory of a daemon before this one. ValueError if it is none, or of another
        format; OSErrors as Segment.adopt()."""
        segment = Segment.adopt(name)
        try:
            # Nothing that has no memory is read: that would give it some.
            ranges = segment.backed_ranges()
            backed = ranges[0].length if ranges and ranges[0].offset == 0 else 0
            if backed < layout.DIRECTORY_HEADER_BYTES:
                raise ValueError("its header was never written")
            header = layout.read_header(segment.buffer)
            if header is None:
                raise ValueError("its header is torn, or of another format")
            if segment.size != directory_bytes_for(header.slots, header.block_tokens):
                raise ValueError(f"it has {segment.size} bytes, which is not what its header says")
            life = layout.read_life(segment.buffer)
            if not 0 < life < _LAST_LIFE:
                raise ValueError(f"no daemon was its {life}th")
            return cls(segment, header, backed)
        except BaseException:
            segment.close(unlink=False)
            raise

    @property
    def life(self) -> int:
        """Which daemon serves it, counted from 1."""
        return layout.read_life(self.segment.buffer)

    @property
    def backed_slots(self) -> int:
        """So many slots, from the first one, have room for their records in memory."""
        size = layout.record_bytes(self._block_tokens)
        return min(self._slots, max(0, self.backed - layout.DIRECTORY_HEADER_BYTES) // size)

    def begin_life(self) -> None:
        """From now on this daemon serves it."""
        layout.write_life(self.segment.buffer, self.life + 1)

    def ensure(self, n_bytes: int) -> None:
        """Give the first `n_bytes` memory. Raises arena.NoSpace; asking again is then right."""
        if n_bytes > self.backed:
            self.segment.back(self.backed, n_bytes - self.backed)
            self.backed = n_bytes

    def shrink(self, n_bytes: int) -> None:
        """Give back all memory but that of the first `n_bytes`, in whole pages."""
        if n_bytes < self.segment.size:
            self.segment.punch(n_bytes, self.segment.size - n_bytes)
        self.backed = min(self.backed, n_bytes)

    def write(self, record: WriteRecord) -> None:
        """A block is sealed. The slot's record lies in the backed part, since the slot does."""
        entry = layout.Record(
            record.start,
            record.tokens,
            record.key,
            record.parent_key,
            record.generation,
            record.checksum,
        )
        # Sealing is the first use: both are of one clock.
        last_use = record.generation
        layout.write_record(self.segment.buffer, record.slot, self._block_tokens, entry, last_use)

    def use(self, slot: int, last_use: int) -> None:
        """A sequence has let go of the slot's block."""
        layout.write_last_use(self.segment.buffer, slot, self._block_tokens, last_use)

    def drop(self, slot: int) -> None:
        """A block is gone."""
        layout.drop_record(self.segment.buffer, slot, self._block_tokens)

    def records(self) -> dict[int, layout.Record]:
        """All whole records by slot."""
        return {entry.slot: entry.record for entry in self.entries()}

    def entries(self) -> list[Entry]:
        """All whole records, read from the backed part only."""
        found: list[Entry] = []
        buffer, block_tokens = self.segment.buffer, self._block_tokens
        for slot in range(self.backed_slots):
            record = layout.read_record(buffer, slot, block_tokens)
            if record is not None:
                last_use = layout.read_last_use(buffer, slot, block_tokens)
                found.append(Entry(slot, record, last_use))
        return found

    def close(self, *, unlink: bool) -> None:
        self.segment.close(unlink=unlink)
