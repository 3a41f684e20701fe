"""The recount finds a fault in every single term, and says which; and the reports add up."""

from collections.abc import Callable
from operator import attrgetter
from random import Random
from typing import Any

import pytest

from kvd.core import recount
from kvd.core.accounting import (
    AccountingError,
    Totals,
    arena_counts,
    totals,
)
from kvd.core.arenas import Arena
from kvd.core.cache import AllocBacking, AppendBacking, Cache, Copying
from kvd.core.reasons import Reason
from kvd.core.recount import check
from kvd.core.tenants import Tenant
from kvd.core.tree import ADOPTED, GONE, Block
from kvd_proto.messages import COMPLETED, Release
from tests.core.driver import (
    BUDGET,
    FULL_DIRECTORY,
    PAGE,
    STAGING,
    Driver,
    alloc,
    path_of,
    walk_in_steps_of,
)
from tests.core.test_long_walks import Steps

CACHED, HELD, ABOVE = (1, 2, 3, 4), (5, 6, 7, 8), (5, 6)
COPYING, BACKING = (10, 11), (12, 13)


@pytest.fixture
def cache() -> Cache:
    """Blocks in every state, reserved slots, a free and a punched one, a copy for the dead."""
    driver = Driver()
    driver.connect("s")
    driver.register(b"s")
    driver.register(b"s", "second", pages=3)
    context = driver.context(b"s", n_ids=8)
    for tokens in (CACHED, (20, 21), (22, 23)):
        handle = driver.alloc(b"s", context)
        driver.store(handle, 0, *tokens)  # slots 0 and 1, 2, 3
        driver.ask(b"s", Release(*handle.fields, COMPLETED))
    held = driver.alloc(b"s", context)
    driver.store(held, 0, *HELD)  # 4, 5
    driver.ask(b"s", alloc(context, reserve=2))  # 6
    driver.work()
    driver.append(driver.alloc(b"s", context), 0, *COPYING)  # 7
    driver.back()
    driver.jobs.clear()
    driver.connect("dead", staging=PAGE * 2)
    driver.register(b"dead")
    driver.append(driver.alloc(b"dead", driver.context(b"dead")), 0, 30)  # 8
    driver.back()
    driver.disconnect(b"dead")
    driver.append(held, 4, *BACKING)  # 9
    driver.ask(b"s", alloc(context, reserve=4))  # 10, 11
    driver.ask(b"s", alloc(driver.context(b"s", n_ids=1, busy=[0]), wait_ms=1000))
    budget = driver.cache.budget
    arena = budget.arenas[1]
    for path in ((20, 21), (22, 23)):
        budget.drop(block_of(arena, path), Reason.ROOM, [])
    budget._punch(arena, 1, [])
    check(driver.cache)
    return driver.cache


def block_of(arena: Arena, path: tuple[int, ...]) -> Block:
    return next(block for block in arena.root.below() if path_of(block) == path)


def first(cache: Cache) -> Arena:
    return cache.budget.arenas[1]


def block(path: tuple[int, ...]) -> Callable[[Cache], Block]:
    return lambda cache: block_of(first(cache), path)


def test_the_story_has_every_kind_of_slot_and_job(cache: Cache) -> None:
    arena = first(cache)
    assert arena_counts(arena) == {
        "free": 1,
        "filling": 6,
        "active": 2,
        "cached": 2,
        "pinned": 0,
        "total": 11,
    }
    assert arena.punched == [3]
    assert {type(job) for job in cache.jobs.values()} == {AllocBacking, AppendBacking, Copying}
    assert cache.leaving
    assert cache.waiting


def add(attribute: str, of: Callable[[Cache], object], amount: int) -> Callable[[Cache], None]:
    def plant(cache: Cache) -> None:
        owner = of(cache)
        setattr(owner, attribute, getattr(owner, attribute) + amount)

    plant.__name__ = f"{attribute} {amount:+}"
    return plant


def of_budget(cache: Cache) -> object:
    return cache.budget


def of_cache(cache: Cache) -> object:
    return cache


def of_session(cache: Cache) -> object:
    return cache.sessions[b"s"]


def of_dead_session(cache: Cache) -> object:
    return cache.leaving[b"dead"]


