"""Pins: what stays without a lease, for how long, what it counts as, and what it costs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvd.core import accounting, recount
from kvd.core.arenas import Arena
from kvd.core.events import (
    BackPins,
    Connected,
    DropPin,
    FoundPin,
    RemoveArena,
    RenewPin,
    WritePin,
)
from kvd.core.pins import pins_bytes_for
from kvd_proto.errors import AllLeased, NoSpace, OverQuota, TooMany, UnknownModel
from kvd_proto.layout import PIN_BYTES
from kvd_proto.messages import (
    COMPLETED,
    Evict,
    Evicted,
    Pin,
    Pinned,
    Release,
    Unpin,
    Unpinned,
)
from tests.core.driver import (
    BUDGET,
    FULL_DIRECTORY,
    PAGE,
    SMALL_DIRECTORY,
    STAGING,
    Driver,
    model,
    no_space,
    packed,
)
from tests.core.test_quota import Tenants

CHAIN = (1, 2, 3, 4, 5)
A, B, C = CHAIN[:2], CHAIN[:4], CHAIN


@pytest.fixture
def driver() -> Driver:
    """A chain of two full blocks and an open tail is cached; and another block."""
    driver = Driver(max_pins=3)
    driver.connect()
    driver.register(b"s")
    context = driver.context(b"s", n_ids=8)
    for tokens in (CHAIN, (8, 9)):
        handle = driver.alloc(b"s", context)
        driver.store(handle, 0, *tokens)
        driver.ask(b"s", Release(*handle.fields, COMPLETED))
    return driver


def paths(driver: Driver) -> set[tuple[int, ...]]:
    return set(driver.blocks())


def evict_all(driver: Driver) -> int:
    reply = driver.ask(b"s", Evict("", 0))
    assert isinstance(reply, Evicted)
    return reply.blocks


# --- what is kept


def test_a_pin_keeps_a_block_and_all_above_it(driver: Driver) -> None:
    assert driver.pin(b"s", *B) == Pinned(4)
    assert driver.counts() == {"pinned": 2, "cached": 2}
    assert evict_all(driver) == 2
    assert paths(driver) == {A, B}
    assert driver.ask(b"s", Unpin("o", "")) == Unpinned(1)
    assert evict_all(driver) == 2


def test_it_is_the_match_of_an_alloc_that_is_pinned(driver: Driver) -> None:
    """Exact to the token: 4 of the third block's 1 token and more, or of none."""
    assert driver.pin(b"s", 1, 2, 3, 7) == Pinned(3)
    assert evict_all(driver) == 2
    assert paths(driver) == {A, B}
    assert driver.pin(b"s", 9, 9) == Pinned(0)
    assert driver.pin(b"s") == Pinned(0)
    assert driver.cache.budget.tenants["t"].pins == 1


def test_it_outlives_the_session_that_made_it(driver: Driver) -> None:
    driver.pin(b"s", *C)
    driver.disconnect(b"s")
    driver.connect("s2")
    driver.ask(b"s2", Evict("", 0))
    assert paths(driver) == {A, B, C}


def test_several_owners_may_pin_a_block_and_each_ends_its_own(driver: Driver) -> None:
    driver.pin(b"s", *B, owner="o")
    driver.pin(b"s", *B, owner="p")
    driver.pin(b"s", *C, owner="p")
    assert driver.ask(b"s", Unpin("p", "m")) == Unpinned(2)
    assert driver.counts() == {"pinned": 2, "cached": 2}
    assert driver.ask(b"s", Unpin("p", "")) == Unpinned(0)
    assert driver.ask(b"s", Unpin("o", "other")) == Unpinned(0)
    assert driver.ask(b"s", Unpin("o", "m")) == Unpinned(1)
    assert driver.counts() == {"cached": 4}


def test_what_is_leased_counts_as_active_whether_pinned_or_not(driver: Driver) -> None:
    driver.pin(b"s", *B)
    handle = driver.alloc(b"s", driver.context(b"s"), *C)
    assert driver.counts() == {"active": 3, "cached": 1}
    driver.ask(b"s", Unpin("o", ""))
    assert driver.counts() == {"active": 3, "cached": 1}
    driver.pin(b"s", *B)
    driver.ask(b"s", Release(*handle.fields, COMPLETED))
    assert driver.counts() == {"pinned": 2, "cached": 2}


def test_what_is_unpinned_is_evicted_last_and_tail_first(driver: Driver) -> None:
    driver.pin(b"s", *B)
    driver.ask(b"s", Unpin("o", ""))
    assert driver.lru() == [(1, C), (1, (8, 9)), (1, B), (1, A)]


