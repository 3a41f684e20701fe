"""The mutator itself: sessions come and go, who is answered, what is never raised and what is."""

import math

import pytest

from kvd.core import accounting
from kvd.core.cache import Limits
from kvd.core.events import (
    CloseStaging,
    Connected,
    Copied,
    CopyResult,
    Disconnected,
    OpenStaging,
    RefuseSession,
    Reply,
    Requested,
    Ticked,
)
from kvd.core.machine import EVICT_BLOCKS, Core
from kvd_proto.errors import (
    AllLeased,
    BadPayload,
    BudgetTooSmall,
    TooManySessions,
    UnknownSession,
)
from kvd_proto.messages import Evict, Evicted, Flush, Flushed, Ping
from tests.core.driver import PAGE, STAGING, Driver, alloc


def test_a_session_is_charged_with_its_staging() -> None:
    driver = Driver()
    driver.connect("s")
    assert driver.effects == [OpenStaging(b"s", STAGING)]
    totals = accounting.totals(driver.cache)
    assert (totals.staging, totals.unassigned) == (STAGING, totals.budget - STAGING)
    driver.disconnect(b"s")
    assert driver.effects == [CloseStaging(b"s")]
    assert accounting.totals(driver.cache).unassigned == totals.budget
    assert driver.counters.sessions_opened == 1


def test_why_a_client_gets_no_session() -> None:
    driver = Driver(2 * STAGING, max_sessions=2)
    refused = {}
    for name, staging in (("huge", 2 * STAGING + 1), ("a", STAGING), ("big", STAGING + 1)):
        driver.connect(name, staging=staging)
        refused[name] = [type(effect.error) for effect in driver.of_kind(RefuseSession)]
    driver.connect("b", staging=0)
    driver.connect("third", staging=0)
    refused["third"] = [type(effect.error) for effect in driver.of_kind(RefuseSession)]
    assert refused == {
        "huge": [BudgetTooSmall],
        "a": [],
        "big": [AllLeased],
        "third": [TooManySessions],
    }
    assert list(driver.cache.sessions) == [b"a", b"b"]


def test_a_session_that_was_refused_can_be_let_go() -> None:
    """The shell does not tell apart who has a session when a lifeline ends."""
    driver = Driver(STAGING)
    driver.connect("s", staging=STAGING + 1)
    driver.disconnect(b"s")
    assert driver.effects == []


def test_leaving_twice_is_leaving_once() -> None:
    driver = Driver()
    driver.connect("s")
    driver.disconnect(b"s")
    driver.disconnect(b"s")
    assert driver.effects == []


@pytest.mark.parametrize("leaves", [False, True])
def test_the_shell_must_not_give_a_sessions_id_twice(leaves: bool) -> None:
    """Not even while a copy still reads the staging of the first one."""
    driver = Driver()
    driver.connect("s")
    driver.register(b"s")
    driver.append(driver.alloc(b"s", driver.context(b"s")), 0, 1)
    driver.back()
    if leaves:
        driver.disconnect(b"s")
    with pytest.raises(AssertionError, match="id twice"):
        driver.handle(Connected(b"s", "s", 1, 1, "t", 0))


def test_a_session_that_is_unknown_or_has_left_is_told_so() -> None:
    driver = Driver()
    driver.connect("s")
    driver.disconnect(b"s")
    for session in (b"s", b"never"):
        assert driver.refusal(session, Flush(0)) is UnknownSession
        assert driver.of_kind(Reply)[0].session == session
    assert (driver.counters.requests, driver.counters.errors) == (2, 2)


def test_nothing_is_sent_to_a_session_that_has_left() -> None:
    driver = Driver()
    driver.connect("s")
    driver.register(b"s")
    context = driver.context(b"s", n_ids=2)
    handle = driver.alloc(b"s", context)
    driver.append(handle, 0, 1, 2)
    driver.flush(b"s", 1)
    driver.ask(b"s", alloc(context, reserve=2))
    driver.ask(b"s", alloc(context, wait_ms=1000))
    before = dict(driver.replies)
    driver.disconnect(b"s")
    driver.pass_time(2.0)
    driver.work()
    assert driver.replies == before
    assert driver.counts() == {"free": 2}


def test_errors_are_counted_when_they_come() -> None:
    driver = Driver()
    driver.connect("s")
    driver.register(b"s")
    context = driver.context(b"s", n_ids=1)
    driver.alloc(b"s", context)
    driver.ask(b"s", alloc(context, wait_ms=1000))
    assert driver.counters.errors == 0
    driver.pass_time(1.0)
    assert driver.counters.errors == 1
    driver.ask(b"s", alloc(context))
    assert driver.counters.errors == 2


