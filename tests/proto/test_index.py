"""The index: what was added is found, what was removed is not, and garbage harms no reader."""

import random
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd_proto import index
from kvd_proto.index import (
    INDEX_HEADER_BYTES,
    MAX_CHAIN,
    IndexReader,
    IndexWriter,
    index_length,
    prefix_of,
)
from kvd_proto.layout import DIRECTORY_CHUNK, directory_bytes_for, directory_growth

ROOT = b"r" * 16
PAGE = 4096


def empty(slots: int = 200) -> memoryview:
    """An index without keys."""
    memory = memoryview(bytearray(index_length(slots)))
    IndexWriter(memory).start(ROOT)
    return memory


def key_of(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def colliding(number: int) -> bytes:
    """Keys that are in one bucket, however many there are."""
    return (number << 40 | 5).to_bytes(8, "little") + bytes(8)


# --- writing and reading


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_it_holds_exactly_what_was_added_and_not_removed(data: st.DataObject):
    n_slots = data.draw(st.integers(1, 40))
    memory = empty(n_slots)
    writer, reader = IndexWriter(memory), IndexReader(memory)
    held: dict[int, bytes] = {}
    # Few keys, of which many share a bucket, and some slots hold the same one.
    keys = [key_of(n) for n in range(12)] + [colliding(n) for n in range(8)] + [bytes(16)]
    for _ in range(data.draw(st.integers(1, 80))):
        slot = data.draw(st.integers(0, n_slots - 1))
        if slot in held:
            writer.remove(slot)
            del held[slot]
        else:
            key = data.draw(st.sampled_from(keys))
            if writer.add(slot, key):
                held[slot] = key
            else:
                assert sum(other in keys[12:20] for other in held.values()) >= MAX_CHAIN
        found = [key for key in keys if reader.has(prefix_of(key))]
        assert found == [key for key in keys if key in held.values()]
        assert [writer.prefix(slot) for slot in range(n_slots)] == [
            prefix_of(held[slot]) if slot in held else 0 for slot in range(n_slots)
        ]


def test_many_slots_in_any_order():
    """Each slot that is used first moves a part of one chain, and no key is ever lost."""
    n_slots, order = 3000, random.Random(7)
    memory = empty(n_slots)
    writer, reader = IndexWriter(memory), IndexReader(memory)
    held: dict[int, int] = {}
    for number in range(20_000):
        slot = order.randrange(min(n_slots, 1 + number // 4))
        if slot in held:
            writer.remove(slot)
            assert not reader.has(prefix_of(key_of(held.pop(slot))))
        else:
            assert writer.add(slot, key_of(number))
            held[slot] = number
        if not number % 500:
            assert all(reader.has(prefix_of(key_of(each))) for each in held.values())
    assert len(held) > 1000
    assert all(reader.has(prefix_of(key_of(each))) for each in held.values())
    for slot in list(held):
        writer.remove(slot)
    heads = memory.cast("I")[19::4]
    assert not any(heads[: writer.n_buckets])
    assert not any(reader.has(prefix_of(key_of(number))) for number in range(20_000))


def test_a_chain_has_an_end():
    """Prompts that somebody has chosen for it cost no more than that."""
    memory = empty()
    writer, reader = IndexWriter(memory), IndexReader(memory)
    added = [writer.add(slot, colliding(slot)) for slot in range(MAX_CHAIN + 2)]
    assert added == [True] * MAX_CHAIN + [False] * 2
    assert [reader.has(prefix_of(colliding(slot))) for slot in range(MAX_CHAIN + 2)] == added
    writer.remove(MAX_CHAIN)  # which was left out
    writer.remove(0)
    assert writer.add(MAX_CHAIN, colliding(MAX_CHAIN))
    assert not reader.has(prefix_of(colliding(0)))
    assert all(reader.has(prefix_of(colliding(slot))) for slot in range(1, MAX_CHAIN + 1))


def test_a_key_that_two_slots_hold_stays_until_both_are_gone():
    memory = empty()
    writer, reader = IndexWriter(memory), IndexReader(memory)
    writer.add(3, key_of(1))
    writer.add(9, key_of(1))
    writer.remove(3)
    assert reader.has(prefix_of(key_of(1)))
    writer.remove(9)
    assert not reader.has(prefix_of(key_of(1)))


def test_what_was_never_there_is_removed_without_harm():
    memory = empty()
    writer = IndexWriter(memory)
    before = bytes(memory)
    writer.remove(0)
    writer.remove(199)
    assert bytes(memory) == before


@pytest.mark.parametrize("n_held", [0, 1, 2, 31, 32])
def test_count_finds_where_the_held_prefix_ends(n_held: int):
    memory = empty()
    writer, reader = IndexWriter(memory), IndexReader(memory)
    for slot in range(n_held):
        writer.add(slot, key_of(slot))
    assert reader.count([prefix_of(key_of(n)) for n in range(32)]) == n_held
    assert reader.count([]) == 0


def test_a_reader_learns_the_root_key_and_of_the_end():
    memory = empty()
    writer, reader = IndexWriter(memory), IndexReader(memory)
    writer.add(5, key_of(5))
    assert reader.root_key == ROOT
    assert reader.has(prefix_of(key_of(5)))
    writer.clear()
    assert not reader.has(prefix_of(key_of(5)))


# --- what a reader may meet


@settings(max_examples=300, deadline=None)
@given(st.integers(0), st.integers(0, 400), st.sampled_from([2, 20, 252, 253, 1 << 32]))
def test_garbage_harms_no_reader(seed: int, n_buckets: int, most: int):
    """Also what looks like chains: links that lead somewhere, or in a circle."""
    chance = random.Random(seed)
    memory = memoryview(bytearray(PAGE))
    items = memory.cast("I")
    for at in range(len(items)):
        items[at] = chance.randrange(most)
    memory[: len(index.MAGIC)] = index.MAGIC
    items[2] = n_buckets
    reader = IndexReader(memory)
    prefixes = [chance.randrange(1 << 64) for _ in range(40)] + [1, 2, 3]
    assert 0 <= reader.count(prefixes) <= len(prefixes)
    if not 0 < n_buckets <= (PAGE - INDEX_HEADER_BYTES) // index.ENTRY_BYTES:
        assert not any(map(reader.has, prefixes))


@settings(max_examples=300, deadline=None)
@given(st.integers(0), st.sampled_from([2, 20, 252, 1 << 32]))
def test_garbage_harms_no_writer(seed: int, most: int):
    """As some process of the daemon's user could leave it: keys are lost, and nothing else."""
    chance = random.Random(seed)
    memory = empty(252)
    writer, items = IndexWriter(memory), memory.cast("I")
    for number in range(400):
        slot = chance.randrange(min(252, number + 1))
        writer.remove(slot)
        writer.add(slot, chance.choice((key_of, colliding))(number))
        items[chance.randrange(16, len(items))] = chance.randrange(most)


def test_a_circle_of_slots_is_left():
    """As a reader may meet it while chains are moved."""
    memory = empty()
    writer, reader = IndexWriter(memory), IndexReader(memory)
    writer.add(0, colliding(0))
    writer.add(1, colliding(1))
    items = memory.cast("I")
    items[4 * 1 + 18] = 1  # slot 1 is followed by slot 0
    assert not reader.has(prefix_of(colliding(9)))


def test_another_form_of_it_holds_nothing():
    memory = empty()
    IndexWriter(memory).add(0, key_of(0))
    memory[7] = 2
    assert not IndexReader(memory).has(prefix_of(key_of(0)))


def test_a_reader_touches_only_what_is_in_use():
    """The rest has no memory, and would get some."""
    memory = empty(10_000)
    writer, reader = IndexWriter(memory), IndexReader(memory)
    for slot in range(300):
        writer.add(slot, key_of(slot))
    touched = Touched()
    reader._wide, reader._items = _View(touched, memory.cast("Q")), _View(touched, memory.cast("I"))
    for number in range(5000):
        assert reader.has(prefix_of(key_of(number))) == (number < 300)
    assert touched.end == INDEX_HEADER_BYTES + 300 * index.ENTRY_BYTES


class Touched:
    """Remembers how far a memory is read."""

    end = 0


class _View:
    def __init__(self, touched: Touched, view: memoryview) -> None:
        self._touched, self._view = touched, view

    def __getitem__(self, at: int) -> int:
        self._touched.end = max(self._touched.end, (at + 1) * self._view.itemsize)
        return self._view[at]


# --- memory


@given(st.integers(1, 20_000), st.integers(1, 1024), st.data())
def test_memory_beside_has_room_for_every_slot_that_is_used(
    slots: int, block_tokens: int, data: st.DataObject
):
    used = data.draw(st.integers(0, slots))
    directory = directory_growth(used, slots, block_tokens)
    beside = index.index_bytes_beside(directory, slots, block_tokens)
    assert index.memory_beside(used, slots, block_tokens) == directory + beside
    assert directory_bytes_for(used, block_tokens) <= directory
    assert directory <= directory_bytes_for(slots, block_tokens)
    assert INDEX_HEADER_BYTES + used * index.ENTRY_BYTES <= beside <= index_length(slots)
    assert directory % PAGE == beside % PAGE == 0
    # It grows by no more than a chunk of the directory and what belongs to that.
    assert directory < directory_bytes_for(used, block_tokens) + DIRECTORY_CHUNK
    assert beside <= index_length(used) + DIRECTORY_CHUNK // 4


def test_an_index_takes_16_bytes_a_block():
    slots = 1_000_000
    directory = directory_growth(slots, slots, 32)
    assert index.index_bytes_beside(directory, slots, 32) / slots < 16.01