def test_a_pinned_tail_stays_when_a_longer_block_replaces_it(driver: Driver) -> None:
    driver.pin(b"s", *C)
    handle = driver.alloc(b"s", driver.context(b"s"), *B)
    driver.store(handle, 4, 5, 6)
    assert {C, (*C, 6)} <= paths(driver)
    driver.restart()
    driver.check()
    assert {C, (*C, 6)} <= paths(driver), "also when both are found again, and checked"
    driver.connect()
    driver.ask(b"s", Unpin("o", ""))
    assert C not in paths(driver)
    assert (*C, 6) in paths(driver)


# --- for how long


def test_a_pin_ends_by_itself(driver: Driver) -> None:
    driver.pin(b"s", *B, ttl=2500)
    assert driver.core.next_deadline() == driver.now + 2.5
    driver.pass_time(2.25)
    assert driver.counts() == {"pinned": 2, "cached": 2}
    driver.pass_time(0.25)
    assert driver.of_kind(DropPin) == [DropPin(1, 0)]
    assert driver.counts() == {"cached": 4}
    assert driver.core.next_deadline() is None


@pytest.mark.parametrize(("second", "due"), [(500, 1.5), (60_000, 61.0), (0, None)])
def test_another_pin_of_the_owner_replaces_the_end(
    driver: Driver, second: int, due: float | None
) -> None:
    driver.pin(b"s", *B, ttl=10_000)
    driver.pass_time(1.0)
    driver.pin(b"s", *B, ttl=second)
    assert driver.of_kind(RenewPin) == [RenewPin(1, 0, due or 0.0)]
    assert driver.cache.budget.tenants["t"].pins == 1
    assert driver.core.next_deadline() == due
    driver.pass_time(100.0)
    assert driver.counts() == ({"pinned": 2, "cached": 2} if due is None else {"cached": 4})


def test_renewing_for_ever_does_not_gather_deadlines(driver: Driver) -> None:
    for _ in range(1000):
        driver.pin(b"s", *B, ttl=10_000)
    assert len(driver.cache.deadlines) < 200


# --- what it costs


def test_the_directory_gets_a_page_for_pins_when_it_needs_one(driver: Driver) -> None:
    before = accounting.totals(driver.cache)
    assert driver.ask(b"s", driver.pin_message(*B)) is None, "it waits for memory"
    assert driver.of_kind(BackPins) == [BackPins(driver.jobs[0].job, 1, b"s", PAGE)]
    assert accounting.totals(driver.cache).directory == before.directory + PAGE
    assert driver.counts() == {"active": 2, "cached": 2}, "held meanwhile"
    driver.back()
    assert driver.of_kind(WritePin)[0][:2] == (1, 0)
    assert driver.replies[driver.asked] == Pinned(4)
    assert driver.ask(b"s", driver.pin_message(*C)) == Pinned(5), "at once: there is memory"
    assert accounting.totals(driver.cache).directory == before.directory + PAGE


def test_pins_that_come_while_it_grows_wait_together() -> None:
    """More than there is room for in the first page."""
    per_page = PAGE // PIN_BYTES
    driver = Driver(max_pins=1000)
    driver.connect()
    driver.register(b"s")
    handle = driver.alloc(b"s", driver.context(b"s"))
    driver.store(handle, 0, *B)
    asked = []
    for number in range(per_page + 2):
        assert driver.ask(b"s", driver.pin_message(*B, owner=f"o{number}")) is None
        asked.append(driver.asked)
    assert len(driver.jobs) == 1
    driver.back()
    assert [driver.replies.get(each) for each in asked] == [Pinned(4)] * per_page + [None] * 2
    driver.back()
    assert [driver.replies[each] for each in asked] == [Pinned(4)] * (per_page + 2)
    arena = driver.cache.budget.arenas[1]
    assert arena.pins.n_bytes == arena.pins.backed == 2 * PAGE


def test_no_more_pins_wait_than_there_may_be() -> None:
    driver = Driver(max_pins=2)
    driver.connect()
    driver.register(b"s")
    handle = driver.alloc(b"s", driver.context(b"s"))
    driver.store(handle, 0, *B)
    for owner in "ab":
        assert driver.ask(b"s", driver.pin_message(*B, owner=owner)) is None
    assert driver.refusal(b"s", driver.pin_message(*B, owner="c")) is TooMany
    driver.back()
    assert driver.cache.budget.tenants["t"].pins == 2


