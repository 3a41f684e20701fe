"""Sequence ids: generations, who may use them, waiting for one, and what alloc, get and release do
with them. What is appended to them: test_storing.py.
"""

import pytest

from kvd.core.accounting import report_of_sequences
from kvd.core.events import Back
from kvd.core.sequences import State
from kvd_proto.errors import (
    AllLeased,
    BadMessage,
    BudgetTooSmall,
    ForeignHandle,
    KvdError,
    NoSequenceFree,
    NoSpace,
    SequenceEnded,
    SequenceLimit,
    StaleHandle,
    UnknownContext,
)
from kvd_proto.messages import (
    COMPLETED,
    FAILED,
    Append,
    Appended,
    Blocks,
    CloseContext,
    Done,
    Get,
    KeepAlive,
    KeptAlive,
    Release,
)
from tests.core.driver import (
    FULL_DIRECTORY,
    INDEX,
    PAGE,
    SMALL_DIRECTORY,
    STAGING,
    Driver,
    Handle,
    alloc,
    append,
    no_space,
    slots_of,
)


@pytest.fixture
def driver() -> Driver:
    """One session, one model, one context of four ids."""
    return opened(Driver())


def opened(driver: Driver) -> Driver:
    driver.connect("s")
    driver.register(b"s")
    assert driver.context(b"s") == 1
    return driver


def release(handle: Handle, outcome: int = COMPLETED) -> Release:
    return Release(*handle.fields, outcome)


def allocated(driver: Driver, correlation: int) -> tuple[int, int]:
    """The handle that was answered."""
    reply = driver.replies[correlation]
    return (reply.seq_id, reply.generation)


# --- ids and generations


def test_ids_come_in_order_and_the_one_that_rested_longest_comes_again(driver: Driver) -> None:
    handles = [driver.alloc(b"s", 1) for _ in range(4)]
    assert [handle.seq_id for handle in handles] == [0, 1, 2, 3]
    for index in (2, 0, 3):
        assert driver.ask(b"s", release(handles[index])) == Done()
    assert [driver.alloc(b"s", 1).seq_id for _ in range(3)] == [2, 0, 3]


def test_each_handle_has_a_generation_of_its_own(driver: Driver) -> None:
    first = driver.alloc(b"s", 1)
    driver.ask(b"s", release(first))
    others = [driver.alloc(b"s", 1) for _ in range(4)]
    assert [(other.seq_id, other.generation) for other in others] == [
        (1, 2),
        (2, 3),
        (3, 4),
        (0, 5),
    ]
    assert driver.refusal(b"s", release(first)) is StaleHandle
    assert driver.ask(b"s", release(others[3])) == Done()


def test_a_handle_that_has_ended_is_refused_with_what_is_there_now(driver: Driver) -> None:
    old = driver.alloc(b"s", 1)
    driver.ask(b"s", release(old))
    kept = KeepAlive(old.context, [old.seq_id], [old.generation])
    for message in (release(old), append(old, 0, 1), Get(*old.fields, 0), kept):
        error = driver.ask(b"s", message)
        assert isinstance(error, StaleHandle)
        assert error.details["current_generation"] is None
    for _ in range(4):
        driver.alloc(b"s", 1)
    error = driver.ask(b"s", release(old))
    assert error.details["current_generation"] == 5


def test_a_handle_of_another_session_is_foreign(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1)
    driver.connect("other")
    messages = (
        release(handle),
        append(handle, 0, 1),
        Get(*handle.fields, 0),
        KeepAlive(1, [], []),
        alloc(1),
        CloseContext(1),
    )
    for message in messages:
        assert driver.refusal(b"other", message) is ForeignHandle
    assert driver.ask(b"s", release(handle)) == Done()


def test_an_unknown_context_is_another_answer(driver: Driver) -> None:
    for message in (
        alloc(7),
        CloseContext(7),
        Release(7, 0, 1, COMPLETED),
        KeepAlive(7, [], []),
    ):
        assert driver.refusal(b"s", message) is UnknownContext


