"""Arenas that nobody uses: they go when their tenant registers one model too many, and empty ones
when there is no room. So no client can lock others out for good by what it registers."""

import pytest

from kvd.core.events import CreateArena, DropRecord, RemoveArena, ShareArena
from kvd.core.tenants import TenantRule
from kvd_proto.errors import AllLeased, BudgetTooSmall, ModelTooLarge, OverQuota, TooMany
from kvd_proto.messages import COMPLETED, Evict, OpenContext, Release
from tests.core.driver import PAGE, SMALL_DIRECTORY, STAGING, Driver, alloc, model

FIRST_DIRECTORY = 5 * PAGE


@pytest.fixture
def driver() -> Driver:
    """A tenant may have two models. The session s has registered the first."""
    driver = Driver(max_models=2)
    driver.register(driver.connect("s"))
    return driver


def visit(driver: Driver, name: str, *tokens: int) -> int:
    """A client registers a model, stores a prompt if there is one, and leaves; the model's
    number."""
    session = driver.connect(f"client of {name}")
    number = driver.register(session, name)
    if tokens:
        handle = driver.alloc(session, driver.context(session, number), *tokens)
        driver.store(handle, 0, *tokens)
        driver.ask(session, Release(*handle.fields, COMPLETED))
    driver.disconnect(session)
    return number


def test_an_empty_one_makes_room_for_another(driver: Driver) -> None:
    assert visit(driver, "second") == 2
    before = driver.cache.budget.unassigned
    assert driver.register(b"s", "third") == 3
    kinds = [type(effect) for effect in driver.effects[:3]]
    assert kinds == [RemoveArena, CreateArena, ShareArena]
    assert driver.effects[0] == RemoveArena(2)
    assert driver.cache.budget.unassigned == before
    assert driver.refusal(b"s", OpenContext(2, 1, [])) is not None
    # One of that name is another one from now on.
    driver.disconnect(b"s")
    assert visit(driver, "second") == 4


def test_one_that_a_session_has_registered_stays(driver: Driver) -> None:
    driver.register(driver.connect("other"), "second")
    error = driver.ask(b"s", model("third"))
    assert type(error) is TooMany
    assert error.details == {"tenant": "t", "max_models": 2}
    driver.disconnect(b"other")
    assert driver.register(b"s", "third") == 3


def test_another_tenants_stays(driver: Driver) -> None:
    visit(driver, "second")
    stranger = driver.connect("stranger", tenant="u")
    driver.register(stranger)
    assert driver.of_kind(RemoveArena) == []
    driver.register(stranger, "second")
    assert driver.of_kind(RemoveArena) == []
    assert driver.refusal(stranger, model("third")) is TooMany


def test_of_those_with_blocks_the_one_goes_that_was_unused_for_longest() -> None:
    """A client that leaves a block in each model it registers locks nobody out either."""
    driver = Driver(max_models=3)
    assert [visit(driver, name, 1, 2, 3, 4) for name in ("a", "b", "c")] == [1, 2, 3]
    visit(driver, "a", 5, 6)
    driver.connect("s")
    assert driver.register(b"s", "d") == 4
    assert driver.of_kind(RemoveArena) == [RemoveArena(2)]
    assert driver.of_kind(DropRecord) == [], "the directory goes as a whole"
    assert driver.evicted() == {"arena": 2}
    assert {arena for arena, _ in driver.lru()} == {1, 3}


def test_an_empty_one_goes_before_one_with_blocks(driver: Driver) -> None:
    driver.disconnect(b"s")
    visit(driver, "second", 1, 2)
    driver.connect("s")
    driver.register(b"s", "third")
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)]


def test_one_in_which_a_copy_is_under_way_stays(driver: Driver) -> None:
    session = driver.connect("dead")
    handle = driver.alloc(session, driver.context(session, driver.register(session, "second")))
    driver.append(handle, 0, 1, 2)
    driver.disconnect(session)
    assert driver.refusal(b"s", model("third")) is TooMany, "its slot is being backed"
    driver.back()
    assert driver.register(b"s", "third") == 3


def test_one_that_clients_of_before_may_read_stays() -> None:
    driver = Driver(max_models=1)
    visit(driver, "first", 1, 2)
    driver.restart(driver.found(has_readers=True))
    driver.connect("s")
    assert driver.refusal(b"s", model("second")) is TooMany
    driver.work()
    assert driver.refusal(b"s", model("second")) is TooMany, "checked, but read still"
    driver.readers_gone()
    assert driver.register(b"s", "second") == 2


