"""What is noted of what happens, and what is kept of it: exact events of exact stories."""

from typing import Any

import pytest

from kvd.core import journal
from kvd.core.journal import Noted
from kvd.core.machine import Core
from kvd_proto.happenings import FIELDS, FREQUENT, Kind
from kvd_proto.messages import Evict, KeepAlive, Release, Unpin
from tests.core.driver import PAGE, Driver


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    driver.cache.budget.journal.is_followed = True
    return driver


def read(driver: Driver, tenant: str | None = None, since: int = 0, **how: Any) -> list[Noted]:
    return driver.cache.budget.journal.read(tenant, since, 500, **how).events


def told(event: Noted) -> dict[str, Any]:
    return dict(zip(FIELDS[event.kind], event.values, strict=True))


def kinds(driver: Driver, since: int = 0) -> list[str]:
    return [event.kind.value for event in read(driver, since=since)]


def last(driver: Driver) -> dict[str, Any]:
    return told(read(driver)[-1])


def test_a_worker_from_hello_to_its_end(driver: Driver) -> None:
    session = driver.connect("worker")
    driver.register(session)
    context = driver.context(session)
    first = driver.alloc(session, context, 1, 2, 3)
    driver.store(first, 0, 1, 2, 3)
    driver.now = 7.0
    second = driver.alloc(session, context, 1, 2, 9)
    driver.ask(session, Release(*second.fields, 0))
    driver.ask(session, Release(*first.fields, 1))
    driver.disconnect(session)
    assert kinds(driver) == [
        "session-opened", "model", "alloc", "seal", "seal", "alloc", "hit", "release", "release",
        "session-gone",
    ]  # fmt: skip
    events = read(driver)
    assert [event.number for event in events] == list(range(10))
    assert [event.when for event in events] == [0.0] * 5 + [7.0] * 5
    assert {event.tenant for event in events} == {"t"}
    assert [event.model for event in events] == ["", *["m"] * 8, ""]
    who = {"client": "worker", "pid": 1}
    of_first = {**who, "context": 1, "seq_id": 0, "generation": 1}
    of_second = {**who, "context": 1, "seq_id": 1, "generation": 2}
    opened, made, miss, seal, tail, alloc, hit, done, failed, gone = map(told, events)
    assert opened == {**who, "uid": 1000, "session": session.hex()[:8], "staging_bytes": 16 * PAGE}
    assert made == {**who, "block_tokens": 2, "stride_bytes": PAGE}
    assert miss == {**of_first, "request": "request", "tokens": 3, "hit_tokens": 0}
    assert seal == {**who, "start": 0, "tokens": 2, "slot": 0}
    assert tail == {**who, "start": 2, "tokens": 1, "slot": 1}
    assert alloc == {**of_second, "request": "request", "tokens": 3, "hit_tokens": 2}
    assert hit == {
        **who, "context": 1, "seq_id": 1, "tokens": 3, "hit_tokens": 2, "blocks": 1,
    }  # fmt: skip
    assert done == {**of_second, "tokens": 2, "outcome": "completed"}
    assert failed == {**of_first, "tokens": 3, "outcome": "failed"}
    assert gone == {
        **who, "session": session.hex()[:8], "reason": "closed", "sequences": 0,
        "connected_seconds": 7.0,
    }  # fmt: skip


def test_every_block_that_goes_says_why(driver: Driver) -> None:
    session = driver.connect()
    driver.register(session)
    handle = driver.alloc(session, driver.context(session))
    driver.store(handle, 0, 1, 2, 3)
    driver.store(handle, 2, 3, 4)  # replaces the open tail
    driver.ask(session, Release(*handle.fields, 0))
    driver.ask(session, Evict("", 1))
    evicted = [told(event) for event in read(driver, kinds=["evict"])]
    assert evicted == [
        {"reason": "superseded", "start": 2, "tokens": 1, "slot": 1},
        {"reason": "command", "start": 2, "tokens": 2, "slot": 2},
    ]


def test_pins_come_and_go(driver: Driver) -> None:
    session = driver.connect()
    driver.register(session)
    driver.store(driver.alloc(session, driver.context(session)), 0, 1, 2)
    at = driver.cache.budget.journal.total
    driver.pin(session, 1, 2)
    driver.ask(session, Unpin("o", ""))
    driver.pin(session, 1, 2, ttl=3000)
    driver.pass_time(3.0)
    assert [(event.kind.value, event.values) for event in read(driver, since=at)] == [
        ("pin", ("o", 2, None)),
        ("unpin", ("o", 2, "asked")),
        ("pin", ("o", 2, 3.0)),
        ("unpin", ("o", 2, "expired")),
    ]


def test_who_is_too_late_or_refused(driver: Driver) -> None:
    session = driver.connect()
    driver.register(session)
    context = driver.context(session)
    driver.alloc(session, context, idle_ms=1500)
    driver.pass_time(2.0)
    assert last(driver) == {
        "client": "s", "pid": 1, "context": 1, "seq_id": 0, "generation": 1, "request": "request",
        "idle_seconds": 2.0,
    }  # fmt: skip
    driver.ask(session, KeepAlive(77, [], []))
    assert last(driver) == {
        "client": "s", "pid": 1, "code": "unknown_context", "message": "no such context is open",
    }  # fmt: skip
    driver.connect("greedy", staging=1 << 40)
    assert last(driver)["code"] == "budget_too_small"
    assert kinds(driver)[-3:] == ["timed-out", "refused", "session-refused"]