def test_busy_ids_are_sequences_without_blocks(driver: Driver) -> None:
    context = driver.context(b"s", busy=[3, 0])
    assert driver.cache.open_sequences == 2
    assert driver.ask(b"s", Get(context, 3, 1, 0)) == Blocks(0, 0, b"")
    assert driver.ask(b"s", Get(context, 0, 2, 0)) == Blocks(0, 0, b"")
    assert [driver.alloc(b"s", context).seq_id for _ in range(2)] == [1, 2]
    assert driver.ask(b"s", Release(context, 3, 1, COMPLETED)) == Done()
    assert driver.alloc(b"s", context).seq_id == 3


def test_max_sequences_counts_those_of_all_sessions() -> None:
    driver = opened(Driver(max_sequences=3))
    driver.connect("other")
    driver.register(b"other")
    context = driver.context(b"other", busy=[0])
    driver.alloc(b"s", 1)
    handle = driver.alloc(b"s", 1)
    assert driver.refusal(b"s", alloc(1)) is SequenceLimit
    assert driver.refusal(b"other", alloc(context)) is SequenceLimit
    driver.ask(b"s", release(handle))
    driver.alloc(b"other", context)


def test_who_ended_well_and_who_failed(driver: Driver) -> None:
    for outcome in (COMPLETED, FAILED, FAILED):
        driver.ask(b"s", release(driver.alloc(b"s", 1), outcome))
    assert driver.counters.sequences_opened == 3
    assert driver.counters.sequences_failed == 2


# --- waiting


def test_without_a_time_to_wait_the_answer_comes_at_once(driver: Driver) -> None:
    for _ in range(4):
        driver.alloc(b"s", 1)
    assert driver.refusal(b"s", alloc(1)) is NoSequenceFree


def test_ids_are_handed_out_first_come_first_served(driver: Driver) -> None:
    handles = [driver.alloc(b"s", 1) for _ in range(4)]
    waiting = []
    for _ in range(3):
        assert driver.ask(b"s", alloc(1, wait_ms=1000)) is None
        waiting.append(driver.asked)
    driver.ask(b"s", release(handles[2]))
    assert allocated(driver, waiting[0]) == (2, 5)
    # Nobody may come between, though an id were free.
    driver.ask(b"s", release(handles[1]))
    assert allocated(driver, waiting[1]) == (1, 6)
    assert driver.refusal(b"s", alloc(1)) is NoSequenceFree
    assert waiting[2] not in driver.replies


def test_the_prefix_is_matched_when_the_id_is_there(driver: Driver) -> None:
    handles = [driver.alloc(b"s", 1) for _ in range(4)]
    driver.ask(b"s", alloc(1, 1, 2, wait_ms=1000))
    waiting = driver.asked
    driver.store(handles[0], 0, 1, 2)
    driver.ask(b"s", release(handles[0]))
    assert driver.replies[waiting].matched_tokens == 2
    assert slots_of(driver.replies[waiting].slots) == [0]


def test_a_deadline_passes(driver: Driver) -> None:
    handles = [driver.alloc(b"s", 1) for _ in range(4)]
    assert driver.core.next_deadline() is None
    driver.ask(b"s", alloc(1, wait_ms=500))
    first = driver.asked
    driver.ask(b"s", alloc(1, wait_ms=250))
    second = driver.asked
    assert driver.core.next_deadline() == 0.25
    driver.pass_time(0.25)
    error = driver.replies[second]
    assert isinstance(error, NoSequenceFree)
    assert error.details["waited_ms"] == 250
    assert first not in driver.replies
    assert driver.core.next_deadline() == 0.5
    driver.ask(b"s", release(handles[0]))
    assert first in driver.replies
    assert driver.core.next_deadline() is None


def test_who_waits_for_the_daemons_limit_is_told_so() -> None:
    driver = opened(Driver(max_sequences=1))
    driver.alloc(b"s", 1)
    driver.ask(b"s", alloc(1, wait_ms=250))
    waiting = driver.asked
    driver.pass_time(0.25)
    assert isinstance(driver.replies[waiting], SequenceLimit)


