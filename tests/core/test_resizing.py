"""Another budget and other quotas while all goes on: larger at once, smaller in steps, and what is
in use stays. At random moments: test_model.py and test_simulation.py."""

import math
from dataclasses import replace
from typing import Any

import pytest

from kvd.core import machine
from kvd.core.events import DropRecord, Punch, Reconfigured, RemoveArena
from kvd.core.reasons import Reason
from kvd.core.shares import ModelRule
from kvd.core.tenants import TenantRule
from kvd_proto import errors
from kvd_proto.messages import COMPLETED, Allocated, OpenContext, Release, Unpin
from tests.core.driver import BUDGET, FULL_DIRECTORY, PAGE, STAGING, Driver, Handle, alloc

N_BLOCKS = 40


def limit(driver: Driver, **limits: Any) -> None:
    """As the shell does it."""
    driver.limits = replace(driver.limits, **limits)
    driver.handle(Reconfigured(driver.limits))


def held_by(driver: Driver) -> int:
    return driver.cache.budget.n_bytes - driver.cache.budget.unassigned


@pytest.fixture
def driver() -> Driver:
    """40 cached blocks of a page each, the oldest of which has the tokens 0 and 1."""
    driver = Driver()
    driver.connect("s")
    context = driver.context(b"s", driver.register(b"s"))
    for number in range(N_BLOCKS):
        release(driver, store(driver, context, number))
    return driver


def store(driver: Driver, context: int, number: int) -> Handle:
    handle = driver.alloc(b"s", context)
    driver.store(handle, 0, 2 * number, 2 * number + 1)
    return handle


def release(driver: Driver, handle: Handle) -> None:
    driver.ask(b"s", Release(*handle.fields, COMPLETED))


def first_tokens(driver: Driver) -> list[int]:
    return sorted(path[0] // 2 for path in driver.blocks())


def test_a_larger_budget_is_there_at_once(driver: Driver) -> None:
    before = driver.cache.budget.unassigned
    limit(driver, max_memory=2 * BUDGET)
    assert driver.effects == []
    assert driver.cache.budget.n_bytes == 2 * BUDGET
    assert driver.cache.budget.unassigned == before + BUDGET
    (tenant,) = driver.cache.budget.tenants.values()
    assert (tenant.quota, tenant.has_quota) == (2 * BUDGET, False)


def test_a_smaller_budget_that_has_room_costs_nothing(driver: Driver) -> None:
    limit(driver, max_memory=held_by(driver))
    assert driver.effects == []
    assert driver.cache.budget.unassigned == 0
    assert len(driver.blocks()) == N_BLOCKS


def test_a_smaller_budget_evicts_the_oldest_and_gives_them_back(driver: Driver) -> None:
    limit(driver, max_memory=held_by(driver) - 10 * PAGE)
    assert first_tokens(driver) == list(range(10, N_BLOCKS))
    assert len(driver.of_kind(DropRecord)) == 10
    assert sum(len(punch.slots) for punch in driver.of_kind(Punch)) == 10
    assert driver.cache.budget.n_bytes == driver.limits.max_memory == held_by(driver)
    (tenant,) = driver.cache.budget.tenants.values()
    assert tenant.evicted[Reason.REDUCED] == sum(tenant.evicted.values()) == 10


def test_it_goes_in_steps_and_what_is_given_back_is_not_given_out(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "EVICT_BLOCKS", 4)
    before = held_by(driver)
    limit(driver, max_memory=before - 10 * PAGE)
    for step in range(1, 3):
        assert driver.cache.budget.n_bytes == held_by(driver) == before - 4 * step * PAGE
        assert driver.core.next_deadline() == -math.inf
        # Between two steps a block is stored: another one goes for it, and no more.
        if step == 1:
            context = next(iter(driver.cache.contexts))
            release(driver, store(driver, context, 100))
            assert driver.cache.budget.n_bytes == held_by(driver) == before - 4 * PAGE
        driver.pass_time(0)
    assert driver.cache.budget.n_bytes == before - 10 * PAGE
    assert driver.core.next_deadline() is None
    assert first_tokens(driver) == [*range(11, N_BLOCKS), 100]


def test_what_is_left_over_of_a_larger_block_is_not_given_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "EVICT_BLOCKS", 1)
    driver = Driver()
    driver.connect("s")
    large = driver.context(b"s", driver.register(b"s", "large", pages=3))
    small = driver.context(b"s", driver.register(b"s", "small"))
    release(driver, store(driver, small, 0))
    for number in range(4):
        release(driver, store(driver, large, number))
    limit(driver, max_memory=held_by(driver) - 6 * PAGE)
    assert driver.core.next_deadline() == -math.inf
    release(driver, store(driver, small, 1))
    assert driver.cache.budget.unassigned == 0
    driver.settle()
    assert driver.cache.budget.n_bytes == driver.limits.max_memory


