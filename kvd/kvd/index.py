"""An arena's index: a segment of its own, from which clients read which blocks are cached.

Covers making it, giving its growth memory, writing it, and descriptors for clients. The layout is
kvd_proto.index's. It lives no longer than the daemon: the next one makes it anew from the
directory. Nothing of the daemon rests on it.

    |<- header, entries of slots ->|                          size
    [ backed                       ][ hole                    ]
"""

from contextlib import suppress

from kvd.arena import ByteRange, Segment, remove_segment
from kvd.core.events import CreateArena
from kvd_proto.geometry import PAGE_BYTES
from kvd_proto.index import (
    ENTRY_BYTES,
    INDEX_HEADER_BYTES,
    IndexWriter,
    index_bytes_beside,
    index_length,
)


class Index:
    """Which keys one arena holds. Written on the loop; `ensure` may run in the copier's thread
    meanwhile. `backed` bytes from the start have memory, the first page always."""

    def __init__(self, segment: Segment, slots: int, block_tokens: int) -> None:
        """Takes over `segment`. Use Index.create()."""
        self.segment = segment
        self._slots = slots
        self._block_tokens = block_tokens
        self.backed = PAGE_BYTES
        self._writer = IndexWriter(segment.buffer)

    @classmethod
    def create(cls, name: str, arena: CreateArena) -> "Index":
        """Create the segment, without keys. Raises arena.NoSpace or OSError, leaving nothing."""
        segment = Segment.create(name, index_length(arena.slots))
        try:
            segment.back(0, PAGE_BYTES)
            return cls(segment, arena.slots, arena.block_tokens)
        except BaseException:
            segment.close(unlink=True)
            raise

    def start(self, root_key: bytes) -> None:
        """Tell clients the arena's root key."""
        self._writer.start(root_key)

    def bytes_beside(self, directory_bytes: int) -> int:
        """What of it has memory beside a directory of so many bytes."""
        return index_bytes_beside(directory_bytes, self._slots, self._block_tokens)

    def ensure(self, n_bytes: int) -> None:
        """Give the first `n_bytes` memory. Raises arena.NoSpace; asking again is then right."""
        if n_bytes > self.backed:
            self.segment.back(self.backed, n_bytes - self.backed)
            self.backed = n_bytes

    def add(self, slot: int, key: bytes) -> None:
        """A block is sealed. If there was no memory for the slot's entry, it is left out."""
        if slot < self._room:
            self._writer.add(slot, key)

    def drop(self, slot: int) -> None:
        """A block is gone."""
        self._writer.remove(slot)

    def prefix(self, slot: int) -> int:
        """What it says of a slot; 0: nothing."""
        return self._writer.prefix(slot)

    def holes(self) -> list[ByteRange]:
        """What has no memory: behind the entries."""
        return [ByteRange(self.backed, self.segment.size - self.backed)]

    def open_reader(self) -> int:
        """A read-only descriptor for one client; the caller closes it."""
        return self.segment.open_read_only()

    def unlink(self) -> None:
        """Remove the name. Clients that have it mapped find no keys any more."""
        self._writer.clear()
        self.segment.unlink()

    def close(self) -> None:
        """Let go, and remove the name, as in `unlink`."""
        self._writer.clear()
        self._writer.release()
        self.segment.close(unlink=True)

    @property
    def _room(self) -> int:
        return (self.backed - INDEX_HEADER_BYTES) // ENTRY_BYTES


def remove_left(name: str) -> None:
    """Remove the index of a daemon before this one, if there is one, and take its memory from
    whoever has it mapped still."""
    with suppress(OSError):  # there is none, or it is a file of another kind
        segment = Segment.adopt(name)
        try:
            segment.punch(0, segment.size)
        finally:
            segment.close(unlink=False)
    remove_segment(name)