def test_the_daemons_limit_is_served_first_come_first_served_over_all_contexts() -> None:
    driver = opened(Driver(max_sequences=2))
    handles = [driver.alloc(b"s", 1), driver.alloc(b"s", 1)]
    other = driver.context(b"s")
    waiting = []
    for context in (other, 1, other):
        driver.ask(b"s", alloc(context, wait_ms=1000))
        waiting.append(driver.asked)
    driver.ask(b"s", release(handles[0]))
    assert waiting[0] in driver.replies
    assert waiting[1] not in driver.replies
    driver.ask(b"s", release(handles[1]))
    assert waiting[1] in driver.replies
    assert waiting[2] not in driver.replies


def test_who_waits_in_a_full_context_holds_up_nobody_elsewhere(driver: Driver) -> None:
    full = driver.context(b"s", n_ids=1)
    driver.alloc(b"s", full)
    driver.ask(b"s", alloc(full, wait_ms=1000))
    driver.alloc(b"s", 1)


def test_closing_a_context_answers_who_waits_for_it(driver: Driver) -> None:
    full = driver.context(b"s", n_ids=1)
    driver.alloc(b"s", full)
    driver.ask(b"s", alloc(full, wait_ms=1000))
    waiting = driver.asked
    assert driver.ask(b"s", CloseContext(full)) == Done()
    assert isinstance(driver.replies[waiting], UnknownContext)
    assert not driver.cache.waiting
    assert driver.core.next_deadline() is None


def test_a_dead_sessions_waiters_are_gone_and_its_ids_go_to_others() -> None:
    driver = opened(Driver(max_sequences=1))
    driver.alloc(b"s", 1)
    driver.ask(b"s", alloc(1, wait_ms=1000))
    dead = driver.asked
    driver.connect("other")
    driver.register(b"other")
    context = driver.context(b"other")
    driver.ask(b"other", alloc(context, wait_ms=1000))
    waiting = driver.asked
    driver.disconnect(b"s")
    assert dead not in driver.replies
    assert allocated(driver, waiting) == (0, 1)


def test_a_waiter_whose_reserve_finds_no_room_lets_the_next_one_in() -> None:
    driver = opened(Driver(SMALL_DIRECTORY + STAGING + 2 * PAGE))
    context = driver.context(b"s", n_ids=1)
    handle = driver.alloc(b"s", context)
    driver.ask(b"s", alloc(context, reserve=6, wait_ms=1000))
    greedy = driver.asked
    driver.ask(b"s", alloc(context, wait_ms=1000))
    modest = driver.asked
    driver.ask(b"s", release(handle))
    assert isinstance(driver.replies[greedy], AllLeased)
    assert allocated(driver, modest) == (0, 3)


# --- idle timeouts


def test_an_idle_sequence_times_out_and_keeps_its_id_until_it_is_released(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1, idle_ms=1000)
    driver.store(handle, 0, 1, 2)
    assert driver.core.next_deadline() == 1.0
    driver.pass_time(1.0)
    (row,) = report_of_sequences(driver.cache, driver.now)
    assert (row["state"], row["tokens"], row["idle_seconds"]) == ("TIMED_OUT", 2, 1.0)
    assert driver.counters.sequences_timed_out == 1
    assert driver.refusal(b"s", append(handle, 2, 3)) is SequenceEnded
    # What it leases stays, and may be read.
    assert driver.ask(b"s", Get(*handle.fields, 0)).sealed_tokens == 2
    assert driver.counts() == {"active": 1}
    assert [driver.alloc(b"s", 1).seq_id for _ in range(3)] == [1, 2, 3]
    assert driver.refusal(b"s", alloc(1)) is NoSequenceFree
    assert driver.core.next_deadline() is None
    assert driver.ask(b"s", release(handle)) == Done()
    assert driver.alloc(b"s", 1).seq_id == 0


