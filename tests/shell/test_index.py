"""The daemon's side of an index: its memory. What is in it: tests/proto/test_index.py."""

import os
from collections.abc import Iterator

import pytest

from kvd.arena import Segment
from kvd.core.events import CreateArena
from kvd.index import Index, remove_left
from kvd_proto.index import prefix_of
from kvd_proto.layout import directory_growth

NAME = f"kvdtest-index-{os.getpid()}"
SLOTS = 1000
ARENA = CreateArena(1, "t", "m", bytes(32), "array", 32, (), 4096, 4096, SLOTS, 0, b"r" * 16)
KEY = b"k" * 16


@pytest.fixture
def index() -> Iterator[Index]:
    made = Index.create(NAME, ARENA)
    made.start(ARENA.root_key)
    yield made
    made.close()
    assert not os.path.exists(f"/dev/shm/{NAME}")


def test_it_has_one_page_at_first_and_grows_beside_the_directory(index: Index):
    assert index.backed == index.segment.backed_bytes() == 4096
    for high_water in (1, 300, 600, SLOTS):
        index.ensure(index.bytes_beside(directory_growth(high_water, SLOTS, 32)))
        assert index.backed == index.segment.backed_bytes()
        index.add(high_water - 1, KEY)
        assert index.prefix(high_water - 1) == prefix_of(KEY)
        assert index.backed == index.segment.backed_bytes(), "it is the memory that it was given"
    (hole,) = index.holes()
    assert hole.offset == index.backed
    assert hole.offset + hole.length == index.segment.size


def test_a_block_is_left_out_if_there_is_no_memory_for_it(index: Index):
    index.add(600, KEY)
    index.drop(600)
    assert index.prefix(600) == 0
    assert index.segment.backed_bytes() == 4096
    index.ensure(index.bytes_beside(directory_growth(601, SLOTS, 32)))
    index.add(600, KEY)
    assert index.prefix(600) == prefix_of(KEY)


def test_what_is_left_of_one_is_removed_and_its_memory_taken():
    left = Segment.create(NAME, 8192)
    left.back(0, 8192)
    remove_left(NAME)
    assert left.backed_bytes() == 0
    assert not os.path.exists(f"/dev/shm/{NAME}")
    left.close(unlink=False)
    remove_left(NAME)  # there is none


def test_a_file_of_another_mode_in_its_place_is_removed():
    path = f"/dev/shm/{NAME}"
    with open(path, "wb") as file:
        os.fchmod(file.fileno(), 0o644)
    remove_left(NAME)
    assert not os.path.exists(path)
