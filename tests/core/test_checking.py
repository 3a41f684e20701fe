"""Adopted blocks are checked before they are served, and all of them in the end.

What is adopted: test_adopting.py.
"""

import math
from dataclasses import replace
from typing import Any

import pytest

from kvd.core import checking
from kvd.core.events import Back, BlocksDamaged, Check, CheckItem, DropRecord
from kvd.core.reasons import Reason
from kvd.core.tree import ADOPTED, SEALED
from kvd_proto.errors import AllLeased, BadPosition, NoSequenceFree, TooMany, UnknownContext
from kvd_proto.messages import (
    COMPLETED,
    Allocated,
    Append,
    Appended,
    Blocks,
    CloseContext,
    Done,
    Evict,
    Get,
    Release,
)
from tests.core.driver import (
    PAGE,
    Driver,
    Handle,
    alloc,
    append,
    array_format,
    slots_of,
    walk_in_steps_of,
)

A, B, C = (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6)
OTHER = (7, 8)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A daemon that stored OTHER, A, B and C in the slots 0 to 3. In the background one block is
    checked after the other."""
    monkeypatch.setattr(checking, "BATCH_BYTES", 1)
    driver = Driver()
    enter(driver, "a")
    for path in (OTHER, C):
        handle = driver.alloc(b"a", 1)
        driver.store(handle, 0, *path)
        driver.ask(b"a", Release(*handle.fields, COMPLETED))
    return driver


@pytest.fixture
def driver(first: Driver) -> Driver:
    """The next daemon. The sessions a and b have a context each, 1 and 2; A is being checked."""
    first.restart()
    assert blocks_checked(first) == [[1]]
    enter(first, "a")
    enter(first, "b")
    return first


def enter(driver: Driver, name: str) -> None:
    driver.connect(name)
    driver.register(name.encode())
    driver.context(name.encode())


def blocks_checked(driver: Driver) -> list[list[int]]:
    """The slots of each check that is under way."""
    return [[item.slot for item in job.items] for job in driver.jobs if isinstance(job, Check)]


def states(driver: Driver) -> dict[int, str]:
    blocks = driver.cache.budget.arenas[1].root.below()
    return {block.slot: block.state for block in blocks}


def deferred(driver: Driver, session: bytes, context: int, *tokens: int, **other: int) -> int:
    """Ask; the correlation of an answer that has to wait."""
    assert driver.ask(session, alloc(context, *tokens, **other)) is None
    return driver.asked


# --- in the background


def test_one_check_after_the_other_parents_first(driver: Driver) -> None:
    assert [job.items for job in driver.jobs if isinstance(job, Check)] == [
        [CheckItem(1, array_format().size(2), driver.records[1][1].checksum)]
    ]
    checked = []
    while driver.jobs:
        checked += blocks_checked(driver)
        driver.check()
    assert checked == [[1], [0], [2], [3]]
    assert set(states(driver).values()) == {SEALED}
    assert driver.cache.unchecked == {}


def test_a_check_has_as_many_blocks_as_make_a_batch(
    first: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "BATCH_BYTES", 3 * PAGE)
    first.restart()
    assert blocks_checked(first) == [[1, 0, 2]]
    first.check()
    assert blocks_checked(first) == [[3]]


def test_a_check_is_of_one_arena(first: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "BATCH_BYTES", 1 << 20)
    first.register(b"a", "second")
    first.store(first.alloc(b"a", first.context(b"a", 2)), 0, 1, 2)
    first.restart()
    assert [(job.arena, len(job.items)) for job in first.jobs if isinstance(job, Check)] == [(1, 4)]
    first.check()
    assert [(job.arena, len(job.items)) for job in first.jobs if isinstance(job, Check)] == [(2, 1)]


# --- an alloc waits


def test_an_alloc_waits_until_its_path_has_been_checked(driver: Driver) -> None:
    correlation = deferred(driver, b"a", 1, *C)
    assert blocks_checked(driver) == [[1], [2, 3]], "the first is being checked already"
    driver.check()
    assert correlation not in driver.replies
    assert blocks_checked(driver) == [[2, 3]], "one at a time"
    driver.check()
    reply = driver.replies[correlation]
    assert (reply.matched_tokens, slots_of(reply.slots)) == (6, [1, 2, 3])
    assert blocks_checked(driver) == [[0]], "and on in the background"


LONG = tuple(range(1, 15))
"""Seven blocks, in slots 0 to 6."""


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The next daemon, of one that stored LONG; the first block is being checked. Walks go on in
    steps of two blocks."""
    monkeypatch.setattr(checking, "BATCH_BYTES", 1)
    driver = Driver()
    enter(driver, "a")
    handle = driver.alloc(b"a", 1)
    driver.store(handle, 0, *LONG)
    driver.restart()
    enter(driver, "a")
    enter(driver, "b")
    walk_in_steps_of(2, monkeypatch)
    return driver


