"""Views of blocks: read-only, invalid after the lease, and refused to be left dangling."""

import gc
import os
from collections.abc import Callable

import numpy as np
import pytest

import kvd_client
from kvd_client import errors
from kvd_client.arena import Arena
from tests.client.blocks import (
    BLOCK_TOKENS,
    MODEL,
    PAYLOAD_BYTES,
    eventually,
    holds,
    mappings,
    payload,
    payloads,
    store,
)
from tests.support import Daemon

PROMPT = list(range(3 * BLOCK_TOKENS))


@pytest.fixture
def sequence(context: kvd_client.Context) -> kvd_client.Sequence:
    """One that has matched three blocks."""
    store(context, PROMPT)
    return context.alloc(PROMPT)


def test_a_view_is_read_only_bytes(sequence: kvd_client.Sequence) -> None:
    view = sequence.block(1)
    assert (view.readonly, view.format, view.nbytes) == (True, "B", PAYLOAD_BYTES)
    assert bytes(view) == payload(PROMPT[:16])
    with pytest.raises(TypeError):
        view[0] = 0
    array = np.frombuffer(view, np.uint8)
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True


def test_release_makes_views_invalid(sequence: kvd_client.Sequence) -> None:
    views = [sequence.block(index) for index in (0, 1, 1)]
    sequence.release()
    for view in views:
        with pytest.raises(ValueError, match="released"):
            view[0]


@pytest.mark.parametrize(
    "derive",
    [
        lambda view: np.frombuffer(view, np.uint8),
        lambda view: np.frombuffer(view, np.float16)[4:8].reshape(2, 2),
        lambda view: view[10:20],
        lambda view: np.frombuffer(view[10:20], np.uint8),
        memoryview,
        lambda view: view.cast("H"),
        np.asarray,
    ],
    ids=["array", "array of an array", "slice", "array of a slice", "view", "cast", "asarray"],
)
def test_everything_over_a_view_is_noticed(
    sequence: kvd_client.Sequence,
    context: kvd_client.Context,
    client: kvd_client.Client,
    derive: Callable[[memoryview], object],
) -> None:
    derived = derive(sequence.block(1))
    for end in (sequence.release, context.close, client.close):
        with pytest.raises(errors.ViewsAlive):
            end()
    # Everything goes on.
    assert sequence.shared
    assert not context.closed
    assert not client.closed
    assert np.array(derived).tobytes() in payload(PROMPT[:16])
    assert holds(sequence, PROMPT)
    with context.alloc(PROMPT) as another:
        assert another.matched_tokens == len(PROMPT)
    assert client.verify()["ok"]
    del derived
    sequence.release()
    assert client.sequences() == []


def test_views_in_a_reference_cycle_do_not_count(sequence: kvd_client.Sequence) -> None:
    """As they are in the frames of an exception that was caught."""
    gc.disable()
    try:
        cycle: list[object] = [np.frombuffer(sequence.block(0), np.uint8)]
        cycle.append(cycle)
        del cycle
        sequence.release()
    finally:
        gc.enable()


def test_an_append_waits_for_nobody_who_looks_at_the_block_that_it_replaces(
    sequence: kvd_client.Sequence, context: kvd_client.Context
) -> None:
    sequence.release()
    asked = [*PROMPT[:20], 9, 9, 9, 9]
    with context.alloc(asked) as partial:
        full = np.frombuffer(partial.block(0), np.uint8)
        beyond = np.frombuffer(partial.block(2), np.uint8)
        with pytest.raises(errors.ViewsAlive):
            partial.append(asked[16:], payloads(asked, 16))
        del beyond
        partial.append(asked[16:], payloads(asked, 16))
        assert full.tobytes() == payload(asked[:8])
        del full


def test_an_error_that_release_adds_does_not_hide_the_first(context: kvd_client.Context) -> None:
    store(context, PROMPT)
    kept: list[object] = []

    def fail() -> None:
        with context.alloc(PROMPT) as sequence:
            kept[:] = [sequence, np.frombuffer(sequence.block(0), np.uint8)]
            raise ZeroDivisionError

    with pytest.raises(errors.ViewsAlive) as raised:
        fail()
    assert isinstance(raised.value.__context__, ZeroDivisionError)
    sequence = kept[0]
    kept.clear()
    assert isinstance(sequence, kvd_client.Sequence)
    sequence.release()


def test_many_views_leave_nothing_behind(sequence: kvd_client.Sequence) -> None:
    for _ in range(1000):
        sequence.block(0)
    views = sequence.views()
    assert len(views) == 0
    kept = sequence.block(0)
    assert len(views) == 1
    del kept


def test_views_outlive_the_daemon(own_daemon: Daemon) -> None:
    """The mapping is ours; the bytes stay what they were."""
    client = kvd_client.connect(own_daemon.runtime_dir, staging_bytes=1 << 20)
    context = client.open_context(MODEL)
    store(context, PROMPT)
    sequence = context.alloc(PROMPT)
    array = np.frombuffer(sequence.block(2), np.uint8)
    own_daemon.stop()
    with pytest.raises(errors.Unavailable):
        sequence.refresh()
    assert not sequence.shared
    assert array.tobytes() == payload(PROMPT)
    with pytest.raises(errors.StaleHandle):
        sequence.block(2)
    with pytest.raises(errors.ViewsAlive):
        sequence.release()
    del array
    sequence.release()
    assert mappings() == []
    client.close()


def test_leased_blocks_are_not_evicted_under_a_view(
    client: kvd_client.Client, sequence: kvd_client.Sequence
) -> None:
    array = np.frombuffer(sequence.block(2), np.uint8)
    assert client.evict().blocks == 0
    assert array.tobytes() == payload(PROMPT)
    del array


def test_reading_touches_only_what_is_leased(
    daemon: Daemon, client: kvd_client.Client, context: kvd_client.Context
) -> None:
    """A read of anything else would give the daemon's holes memory (`verify` tells)."""
    assert daemon
    for start in range(0, 400, 40):
        store(context, range(start, start + 40))
    assert client.evict("tiny", 25).blocks == 25
    for start in range(0, 400, 40):
        with context.alloc(range(start, start + 40)) as sequence:
            for index in range(sequence.n_blocks):
                sequence.read_into(index, np.empty(PAYLOAD_BYTES, np.uint8))
    assert client.verify() == {**client.verify(), "ok": True, "differences": []}


def test_a_slot_that_has_had_other_memory_reads_right(
    client: kvd_client.Client, context: kvd_client.Context
) -> None:
    """Its pages were mapped, punched, and backed again."""
    for turn in range(3):
        tokens = [turn, *PROMPT]
        store(context, tokens)
        with context.alloc(tokens) as sequence:
            assert holds(sequence, tokens)
        assert client.evict().blocks > 0
    with client.open_context(MODEL) as second:
        store(second, PROMPT)
        with second.alloc(PROMPT) as sequence:
            assert holds(sequence, PROMPT)
    eventually(lambda: client.verify()["ok"])


def test_an_arena_that_was_let_go_is_not_read_as_zeros() -> None:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, 4096)
    arena = Arena(fd, 4096, os.dup(fd))
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.read(0, 10)