def test_evict_by_request() -> None:
    driver = Driver()
    driver.connect("s")
    driver.register(b"s")
    handle = driver.alloc(b"s", driver.context(b"s"))
    driver.store(handle, 0, 1, 2, 3, 4)
    assert driver.ask(b"s", Evict("", 0)) == Evicted(0, 0)
    driver.disconnect(b"s")
    driver.connect("s")
    assert driver.ask(b"s", Evict("another", 0)) == Evicted(0, 0)
    assert driver.ask(b"s", Evict("m", 1)) == Evicted(1, PAGE)
    assert driver.blocks() == {(1, 2): 0}
    assert driver.ask(b"s", Evict("", 0)) == Evicted(1, PAGE)
    assert driver.evicted() == {"command": 2}


def test_a_message_that_the_shell_answers_is_a_fault_of_ours() -> None:
    core = Core(Limits(1 << 20))
    core.handle(Connected(b"s", "s", 1, 1, "t", 0), 0.0)
    with pytest.raises(AssertionError, match="Ping"):
        core.handle(Requested(b"s", 1, Ping()), 0.0)


def test_one_copy_can_finish_commits_of_several_sessions() -> None:
    driver = Driver()
    for number, name in enumerate(("a", "b", "c"), 1):
        driver.connect(name)
        driver.register(name.encode())
        driver.context(name.encode())
        driver.append(driver.alloc(name.encode(), number), 0, 1, 2)
    driver.back()
    waiting = {}
    for name in (b"a", b"b", b"c"):
        driver.flush(name, 1)
        waiting[name] = driver.asked
    (job,) = driver.jobs
    driver.handle(Copied(job.job, [CopyResult(5, None)]))
    assert all(driver.replies[each] == Flushed(1, []) for each in waiting.values())


def test_time_may_pass_when_nothing_is_due() -> None:
    core = Core(Limits(1 << 20))
    assert core.handle(Ticked(), 5.0) == []
    assert core.next_deadline() is None


def test_staging_of_the_dead_makes_room_for_who_waits() -> None:
    """In the same step: the waiter must not hear that there is no room."""
    driver = Driver(6 * PAGE + STAGING + PAGE, max_sequences=1)
    driver.connect("s")
    driver.register(b"s")
    driver.alloc(b"s", driver.context(b"s"))
    driver.connect("waiting", staging=0)
    driver.register(b"waiting")
    driver.ask(b"waiting", alloc(driver.context(b"waiting"), reserve=4, wait_ms=1000))
    waiting = driver.asked
    driver.disconnect(b"s")
    driver.work()
    assert driver.replies[waiting].seq_id == 0


def test_a_bad_copy_raises_nothing() -> None:
    driver = Driver()
    driver.connect("s")
    driver.register(b"s")
    driver.append(driver.alloc(b"s", driver.context(b"s")), 0, 1)
    driver.back()
    (job,) = driver.jobs
    driver.handle(Disconnected(b"s"))
    driver.handle(Copied(job.job, [CopyResult(0, BadPayload("spoilt"))]))
    assert driver.effects == [CloseStaging(b"s")]


def evictable(n_blocks: int) -> Driver:
    """So many cached blocks, and a session "s"."""
    driver = Driver(1 << 22)
    driver.connect("t")
    driver.register(b"t")
    handle = driver.alloc(b"t", driver.context(b"t"))
    driver.store(handle, 0, *range(2 * n_blocks))
    driver.disconnect(b"t")
    driver.connect("s")
    assert driver.counts() == {"cached": n_blocks}
    return driver


def test_a_long_eviction_lets_others_in_between() -> None:
    n_blocks = 2 * EVICT_BLOCKS + 1
    driver = evictable(n_blocks)
    assert driver.ask(b"s", Evict("", 0)) is None
    first, second = driver.asked, driver.asked + 1
    assert driver.core.next_deadline() == -math.inf
    assert driver.ask(b"s", Evict("", 1)) is None
    for left in (n_blocks - 2 * EVICT_BLOCKS, 0):
        # Its answer to the other eviction was one step of the first one.
        assert driver.counts().get("cached", 0) == left
        if left:
            driver.pass_time(0)
    assert driver.replies[first] == Evicted(n_blocks, n_blocks * PAGE)
    driver.pass_time(0)
    assert driver.replies[second] == Evicted(0, 0)
    assert driver.core.next_deadline() is None


def test_an_eviction_ends_with_its_session() -> None:
    driver = evictable(2 * EVICT_BLOCKS)
    assert driver.ask(b"s", Evict("", 0)) is None
    driver.disconnect(b"s")
    driver.pass_time(0)
    assert driver.core.next_deadline() is None
    assert driver.asked not in driver.replies
