"""What one session may have: a typed answer at the limit, room again below it, others untouched."""

from typing import Any

import pytest

from kvd_proto import errors
from kvd_proto.messages import (
    COMPLETED,
    Allocated,
    CloseContext,
    ContextOpened,
    OpenContext,
    Release,
)
from tests.core.driver import PAGE, Driver, alloc, append, model, no_space


def two(**limits: Any) -> Driver:
    """Two sessions with a model and a context each: 1 is s's, 2 is other's."""
    driver = Driver(**limits)
    for name in ("s", "other"):
        driver.context(driver.connect(name), driver.register(name.encode()))
    return driver


def release(driver: Driver, handle: Any) -> None:
    driver.ask(handle.session, Release(*handle.fields, COMPLETED))


def test_sequences() -> None:
    driver = two(max_sequences=4, session_sequences=3)
    handles = [driver.alloc(b"s", 1) for _ in range(3)]
    error = driver.ask(b"s", alloc(1))
    assert type(error) is errors.SequenceLimit
    assert error.details == {"max_session_sequences": 3}
    assert driver.refusal(b"s", OpenContext(1, 2, [0])) is errors.SequenceLimit
    last = driver.alloc(b"other", 2)
    assert driver.refusal(b"other", alloc(2)) is errors.SequenceLimit, "now the daemon is full"
    release(driver, handles[0])
    driver.alloc(b"s", 1)
    release(driver, last)


def test_who_waits_for_its_own_limit_does_not_hold_up_others() -> None:
    driver = two(max_sequences=10, session_sequences=2)
    first = driver.alloc(b"s", 1)
    driver.alloc(b"s", 1)
    assert driver.ask(b"s", alloc(1, wait_ms=1000)) is None
    waiting = driver.asked
    for _ in range(2):
        driver.alloc(b"other", 2)
    release(driver, first)
    assert isinstance(driver.replies[waiting], Allocated)
    assert driver.ask(b"s", alloc(1, wait_ms=1000)) is None
    waiting = driver.asked
    driver.pass_time(1.0)
    assert type(driver.replies[waiting]) is errors.SequenceLimit
    assert driver.replies[waiting].details["max_session_sequences"] == 2


def test_allocs_that_wait() -> None:
    driver = two(session_waiting=2)
    handles = [driver.alloc(b"s", 1) for _ in range(4)]
    for _ in range(2):
        assert driver.ask(b"s", alloc(1, wait_ms=1000)) is None
    assert driver.refusal(b"s", alloc(1, wait_ms=1000)) is errors.TooMany
    for _ in range(4):
        driver.alloc(b"other", 2)
    assert driver.ask(b"other", alloc(2, wait_ms=1000)) is None
    release(driver, handles[0])
    assert driver.ask(b"s", alloc(1, wait_ms=1000)) is None
    driver.pass_time(1.0)
    assert driver.ask(b"s", alloc(1, wait_ms=1000)) is None
    assert driver.refusal(b"s", alloc(1)) is errors.NoSequenceFree, "one that does not wait"


def test_tokens_of_allocs_that_wait() -> None:
    driver = two(session_waiting_bytes=40)
    for _ in range(4):
        driver.alloc(b"s", 1)
    assert driver.ask(b"s", alloc(1, *range(6), wait_ms=1000)) is None
    assert driver.refusal(b"s", alloc(1, *range(5), wait_ms=1000)) is errors.TooMany
    assert driver.ask(b"s", alloc(1, *range(4), wait_ms=1000)) is None
    driver.ask(b"s", CloseContext(1))
    assert driver.cache.sessions[b"s"].waiting_bytes == 0


def test_contexts() -> None:
    driver = two(session_contexts=2)
    assert isinstance(driver.ask(b"s", OpenContext(1, 4, [])), ContextOpened)
    assert driver.refusal(b"s", OpenContext(1, 4, [])) is errors.TooMany
    driver.context(b"other")
    driver.ask(b"s", CloseContext(1))
    driver.context(b"s")


def test_models_of_a_session_and_of_a_tenant() -> None:
    driver = two(session_models=2, max_models=3)
    driver.register(b"s", "second")
    assert driver.refusal(b"s", model("third")) is errors.TooMany
    assert driver.register(b"s") == 1, "it has this one"
    driver.register(b"other", "third")
    driver.connect("again")
    error = driver.ask(b"again", model("fourth"))
    assert type(error) is errors.TooMany
    assert error.details == {"tenant": "t", "max_models": 3}
    driver.register(driver.connect("of another", tenant="u"), "fourth")


def test_commits_and_flushes() -> None:
    driver = two(session_commits=2)
    handle = driver.alloc(b"s", 1)
    for start in (0, 2):
        driver.append(handle, start, 1, 2)
    assert driver.refusal(b"s", append(handle, 4, 1, 2)) is errors.TooMany
    assert driver.append(driver.alloc(b"other", 2), 0, 1, 2).joined == 1
    for _ in range(2):
        assert driver.flush(b"s", 2) is None
    assert type(driver.flush(b"s", 2)) is errors.TooMany
    driver.work()
    assert driver.flush(b"s", 2).completed == 2
    driver.store(handle, 4, 1, 2)


@pytest.mark.parametrize("end", ["release", "append", "no memory", "disconnect"])
def test_room_set_aside(end: str) -> None:
    driver = two(session_reserved=4 * PAGE)
    assert driver.ask(b"s", alloc(1, reserve=6)) is None
    reserving = driver.asked
    if end == "no memory":
        driver.back(no_space())
    else:
        driver.work()
    if end != "no memory":
        error = driver.ask(b"s", alloc(1, reserve=4))
        assert type(error) is errors.TooMany
        assert error.details == {
            "asked_bytes": 2 * PAGE,
            "reserved_bytes": 3 * PAGE,
            "max_reserved": 4 * PAGE,
        }
        assert len(driver.cache.sessions[b"s"].contexts[1].open) == 1, "its id is free again"
    assert driver.ask(b"other", alloc(2, reserve=8)) is None
    driver.work()
    if end == "release":
        (handle,) = driver.cache.contexts[1].open.values()
        driver.ask(b"s", Release(1, handle.seq_id, handle.generation, COMPLETED))
    elif end == "append":
        reply = driver.replies[reserving]
        fields = driver.ask(b"s", append(_Handle(1, reply), 0, 1, 2, 3, 4))
        assert fields.stored == 2
        driver.work()
        assert driver.cache.sessions[b"s"].reserved.n_bytes == PAGE
        return
    elif end == "disconnect":
        driver.disconnect(b"s")
        driver.context(driver.connect("s"), driver.register(b"s"))
    context = max(driver.cache.sessions[b"s"].contexts)
    driver.ask(b"s", alloc(context, reserve=8))
    driver.work()
    assert driver.cache.sessions[b"s"].reserved.n_bytes == 4 * PAGE


class _Handle:
    def __init__(self, context: int, reply: Allocated) -> None:
        self.fields = (context, reply.seq_id, reply.generation)


def test_more_than_fits_at_all_says_so() -> None:
    driver = two(session_reserved=4 * PAGE)
    assert driver.refusal(b"s", alloc(1, reserve=4000)) is errors.BudgetTooSmall
