"""An arena's index: which block keys it holds at this moment, for hints without a round trip.

A segment of its own beside the arena and its directory. Only the daemon writes it, clients map it
read-only, and nothing rests on it: a read beside a write may miss a key, or find one that has just
gone. Chains of slots, in as many buckets as slots have been used:

    0    8  magic "KVDIDX\\0\\1"
    8    4  buckets: the entries from the first one on that are in use; they have memory
    16  16  the arena's root key
    64  ..  an entry for each slot

Entry i, at 64 + i * 16, in the machine's byte order:

    0    8  of slot i: the first 8 bytes of its block's key, 1 where they are 0; 0: no block
    8    4  of slot i: the slot that follows it in its chain, + 1; 0: none
    12   4  of bucket i: the first slot of its chain, + 1; 0: none

A key is in bucket `p & (2**k - 1)`, where p is the number of its first 8 bytes and 2**k the least
power of two that is not below the number of buckets; if there is no such bucket, in `p & (2**(k -
1) - 1)` (linear hashing). So the index grows by a bucket with each slot that is used first, which
moves what one chain holds, and there is never a step that moves all.

A chain has at most MAX_CHAIN slots: a key that finds it full is left out. That does not come by
chance, only by prompts that somebody has chosen for it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from struct import Struct

from kvd_proto.geometry import round_up
from kvd_proto.keys import KEY_BYTES
from kvd_proto.layout import directory_growth, slots_recorded

MAGIC = b"KVDIDX\0\1"
INDEX_HEADER_BYTES = 64
ENTRY_BYTES = 16
MAX_CHAIN = 32
_FIRST = Struct("<Q")
_ROOT_OFFSET = 16
_BUCKETS = 2
# Where an entry's fields are, as items of 8 and of 4 bytes; i is a slot or bucket.
_PREFIX = 8  # + 2 * i
_NEXT = 18  # + 4 * i
_HEAD = 19  # + 4 * i


def prefix_of(key: bytes) -> int:
    """What stands for a key in the index."""
    (prefix,) = _FIRST.unpack_from(key)
    return prefix or 1


def index_length(slots: int) -> int:
    """Bytes of the whole segment, of which most may have no memory."""
    return round_up(INDEX_HEADER_BYTES + slots * ENTRY_BYTES)


def index_bytes_beside(directory_bytes: int, slots: int, block_tokens: int) -> int:
    """Bytes of an index that have memory beside a directory of so many bytes: it has entries for
    the slots that have room for their records."""
    return index_length(slots_recorded(directory_bytes, slots, block_tokens))


def memory_beside(high_water: int, slots: int, block_tokens: int) -> int:
    """Bytes that directory and index of an arena take, pins apart, once its slots below
    `high_water` have been used."""
    directory = directory_growth(high_water, slots, block_tokens)
    return directory + index_bytes_beside(directory, slots, block_tokens)


class IndexWriter:
    """Writes an index. `index` is all of its segment; touched is what the calls name.

    It believes nothing that it reads there: whoever could write into it may lose keys, and nothing
    else.
    """

    def __init__(self, index: memoryview) -> None:
        self._bytes = index
        self._wide = index.cast("B").cast("Q")
        self._items = index.cast("B").cast("I")
        self.n_buckets = 0
        self._mask = 0

    def start(self, root_key: bytes) -> None:
        """Write the header of an index without keys. Its first page has memory, of zeros."""
        self._bytes[_ROOT_OFFSET : _ROOT_OFFSET + KEY_BYTES] = root_key
        self._bytes[: len(MAGIC)] = MAGIC

    def add(self, slot: int, key: bytes) -> bool:
        """The block of `slot`, which has none in the index, has this key. False if its chain is
        full, and it is left out. The entries up to the slot's have memory."""
        if slot >= self.n_buckets:
            self.grow(slot + 1)
        items = self._items
        prefix = prefix_of(key)
        bucket = prefix & self._mask
        if bucket >= self.n_buckets:
            bucket &= self._mask >> 1
        where = 4 * bucket + _HEAD
        if items[where]:
            end = self._end_of(where)
            if end is None:
                return False
            where = end
        items[4 * slot + _NEXT] = 0
        self._wide[2 * slot + _PREFIX] = prefix
        items[where] = slot + 1
        return True

    def remove(self, slot: int) -> None:
        """The block of `slot` is gone; nothing happens if it is not in the index."""
        if slot >= self.n_buckets:
            return
        items = self._items
        prefix = self._wide[2 * slot + _PREFIX]
        if not prefix:
            return
        self._wide[2 * slot + _PREFIX] = 0
        bucket = prefix & self._mask
        if bucket >= self.n_buckets:
            bucket &= self._mask >> 1
        where = 4 * bucket + _HEAD
        for _ in range(MAX_CHAIN):
            follower = items[where]
            if follower == slot + 1:
                items[where] = items[4 * slot + _NEXT]
                return
            if not 0 < follower <= self.n_buckets:
                return
            where = 4 * follower + _NEXT - 4

    def prefix(self, slot: int) -> int:
        """What stands for the key of the block in `slot`; 0: the index has none."""
        return self._wide[2 * slot + _PREFIX] if slot < self.n_buckets else 0

    def grow(self, n_buckets: int) -> None:
        """Have at least so many buckets; their entries have memory, of zeros."""
        for bucket in range(self.n_buckets, n_buckets):
            if bucket:
                self._split(bucket)
            self._mask = (1 << bucket.bit_length()) - 1
            self.n_buckets = self._items[_BUCKETS] = bucket + 1

    def clear(self) -> None:
        """Have no keys any more, for whoever still reads it. Nothing may be added after that."""
        if self.n_buckets:
            self.n_buckets = self._items[_BUCKETS] = 0

    def release(self) -> None:
        """Let go of the memory."""
        self._wide.release()
        self._items.release()

    def _end_of(self, head: int) -> int | None:
        """Where to write what follows the last slot of a chain; None if it is full."""
        where = head
        for _ in range(MAX_CHAIN):
            follower = self._items[where]
            if not follower:
                return where
            if follower > self.n_buckets:
                return None
            where = 4 * follower + _NEXT - 4
        return None

    def _split(self, new: int) -> None:
        """Move to bucket `new` what belongs there, from the one where that has been."""
        wide, items = self._wide, self._items
        mask = (1 << new.bit_length()) - 1
        stays = 4 * (new & mask >> 1) + _HEAD
        moves = 4 * new + _HEAD
        follower = items[stays]
        for _ in range(MAX_CHAIN):
            if not 0 < follower <= new:
                return
            after = 4 * follower + _NEXT - 4
            following = items[after]
            if wide[2 * follower + _PREFIX - 2] & mask == new:
                items[moves] = follower
                items[stays] = following
                items[after] = 0
                moves = after
            else:
                stays = after
            follower = following