def test_no_memory_for_a_pin_is_an_answer_and_the_next_one_asks_again(driver: Driver) -> None:
    driver.ask(b"s", driver.pin_message(*B))
    driver.back(no_space())
    assert isinstance(driver.replies[driver.asked], NoSpace)
    assert driver.counts() == {"cached": 4}
    before = accounting.totals(driver.cache)
    assert driver.pin(b"s", *B) == Pinned(4)
    assert accounting.totals(driver.cache).directory == before.directory, "charged once"


def test_a_session_that_ends_while_its_pin_waits_has_pinned_nothing(driver: Driver) -> None:
    driver.ask(b"s", driver.pin_message(*B))
    driver.disconnect(b"s")
    assert driver.counts() == {"active": 2, "cached": 2}
    driver.back()
    assert driver.counts() == {"cached": 4}
    assert driver.of_kind(WritePin) == []


def test_places_are_used_again(driver: Driver) -> None:
    for tokens in (A, B, C):
        driver.pin(b"s", *tokens, owner=str(len(tokens)))
    driver.ask(b"s", Unpin("4", ""))
    driver.pin(b"s", 8, 9)
    assert driver.of_kind(WritePin)[0].place == 1
    assert sorted(driver.pins[1]) == [0, 1, 2]


def test_a_tenant_has_so_many_pins_and_no_more(driver: Driver) -> None:
    for owner in "abc":
        driver.pin(b"s", *A, owner=owner)
    assert driver.refusal(b"s", driver.pin_message(*B, owner="d")) is TooMany
    assert driver.ask(b"s", driver.pin_message(*A, owner="c", ttl=9)) == Pinned(2), "renewed"
    driver.ask(b"s", Unpin("a", ""))
    assert driver.ask(b"s", driver.pin_message(*B, owner="d")) == Pinned(4)


def test_an_unknown_model_cannot_be_pinned(driver: Driver) -> None:
    assert driver.refusal(b"s", Pin(bytes(32), packed(1), "o", 0)) is UnknownModel
    driver.connect("other", tenant="u")
    assert driver.refusal(b"other", driver.pin_message(*A)) is UnknownModel


def test_what_is_pinned_is_not_given_up_for_others() -> None:
    """The budget has room for four blocks, and for pins."""
    driver = Driver(FULL_DIRECTORY - 5 * PAGE + STAGING + 5 * PAGE)
    driver.connect()
    driver.register(b"s")
    context = driver.context(b"s")
    handle = driver.alloc(b"s", context)
    driver.store(handle, 0, *B)
    driver.ask(b"s", Release(*handle.fields, COMPLETED))
    driver.pin(b"s", *B)
    handle = driver.alloc(b"s", context)
    driver.store(handle, 0, 21, 22, 23, 24)
    driver.append(handle, 4, 25, 26)
    error = driver.replies[driver.asked]
    assert isinstance(error, AllLeased)
    assert error.details["pinned_bytes"] == 2 * PAGE
    assert paths(driver) >= {A, B}
    driver.ask(b"s", Unpin("o", ""))
    driver.store(handle, 4, 25, 26)
    assert B not in paths(driver)


def test_a_pin_does_not_evict_what_it_is_to_pin() -> None:
    """There is no page left for the directory but that of the block itself."""
    driver = Driver(FULL_DIRECTORY - 5 * PAGE + STAGING + PAGE)
    driver.connect()
    driver.register(b"s")
    handle = driver.alloc(b"s", driver.context(b"s"))
    driver.store(handle, 0, *A)
    driver.ask(b"s", Release(*handle.fields, COMPLETED))
    assert driver.refusal(b"s", driver.pin_message(*A)) is AllLeased
    assert paths(driver) == {A}
    assert driver.counts() == {"cached": 1}


def test_what_a_tenant_pins_counts_against_its_quota() -> None:
    driver = Tenants(3, None)
    driver.put("a", 1, 2)
    assert driver.pin(b"a", 1) == driver.pin(b"a", 2) == Pinned(1)
    handle = driver.alloc(b"a", driver.contexts["a"])
    driver.append(handle, 0, 3)
    assert isinstance(driver.replies[driver.asked], OverQuota), "the pins have taken a page, too"
    assert paths(driver) == {(1,), (2,)}
    assert accounting.totals(driver.cache, driver.cache.budget.tenants["a"]).pinned == 2 * PAGE