def test_one_that_is_being_checked_goes_and_the_check_means_nothing() -> None:
    driver = Driver(max_models=2)
    visit(driver, "first", 1, 2)
    visit(driver, "second", 1, 2)
    driver.restart()
    driver.connect("s")
    driver.register(b"s", "third")
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)]
    driver.check(0)
    assert driver.cache.counters.damaged_blocks == 0
    driver.work()
    assert driver.cache.unchecked == {}
    assert driver.blocks(2) == {(1, 2): 0}


def test_for_a_model_that_cannot_be_nothing_goes(driver: Driver) -> None:
    visit(driver, "second")
    assert driver.refusal(b"s", model("huge", pages=512)) is ModelTooLarge
    assert driver.of_kind(RemoveArena) == []
    assert driver.register(b"s", "second") == 2


def test_if_it_cannot_be_made_in_the_end_the_other_has_gone_all_the_same() -> None:
    driver = Driver(2 * FIRST_DIRECTORY + STAGING, max_models=2)
    visit(driver, "first")
    driver.register(driver.connect("s", staging=0), "second")
    driver.connect("large", staging=FIRST_DIRECTORY + STAGING)
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)], "its directory made room"
    assert driver.refusal(b"s", model("third")) is AllLeased


# --- for want of room


def cramped(name: str = "mine") -> Driver:
    """A budget for two directories, of which one is of a model that nobody uses any more and that
    is empty; s has registered and opened the other. Nobody has a staging."""
    driver = Driver(2 * SMALL_DIRECTORY)
    session = driver.connect("before", staging=0)
    number = driver.register(session, "theirs")
    driver.ask(session, alloc(driver.context(session, number), reserve=2))
    driver.work()
    driver.disconnect(session)
    session = driver.connect("s", staging=0)
    driver.context(session, driver.register(session, name))
    driver.ask(session, Evict("", 0))
    arenas = driver.cache.budget.arenas.values()
    assert [arena.directory_bytes for arena in arenas] == [SMALL_DIRECTORY, FIRST_DIRECTORY]
    assert driver.cache.budget.unassigned == PAGE
    return driver


def test_an_empty_ones_directory_makes_room_for_slots() -> None:
    driver = cramped()
    assert driver.ask(b"s", alloc(1 + 1, reserve=2 * 6)) is None
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)]
    driver.work()
    assert driver.cache.budget.unassigned == 0
    assert driver.counts(2) == {"filling": 6}


def test_for_more_than_that_makes_room_for_it_stays() -> None:
    driver = cramped()
    assert driver.refusal(b"s", alloc(1 + 1, reserve=2 * 7)) is BudgetTooSmall
    assert driver.of_kind(RemoveArena) == []


def test_it_makes_room_for_a_staging_and_for_another_directory() -> None:
    driver = cramped()
    driver.connect("writer", staging=2 * PAGE)
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)]
    driver.disconnect(b"writer")
    driver = cramped()
    assert driver.register(b"s", "another") == 3
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)]


def test_the_directory_of_one_that_is_registered_makes_no_room() -> None:
    driver = cramped()
    driver.register(driver.connect("other", staging=0), "theirs")
    assert driver.refusal(b"s", alloc(1 + 1, reserve=2 * 5)) is BudgetTooSmall
    assert driver.refusal(b"s", model("another")) is BudgetTooSmall


def test_one_with_blocks_gives_them_first_the_oldest_of_all_first() -> None:
    """Only when it has none left does it go."""
    driver = Driver(2 * SMALL_DIRECTORY + STAGING + 2 * PAGE)
    visit(driver, "theirs", 1, 2)
    session = driver.connect("s", staging=0)
    context = driver.context(session, driver.register(session, "mine"))
    n_slots = driver.cache.budget.unassigned // PAGE - 1
    driver.ask(session, alloc(context, reserve=2 * n_slots))
    driver.work()
    assert driver.of_kind(RemoveArena) == []
    driver.ask(session, alloc(context, reserve=2))
    assert driver.of_kind(DropRecord) == [DropRecord(1, 0)]
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)]


def test_a_quota_counts_with_them_too() -> None:
    rule = TenantRule("t", quota=2 * SMALL_DIRECTORY)
    driver = Driver(6 * SMALL_DIRECTORY, tenants=(rule,))
    session = driver.connect("before", staging=0)
    driver.register(session, "theirs")
    driver.disconnect(session)
    session = driver.connect("s", staging=0)
    context = driver.context(session, driver.register(session, "mine"))
    assert driver.ask(session, alloc(context, reserve=2 * 6)) is None
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)]
    driver.work()
    assert driver.refusal(session, alloc(context, reserve=2)) is OverQuota