def of_tenant(cache: Cache) -> Tenant:
    return cache.budget.tenants["t"]


def swap(cache: Cache) -> None:
    """A parent before its child."""
    child, _ = of_tenant(cache).evictable
    move_to_the_end(child)


def forget_a_use(cache: Cache) -> None:
    """After a restart it would have another place."""
    block_of(first(cache), CACHED).last_use -= 1


def strike_out(block: Block) -> None:
    assert block.parent is not None
    block.arena.evictable.remove(block, block.parent)


def enlist(block: Block, used: int) -> None:
    assert block.parent is not None
    block.arena.evictable.add(block, block.parent, used)


def move_to_the_end(block: Block) -> None:
    strike_out(block)
    enlist(block, block.used)


def lose_from_the_lru(cache: Cache) -> None:
    strike_out(block_of(first(cache), CACHED))


def leave_in_the_lru(cache: Cache) -> None:
    """What is gone."""
    arena = first(cache)
    enlist(Block(arena, arena.root, b"", b"", 0), cache.budget.clock)


def put_into_the_lru(cache: Cache) -> None:
    enlist(block_of(first(cache), HELD), cache.budget.clock)


def lose_an_arena(cache: Cache) -> None:
    of_tenant(cache).arenas.pop()


def exceed_the_quota(cache: Cache) -> None:
    of_tenant(cache).quota = of_tenant(cache).held - 1


def count_one_twice(cache: Cache) -> None:
    arena = first(cache)
    arena.free.append(block_of(arena, HELD).slot)
    cache.budget.spend(arena.tenant, arena.stride)


def lose_a_slot(cache: Cache) -> None:
    """From a list without a total of its own, and the budget is none the poorer."""
    first(cache).punched.pop()


def lose_a_reserved_slot(cache: Cache) -> None:
    next(each for each in cache.sequences() if each.reserved).reserved.pop()


def lose_a_job(cache: Cache) -> None:
    number = next(number for number, job in cache.jobs.items() if isinstance(job, AllocBacking))
    del cache.jobs[number]


def swap_slots(cache: Cache) -> None:
    block_of(first(cache), HELD).slot = block_of(first(cache), CACHED).slot


def list_one_twice(cache: Cache) -> None:
    arena = first(cache)
    arena.blocks[arena.free[0]] = block_of(arena, HELD)


def lease_what_is_gone(cache: Cache) -> None:
    block_of(first(cache), BACKED).state = GONE


BACKED = HELD + BACKING


def put_children_below_a_tail(cache: Cache) -> None:
    block_of(first(cache), ABOVE).tokens = b"\5\0\0\0"


def leave_a_shorter_one(cache: Cache) -> None:
    """Its longer sibling should have replaced it."""
    block_of(first(cache), CACHED).tokens = b"\3\0\0\0"
    arena = first(cache)
    parent = block_of(arena, (1, 2))
    slot = arena.punched.pop()
    longer = Block(arena, parent, b"\3\0\0\0\4\0\0\0", b"", slot)
    longer.state = "sealed"
    arena.blocks[slot] = longer
    parent.add(longer)
    enlist(longer, 0)
    for other in [each for each in arena.evictable if each is not longer]:
        move_to_the_end(other)
    arena.cached += 1
    cache.budget.spend(arena.tenant, arena.stride)


def lose_one_and_put_another_into_the_lru(cache: Cache) -> None:
    strike_out(block_of(first(cache), (1, 2)))
    put_into_the_lru(cache)


def forget_whose_slot_it_is(cache: Cache) -> None:
    arena = first(cache)
    arena.blocks[block_of(arena, HELD).slot] = None


def forget_where_a_first_one_is(cache: Cache) -> None:
    """A block below the root, which has no slot itself."""
    arena = first(cache)
    child = block_of(arena, COPYING)
    assert child.parent is arena.root
    arena.blocks[child.slot] = None


def lose_from_the_tree(cache: Cache) -> None:
    """It can never be matched again, or evicted with its parent."""
    block = block_of(first(cache), COPYING)
    assert block.parent is not None
    block.parent.remove(block)


def forget_to_check(cache: Cache) -> None:
    block_of(first(cache), CACHED).state = ADOPTED
    first(cache).unchecked += 1