def test_a_long_prompt_is_checked_and_matched_step_by_step(long: Driver) -> None:
    correlation = deferred(long, b"a", 1, *LONG)
    checked = []
    while correlation not in long.replies:
        assert long.core.next_deadline() != -math.inf, "it waits for the check"
        checked += blocks_checked(long)[0]
        if len(checked) > 2:
            assert long.counts()["active"] == (len(checked) - 1) // 2 * 2, "what has matched"
        long.check()
        long.settle()
    assert checked == list(range(7))
    reply = long.replies[correlation]
    assert (reply.matched_tokens, slots_of(reply.slots)) == (14, list(range(7)))


@pytest.mark.parametrize("bad", range(7))
def test_a_long_prompt_matches_up_to_what_is_damaged(long: Driver, bad: int) -> None:
    correlation = deferred(long, b"a", 1, *LONG)
    while correlation not in long.replies:
        slots = blocks_checked(long)[0]
        long.check(*([slots.index(bad)] if bad in slots else []))
        long.settle()
    assert long.replies[correlation].matched_tokens == 2 * bad


def test_who_dies_while_a_long_prompt_is_checked_leaves_nothing(long: Driver) -> None:
    deferred(long, b"a", 1, *LONG)
    long.check()
    long.check()
    long.settle()
    assert long.counts()["active"] == 2
    long.disconnect(b"a")
    long.settle()
    while long.jobs:
        long.check()
        long.settle()
    assert long.counts() == {"cached": 7}
    assert not long.cache.openings


def test_what_it_does_not_match_is_not_checked_for_it(driver: Driver) -> None:
    assert driver.alloc(b"a", 1, 9, 9).matched == 0
    assert blocks_checked(driver) == [[1]]
    correlation = deferred(driver, b"a", 1, *B)
    driver.check()
    driver.check()
    assert driver.replies[correlation].matched_tokens == 4
    assert states(driver) == {0: ADOPTED, 1: SEALED, 2: SEALED, 3: ADOPTED}


def test_once_it_is_checked_nobody_waits(driver: Driver) -> None:
    driver.check()
    assert driver.alloc(b"a", 1, *A).slots == [1]


def test_it_waits_for_a_block_that_agrees_in_part(driver: Driver) -> None:
    correlation = deferred(driver, b"a", 1, 7, 9, 9)
    assert blocks_checked(driver) == [[1], [0]]
    driver.check()
    driver.check()
    reply = driver.replies[correlation]
    assert (reply.matched_tokens, reply.last_block_tokens) == (1, 2)
    assert slots_of(reply.slots) == [0]


def test_several_wait_for_one_check_and_are_answered_in_their_order(driver: Driver) -> None:
    waiting = [
        deferred(driver, b"a", 1, *C),
        deferred(driver, b"b", 2, *B),
        deferred(driver, b"a", 1, *C, 9),
    ]
    assert blocks_checked(driver) == [[1], [2, 3]]
    driver.check()
    driver.check()
    assert [key for key in driver.replies if key in waiting] == waiting
    assert [driver.replies[key].matched_tokens for key in waiting] == [6, 4, 6]
    assert [driver.replies[key].seq_id for key in waiting] == [0, 0, 1]


