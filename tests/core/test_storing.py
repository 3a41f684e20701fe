"""Appending: what is stored, present or joined; who fills a block; what fails, and who is told.

Sequences without appends: test_sequences.py.
"""

from struct import pack
from typing import Any

import pytest

from kvd.core.events import (
    Back,
    CloseStaging,
    Completed,
    Copied,
    Copy,
    CopyItem,
    CopyResult,
    DropRecord,
    Punch,
    Reply,
    UseRecord,
    WriteRecord,
)
from kvd.core.storing import COPY_BLOCKS
from kvd_proto.errors import (
    AllLeased,
    BadMessage,
    BadPayload,
    BadPosition,
    BadStaging,
    BudgetTooSmall,
    NoSpace,
    ReservationExceeded,
)
from kvd_proto.keys import arena_fingerprint, block_key, root_key
from kvd_proto.messages import (
    COMPLETED,
    MAX_FAILURES,
    MAX_TOKENS,
    Append,
    Appended,
    Flush,
    Flushed,
    Get,
    Release,
)
from tests.core.driver import (
    PAGE,
    SMALL_DIRECTORY,
    STAGING,
    Driver,
    Handle,
    alloc,
    append,
    no_space,
    packed,
    path_of,
    slots_of,
)


@pytest.fixture
def driver() -> Driver:
    return joined_by(Driver(), "a")


def joined_by(driver: Driver, *names: str) -> Driver:
    """Sessions with a context each, numbered from 1, of one model."""
    for name in names:
        driver.connect(name)
        driver.register(name.encode())
        driver.context(name.encode())
    return driver


@pytest.fixture
def three(driver: Driver) -> tuple[Driver, Handle, Handle, Handle]:
    """A sequence for each of the sessions a, b, c. All slots that they will need have memory."""
    joined_by(driver, "b", "c")
    handles = [driver.alloc(each, number) for number, each in enumerate((b"a", b"b", b"c"), 1)]
    backed(driver, 8)
    return (driver, *handles)


def backed(driver: Driver, n_slots: int) -> None:
    """Free slots 0 .. n_slots-1, of which the highest comes first."""
    driver.ask(b"a", alloc(1, reserve=2 * n_slots))
    driver.work()
    reply = driver.replies[driver.asked]
    driver.ask(b"a", Release(1, reply.seq_id, reply.generation, COMPLETED))
    assert driver.counts() == {"free": n_slots}


def release(handle: Handle) -> Release:
    return Release(*handle.fields, COMPLETED)


def tokens_of(driver: Driver, handle: Handle) -> int:
    sequence = driver.cache.contexts[handle.context].open[handle.seq_id]
    return sequence.length


# --- stored, present, joined


def test_a_new_block_goes_all_the_way(driver: Driver) -> None:
    handle = driver.alloc(b"a", 1)
    message = append(handle, 0, 1, 2, 3, staged=[PAGE, 3 * PAGE])
    assert driver.ask(b"a", message) is None
    assert driver.effects == [Back(1, 1, b"a", [0, 1], driver.cache.budget.arenas[1].records_bytes)]
    driver.back()
    assert driver.effects == [
        Reply(b"a", driver.asked, Appended(1, 2, 0, 0)),
        Copy(
            2,
            1,
            b"a",
            [CopyItem(0, PAGE, PAGE, 0, 2), CopyItem(1, 3 * PAGE, PAGE, 2, 1)],
        ),
    ]
    driver.handle(Copied(2, [CopyResult(77, None), CopyResult(88, None)]))
    root = root_key(arena_fingerprint(b"m".ljust(32), "array", 2))
    first = block_key(root, packed(1, 2))
    second = block_key(first, packed(3))
    assert driver.effects == [
        WriteRecord(1, 0, first, root, 0, packed(1, 2), 1, 77),
        WriteRecord(1, 1, second, first, 2, packed(3), 2, 88),
        Completed(b"a", 1),
    ]
    assert driver.counts() == {"active": 2}
    counters = driver.counters
    assert (counters.stored_blocks, counters.stored_bytes) == (2, 2 * PAGE)


def test_what_is_there_is_not_stored_again(three: Any) -> None:
    driver, a, b, _ = three
    driver.store(a, 0, 1, 2, 3, 4)
    assert driver.append(b, 0, 1, 2, 3, 4) == Appended(1, 0, 2, 0)
    # Nothing to wait for: the commit is finished with its reply.
    assert driver.effects[1:] == [Completed(b"b", 1)]
    assert driver.append(b, 4, 5, 6) == Appended(2, 1, 0, 0)
    assert driver.counters.present_blocks == 2
    assert slots_of(driver.ask(b"b", Get(*b.fields, 0)).slots) == [7, 6]


