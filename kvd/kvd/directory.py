"""An arena's directory: a segment of its own beside the arena, with one record for each sealed
block.

Covers making it, giving its growth memory, and writing and reading records. The layout is
kvd_proto.layout's; which record is written when is the core's decision.
"""

from kvd.arena import Segment
from kvd.core.budget import directory_bytes_for
from kvd.core.events import CreateArena, WriteRecord
from kvd_proto import layout


class Directory:
    """The records of one arena. Only the daemon maps it.

    Records are written and read on the loop; `ensure` may run in the copier's thread meanwhile.
    `backed` bytes from the start have memory.
    """

    def __init__(self, name: str, arena: CreateArena) -> None:
        """Create the segment and its header. Raises arena.NoSpace or OSError, leaving nothing."""
        self._block_tokens = arena.block_tokens
        self._slots = arena.slots
        self.segment = Segment.create(name, directory_bytes_for(arena.slots, arena.block_tokens))
        self.backed = 0
        try:
            self.ensure(arena.directory_bytes)
            registration = {
                "tenant": arena.tenant,
                "name": arena.name,
                "fingerprint": arena.fingerprint,
                "format": arena.payload_format,
                "layers": arena.layers,
            }
            header = layout.Header(
                arena.block_tokens, arena.slots, arena.stride_bytes, registration
            )
            layout.write_header(self.segment.buffer, header)
        except BaseException:
            self.close(unlink=True)
            raise

    def ensure(self, n_bytes: int) -> None:
        """Give the first `n_bytes` memory. Raises arena.NoSpace; asking again is then right."""
        if n_bytes > self.backed:
            self.segment.back(self.backed, n_bytes - self.backed)
            self.backed = n_bytes

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
        layout.write_record(self.segment.buffer, record.slot, self._block_tokens, entry)

    def drop(self, slot: int) -> None:
        """A block is gone."""
        layout.drop_record(self.segment.buffer, slot, self._block_tokens)

    def records(self) -> dict[int, layout.Record]:
        """All whole records by slot, read from the backed part only."""
        found: dict[int, layout.Record] = {}
        size = layout.record_bytes(self._block_tokens)
        backed_slots = max(0, self.backed - layout.DIRECTORY_HEADER_BYTES) // size
        for slot in range(min(self._slots, backed_slots)):
            record = layout.read_record(self.segment.buffer, slot, self._block_tokens)
            if record is not None:
                found[slot] = record
        return found

    def close(self, *, unlink: bool) -> None:
        self.segment.close(unlink=unlink)