def test_one_whose_path_is_longer_waits_longer(driver: Driver) -> None:
    short, long = deferred(driver, b"a", 1, *A), deferred(driver, b"b", 2, *C)
    driver.check()
    assert driver.replies[short].matched_tokens == 2
    assert long not in driver.replies
    driver.check()
    assert driver.replies[long].matched_tokens == 6


def test_what_is_damaged_is_not_served_nor_what_is_below(driver: Driver) -> None:
    correlation = deferred(driver, b"a", 1, *C)
    driver.check()
    driver.check(0)
    reply = driver.replies[correlation]
    assert (reply.matched_tokens, slots_of(reply.slots)) == (2, [1])
    assert [effect.slot for effect in driver.of_kind(DropRecord)] == [3, 2]
    assert driver.of_kind(BlocksDamaged) == [BlocksDamaged(1, 1)]
    assert driver.cache.counters.damaged_blocks == 1, "the other one was good"
    assert driver.evicted() == {"damaged": 2}
    assert driver.counts() == {"active": 1, "cached": 1, "free": 2}


def test_of_a_path_whose_first_block_is_damaged_nothing_is_left(driver: Driver) -> None:
    correlation = deferred(driver, b"a", 1, *C)
    driver.check(0)
    assert correlation not in driver.replies, "its check has not ended yet"
    driver.check()
    assert driver.replies[correlation].matched_tokens == 0
    assert driver.blocks() == {OTHER: 0}


def test_when_the_best_is_damaged_the_next_best_is_checked(first: Driver) -> None:
    handle = first.alloc(b"a", 1, 1, 2)
    first.store(handle, 2, 3, 9)
    first.restart()
    enter(first, "a")
    # Two agree with 3: the one that sorts before is the better one.
    correlation = deferred(first, b"a", 1, 1, 2, 3, 5)
    first.check()
    (best,) = blocks_checked(first)
    first.check(0)
    assert correlation not in first.replies
    (next_best,) = blocks_checked(first)
    assert {*best, *next_best} == {2, 4}
    first.check()
    reply = first.replies[correlation]
    assert (reply.matched_tokens, slots_of(reply.slots)) == (3, [1, *next_best])


def test_a_session_that_dies_while_it_waits_hears_nothing(driver: Driver) -> None:
    dead = deferred(driver, b"a", 1, *C)
    alive = deferred(driver, b"b", 2, *C)
    driver.disconnect(b"a")
    driver.work()
    assert dead not in driver.replies
    assert driver.replies[alive].matched_tokens == 6
    assert driver.cache.open_sequences == 1
    assert driver.cache.counters.errors == 0


def test_of_a_session_that_dies_while_it_waits_nothing_is_kept(driver: Driver) -> None:
    """Who connects, asks and hangs up again and again fills no memory with its tokens."""
    session = driver.cache.sessions[b"a"]
    for _ in range(3):
        deferred(driver, b"a", 1, *C)
    stays = deferred(driver, b"b", 2, *C)
    driver.disconnect(b"a")
    kept = [each for job in driver.cache.jobs.values() for each in job.deferred]
    assert [each.correlation for each in kept] == [stays]
    assert (session.waiting, session.waiting_bytes) == (0, 0)


def test_it_counts_against_the_limit_of_those_that_wait(first: Driver) -> None:
    first.limits = replace(first.limits, session_waiting=2, session_waiting_bytes=8 * len(C))
    first.restart()
    enter(first, "a")
    enter(first, "b")
    waiting = [deferred(first, b"a", 1, *C), deferred(first, b"a", 1, *A)]
    assert first.refusal(b"a", alloc(1, *A)) is TooMany
    assert first.alloc(b"a", 1, 9).matched == 0, "one that need not wait"
    waiting.append(deferred(first, b"b", 2, *C))
    assert first.refusal(b"b", alloc(2, *C, 9)) is TooMany, "its tokens are too many"
    first.work()
    assert [first.replies[key].matched_tokens for key in waiting] == [6, 2, 6]
    session = first.cache.sessions[b"a"]
    assert (session.waiting, session.waiting_bytes) == (0, 0)