def test_a_model_that_gives_way() -> None:
    driver = Driver(max_models=1)
    session = driver.connect()
    driver.register(session, "first")
    driver.store(driver.alloc(session, driver.context(session)), 0, 1, 2)
    driver.disconnect(session)
    driver.register(driver.connect(), "second")
    assert kinds(driver)[-3:] == ["session-opened", "model-gone", "model"]
    assert [(event.model, event.values) for event in read(driver, kinds=["model-gone"])] == [
        ("first", (1,))
    ]


def test_what_an_earlier_daemon_left() -> None:
    driver = Driver()
    session = driver.connect()
    driver.register(session)
    driver.store(driver.alloc(session, driver.context(session)), 0, 1, 2, 3, 4)
    driver.pin(session, 1, 2)
    found = driver.found()
    driver.restart(found, found._replace(arena=2))
    driver.check(1)
    assert [(event.kind.value, event.model, event.values) for event in read(driver)] == [
        ("adopted", "m", (2, 1)),
        ("not-adopted", "m", ("there is another arena of the same model and tenant",)),
        ("damaged", "m", (1,)),
    ]


# --- what is kept


def test_frequent_events_are_noted_only_for_those_who_follow() -> None:
    driver = Driver()
    session = driver.connect()
    driver.register(session)
    handle = driver.alloc(session, driver.context(session))
    driver.store(handle, 0, 1, 2)
    driver.ask(session, Release(*handle.fields, 0))
    driver.ask(session, Evict("", 0))
    driver.disconnect(session)
    assert kinds(driver) == ["session-opened", "model", "session-gone"]


def test_a_slow_reader_is_told_how_much_it_has_lost(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "KEPT", 5)
    driver.core = Core(driver.limits)
    driver.cache.budget.journal.is_followed = True
    session = driver.connect()
    driver.register(session)
    context = driver.context(session)
    for _ in range(4):  # two events each
        driver.ask(session, Release(*driver.alloc(session, context).fields, 0))
    kept = driver.cache.budget.journal.read(None, 0, 500)
    # Frequent ones have not pushed out the rare ones.
    assert [event.number for event in kept.events] == [0, 1, 5, 6, 7, 8, 9]
    assert (kept.next, kept.lost) == (10, 3)
    # In parts, each is told once.
    first = driver.cache.budget.journal.read(None, 1, 2)
    assert ([event.number for event in first.events], first.next, first.lost) == ([1, 5], 6, 3)
    rest = driver.cache.budget.journal.read(None, first.next, 500)
    assert ([event.number for event in rest.events], rest.lost) == ([6, 7, 8, 9], 0)
    none = driver.cache.budget.journal.read(None, 1 << 64, 500)
    assert none == ([], 10, 0)


def test_a_tenant_has_numbers_and_room_of_its_own(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells it what others do, nor can they push out what is its own."""
    monkeypatch.setattr(journal, "KEPT", 5)
    driver.core = Core(driver.limits)
    driver.cache.budget.journal.is_followed = True
    quiet, noisy = driver.connect("q", "quiet"), driver.connect("n", "noisy")
    number = driver.register(quiet)
    driver.alloc(quiet, driver.context(quiet, number))
    context = driver.context(noisy, driver.register(noisy))
    for _ in range(20):
        driver.ask(noisy, Release(*driver.alloc(noisy, context).fields, 0))
    mine = driver.cache.budget.journal.read("quiet", 0, 500)
    assert [(event.own, event.kind) for event in mine.events] == [
        (0, "session-opened"), (1, "model"), (2, "alloc"),
    ]  # fmt: skip
    assert (mine.next, mine.lost) == (3, 0)
    theirs = driver.cache.budget.journal.read("noisy", 0, 500)
    assert (theirs.next, theirs.lost) == (42, 35)
    everything = driver.cache.budget.journal.read(None, 0, 500)
    assert [event.tenant for event in everything.events].count("quiet") == 3
    assert everything.lost == 35
    assert driver.cache.budget.journal.read("nobody", 5, 500) == ([], 0, 0)


def test_kinds_and_models_are_chosen_and_a_reading_is_bounded(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = driver.connect()
    driver.register(session)
    other = driver.register(session, "other")
    for number in (1, other):
        driver.alloc(session, driver.context(session, number))
    assert [event.model for event in read(driver, kinds=["alloc"])] == ["m", "other"]
    assert [event.kind for event in read(driver, model="other")] == ["model", "alloc"]
    monkeypatch.setattr(journal, "LOOKED_AT", 3)
    cut = driver.cache.budget.journal.read(None, 0, 500, ["alloc"])
    assert cut == ([], 3, 0)
    assert len(driver.cache.budget.journal.read(None, 3, 500, ["alloc"]).events) == 2


def test_every_kind_has_its_fields_and_the_frequent_ones_exist() -> None:
    assert set(FIELDS) == set(Kind)
    assert set(Kind) > FREQUENT
