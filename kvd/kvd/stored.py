"""An arena's three segments: slots, directory and index, which come, grow and go together.

What happens in them: store.py. What each is: arena.py, directory.py, index.py.
"""

from dataclasses import dataclass, field

from kvd import copier
from kvd.arena import ByteRange, Segment
from kvd.copier import Steps
from kvd.core.events import CreateArena, FoundRecord
from kvd.directory import Directory
from kvd.index import Index
from kvd_proto.payload import PayloadFormat


@dataclass(slots=True)
class StoredArena:
    """An arena's three segments, and how its payloads are checked."""

    arena: CreateArena
    segment: Segment
    directory: Directory
    index: Index
    format: PayloadFormat
    has_former_readers: bool = False
    """Whether clients of an earlier daemon may still read it."""
    growing: dict[int, int] = field(default_factory=dict)
    """By job: how long the directory will be when it has ended."""
    growing_pins: dict[int, int] = field(default_factory=dict)
    """By job: how many bytes of pins it will have."""
    found: list[FoundRecord] = field(default_factory=list)
    """What an earlier daemon left, until the core has said what it takes."""

    @property
    def directory_bytes(self) -> int:
        """What the directory has in memory, pins and index included, when all jobs have ended
        well."""
        return (
            max([self.directory.backed, *self.growing.values()])
            + max([self.directory.pins_backed, *self.growing_pins.values()])
            + max([self.index.backed, *map(self.index.bytes_beside, self.growing.values())])
        )

    def growth_to(self, directory_bytes: int) -> int:
        """Bytes that `ensure` takes."""
        index = self.index.bytes_beside(directory_bytes)
        return max(0, directory_bytes - self.directory.backed) + max(0, index - self.index.backed)

    def ensure(self, directory_bytes: int) -> None:
        """Give the first bytes of the directory memory, and what belongs to them of the index.
        Raises arena.NoSpace; asking again is then right."""
        self.directory.ensure(directory_bytes)
        self.index.ensure(self.index.bytes_beside(directory_bytes))

    def open_reader(self) -> int:
        """A read-only descriptor for one client of this daemon; the caller closes it."""
        return self.segment.open_reader(self.directory.life)

    def unlink(self) -> None:
        """Remove all names; all goes on as before for who has it open. The arena's first: what is
        without its arena is removed by the next daemon."""
        self.segment.unlink()
        self.directory.segment.unlink()
        self.index.unlink()

    def close(self, *, unlink: bool) -> None:
        """Let go of all, and with `unlink` remove the names; that of the index always."""
        # The arena first, as in `unlink`.
        self.segment.close(unlink=unlink)
        self.directory.close(unlink=unlink)
        self.index.close()

    def removing(self) -> Steps:
        """Give the memory of what has no names any more back, and let go of it."""
        # A client that has gone from here may have them mapped still, and would keep the memory.
        for segment in (self.index.segment, self.segment):
            found = segment.next_backed(0)
            while found is not None:
                part = ByteRange(found, min(copier.PUNCH_STEP_BYTES, segment.size - found))
                yield from copier.punching(segment, [part])
                yield 0
                found = segment.next_backed(found)
        self.close(unlink=False)
        return None