def test_present_blocks_first_and_then_new_ones(three: Any) -> None:
    driver, a, b, _ = three
    driver.store(a, 0, 1, 2)
    assert driver.append(b, 0, 1, 2, 3, 4, 5, 6) == Appended(1, 2, 1, 0)


def test_two_that_store_the_same_at_once_store_it_once(three: Any) -> None:
    driver, a, b, _ = three
    assert driver.append(a, 0, 1, 2, 3, 4) == Appended(1, 2, 0, 0)
    assert driver.append(b, 0, 1, 2, 3, 4) == Appended(1, 0, 0, 2)
    assert driver.effects[1:] == []
    driver.copy()
    assert driver.of_kind(Completed) == [Completed(b"a", 1), Completed(b"b", 1)]
    assert driver.blocks() == {(1, 2): 7, (1, 2, 3, 4): 6}
    assert driver.counts() == {"active": 2, "free": 6}
    assert driver.counters.joined_blocks == 2


def test_two_sequences_of_one_session_that_store_the_same(three: Any) -> None:
    driver, a, _, _ = three
    other = driver.alloc(b"a", 1)
    driver.append(a, 0, 1, 2)
    assert driver.append(other, 0, 1, 2, 3) == Appended(2, 1, 0, 1)
    driver.copy()
    assert driver.of_kind(Completed) == [Completed(b"a", 1)]
    driver.copy()
    assert driver.of_kind(Completed) == [Completed(b"a", 2)]
    assert driver.flush(b"a", 2) == Flushed(2, [])


def test_the_same_tail_appended_twice_by_one_sequence(three: Any) -> None:
    driver, a, _, _ = three
    driver.append(a, 0, 1)
    assert driver.append(a, 0, 1) == Appended(2, 0, 0, 1)
    driver.copy()
    assert driver.blocks() == {(1,): 7}
    assert driver.flush(b"a", 2) == Flushed(2, [])


def test_models_and_tenants_share_nothing(driver: Driver) -> None:
    driver.store(driver.alloc(b"a", 1), 0, 1, 2)
    driver.connect("stranger", tenant="other")
    assert driver.register(b"stranger") == 2
    assert driver.alloc(b"stranger", driver.context(b"stranger", 2), 1, 2).matched == 0
    assert driver.register(b"a", "another model") == 3
    assert driver.alloc(b"a", driver.context(b"a", 3), 1, 2).matched == 0


# --- open tails


def test_a_longer_tail_replaces_the_shorter_one(three: Any) -> None:
    driver, a, _, _ = three
    driver.store(a, 0, 1)
    assert driver.append(a, 0, 1, 2) == Appended(2, 1, 0, 0)
    assert driver.blocks() == {(1,): 7}
    driver.copy()
    assert driver.effects[1:] == [DropRecord(1, 7), Completed(b"a", 2)]
    assert driver.blocks() == {(1, 2): 6}
    assert driver.evicted() == {"superseded": 1}


def test_a_shorter_tail_that_is_leased_goes_when_it_is_let_go(three: Any) -> None:
    driver, a, _, _ = three
    driver.store(a, 0, 1)
    reader = driver.alloc(b"b", 2, 1, 3)
    assert (reader.matched, reader.slots) == (1, [7])
    driver.store(a, 0, 1, 2)
    assert driver.blocks() == {(1,): 7, (1, 2): 6}
    driver.ask(b"b", release(reader))
    assert driver.of_kind(DropRecord) == [DropRecord(1, 7)]
    assert driver.evicted() == {"superseded": 1}
    assert driver.blocks() == {(1, 2): 6}


def test_a_shorter_tail_that_is_sealed_later_is_not_kept(three: Any) -> None:
    """The longer one overtakes it because the first copy of the shorter one is bad."""
    driver, a, b, c = three
    driver.append(a, 0, 1)
    driver.append(b, 0, 1)
    driver.append(c, 0, 1, 2)
    driver.copy(0)
    driver.copy()
    assert driver.blocks() == {(1, 2): 6}
    driver.copy()
    assert driver.blocks() == {(1,): 7, (1, 2): 6}
    # Both lease it; the last one to let go drops it.
    driver.ask(b"a", release(a))
    driver.ask(b"b", release(b))
    assert driver.of_kind(DropRecord) == [DropRecord(1, 7)]
    assert driver.evicted() == {"superseded": 1}
    assert driver.blocks() == {(1, 2): 6}