def lose_a_copy(cache: Cache) -> None:
    number = next(
        number
        for number, job in cache.jobs.items()
        if isinstance(job, Copying) and job.session is of_session(cache)
    )
    del cache.jobs[number]


def reserve_what_is_free(cache: Cache) -> None:
    sequence = next(each for each in cache.sequences() if each.reserved)
    sequence.reserved[0] = first(cache).free[0]


def reserved(cache: Cache) -> Any:
    return of_session(cache).reserved


def of_share(cache: Cache) -> Any:
    return of_tenant(cache).share


def filled(cache: Cache) -> Any:
    return of_session(cache).filling


def forget_a_waiter(cache: Cache) -> None:
    cache.waiting.popitem()


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (add("unassigned", of_budget, 1), "budget .* the sum of Totals"),
        (add("staging", of_tenant, PAGE), "budget .* staging="),
        (add("staging_bytes", of_session, -PAGE), "staging of t: running total .*, recounted"),
        (add("staging_bytes", of_dead_session, PAGE), "staging of t: running total"),
        (add("held", of_tenant, 1), "held by t: running total"),
        (lose_an_arena, "arenas of t"),
        (add("held", of_share, PAGE), "of the minimum of t: running total"),
        (add("promised", of_budget, PAGE), "promised: running total 4096, recounted 0"),
        (exceed_the_quota, "quota of t: running total"),
        (add("excess", of_tenant, 1), "excess of t: running total 1, recounted 0"),
        (add("wanted", attrgetter("budget"), -PAGE), "budget: running total"),
        (add("open_sequences", of_session, 1), "open sequences of s: running total"),
        (add("waiting", of_session, 1), "waiting allocs of s: running total 2, recounted 1"),
        (add("waiting_bytes", of_session, 4), "tokens of waiting allocs of s"),
        (add("n_bytes", reserved, PAGE), "reserved by s: running total Amount"),
        (add("blocks", filled, 1), "filled by s: running total Amount"),
        (add("filling_blocks", first, 1), "blocks being stored for .*: running total"),
        (add("active_lacks", first, 1), "tokens that active blocks lack: running total"),
        (add("pinned_lacks", first, 1), "tokens that pinned blocks lack: running total"),
        (add("cached_lacks", first, 1), "tokens that cached blocks lack: running total"),
        (add("filling_tokens", first, 1), "tokens being stored for .*: running total"),
        (add("in_flight", of_session, 1), "copies from the staging of s: running total 2"),
        (add("in_flight", of_dead_session, -1), "copies from the staging of dead"),
        (add("open_sequences", of_cache, 1), "open sequences"),
        (forget_a_waiter, "waiting: running total 0, recounted 1"),
        (add("filling", first, 1), "budget .* filling="),
        (add("active", first, 1), "budget .* active="),
        (add("cached", first, 1), "budget .* cached="),
        (add("directory_bytes", first, PAGE), "budget .* directory="),
        (add("holds", block(HELD), 1), r"holds of slot \d+: running total 2, recounted 1"),
        (add("holds", block(CACHED), 1), "holds of slot"),
        (add("holds", block(COPYING), -1), "holds of slot"),
        (add("high_water", first, 1), "each slot below 13 should be in one place: 12 is in none"),
        (swap, "would be evicted before its child"),
        (forget_a_use, r"by its records, and at \d+ by its place"),
        (lose_from_the_lru, "which is not in the LRU"),
        (leave_in_the_lru, "blocks in the LRU of t: running total 3, recounted 2"),
        (lose_one_and_put_another_into_the_lru, "which is not in the LRU"),
        (put_into_the_lru, "is held or pinned, and in the LRU"),
        (count_one_twice, r"each slot below 12 .*: \d+ is free and a block's$"),
        (lose_a_slot, "each slot below 12 should be in one place: 3 is in none$"),
        (lose_a_reserved_slot, "reserved by s: running total"),
        (lose_a_job, "reserved by s: running total"),
        (swap_slots, "a block in the tree is not the one in its slot"),
        (list_one_twice, "in slot . says that it is in slot"),
        (lease_what_is_gone, "sequence 3 of context 1 leases a block that is gone"),
        (put_children_below_a_tail, "is not full and has children"),
        (leave_a_shorter_one, "nobody holds slot"),
        (forget_whose_slot_it_is, "a block in the tree is not the one in its slot"),
        (forget_where_a_first_one_is, "a block in the tree is not the one in its slot"),
        (lose_from_the_tree, "has a block that is not in the tree"),
        (add("unchecked", first, 1), "blocks to check: running total 1, recounted 0"),
        (forget_to_check, "was left by an earlier daemon, and nobody checks it"),
        (lose_a_copy, "copies from the staging of s: running total 1, recounted 0"),
        (reserve_what_is_free, "each slot below 12 .* is free and set aside"),
    ],
)
def test_every_planted_fault_is_found(
    cache: Cache, plant: Callable[[Cache], None], says: str
) -> None:
    plant(cache)
    with pytest.raises(AccountingError, match=says):
        check(cache)