def test_what_is_in_use_stays_until_it_is_let_go(driver: Driver) -> None:
    context = next(iter(driver.cache.contexts))
    handles = [driver.alloc(b"s", context, 2 * number, 2 * number + 1) for number in range(3)]
    driver.pin(b"s", 6, 7)
    driver.work()
    limit(driver, max_memory=STAGING)
    assert first_tokens(driver) == [0, 1, 2, 3]
    budget = driver.cache.budget
    assert budget.n_bytes == held_by(driver) > budget.wanted
    assert driver.core.next_deadline() is None, "there is nothing to do but to wait"
    assert driver.refusal(b"s", alloc(context, reserve=2)) is errors.AllLeased
    before = budget.n_bytes
    release(driver, handles[0])
    driver.settle()
    assert first_tokens(driver) == [1, 2, 3]
    assert budget.n_bytes == held_by(driver) == before - PAGE
    for handle in handles[1:]:
        release(driver, handle)
    driver.ask(b"s", Unpin("o", ""))
    driver.settle()
    assert driver.blocks() == {}
    driver.disconnect(b"s")
    driver.settle()
    assert budget.n_bytes == STAGING, "it has all that it was to have"
    limit(driver, max_memory=PAGE)
    assert budget.arenas == {}, "nobody has registered the model any more"
    assert budget.n_bytes == PAGE == budget.unassigned


def test_an_empty_arena_that_nobody_uses_goes_first(driver: Driver) -> None:
    driver.connect("t")
    driver.register(b"t", "other", pages=2)
    driver.disconnect(b"t")
    limit(driver, max_memory=held_by(driver) - PAGE)
    assert [removed.arena for removed in driver.of_kind(RemoveArena)] == [2]