def test_a_tail_that_a_longer_block_has_already_is_present(three: Any) -> None:
    driver, a, b, _ = three
    driver.store(a, 0, 1, 2)
    assert driver.append(b, 0, 1) == Appended(1, 0, 1, 0)
    blocks = driver.ask(b"b", Get(*b.fields, 0))
    assert (blocks.sealed_tokens, blocks.last_block_tokens) == (1, 2)
    # It goes on from the tail's start.
    assert driver.append(b, 0, 1, 3) == Appended(2, 1, 0, 0)


def test_append_moves_the_lease_off_a_block_that_matched_in_part(three: Any) -> None:
    driver, a, _, _ = three
    driver.store(a, 0, 1, 2)
    driver.ask(b"a", release(a))
    reader = driver.alloc(b"b", 2, 1, 3)
    assert driver.counts() == {"active": 1, "free": 7}
    driver.store(reader, 0, 1, 3)
    assert driver.counts() == {"active": 1, "cached": 1, "free": 6}
    assert list(map(path_of, list(driver.cache.budget.oldest_first()))) == [(1, 2)]


def test_a_tail_that_is_leased_elsewhere_can_be_appended_and_let_go(three: Any) -> None:
    """Present by its very tokens, and replaced by a longer one already."""
    driver, a, b, c = three
    driver.store(a, 0, 1)
    driver.store(b, 0, 1, 2)
    assert driver.blocks() == {(1,): 7, (1, 2): 6}
    assert driver.append(c, 0, 1) == Appended(1, 0, 1, 0)
    driver.ask(b"a", release(a))
    assert driver.blocks() == {(1,): 7, (1, 2): 6}
    driver.ask(b"c", release(c))
    assert driver.blocks() == {(1, 2): 6}


# --- takeover


def test_the_next_takes_over_when_the_first_copy_is_bad(three: Any) -> None:
    driver, a, b, c = three
    for handle, place in ((a, 1), (b, 2), (c, 3)):
        driver.ask(handle.session, append(handle, 0, 1, 2, staged=[place * PAGE]))
    driver.copy(0)
    assert driver.effects == [
        Copy(driver.jobs[0].job, 1, b"b", [CopyItem(7, 2 * PAGE, PAGE, 0, 2)]),
        Completed(b"a", 1),
    ]
    driver.copy(0)
    assert driver.of_kind(Copy) == [
        Copy(driver.jobs[0].job, 1, b"c", [CopyItem(7, 3 * PAGE, PAGE, 0, 2)])
    ]
    driver.copy()
    assert driver.blocks() == {(1, 2): 7}
    # Those whose payload was bad are told, and have the block nevertheless.
    assert driver.flush(b"a", 1) == Flushed(1, [[1, "bad_payload", "spoilt"]])
    assert driver.flush(b"b", 1) == Flushed(1, [[1, "bad_payload", "spoilt"]])
    assert driver.flush(b"c", 1) == Flushed(1, [])
    assert driver.ask(b"a", Get(*a.fields, 0)).sealed_tokens == 2


def test_a_child_can_be_sealed_before_its_parent_and_is_not_seen_before(three: Any) -> None:
    driver, a, b, _ = three
    driver.append(a, 0, 1, 2)
    driver.append(b, 0, 1, 2, 3, 4)
    driver.copy(0)
    driver.copy()
    assert driver.blocks() == {(1, 2, 3, 4): 6}
    assert driver.alloc(b"c", 3, 1, 2, 3, 4).matched == 0
    assert driver.ask(b"b", Get(*b.fields, 0)).sealed_tokens == 0
    driver.ask(b"b", release(b))
    assert driver.counts() == {"cached": 1, "filling": 1, "free": 6}
    driver.copy()
    assert driver.alloc(b"c", 3, 1, 2, 3, 4).matched == 4


