"""A request may ask that nothing of it is stored, or that nothing is used for it."""

import pytest

from kvd_proto.errors import BadMessage, NotStored
from kvd_proto.messages import COMPLETED, Appended, Get, Release
from tests.core.driver import Driver, alloc, append


@pytest.fixture
def driver() -> Driver:
    """(1, 2) and (3, 4) are cached."""
    made = Driver()
    made.connect("s")
    made.register(b"s")
    made.context(b"s")
    handle = made.alloc(b"s", 1)
    made.store(handle, 0, 1, 2, 3, 4)
    made.ask(b"s", Release(*handle.fields, COMPLETED))
    return made


def test_what_is_not_to_be_used_is_not_matched(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1, 1, 2, 3, 4, use=0)
    assert (handle.matched, handle.slots) == (0, [])
    assert driver.counts()["cached"] == 2, "and it leases nothing"
    counters = driver.counters
    assert (counters.sequences_not_matched, counters.queried_tokens) == (1, 0)


def test_it_may_be_stored_all_the_same_and_is_there_already(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1, 1, 2, 3, 4, use=0)
    driver.append(handle, 0, 1, 2, 3, 4, 5, 6)
    correlation = driver.asked
    driver.work()
    assert driver.replies[correlation] == Appended(2, 1, 2, 0)
    assert (1, 2, 3, 4, 5, 6) in driver.blocks()


def test_what_is_not_to_be_stored_takes_no_append(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1, 1, 2, 3, 4, 5, store=0)
    assert handle.matched == 4, "it is used all the same"
    before = driver.blocks()
    assert driver.refusal(b"s", append(handle, 4, 5, 6)) is NotStored
    # Whatever else may be wrong with it.
    assert driver.refusal(b"s", append(handle, 99)) is NotStored
    assert driver.blocks() == before
    assert driver.ask(b"s", Get(*handle.fields, 0)).sealed_tokens == 4
    assert driver.counters.sequences_not_stored == 1


def test_nothing_is_reserved_for_what_is_not_to_be_stored(driver: Driver) -> None:
    assert driver.refusal(b"s", alloc(1, 1, 2, reserve=2, store=0)) is BadMessage
    assert driver.counters.sequences_not_stored == 0


def test_who_waits_for_an_id_is_not_matched_or_stored_later_either(driver: Driver) -> None:
    context = driver.context(b"s", n_ids=1)
    holder = driver.alloc(b"s", context)
    driver.ask(b"s", alloc(context, 1, 2, wait_ms=1000, use=0, store=0))
    waiting = driver.asked
    driver.ask(b"s", Release(*holder.fields, COMPLETED))
    reply = driver.replies[waiting]
    assert reply.matched_tokens == 0
    (sequence,) = driver.cache.contexts[context].open.values()
    assert not sequence.stores


def test_what_is_not_to_be_used_waits_for_no_check(driver: Driver) -> None:
    """An earlier daemon left the blocks, and they are not checked yet."""
    driver.restart()
    driver.connect("s")
    driver.register(b"s")
    context = driver.context(b"s")
    assert driver.ask(b"s", alloc(context, 1, 2)) is None
    assert driver.ask(b"s", alloc(context, 1, 2, use=0)).matched_tokens == 0