def test_asking_for_a_sequence_keeps_it_from_timing_out(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1, idle_ms=1000)
    driver.pass_time(0.75)
    driver.ask(b"s", Get(*handle.fields, 0))
    assert driver.core.next_deadline() == 1.75
    driver.pass_time(0.75)
    assert isinstance(driver.append(handle, 0, 1), Appended | None)
    assert driver.core.next_deadline() == 2.5
    driver.pass_time(1.0)
    assert driver.cache.sequences()[0].state is State.TIMED_OUT


def test_keep_alive_lets_the_idle_time_begin_anew(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1, idle_ms=1000)
    other = driver.alloc(b"s", 1, idle_ms=1000)
    driver.pass_time(0.75)
    kept = KeepAlive(1, [handle.seq_id], [handle.generation])
    assert driver.ask(b"s", kept) == KeptAlive([])
    driver.pass_time(0.75)
    assert [each.state for each in driver.cache.sequences()] == [
        State.PROCESSING,
        State.TIMED_OUT,
    ]
    assert driver.core.next_deadline() == 1.75
    # All of the context: the one that has timed out stays so, and is named.
    assert driver.ask(b"s", KeepAlive(1, [], [])) == KeptAlive([other.seq_id])
    assert driver.core.next_deadline() == 2.5
    both = KeepAlive(1, [1, 0], [other.generation, handle.generation])
    assert driver.ask(b"s", both) == KeptAlive([1])
    assert driver.refusal(b"s", append(other, 0, 1)) is SequenceEnded


def test_keep_alive_with_a_wrong_handle_keeps_nothing_alive(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1, idle_ms=1000)
    driver.pass_time(0.75)
    stale = KeepAlive(1, [handle.seq_id, 3], [handle.generation, 9])
    assert driver.refusal(b"s", stale) is StaleHandle
    uneven = KeepAlive(1, [handle.seq_id], [])
    assert driver.refusal(b"s", uneven) is BadMessage
    assert driver.core.next_deadline() == 1.0


def test_a_sequence_that_ended_in_time_is_not_counted(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1, idle_ms=1000)
    driver.ask(b"s", release(handle))
    again = [driver.alloc(b"s", 1) for _ in range(4)][3]
    assert again.seq_id == handle.seq_id
    driver.pass_time(2.0)
    assert driver.counters.sequences_timed_out == 0


# --- what alloc leases, and get


def test_a_match_is_exact_to_the_token(driver: Driver) -> None:
    driver.store(driver.alloc(b"s", 1), 0, 1, 2, 3, 4, 5)
    for prompt, matched, last_block, n_slots in (
        ((1, 2, 3, 4, 5, 6), 5, 1, 3),
        ((1, 2, 3, 4), 4, 2, 2),
        ((1, 2, 3, 9), 3, 2, 2),
        ((1, 9), 1, 2, 1),
        ((9,), 0, 0, 0),
        ((), 0, 0, 0),
    ):
        handle = driver.alloc(b"s", 1, *prompt)
        found = (handle.matched, handle.last_block_tokens, len(handle.slots))
        assert found == (matched, last_block, n_slots)
        assert handle.slots == [0, 1, 2][:n_slots]
        driver.ask(b"s", release(handle))


def test_what_alloc_matched_is_leased_until_release(driver: Driver) -> None:
    writer = driver.alloc(b"s", 1)
    driver.store(writer, 0, 1, 2, 3, 4)
    driver.ask(b"s", release(writer))
    assert driver.counts() == {"cached": 2}
    reader = driver.alloc(b"s", 1, 1, 2, 3)
    assert driver.counts() == {"active": 2}
    driver.ask(b"s", release(reader))
    assert driver.counts() == {"cached": 2}


def test_a_filling_block_is_not_matched(driver: Driver) -> None:
    driver.append(driver.alloc(b"s", 1), 0, 1, 2)
    assert driver.alloc(b"s", 1, 1, 2).matched == 0
    driver.work()
    assert driver.alloc(b"s", 1, 1, 2).matched == 2