def test_an_administrator_ends_pins_of_all_tenants_and_others_their_own() -> None:
    driver = Tenants(None, None)
    driver.put("a", 1)
    driver.put("b", 1)
    assert driver.pin(b"a", 1) == driver.pin(b"b", 1, arena=2) == Pinned(1)
    driver.handle(Connected(b"x", "x", 1, 1, "b", 0, administrator=False))
    tenants = driver.cache.budget.tenants
    rows = accounting.report_of_pins(driver.cache, driver.now, tenants["b"])
    assert [(row["tenant"], row["tokens"]) for row in rows] == [("b", 1)]
    assert driver.ask(b"x", Unpin("o", "")) == Unpinned(1)
    assert driver.ask(b"a", Unpin("o", "")) == Unpinned(1)
    assert accounting.report_of_pins(driver.cache, driver.now) == []


# --- arenas that nobody uses


def test_an_arena_with_a_pin_is_not_given_up() -> None:
    """Nor is one whose pin waits for memory. When the pins have ended, all of it goes."""
    driver = Driver(max_models=1)
    driver.connect()
    driver.register(b"s")
    handle = driver.alloc(b"s", driver.context(b"s"))
    driver.store(handle, 0, *B)
    driver.disconnect(b"s")
    driver.connect("t")
    driver.ask(b"t", driver.pin_message(*B))
    assert driver.refusal(b"t", model("second")) is TooMany
    driver.back()
    assert driver.refusal(b"t", model("second")) is TooMany
    assert driver.ask(b"t", Unpin("o", "")) == Unpinned(1)
    driver.disconnect(b"t")
    driver.connect("u", staging=0)
    driver.register(b"u", "second")
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)]
    assert accounting.totals(driver.cache).directory == 5 * PAGE
    assert driver.refusal(b"u", driver.pin_message(*B)) is UnknownModel