def test_all_below_goes_when_the_last_copy_is_bad(three: Any) -> None:
    driver, a, b, c = three
    driver.append(a, 0, 1, 2)
    driver.append(b, 0, 1, 2, 3, 4, 5)
    driver.append(c, 0, 9, 9)
    driver.copy(0)  # a's
    driver.copy()  # b's (3, 4) and (5)
    driver.copy()  # c's
    assert driver.blocks() == {(1, 2, 3, 4): 6, (1, 2, 3, 4, 5): 5, (9, 9): 4}
    driver.copy(0)  # b's (1, 2), which had taken over
    assert [effect.slot for effect in driver.of_kind(DropRecord)] == [5, 6]
    assert driver.evicted() == {"orphaned": 2}
    assert driver.blocks() == {(9, 9): 4}
    assert driver.counts() == {"active": 1, "free": 7}
    assert (tokens_of(driver, a), tokens_of(driver, b), tokens_of(driver, c)) == (0, 0, 2)
    assert driver.flush(b"a", 1).failures == [[1, "bad_payload", "spoilt"]]
    assert driver.flush(b"b", 1).failures == [[1, "bad_payload", "spoilt"]]
    # They may try again.
    driver.store(b, 0, 1, 2)
    assert driver.blocks() == {(9, 9): 4, (1, 2): 7}


def test_a_bad_block_in_the_middle_takes_what_is_below_and_not_what_is_above(three: Any) -> None:
    driver, a, _, _ = three
    driver.append(a, 0, 1, 2, 3, 4, 5, 6)
    driver.copy(1)
    assert driver.blocks() == {(1, 2): 7}
    assert driver.counts() == {"active": 1, "free": 7}
    assert tokens_of(driver, a) == 2
    assert driver.refusal(b"a", append(a, 6, 7)) is BadPosition
    assert driver.append(a, 2, 3) == Appended(2, 1, 0, 0)


def test_a_slot_is_not_free_while_a_copy_into_it_is_under_way(three: Any) -> None:
    driver, a, b, _ = three
    driver.append(a, 0, 1, 2)
    driver.append(b, 0, 1, 2, 3, 4)
    # Both copies of (1, 2) are bad, and the one of (3, 4) has not ended.
    first, second = driver.jobs
    bad = [CopyResult(0, BadPayload("spoilt"))]
    driver.handle(Copied(first.job, bad))
    takeover = driver.jobs.pop()
    driver.handle(Copied(takeover.job, bad))
    assert driver.counts() == {"filling": 1, "free": 7}
    driver.jobs = [second]
    driver.copy()
    assert driver.counts() == {"free": 8}
    assert driver.of_kind(WriteRecord) == []