def test_get_tells_what_is_sealed_of_a_sequence(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1)
    driver.append(handle, 0, 1, 2, 3, 4, 5)
    assert driver.ask(b"s", Get(*handle.fields, 0)) == Blocks(0, 0, b"")
    driver.work()
    blocks = driver.ask(b"s", Get(*handle.fields, 0))
    assert (blocks.sealed_tokens, blocks.last_block_tokens) == (5, 1)
    assert slots_of(blocks.slots) == [0, 1, 2]
    blocks = driver.ask(b"s", Get(*handle.fields, 2))
    assert (blocks.sealed_tokens, slots_of(blocks.slots)) == (5, [2])
    assert slots_of(driver.ask(b"s", Get(*handle.fields, 9)).slots) == []


def test_get_of_a_match_that_ends_within_a_block(driver: Driver) -> None:
    driver.store(driver.alloc(b"s", 1), 0, 1, 2, 3, 4)
    handle = driver.alloc(b"s", 1, 1, 2, 3)
    blocks = driver.ask(b"s", Get(*handle.fields, 0))
    assert (blocks.sealed_tokens, blocks.last_block_tokens) == (3, 2)
    assert slots_of(blocks.slots) == [0, 1]


def test_counters_of_hits(driver: Driver) -> None:
    driver.store(driver.alloc(b"s", 1, 1, 2, 3), 0, 1, 2, 3)
    driver.alloc(b"s", 1, 1, 2, 9)
    counters = driver.counters
    assert (counters.queried_tokens, counters.hit_tokens) == (6, 2)


# --- reservations


def test_a_reservation_is_answered_when_it_has_memory(driver: Driver) -> None:
    assert driver.ask(b"s", alloc(1, reserve=5)) is None
    assert driver.of_kind(Back) == [Back(1, 1, b"s", [0, 1, 2], FULL_DIRECTORY - INDEX)]
    assert driver.counts() == {"filling": 3}
    reserving = driver.asked
    driver.back()
    handle = Handle(b"s", 1, driver.replies[reserving])
    assert handle.seq_id == 0
    # Now it appends without waiting for anything.
    assert driver.append(handle, 0, 1, 2, 3, 4, 5) == Appended(1, 3, 0, 0)
    driver.work()
    assert driver.counts() == {"active": 3}


def test_memory_that_is_there_already_is_reserved_at_once(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, reserve=4))
    driver.back()
    driver.ask(b"s", Release(1, 0, 1, COMPLETED))
    assert driver.counts() == {"free": 2}
    assert driver.alloc(b"s", 1, reserve=3).seq_id == 1
    assert driver.counts() == {"filling": 2}


def test_a_reservation_starts_after_the_last_full_block(driver: Driver) -> None:
    driver.store(driver.alloc(b"s", 1), 0, 1, 2, 3)
    assert driver.ask(b"s", alloc(1, 1, 2, 3, reserve=3)) is None
    correlation = driver.asked
    driver.back()
    handle = Handle(b"s", 1, driver.replies[correlation])
    assert handle.matched == 3
    error = driver.ask(b"s", append(handle, 2, 3, 4, 5, 6))
    assert (error.details["end"], error.details["reserved_to"]) == (6, 5)
    assert driver.append(handle, 2, 3, 4, 5) == Appended(2, 2, 0, 0)


def test_no_memory_for_a_reservation_gives_the_id_back(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, reserve=4))
    reserving = driver.asked
    driver.back(no_space())
    assert isinstance(driver.replies[reserving], NoSpace)
    assert driver.counts() == {}
    assert driver.cache.open_sequences == 0
    assert driver.cache.budget.arenas[1].punched == [0, 1]
    assert [driver.alloc(b"s", 1).seq_id for _ in range(4)] == [1, 2, 3, 0]


def test_no_room_for_a_reservation_changes_nothing() -> None:
    driver = opened(Driver(SMALL_DIRECTORY + STAGING + 2 * PAGE))
    # Only the stagings might go.
    assert driver.refusal(b"s", alloc(1, reserve=2 * 19)) is BudgetTooSmall
    assert driver.refusal(b"s", alloc(1, reserve=2 * 18)) is AllLeased
    driver.ask(b"s", alloc(1, reserve=2))
    driver.back()
    assert driver.refusal(b"s", alloc(1, reserve=4)) is AllLeased
    assert driver.cache.open_sequences == 1
    assert driver.counts() == {"filling": 1}