def test_the_page_of_its_pins_is_given_up_for_others_too() -> None:
    """An empty arena that nobody uses makes room with all that its directory has."""
    driver = Driver(2 * SMALL_DIRECTORY + PAGE)
    driver.connect("before", staging=STAGING // 4)
    driver.register(b"before")
    handle = driver.alloc(b"before", driver.context(b"before"))
    driver.store(handle, 0, *A)
    driver.disconnect(b"before")
    driver.connect("s", staging=0)
    assert driver.pin(b"s", *A) == Pinned(2)
    assert driver.ask(b"s", Unpin("o", "")) == Unpinned(1)
    driver.ask(b"s", Evict("", 0))
    driver.connect("large", staging=2 * SMALL_DIRECTORY + PAGE)
    assert driver.of_kind(RemoveArena) == [RemoveArena(1)]
    assert driver.cache.budget.unassigned == 0


# --- a restart


def test_pins_survive_a_restart_and_their_time_goes_on(driver: Driver) -> None:
    driver.pin(b"s", *B, ttl=10_000)
    driver.pin(b"s", *A, owner="p")
    driver.pass_time(4.0)
    driver.restart()
    assert driver.counts() == {"pinned": 2, "cached": 2}
    assert driver.core.next_deadline() == driver.now + 6.0
    driver.connect()
    assert evict_all(driver) == 2
    driver.pass_time(6.0)
    assert driver.counts() == {"pinned": 1, "cached": 1}


def test_a_pin_whose_time_is_over_at_the_start_is_dropped(driver: Driver) -> None:
    driver.pin(b"s", *B, ttl=1000)
    driver.pin(b"s", *A)
    driver.now += 1.0
    driver.restart()
    assert driver.pins[1].keys() == {1}
    assert driver.counts() == {"pinned": 1, "cached": 3}


def test_a_pin_whose_block_is_gone_is_dropped(driver: Driver) -> None:
    driver.pin(b"s", *B)
    driver.pin(b"s", *A, owner="p")
    slot = driver.blocks()[B]
    records = [each for each in driver.found().records if each.slot != slot]
    driver.restart(driver.found(records=records))
    assert driver.of_kind(DropPin) == [DropPin(1, 0)]
    assert driver.counts() == {"pinned": 1, "cached": 1}
    arena = driver.cache.budget.arenas[1]
    assert (arena.pins.high_water, arena.pins.free) == (2, [0])


def test_of_two_pins_that_are_the_same_one_is_taken(driver: Driver) -> None:
    driver.pin(b"s", *B)
    (pin,) = driver.pins[1].values()
    driver.pins[1][1] = FoundPin(1, *pin[1:])
    driver.restart()
    assert driver.pins[1].keys() == {0}
    assert driver.cache.budget.tenants["t"].pins == 1


def test_the_memory_of_the_pins_is_taken_over_to_the_page(driver: Driver) -> None:
    driver.pin(b"s", *B)
    before = accounting.totals(driver.cache)
    driver.restart()
    assert accounting.totals(driver.cache).directory == before.directory
    assert driver.of_kind(DropPin) == []
    driver.connect()
    driver.ask(b"s", Unpin("o", ""))
    driver.restart()
    assert accounting.totals(driver.cache).directory == before.directory - pins_bytes_for(1)


def test_a_damaged_block_takes_the_pins_on_it_along(driver: Driver) -> None:
    driver.pin(b"s", *C, ttl=1000)
    driver.pin(b"s", *A, owner="p")
    driver.restart()
    items = driver.jobs[0].items
    slot = driver.blocks()[B]
    driver.check(next(index for index, item in enumerate(items) if item.slot == slot))
    assert paths(driver) == {A, (8, 9)}
    assert driver.counts() == {"pinned": 1, "cached": 1, "free": 2}
    assert driver.core.next_deadline() is None
    driver.pass_time(2.0)


def test_a_pin_waits_until_what_an_earlier_daemon_left_is_checked(driver: Driver) -> None:
    driver.restart()
    driver.connect()
    assert driver.ask(b"s", driver.pin_message(*B)) is None
    driver.check()
    assert driver.of_kind(BackPins), "checked, but there is no memory for it yet"
    driver.back()
    assert driver.replies[driver.asked] == Pinned(4)


def test_pins_that_wait_for_a_check_count_as_waiting(driver: Driver) -> None:
    driver.limits = replace(driver.limits, session_waiting=1)
    driver.restart()
    driver.connect()
    assert driver.ask(b"s", driver.pin_message(*B)) is None
    assert driver.refusal(b"s", driver.pin_message(*A)) is TooMany
    session = driver.cache.sessions[b"s"]
    assert (session.waiting, session.waiting_bytes) == (1, 16)
    driver.disconnect(b"s")
    driver.check()
    assert (session.waiting, session.waiting_bytes) == (0, 0)
    assert driver.of_kind(BackPins) == [], "nobody waits for it any more"


def test_it_does_not_fit_the_budget_with_its_pins(driver: Driver) -> None:
    """A place that is far behind costs all the pages before it."""
    driver.pin(b"s", *B)
    (pin,) = driver.pins[1].values()
    far = BUDGET // PIN_BYTES
    driver.pins[1] = {far: pin._replace(place=far)}
    driver.restart()
    assert driver.cache.budget.arenas == {}
    assert "does not fit the budget" in driver.effects[0].reason


def test_readers_of_before_and_pins_do_not_get_in_each_others_way(driver: Driver) -> None:
    driver.pin(b"s", *B)
    driver.restart(driver.found(has_readers=True))
    assert driver.counts() == {"active": 4}
    driver.readers_gone()
    assert driver.counts() == {"pinned": 2, "cached": 2}


# --- the recount


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (lambda arena: setattr(arena, "pinned", 3), "the sum of Totals"),
        (lambda arena: setattr(arena.tenant, "pins", 3), "pins of t: running total 3, recounted 2"),
        (lambda arena: setattr(arena.root.children[0], "pins", 1), "pins of slot 0"),
        (lambda arena: setattr(arena.root.children[1], "pins", 1), "pins of slot 3"),
        (lambda arena: arena.pins.free.append(1), "each place below 2 should be one of"),
        (lambda arena: setattr(arena.pins, "high_water", 3), "each place below 3"),
        (lambda arena: setattr(arena.pins, "backed", 0), "2 places for pins, 0 of 4096 bytes"),
        (lambda arena: setattr(arena.pins, "backed", 2 * PAGE), "8192 of 4096 bytes backed"),
        (lambda arena: setattr(arena.pins, "n_bytes", 2 * PAGE), "the sum of Totals"),
        (lambda arena: setattr(pinned(arena)[1], "place", 0), "each place below 2"),
        (
            lambda arena: setattr(pinned(arena)[0], "owner", "q"),
            "the pin at place 0 is not of slot",
        ),
        (lambda arena: setattr(pinned(arena)[0].block, "state", "filling"), "holds of slot 0"),
    ],
)
def test_every_planted_fault_is_found(
    driver: Driver, plant: Callable[[Arena], None], says: str
) -> None:
    driver.pin(b"s", *A)
    driver.pin(b"s", *B, owner="p")
    plant(driver.cache.budget.arenas[1])
    with pytest.raises(accounting.AccountingError, match=says):
        recount.check(driver.cache)


def pinned(arena: Arena) -> list[Any]:
    return list(arena.pins.pins.values())