def test_a_smaller_quota_takes_the_tenants_own_oldest() -> None:
    driver = Driver(tenants=(TenantRule("a", quota=BUDGET // 2), TenantRule("b")))
    contexts = {}
    for name in "ab":
        session = driver.connect(name, tenant=name)
        contexts[name] = driver.context(session, driver.register(session))
        for number in range(4):
            handle = driver.alloc(session, contexts[name])
            driver.store(handle, 0, number)
            driver.ask(session, Release(*handle.fields, COMPLETED))
    a, b = (driver.cache.budget.tenants[name] for name in "ab")
    rules = (TenantRule("a", quota=a.held - 2 * PAGE), TenantRule("b"))
    limit(driver, tenants=rules)
    assert (a.quota, a.excess, a.has_quota) == (a.held, 0, True)
    assert sorted(driver.blocks(1)) == [(2,), (3,)]
    assert len(driver.blocks(2)) == 4
    limit(driver, tenants=(TenantRule("a"), TenantRule("b", quota=b.held - PAGE)))
    assert (a.quota, a.has_quota) == (BUDGET, False)
    assert sorted(driver.blocks(2)) == [(1,), (2,), (3,)]


def test_a_salt_does_not_change() -> None:
    driver = Driver(tenants=(TenantRule("t", b"salt"),))
    limit(driver, tenants=(TenantRule("t", b"another", 1 << 19),))
    tenant = driver.cache.budget.tenants["t"]
    assert (tenant.salt, tenant.quota) == (b"salt", 1 << 19)


def test_who_waited_for_a_sequence_gets_it() -> None:
    driver = Driver(max_sequences=1)
    driver.connect("s")
    context = driver.context(b"s", driver.register(b"s"))
    driver.alloc(b"s", context)
    assert driver.ask(b"s", alloc(context, wait_ms=1000)) is None
    waiting = driver.asked
    limit(driver, max_sequences=2)
    assert isinstance(driver.replies[waiting], Allocated)


def test_fewer_sequences_take_none_away() -> None:
    driver = Driver(max_sequences=4, n_seq_max=4)
    driver.connect("s")
    model = driver.register(b"s")
    context = driver.context(b"s", model, n_ids=4)
    handles = [driver.alloc(b"s", context) for _ in range(3)]
    limit(driver, max_sequences=2, n_seq_max=2)
    assert driver.cache.open_sequences == 3
    assert driver.refusal(b"s", alloc(context)) is errors.SequenceLimit
    assert driver.refusal(b"s", OpenContext(model, 3, [])) is errors.BadMessage
    for handle in handles[:2]:
        release(driver, handle)
    driver.alloc(b"s", context)


# --- minima and caps of models


def test_a_smaller_budget_leaves_each_its_minimum() -> None:
    """Though what is in it is the oldest."""
    driver = Driver(models=(ModelRule("kept", minimum=FULL_DIRECTORY + 5 * PAGE),))
    driver.connect("s")
    kept = driver.context(b"s", driver.register(b"s", "kept"))
    other = driver.context(b"s", driver.register(b"s", "other"))
    for context in (kept, other):
        for number in range(8):
            release(driver, store(driver, context, number))
    limit(driver, max_memory=held_by(driver) - 10 * PAGE)
    driver.settle()
    assert (len(driver.blocks(1)), len(driver.blocks(2))) == (5, 1)
    assert driver.cache.budget.n_bytes == driver.limits.max_memory
    limit(driver, max_memory=held_by(driver) - PAGE)
    driver.settle()
    assert (len(driver.blocks(1)), len(driver.blocks(2))) == (5, 0)


def test_what_is_found_beyond_a_cap_is_evicted(driver: Driver) -> None:
    cap = FULL_DIRECTORY + 4 * PAGE
    driver.limits = replace(driver.limits, models=(ModelRule("m", cap=cap),))
    driver.restart()
    model = driver.cache.budget.models["m"]
    assert (model.cap, model.excess) == (model.held, (N_BLOCKS - 4) * PAGE)
    driver.settle()
    assert first_tokens(driver) == list(range(N_BLOCKS - 4, N_BLOCKS))
    assert (model.cap, model.excess, model.held) == (cap, 0, cap)


# --- an arena that is shorter than the budget is now


def test_an_arena_is_as_long_as_it_is_told() -> None:
    driver = Driver(arena_bytes=3 * BUDGET)
    driver.connect("s")
    driver.register(b"s")
    assert driver.made[1].slots == 3 * BUDGET // PAGE
    driver = Driver(arena_bytes=BUDGET // 2)
    driver.connect("s")
    driver.register(b"s")
    assert driver.made[1].slots == BUDGET // PAGE


def test_a_short_arena_uses_its_slots_and_evicts_its_own(driver: Driver) -> None:
    """Its oldest, though others' blocks are older, and the budget has room."""
    found = driver.found(slots=N_BLOCKS)
    driver.restart(found)
    driver.work()
    driver.connect("s")
    other = driver.context(b"s", driver.register(b"s", "other"))
    context = driver.context(b"s", driver.register(b"s"))
    release(driver, store(driver, other, 500))
    handle = driver.alloc(b"s", context, 0, 1)
    release(driver, handle)
    limit(driver, max_memory=8 * BUDGET)
    release(driver, store(driver, context, 600))
    assert first_tokens(driver) == [0, *range(2, N_BLOCKS), 600]
    assert len(driver.blocks(2)) == 1
    assert driver.refusal(b"s", alloc(context, reserve=2 * N_BLOCKS + 2)) is errors.BudgetTooSmall