def test_totals_that_hide_each_others_fault_are_found(cache: Cache) -> None:
    """The sum is right, and the recount of the arena is not."""
    arena = first(cache)
    arena.active += 1
    arena.filling -= 1
    totals(cache).check()
    with pytest.raises(AccountingError, match="filling: running total 5, recounted 6"):
        check(cache)


def test_totals_add_up_and_name_the_padding() -> None:
    driver = Driver()
    driver.connect("s")
    driver.register(b"s", layers=[["f16", 256, "f16", 256]])
    handle = driver.alloc(b"s", driver.context(b"s"))
    driver.store(handle, 0, 1, 2, 3)
    found = totals(driver.cache)
    assert found == Totals(
        budget=BUDGET,
        unassigned=BUDGET - FULL_DIRECTORY - STAGING - 2 * PAGE,
        directory=FULL_DIRECTORY,
        staging=STAGING,
        free=0,
        filling=0,
        active=2 * PAGE,
        pinned=0,
        cached=0,
        padding=2 * (PAGE - 1024),
    )
    assert found.backed == FULL_DIRECTORY + STAGING + 2 * PAGE


def test_the_error_prints_every_term() -> None:
    broken = Totals(100, 50, 10, 10, 5, 5, 5, 4, 1, 3)
    with pytest.raises(AccountingError) as error:
        broken.check()
    assert "budget 100 != 90" in str(error.value)
    for term in (
        "unassigned=50",
        "directory=10",
        "staging=10",
        "free=5",
        "filling=5",
        "active=5",
        "pinned=4",
        "cached=1",
    ):
        assert term in str(error.value)


def test_an_lru_whose_oldest_block_is_not_the_first_is_found() -> None:
    driver = Driver()
    driver.connect("s")
    driver.register(b"s")
    context = driver.context(b"s")
    for tokens in ((1, 2), (3, 4)):
        handle = driver.alloc(b"s", context)
        driver.store(handle, 0, *tokens)
        driver.ask(b"s", Release(*handle.fields, COMPLETED))
    check(driver.cache)
    move_to_the_end(block_of(first(driver.cache), (1, 2)))
    with pytest.raises(AccountingError, match=r"slot 0 was used at 1 .*, which comes after 2"):
        check(driver.cache)


# --- a recount in steps


@pytest.mark.parametrize("seed", range(20))
def test_a_recount_in_steps_agrees_whatever_happens_in_between(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event is also followed by a recount at once (driver.py), which agrees as well."""
    random = Random(seed)
    walk_in_steps_of(random.choice((1, 2, 1024)), monkeypatch)
    monkeypatch.setattr(recount, "STEP_BLOCKS", random.choice((1, 2, 5)))
    steps = Steps(random)
    ended = 0
    counting = recount.check_in_steps(steps.driver.cache)
    for _ in range(300):
        steps.step()
        for _ in range(random.choice((0, 1, 3))):
            if next(counting, counting) is counting:
                recount.check_totals(steps.driver.cache)
                counting = recount.check_in_steps(steps.driver.cache)
                ended += 1
    assert ended > 3


@pytest.mark.parametrize("plant", [add("active", first, 1), lose_from_the_tree, forget_a_use])
def test_a_fault_that_was_there_all_the_time_is_found_in_steps(
    cache: Cache, plant: Callable[[Cache], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recount, "STEP_BLOCKS", 1)
    plant(cache)
    with pytest.raises(AccountingError):
        for _ in recount.check_in_steps(cache):
            pass