def test_it_counts_once_while_it_waits_for_a_check_and_then_for_an_id(first: Driver) -> None:
    first.limits = replace(first.limits, session_waiting=1)
    first.restart()
    enter(first, "a")
    context = first.context(b"a", n_ids=1)
    holder = first.alloc(b"a", context, 9)
    waiting = deferred(first, b"a", context, *C, wait_ms=500)
    first.work()
    assert waiting not in first.replies
    assert first.refusal(b"a", alloc(context, 9, wait_ms=500)) is TooMany
    first.ask(b"a", Release(*holder.fields, COMPLETED))
    assert first.replies[waiting].matched_tokens == 6


def test_a_context_that_closes_while_an_alloc_waits(driver: Driver) -> None:
    correlation = deferred(driver, b"a", 1, *C)
    assert driver.ask(b"a", CloseContext(1)) == Done()
    driver.work()
    assert type(driver.replies[correlation]) is UnknownContext


def test_after_the_check_it_waits_for_an_id_like_others(driver: Driver) -> None:
    context = driver.context(b"a", n_ids=1)
    assert context == 3
    waiting = deferred(driver, b"a", context, *A, wait_ms=500)
    hasty = deferred(driver, b"a", context, *A)
    holder = driver.alloc(b"a", context, 9)
    driver.check()
    assert type(driver.replies[hasty]) is NoSequenceFree
    assert waiting not in driver.replies
    driver.ask(b"a", Release(*holder.fields, COMPLETED))
    assert driver.replies[waiting].matched_tokens == 2


def test_its_time_to_wait_for_an_id_begins_after_the_check(driver: Driver) -> None:
    context = driver.context(b"a", n_ids=1)
    driver.alloc(b"a", context, 9)
    correlation = deferred(driver, b"a", context, *A, wait_ms=500)
    driver.pass_time(10)
    assert correlation not in driver.replies
    driver.check()
    driver.pass_time(0.499)
    assert correlation not in driver.replies
    driver.pass_time(0.001)
    assert type(driver.replies[correlation]) is NoSequenceFree


def test_after_the_check_its_reservation_is_backed(driver: Driver) -> None:
    correlation = deferred(driver, b"a", 1, *A, reserve=2)
    driver.check()
    assert correlation not in driver.replies
    assert [type(job) for job in driver.jobs] == [Back, Check]
    driver.back()
    assert driver.replies[correlation].matched_tokens == 2


def test_what_it_would_match_may_be_evicted_while_it_waits_for_an_id(first: Driver) -> None:
    """Then it matches what is checked by then: the next best is not, and is not served."""
    first.store(first.alloc(b"a", 1, 1, 2), 2, 3, 9)
    first.restart()
    enter(first, "a")
    context = first.context(b"a", n_ids=1)
    holder = first.alloc(b"a", context, 9)
    correlation = deferred(first, b"a", context, 1, 2, 3, 5, wait_ms=500)
    first.check()
    (best,) = blocks_checked(first)
    first.check()
    assert states(first)[best[0]] == SEALED
    next_best = {2: 4, 4: 2}[best[0]]
    assert states(first)[next_best] == ADOPTED
    budget = first.cache.budget
    block = next(block for block in budget.oldest_first() if block.slot == best[0])
    for below in [*reversed(block.below()), block]:
        budget.drop(below, Reason.ROOM, [])
    first.ask(b"a", Release(*holder.fields, COMPLETED))
    reply = first.replies[correlation]
    assert (reply.matched_tokens, slots_of(reply.slots)) == (2, [1])


# --- used before it is checked


def on_unchecked(driver: Driver) -> Handle:
    """A sequence of session a whose tokens are those of B, and of one block more, slot 4."""
    handle = driver.alloc(b"a", 1, 9)
    assert driver.ask(b"a", append(handle, 0, *B, 50, 51)) is None
    correlation = driver.asked
    checks = [job for job in driver.jobs if isinstance(job, Check)]
    driver.jobs[:] = [job for job in driver.jobs if not isinstance(job, Check)]
    driver.work()
    driver.jobs[:] = checks
    assert driver.replies[correlation] == Appended(1, 1, 2, 0)
    assert driver.blocks()[(*B, 50, 51)] == 4
    return handle