class IndexReader:
    """Reads an index that the daemon writes meanwhile. `index` is a mapping of all of its segment,
    of which only the entries that are in use are touched: the others have no memory, and would get
    some. Whatever is there, a call ends soon and does not fail."""

    def __init__(self, index: memoryview) -> None:
        self._bytes = index
        self._wide = index.cast("B").cast("Q")
        self._items = index.cast("B").cast("I")
        self._room = (index.nbytes - INDEX_HEADER_BYTES) // ENTRY_BYTES
        if self._bytes[: len(MAGIC)] != MAGIC:
            self._room = 0  # another form of it: nothing is held

    @property
    def root_key(self) -> bytes:
        """The parent of all first blocks of this arena."""
        return bytes(self._bytes[_ROOT_OFFSET : _ROOT_OFFSET + KEY_BYTES])

    def has(self, prefix: int) -> bool:
        """Whether a key that begins so is held."""
        items = self._items
        n = items[_BUCKETS]
        if not 0 < n <= self._room:
            return False
        mask = (1 << (n - 1).bit_length()) - 1
        bucket = prefix & mask
        follower = items[4 * (bucket if bucket < n else bucket & mask >> 1) + _HEAD]
        for _ in range(MAX_CHAIN):
            if not 0 < follower <= n:
                return False
            if self._wide[2 * follower + _PREFIX - 2] == prefix:
                return True
            follower = items[4 * follower + _NEXT - 4]
        return False

    def count(self, prefixes: Sequence[int]) -> int:
        """How many blocks of a chain are held, from the first one on, whose keys begin so. They are
        not all looked at: where a block is held, those before it are."""
        return bisect_left(prefixes, True, key=lambda prefix: not self.has(prefix))