def test_a_very_deep_chain_fails_as_a_whole() -> None:
    """A failure that went down by recursion would end here."""
    driver = joined_by(Driver(1 << 24), "a")
    handle = driver.alloc(b"a", 1)
    n_blocks = 2500
    staged = append(handle, 0, *range(2 * n_blocks))
    driver.ask(b"a", staged)
    driver.back()
    assert len(driver.jobs) == -(-n_blocks // COPY_BLOCKS)
    driver.copy(0)
    driver.work()
    assert driver.counts() == {"free": n_blocks}
    driver.ask(b"a", staged)
    driver.disconnect(b"a")
    driver.work()
    driver.settle()
    assert driver.counts() == {"cached": n_blocks}


# --- no memory


def test_no_memory_is_answered_and_nothing_is_lost(driver: Driver) -> None:
    handle = driver.alloc(b"a", 1)
    driver.store(handle, 0, 1, 2, 3)
    driver.append(handle, 2, 3, 4, 5, 6)
    appending = driver.asked
    assert tokens_of(driver, handle) == 6
    driver.back(no_space())
    assert isinstance(driver.replies[appending], NoSpace)
    # It has the number 2, which nobody waits for.
    assert driver.of_kind(Completed) == [Completed(b"a", 2)]
    assert driver.flush(b"a", 2) == Flushed(2, [])
    assert tokens_of(driver, handle) == 2
    assert driver.blocks() == {(1, 2): 0, (1, 2, 3): 1}
    assert driver.counts() == {"active": 1, "cached": 1}
    assert sorted(driver.cache.budget.arenas[1].punched) == [2, 3]
    # The same again, from the same place, when there is memory.
    driver.store(handle, 2, 3, 4, 5, 6)
    assert driver.alloc(b"a", 1, 1, 2, 3, 4, 5, 6).matched == 6


def test_no_memory_for_one_of_several_blocks(driver: Driver) -> None:
    """Slots that had memory already are free again, and those without it are not."""
    backed(driver, 1)
    handle = driver.alloc(b"a", 1)
    driver.append(handle, 0, 1, 2, 3, 4)
    assert driver.of_kind(Back)[0].slots == [1]
    driver.back(no_space())
    assert driver.counts() == {"free": 1}
    assert driver.cache.budget.arenas[1].punched == [1]


def test_what_was_appended_on_top_of_a_refused_append_is_void(driver: Driver) -> None:
    """A client need not wait for replies: the second append leaves before the first is refused."""
    handle = driver.alloc(b"a", 1)
    driver.append(handle, 0, 1, 2)
    first = driver.asked
    driver.append(handle, 2, 3, 4)
    second = driver.asked
    driver.back(no_space())
    assert isinstance(driver.replies[first], NoSpace)
    assert tokens_of(driver, handle) == 0
    driver.back()
    assert driver.replies[second] == Appended(2, 1, 0, 0)
    assert driver.flush(b"a", 2) == Flushed(2, [[2, "no_space", "no memory"]])
    assert driver.counts() == {"free": 1}


def test_a_refused_append_goes_back_even_beyond_blocks_that_stay(three: Any) -> None:
    """Its own start is where the client will try again."""
    driver, a, b, _ = three
    driver.store(a, 0, 1, 2)
    driver.append(b, 0, 1, 2, *range(10, 30))
    driver.back(no_space())
    assert tokens_of(driver, b) == 0
    assert driver.append(b, 0, 1, 2) == Appended(2, 0, 1, 0)


def test_a_refused_append_leaves_later_ones_that_do_not_rest_on_it(driver: Driver) -> None:
    handle = driver.alloc(b"a", 1)
    driver.append(handle, 0, 1)
    driver.append(handle, 0, 2, 2)
    driver.back(no_space())
    assert tokens_of(driver, handle) == 2
    driver.work()
    assert driver.blocks() == {(2, 2): 1}


def test_no_staging_is_read_before_its_append_is_answered(driver: Driver) -> None:
    """The second has joined, and takes over, while its own slots are being backed."""
    joined_by(driver, "b")
    backed(driver, 1)
    a, b = driver.alloc(b"a", 1), driver.alloc(b"b", 2)
    driver.append(a, 0, 1, 2)
    assert driver.append(b, 0, 1, 2, 3, 4) is None
    appending = driver.asked
    driver.copy(0)
    assert driver.of_kind(Copy) == []
    driver.back()
    assert driver.replies[appending] == Appended(1, 1, 0, 1)
    assert driver.of_kind(Copy)[0].items == [
        CopyItem(0, PAGE, PAGE, 0, 2),
        CopyItem(1, PAGE, PAGE, 2, 2),
    ]
    driver.copy()
    assert driver.blocks() == {(1, 2): 0, (1, 2, 3, 4): 1}


def test_what_a_refused_append_had_joined_is_not_copied_from_it(driver: Driver) -> None:
    """Its staging is the client's again, who may write something else there."""
    joined_by(driver, "b")
    backed(driver, 1)
    a, b = driver.alloc(b"a", 1), driver.alloc(b"b", 2)
    driver.append(a, 0, 1, 2)
    driver.append(b, 0, 1, 2, 3, 4)
    copying, backing = driver.jobs
    driver.jobs = [backing, copying]
    driver.back(no_space())
    driver.copy(0)
    assert driver.of_kind(Copy) == []
    assert (driver.blocks(), driver.counts()) == ({}, {"free": 1})


def test_a_refused_append_that_was_to_take_over_lets_the_next_one(driver: Driver) -> None:
    joined_by(driver, "b", "c")
    backed(driver, 1)
    a, b, c = (driver.alloc(each, number) for number, each in enumerate((b"a", b"b", b"c"), 1))
    driver.append(a, 0, 1, 2)
    driver.append(b, 0, 1, 2, 3, 4)
    driver.append(c, 0, 1, 2)
    driver.copy(0)
    assert driver.of_kind(Copy) == []
    driver.back(no_space())
    assert [job.session for job in driver.of_kind(Copy)] == [b"c"]
    driver.copy()
    assert driver.blocks() == {(1, 2): 0}
    assert (tokens_of(driver, a), tokens_of(driver, b), tokens_of(driver, c)) == (2, 0, 2)


def test_others_who_joined_a_refused_append_fill_what_has_memory(driver: Driver) -> None:
    joined_by(driver, "b")
    backed(driver, 1)
    a, b = driver.alloc(b"a", 1), driver.alloc(b"b", 2)
    driver.append(a, 0, 1, 2, 3, 4)
    assert driver.append(b, 0, 1, 2, 3, 4) == Appended(1, 0, 0, 2)
    driver.back(no_space())
    assert driver.of_kind(Copy) == [
        Copy(driver.jobs[0].job, 1, b"b", [CopyItem(0, PAGE, PAGE, 0, 2)])
    ]
    driver.copy()
    assert driver.blocks() == {(1, 2): 0}
    assert tokens_of(driver, b) == 2
    assert driver.flush(b"b", 1) == Flushed(1, [[1, "no_space", "no memory"]])


def test_no_room_changes_nothing_but_the_order_of_the_lru() -> None:
    driver = joined_by(Driver(SMALL_DIRECTORY + STAGING + 2 * PAGE), "a")
    handle = driver.alloc(b"a", 1)
    driver.store(handle, 0, 1, 2)
    assert driver.refusal(b"a", append(handle, 2, 3, 4, 5, 6)) is AllLeased
    assert driver.refusal(b"a", append(handle, 2, *range(40))) is BudgetTooSmall
    assert (tokens_of(driver, handle), driver.counts()) == (2, {"active": 1})
    assert driver.flush(b"a", 0) == Flushed(1, [])
    assert driver.append(handle, 2, 3) is None
    driver.work()
    assert driver.of_kind(Completed) == [Completed(b"a", 2)]


def test_what_exists_is_not_evicted_for_what_does_not() -> None:
    """The append needs a slot, and the oldest block is the one that it goes on from."""
    driver = joined_by(Driver(SMALL_DIRECTORY + STAGING + 2 * PAGE), "a")
    writer = driver.alloc(b"a", 1)
    driver.store(writer, 0, 1, 2)
    driver.ask(b"a", release(writer))
    writer = driver.alloc(b"a", 1)
    driver.store(writer, 0, 3, 4)
    driver.ask(b"a", release(writer))
    handle = driver.alloc(b"a", 1)
    assert driver.append(handle, 0, 1, 2, 5, 6) == Appended(3, 1, 1, 0)
    driver.work()
    assert driver.blocks() == {(1, 2): 0, (1, 2, 5, 6): 1}


def test_memory_of_another_model_is_punched_before_it_is_used() -> None:
    driver = joined_by(Driver(2 * SMALL_DIRECTORY + STAGING + 3 * PAGE), "a")
    small = driver.alloc(b"a", 1)
    driver.store(small, 0, 1, 2, 3, 4, 5, 6)
    driver.ask(b"a", release(small))
    large = driver.alloc(b"a", driver.context(b"a", driver.register(b"a", "large", pages=3)))
    driver.append(large, 0, 1, 2)
    assert [type(effect) for effect in driver.effects if not isinstance(effect, UseRecord)] == [
        *[DropRecord, DropRecord, DropRecord],
        Punch,  # one for all
        Back,
    ]
    (punch,) = driver.of_kind(Punch)
    assert sorted(punch.slots) == [0, 1, 2]
    driver.work()
    assert (driver.counts(1), driver.counts(2)) == ({}, {"active": 1})


# --- what is wrong with an append


def test_bad_positions(three: Any) -> None:
    driver, a, _, _ = three
    for start in (1, 2, 1 << 31):
        assert driver.refusal(b"a", append(a, start, 1, 2)) is BadPosition
    driver.store(a, 0, 1, 2, 3)
    for start in (0, 1, 3, 4):
        error = driver.ask(b"a", append(a, start, 3))
        assert isinstance(error, BadPosition)
        assert error.details == {"start": start, "expected": 2}
    assert driver.append(a, 2, 3, 4) == Appended(2, 1, 0, 0)


def test_an_append_has_tokens_and_one_offset_for_each_block(three: Any) -> None:
    driver, a, _, _ = three
    for message in (
        append(a, 0),
        append(a, 0, staged=[PAGE]),
        append(a, 0, 1, 2, 3, staged=[PAGE]),
        append(a, 0, 1, 2, 3, staged=[PAGE, PAGE, PAGE]),
        Append(*a.fields, 0, bytes(4 * (MAX_TOKENS + 1)), pack("<Q", PAGE) * (MAX_TOKENS // 2 + 1)),
    ):
        assert driver.refusal(b"a", message) is BadMessage
    assert driver.counts() == {"free": 8}


@pytest.mark.parametrize(
    "offset", [0, 8, PAGE - 8, PAGE + 4, STAGING - PAGE + 8, STAGING, 1 << 63, (1 << 64) - 8]
)
def test_staging_bounds(three: Any, offset: int) -> None:
    driver, a, _, _ = three
    error = driver.ask(b"a", append(a, 0, 1, 2, 3, staged=[PAGE, offset]))
    assert isinstance(error, BadStaging)
    assert (error.details["block"], error.details["offset"]) == (1, offset)
    assert driver.counts() == {"free": 8}


def test_the_last_place_of_the_staging(three: Any) -> None:
    driver, a, _, _ = three
    driver.ask(b"a", append(a, 0, 1, staged=[STAGING - PAGE]))
    assert driver.jobs[0].items == [CopyItem(7, STAGING - PAGE, PAGE, 0, 1)]


def test_a_session_without_staging_cannot_append(driver: Driver) -> None:
    driver.connect("poor", staging=0)
    driver.register(b"poor")
    handle = driver.alloc(b"poor", driver.context(b"poor"))
    assert driver.refusal(b"poor", append(handle, 0, 1)) is BadStaging


def test_a_staged_payload_is_looked_at_before_anything_changes(driver: Driver) -> None:
    """A llama-state block of zeros has no magic number."""
    driver.register(b"a", "llama", payload_format="llama-state", layers=[["f16", 64, "f16", 64]])
    handle = driver.alloc(b"a", driver.context(b"a", 2))
    assert driver.refusal(b"a", append(handle, 0, 1, 2)) is BadPayload
    assert driver.counts(2) == {}


def test_a_reservation_is_not_exceeded(driver: Driver) -> None:
    driver.ask(b"a", alloc(1, reserve=3))
    driver.back()
    handle = Handle(b"a", 1, driver.replies[driver.asked])
    assert driver.refusal(b"a", append(handle, 0, 1, 2, 3, 4)) is ReservationExceeded
    assert driver.append(handle, 0, 1, 2) == Appended(1, 1, 0, 0)
    assert driver.refusal(b"a", append(handle, 2, 3, 4)) is ReservationExceeded
    assert driver.append(handle, 2, 3) == Appended(2, 1, 0, 0)
    driver.work()
    assert driver.counts() == {"active": 2}


def test_what_was_reserved_and_not_needed_goes_back(three: Any) -> None:
    driver, a, _, _ = three
    driver.store(a, 0, 1, 2)
    handle = driver.alloc(b"b", 2, reserve=6)
    assert driver.counts() == {"active": 1, "filling": 3, "free": 4}
    driver.store(handle, 0, 1, 2, 3, 4)
    assert driver.counts() == {"active": 2, "filling": 2, "free": 4}
    driver.ask(b"b", release(handle))
    assert driver.counts() == {"active": 1, "cached": 1, "free": 6}


# --- sessions that die


def test_a_commit_that_was_answered_outlives_its_session(three: Any) -> None:
    driver, a, _, _ = three
    driver.append(a, 0, 1, 2)
    driver.disconnect(b"a")
    assert driver.of_kind(CloseStaging) == []
    assert driver.cache.budget.staging == 3 * STAGING
    driver.copy()
    assert driver.effects[1:] == [CloseStaging(b"a")]
    assert driver.cache.budget.staging == 2 * STAGING
    assert (driver.blocks(), driver.counts()) == ({(1, 2): 7}, {"cached": 1, "free": 7})


def test_a_commit_that_was_not_answered_never_was(driver: Driver) -> None:
    handle = driver.alloc(b"a", 1)
    driver.append(handle, 0, 1, 2, 3)
    driver.disconnect(b"a")
    assert driver.of_kind(CloseStaging) == [CloseStaging(b"a")]
    driver.back()
    assert driver.effects == []
    assert (driver.blocks(), driver.counts()) == ({}, {"free": 2})
    assert not driver.cache.jobs


def test_no_memory_for_a_dead_session(driver: Driver) -> None:
    driver.append(driver.alloc(b"a", 1), 0, 1, 2)
    driver.disconnect(b"a")
    driver.back(no_space())
    assert (driver.effects, driver.counts()) == ([], {})


def test_who_joined_a_dead_session_takes_over(driver: Driver) -> None:
    """The dead one's append was not answered; its slots have memory now."""
    joined_by(driver, "b")
    a, b = driver.alloc(b"a", 1), driver.alloc(b"b", 2)
    driver.append(a, 0, 1, 2, 3, 4)
    assert driver.append(b, 0, 1, 2) == Appended(1, 0, 0, 1)
    driver.disconnect(b"a")
    driver.back()
    assert [job.session for job in driver.of_kind(Copy)] == [b"b"]
    assert driver.counts() == {"filling": 1, "free": 1}
    driver.copy()
    assert driver.blocks() == {(1, 2): 0}


def test_two_that_join_before_they_are_answered(driver: Driver) -> None:
    """The dead one's block waits for the second, whose own slots are being backed, too."""
    joined_by(driver, "b")
    a, b = driver.alloc(b"a", 1), driver.alloc(b"b", 2)
    driver.append(a, 0, 1, 2)
    driver.append(b, 0, 1, 2, 3, 4)
    driver.disconnect(b"a")
    driver.back()
    assert driver.of_kind(Copy) == []
    assert driver.counts() == {"filling": 2}
    driver.work()
    assert driver.blocks() == {(1, 2): 0, (1, 2, 3, 4): 1}


def test_a_dead_sessions_staging_stands_by_no_longer(three: Any) -> None:
    driver, a, b, _ = three
    driver.append(a, 0, 1, 2)
    driver.append(b, 0, 1, 2)
    driver.disconnect(b"b")
    assert driver.of_kind(CloseStaging) == [CloseStaging(b"b")]
    driver.copy(0)
    assert driver.of_kind(Copy) == []
    assert driver.counts() == {"free": 8}


def test_the_copy_of_a_dead_session_is_bad_and_the_next_takes_over(three: Any) -> None:
    driver, a, b, _ = three
    driver.append(a, 0, 1, 2)
    driver.append(b, 0, 1, 2)
    driver.disconnect(b"a")
    driver.copy(0)
    assert [type(effect) for effect in driver.effects] == [Copy, CloseStaging]
    driver.copy()
    assert driver.blocks() == {(1, 2): 7}


# --- completed numbers and flush


def test_completed_numbers_never_pass_an_unfinished_commit(three: Any) -> None:
    driver, a, _, _ = three
    driver.append(a, 0, 1, 2)
    driver.append(a, 2, 3, 4)
    first, second = driver.jobs
    driver.handle(Copied(second.job, [CopyResult(0, None)]))
    assert driver.of_kind(Completed) == []
    driver.handle(Copied(first.job, [CopyResult(0, None)]))
    assert driver.of_kind(Completed) == [Completed(b"a", 2)]


def test_a_commit_is_not_completed_before_it_is_answered(driver: Driver) -> None:
    """The second is finished at once, the first still waits for memory."""
    handle, other = driver.alloc(b"a", 1), driver.alloc(b"a", 1)
    driver.append(handle, 0, 1, 2)
    assert driver.append(other, 0, 1, 2) == Appended(2, 0, 0, 1)
    driver.back()
    assert [type(effect) for effect in driver.effects] == [Reply, Copy]
    driver.copy()
    assert driver.of_kind(Completed) == [Completed(b"a", 2)]


def test_flush_waits_until_all_is_sealed(three: Any) -> None:
    driver, a, _, _ = three
    driver.append(a, 0, 1, 2)
    driver.append(a, 2, 3, 4)
    waiting = []
    for commit in (2, 1, 1):
        assert driver.flush(b"a", commit) is None
        waiting.append(driver.asked)
    driver.copy()
    kinds = [type(effect) for effect in driver.effects]
    assert kinds == [WriteRecord, Completed, Reply, Reply]
    assert [driver.replies.get(each) for each in waiting] == [None, Flushed(1, []), Flushed(1, [])]
    driver.copy()
    assert driver.replies[waiting[0]] == Flushed(2, [])


def test_flush_of_a_commit_that_was_never_made(three: Any) -> None:
    driver, a, _, _ = three
    assert driver.flush(b"a", 0) == Flushed(0, [])
    assert driver.refusal(b"a", Flush(1)) is BadMessage
    driver.append(a, 0, 1)
    assert driver.refusal(b"a", Flush(2)) is BadMessage
    assert driver.refusal(b"b", Flush(1)) is BadMessage


def test_flush_tells_failures_once(three: Any) -> None:
    driver, a, _, _ = three
    driver.append(a, 0, 1, 2)
    driver.append(a, 2, 3, 4)
    driver.copy(0)
    driver.copy()
    failed = [[1, "bad_payload", "spoilt"], [2, "bad_payload", "spoilt"]]
    assert driver.flush(b"a", 1) == Flushed(2, failed)
    assert driver.flush(b"a", 2) == Flushed(2, [])


def test_a_session_that_never_flushes_is_told_of_the_latest_failures(driver: Driver) -> None:
    handle = driver.alloc(b"a", 1)
    for number in range(MAX_FAILURES + 3):
        driver.append(handle, 0, number)
        driver.work(0)
    failures = driver.flush(b"a", 1).failures
    assert [row[0] for row in failures] == list(range(4, MAX_FAILURES + 4))
    assert driver.counts() == {"free": 1}


def test_counters_of_failed_blocks(three: Any) -> None:
    driver, a, _, _ = three
    driver.append(a, 0, 1, 2, 3, 4)
    driver.copy(0, 1)
    # The second was not wanted any more.
    assert driver.counters.failed_blocks == 1
