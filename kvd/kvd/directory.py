"""An arena's directory: a segment of its own beside the arena, with one record for each sealed
block, and behind all records the pins.

Covers making it or finding it again, giving its growth memory, and writing and reading records and
pins. The layout is kvd_proto.layout's; what is written when is the core's decision, and which
directory is adopted is adoption.py's.

    |<- header, records ->|                 |<- pins ->|                                  size
    [ backed              ][ hole           ][ backed  ][ hole                                ]
                                             ^ pins_offset
"""

from typing import NamedTuple

from kvd.arena import ByteRange, Segment
from kvd.core.events import CreateArena, FoundPin, WritePin, WriteRecord
from kvd_proto import layout

_LAST_LIFE = 1 << 62
"""A life is a place in a file for the kernel's locks (arena.py), which are signed."""


class Entry(NamedTuple):
    """A record that was found in a slot, and when its block was used last."""

    slot: int
    record: layout.Record
    last_use: int


class Directory:
    """The records and the pins of one arena. Only the daemon maps it.

    They are written and read on the loop; `ensure` and `ensure_pins` may run in the copier's thread
    meanwhile. `backed` bytes from the start have memory, and `pins_backed` of the pins.
    """

    def __init__(
        self, segment: Segment, header: layout.Header, backed: int, pins_backed: int, life: int
    ) -> None:
        """Takes over `segment`. Use Directory.create() or Directory.adopt()."""
        self._block_tokens = header.block_tokens
        self._slots = header.slots
        self.segment = segment
        self.header = header
        self.life = life
        """Which daemon serves it, counted from 1."""
        self.backed = backed
        self.pins_backed = pins_backed
        self._pins_offset = layout.pins_offset(header.slots, header.block_tokens)

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
        segment = Segment.create(name, layout.directory_length(arena.slots, arena.block_tokens))
        directory = cls(segment, header, 0, 0, life=1)
        try:
            directory.ensure(arena.directory_bytes)
            layout.write_life(segment.buffer, directory.life)
            layout.write_header(segment.buffer, header)
            # As whoever looks at it will read it: with lists for tuples.
            read = layout.read_header(segment.buffer)
            assert read is not None
            directory.header = read
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
            backed = _backed_from(segment, 0)
            if backed < layout.DIRECTORY_HEADER_BYTES:
                raise ValueError("its header was never written")
            header = layout.read_header(segment.buffer)
            if header is None:
                raise ValueError("its header is torn, or of another format")
            if segment.size != layout.directory_length(header.slots, header.block_tokens):
                raise ValueError(f"it has {segment.size} bytes, which is not what its header says")
            life = layout.read_life(segment.buffer)
            if not 0 < life < _LAST_LIFE:
                raise ValueError(f"no daemon was its {life}th")
            pins = layout.pins_offset(header.slots, header.block_tokens)
            return cls(segment, header, min(backed, pins), _backed_from(segment, pins), life)
        except BaseException:
            segment.close(unlink=False)
            raise

    @property
    def backed_slots(self) -> int:
        """So many slots, from the first one, have room for their records in memory."""
        return layout.slots_recorded(self.backed, self._slots, self._block_tokens)

    def begin_life(self) -> None:
        """From now on this daemon serves it."""
        self.life += 1
        layout.write_life(self.segment.buffer, self.life)

    def ensure(self, n_bytes: int) -> None:
        """Give the first `n_bytes` memory. Raises arena.NoSpace; asking again is then right."""
        if n_bytes > self.backed:
            self.segment.back(self.backed, n_bytes - self.backed)
            self.backed = n_bytes

    def ensure_pins(self, n_bytes: int) -> None:
        """Give the first `n_bytes` of the pins memory. As `ensure`."""
        if n_bytes > self.pins_backed:
            self.segment.back(self._pins_offset + self.pins_backed, n_bytes - self.pins_backed)
            self.pins_backed = n_bytes

    def holes(self) -> list[ByteRange]:
        """What has no memory: behind the records, and behind the pins."""
        pins = self._pins_offset + self.pins_backed
        return [
            ByteRange(self.backed, self._pins_offset - self.backed),
            ByteRange(pins, self.segment.size - pins),
        ]

    def shrink(self, n_bytes: int, pins_bytes: int) -> None:
        """Give back all memory but that of the first `n_bytes`, and of the first `pins_bytes` of
        the pins, in whole pages."""
        ends = ((n_bytes, self._pins_offset), (self._pins_offset + pins_bytes, self.segment.size))
        for start, end in ends:
            if start < end:
                self.segment.punch(start, end - start)
        self.backed = min(self.backed, n_bytes)
        self.pins_backed = min(self.pins_backed, pins_bytes)

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

    def record(self, slot: int) -> layout.Record | None:
        """The whole record of a slot in the backed part, if there is one."""
        return layout.read_record(self.segment.buffer, slot, self._block_tokens)

    def last_use(self, slot: int) -> int:
        """When the block of a slot with a record was used last."""
        return layout.read_last_use(self.segment.buffer, slot, self._block_tokens)

    def is_absent(self, slot: int) -> bool:
        """Whether the slot, in the backed part, has neither a record nor a torn one."""
        return layout.is_absent(self.segment.buffer, layout.record_offset(slot, self._block_tokens))

    def write_pin(self, pin: WritePin) -> None:
        """A block is pinned. Its place lies in the backed part."""
        entry = layout.PinEntry(pin.key, pin.owner, pin.expires)
        layout.write_pin(self.segment.buffer, self._pin_offset(pin.place), entry)

    def renew_pin(self, place: int, expires: float) -> None:
        """A pin ends at another time."""
        layout.renew_pin(self.segment.buffer, self._pin_offset(place), expires)

    def drop_pin(self, place: int) -> None:
        """A pin has ended."""
        layout.drop_pin(self.segment.buffer, self._pin_offset(place))

    @property
    def pin_places(self) -> int:
        """So many places, from the first one, have memory for their pins."""
        return min(layout.MAX_PINS, self.pins_backed // layout.PIN_BYTES)

    def pin(self, place: int) -> layout.PinEntry | None:
        """The whole pin at a place in the backed part, if there is one."""
        return layout.read_pin(self.segment.buffer, self._pin_offset(place))

    def pin_is_absent(self, place: int) -> bool:
        """Whether the place has neither a pin nor a torn one."""
        return layout.is_absent(self.segment.buffer, self._pin_offset(place))

    def pins(self) -> list[FoundPin]:
        """All whole pins, read from the backed part only; torn ones are dropped."""
        found: list[FoundPin] = []
        for place in range(self.pin_places):
            pin = self.pin(place)
            if pin is not None:
                found.append(FoundPin(place, *pin))
            elif not self.pin_is_absent(place):
                self.drop_pin(place)
        return found

    def _pin_offset(self, place: int) -> int:
        return self._pins_offset + place * layout.PIN_BYTES

    def entries(self) -> list[Entry]:
        """All whole records, read from the backed part only; torn ones are dropped."""
        found: list[Entry] = []
        for slot in range(self.backed_slots):
            record = self.record(slot)
            if record is not None:
                found.append(Entry(slot, record, self.last_use(slot)))
            elif not self.is_absent(slot):
                self.drop(slot)
        return found

    def close(self, *, unlink: bool) -> None:
        self.segment.close(unlink=unlink)


def _backed_from(segment: Segment, offset: int) -> int:
    """How many bytes from `offset` on have memory. Fills nothing."""
    for start, length in segment.backed_ranges():
        if start <= offset < start + length:
            return start + length - offset
    return 0