def test_a_session_that_dies_while_its_reservation_is_backed(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, reserve=4))
    reserving = driver.asked
    driver.disconnect(b"s")
    assert driver.counts() == {"filling": 2}
    driver.back()
    assert driver.counts() == {"free": 2}
    assert reserving not in driver.replies


def test_a_session_that_dies_while_there_is_no_memory_for_its_reservation(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, reserve=4))
    driver.disconnect(b"s")
    driver.back(no_space())
    assert driver.counts() == {}


@pytest.mark.parametrize("error", [None, no_space()])
@pytest.mark.parametrize("ending", [CloseContext(1), Release(1, 0, 1, FAILED)])
def test_a_reservation_of_a_sequence_that_was_closed_is_answered(
    driver: Driver, ending: CloseContext | Release, error: KvdError | None
) -> None:
    """Its handle can be guessed, and contexts be closed: every request gets an answer."""
    driver.ask(b"s", alloc(1, reserve=4))
    reserving = driver.asked
    assert driver.ask(b"s", ending) == Done()
    driver.back(error)
    assert isinstance(driver.replies[reserving], StaleHandle if error is None else NoSpace)
    assert driver.counts() == ({"free": 2} if error is None else {})


# --- closing


def test_close_context_in_the_middle_of_everything(driver: Driver) -> None:
    """Waiters, a reservation, an append that is being backed, and one that is being copied."""
    context = driver.context(b"s", n_ids=3)
    first, second = driver.alloc(b"s", context), driver.alloc(b"s", context)
    driver.append(first, 0, 1, 2)
    driver.back()
    driver.append(second, 0, 3, 4)
    appending = driver.asked
    driver.ask(b"s", alloc(context, reserve=2))
    reserving = driver.asked
    driver.ask(b"s", alloc(context, wait_ms=1000))
    waiting = driver.asked
    assert driver.ask(b"s", CloseContext(context)) == Done()
    assert isinstance(driver.replies[waiting], UnknownContext)
    driver.work()
    assert isinstance(driver.replies[reserving], StaleHandle)
    # What it had committed is finished.
    assert driver.replies[appending] == Appended(2, 1, 0, 0)
    assert driver.blocks() == {(1, 2): 0, (3, 4): 1}
    assert driver.counts() == {"cached": 2, "free": 1}
    assert driver.cache.open_sequences == 0
    assert driver.refusal(b"s", CloseContext(context)) is UnknownContext


def test_append_to_a_sequence_released_while_it_is_backed(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1)
    driver.append(handle, 0, 1, 2)
    appending = driver.asked
    driver.ask(b"s", release(handle))
    driver.work()
    assert driver.replies[appending] == Appended(1, 1, 0, 0)
    assert (driver.blocks(), driver.counts()) == ({(1, 2): 0}, {"cached": 1})
    assert isinstance(driver.ask(b"s", Append(1, 0, 1, 2, b"", b"")), StaleHandle)


def test_report_has_a_row_for_each_open_or_waiting_sequence(driver: Driver) -> None:
    context = driver.context(b"s", n_ids=1)
    driver.store(driver.alloc(b"s", context), 0, 1, 2, 3)
    driver.ask(b"s", alloc(context, wait_ms=1000))
    driver.pass_time(0.5)
    open_one, waiting_one = report_of_sequences(driver.cache, driver.now)
    common = {"context": context, "request": "request", "client": "s", "pid": 1, "model": "m"}
    assert open_one == {
        **common,
        "seq_id": 0,
        "generation": 1,
        "state": "PROCESSING",
        "tokens": 3,
        "leased_blocks": 2,
        "reserved_blocks": 0,
        "idle_seconds": 0.5,
    }
    assert waiting_one == {
        **common,
        "seq_id": None,
        "generation": None,
        "state": "PENDING",
        "tokens": 0,
        "leased_blocks": 0,
        "reserved_blocks": 0,
        "idle_seconds": 0.5,
    }