def read(driver: Driver, handle: Handle) -> tuple[int, list[int]]:
    reply = driver.ask(handle.session, Get(*handle.fields, 0))
    assert isinstance(reply, Blocks)
    return reply.sealed_tokens, slots_of(reply.slots)


def test_an_append_onto_what_is_not_checked_is_readable_when_it_is(driver: Driver) -> None:
    handle = on_unchecked(driver)
    assert read(driver, handle) == (0, [])
    correlation = deferred(driver, b"b", 2, *B, 50, 51)
    driver.work()
    assert read(driver, handle) == (6, [1, 2, 4])
    assert driver.replies[correlation].matched_tokens == 6


def test_if_that_is_damaged_the_sequence_falls_back(driver: Driver) -> None:
    handle = on_unchecked(driver)
    deferred(driver, b"b", 2, *B)
    driver.check()
    driver.check(0)
    assert read(driver, handle) == (2, [1])
    assert sorted(driver.blocks()) == [A, OTHER]
    assert driver.refusal(b"a", append(handle, 6, 60, 61)) is BadPosition
    driver.store(handle, 2, 3, 4)
    assert read(driver, handle)[0] == 4


def test_what_is_evicted_before_it_was_checked_is_forgotten(driver: Driver) -> None:
    assert driver.ask(b"a", Evict("", 0)).blocks == 4
    assert driver.counts() == {}
    driver.check(0)
    assert driver.of_kind(BlocksDamaged) == [], "its slot has other bytes by now, as it may"
    assert driver.cache.counters.damaged_blocks == 0
    assert (driver.jobs, driver.cache.unchecked) == ([], {})


def test_an_alloc_whose_blocks_were_evicted_meanwhile_is_answered(driver: Driver) -> None:
    correlation = deferred(driver, b"a", 1, *C)
    driver.ask(b"b", Evict("", 0))
    driver.work()
    assert driver.replies[correlation] == Allocated(0, 1, 0, 0, b"")


def test_a_budget_full_of_unchecked_blocks_has_room(driver: Driver) -> None:
    handle = driver.alloc(b"a", 1, 9)
    n_slots = driver.cache.budget.unassigned // PAGE
    reserved = deferred(driver, b"b", 2, 9, reserve=2 * (n_slots + 3))
    assert [effect.slot for effect in driver.of_kind(DropRecord)] == [0, 3, 2]
    assert isinstance(driver.jobs[-1], Back)
    driver.work()
    assert isinstance(driver.replies[reserved], Allocated)
    assert driver.blocks() == {A: 1}
    assert driver.append(handle, 0, 10, 11) == Appended(1, 1, 0, 0), "instead of the last one"
    assert driver.refusal(b"a", Append(*handle.fields, 2, *two_more())) is AllLeased


def two_more() -> Any:
    message = append(Handle(b"a", 1, Allocated(0, 1, 0, 0, b"")), 2, 12, 13)
    return message.tokens, message.staged


def test_a_tail_goes_when_the_longer_one_has_been_checked(first: Driver) -> None:
    reader, writer = first.alloc(b"a", 1), first.alloc(b"a", 1)
    first.store(reader, 0, 20)
    first.store(writer, 0, 20, 21)
    assert first.blocks() == {A: 1, B: 2, C: 3, OTHER: 0, (20,): 4, (20, 21): 5}
    first.restart()
    first.work()
    assert first.blocks() == {A: 1, B: 2, C: 3, OTHER: 0, (20, 21): 5}


def test_a_tail_stays_when_the_longer_one_is_damaged(first: Driver) -> None:
    reader, writer = first.alloc(b"a", 1), first.alloc(b"a", 1)
    first.store(reader, 0, 20)
    first.store(writer, 0, 20, 21)
    first.restart()
    while first.jobs:
        (slots,) = blocks_checked(first)
        first.check(*[index for index, slot in enumerate(slots) if slot == 5])
    assert first.blocks() == {A: 1, B: 2, C: 3, OTHER: 0, (20,): 4}
