"""What a request costs does not depend on how much there is: counted, not timed.

Counted are the lines of the core that are run, and the items that are taken from its containers,
which one line can do by the thousand. A bisection (in C, of about 14 comparisons here) is one line.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import kvd.core
from kvd.core.budget import Budget
from kvd.core.siblings import Siblings
from kvd_proto.messages import COMPLETED, CloseContext, Evict, Get, Release
from tests.core.driver import PAGE, Driver, Handle, alloc, append, siblings_in_runs_of

CORE = str(Path(kvd.core.__file__).parent)
FEW, MANY = 100, 5_000


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let siblings be in several runs with few of them already, as they are with many."""
    siblings_in_runs_of(8, monkeypatch)


class Counter:
    """The lines of the core that are run, and the items it takes one by one."""

    def __init__(self) -> None:
        self.steps = 0

    def of(self, action: Callable[[], object]) -> int:
        self.steps = 0
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            action()
        finally:
            sys.settrace(before)
        return self.steps

    def _called(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(CORE) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        self.steps += event == "line"
        return self._line

    def watch(self, driver: Driver) -> None:
        """Put containers that count into the core."""
        cache, budget = driver.cache, driver.cache.budget
        for name in ("waiting", "jobs"):
            setattr(cache, name, self._watched(dict, getattr(cache, name)))
        for context in cache.contexts.values():
            context.waiting = self._watched(dict, context.waiting)
            context.open = self._watched(dict, context.open)
        for arena in budget.arenas.values():
            arena.free = self._watched(list, arena.free)
            arena.punched = self._watched(list, arena.punched)
            children = arena.root.family
            if isinstance(children, Siblings):
                children.runs = [self._watched(list, run) for run in children.runs]
            elif isinstance(children, list):
                arena.root.family = self._watched(list, children)

    def _watched(self, kind: Any, items: Any) -> Any:
        counter = self

        class Watched(kind):
            def __iter__(self) -> Iterator[Any]:
                for item in super().__iter__():
                    counter.steps += 1
                    yield item

            def __len__(self) -> int:
                counter.steps += 1  # who asks each of many walks them
                return super().__len__()

        return Watched(items)


def daemon(n_slots: int, **limits: int) -> Driver:
    """A session, a model whose directory is as large as it gets, and a context of four ids."""
    driver = Driver((n_slots + 250) * PAGE, **limits)
    driver.checked = False
    driver.connect("s")
    driver.register(b"s")
    driver.context(b"s")
    arena = driver.cache.budget.arenas[1]
    budget = driver.cache.budget
    budget.spend(arena.tenant, arena.directory_limit - arena.directory_bytes)
    arena.directory_bytes = arena.directory_limit
    budget.charge_staging(arena.tenant, budget.unassigned - n_slots * PAGE, [])
    return driver


def release(handle: Handle) -> Release:
    return Release(*handle.fields, COMPLETED)


def siblings(driver: Driver, n_blocks: int) -> None:
    """So many prompts of one block, all cached."""
    for number in range(n_blocks):
        handle = driver.alloc(b"s", 1)
        driver.store(handle, 0, number, number)
        driver.ask(b"s", release(handle))


def chain(driver: Driver, n_blocks: int) -> Handle:
    """One prompt of so many blocks, leased."""
    handle = driver.alloc(b"s", 1)
    driver.store(handle, 0, *range(2 * n_blocks))
    return handle


def same(cost: Callable[[int], int]) -> None:
    """The cost is the same with few and with many, but for a neighbour that may be in the next
    run."""
    few, many = cost(FEW), cost(MANY)
    assert few > 0
    assert abs(many - few) <= 3


def test_the_counter_sees_a_walk() -> None:
    """Of a line that takes everything, and of a loop."""

    def cost(n_blocks: int, action: Callable[[Driver], object]) -> int:
        driver = daemon(n_blocks)
        siblings(driver, n_blocks)
        counter = Counter()
        counter.watch(driver)
        return counter.of(lambda: action(driver))

    for walk in (
        lambda driver: list(driver.cache.budget.oldest_first()),
        lambda driver: driver.cache.budget.arenas[1].root.below(),
        lambda driver: sorted(driver.cache.budget.tenant("t").evictable, key=id),
    ):
        assert cost(200, walk) > cost(100, walk) + 50


def test_one_eviction_for_one_block_that_is_stored() -> None:
    def cost(n_blocks: int) -> int:
        driver = daemon(n_blocks)
        siblings(driver, n_blocks)
        assert driver.counts() == {"cached": n_blocks}
        handle = driver.alloc(b"s", 1)
        counter = Counter()
        counter.watch(driver)
        steps = counter.of(lambda: driver.append(handle, 0, 1 << 20, 1))
        assert driver.counts() == {"cached": n_blocks - 1, "filling": 1}
        steps += counter.of(driver.copy)
        assert driver.counts() == {"cached": n_blocks - 1, "active": 1}
        return steps

    same(cost)


def test_eviction_from_a_deep_chain() -> None:
    def cost(n_blocks: int) -> int:
        driver = daemon(n_blocks)
        driver.ask(b"s", release(chain(driver, n_blocks)))
        driver.settle()
        handle = driver.alloc(b"s", 1)
        counter = Counter()
        counter.watch(driver)
        steps = counter.of(lambda: driver.append(handle, 0, 1 << 20, 1))
        assert driver.counts() == {"cached": n_blocks - 1, "filling": 1}
        return steps

    same(cost)


def test_lease_and_release_of_one_block_among_many() -> None:
    def cost(n_blocks: int) -> int:
        driver = daemon(n_blocks)
        siblings(driver, n_blocks)
        counter = Counter()
        counter.watch(driver)
        handles: list[Handle] = []
        steps = counter.of(lambda: handles.append(driver.alloc(b"s", 1, 7, 7, 8)))
        assert handles[0].matched == 2
        return steps + counter.of(lambda: driver.ask(b"s", release(handles[0])))

    same(cost)


def test_a_partial_match_among_many_siblings() -> None:
    def cost(n_blocks: int) -> int:
        driver = daemon(n_blocks)
        siblings(driver, n_blocks)
        counter = Counter()
        counter.watch(driver)
        return counter.of(lambda: driver.alloc(b"s", 1, 50, 1 << 30))

    same(cost)


def test_holding_a_deep_block_that_is_held_already() -> None:
    def cost(n_blocks: int) -> int:
        driver = daemon(n_blocks)
        chain(driver, n_blocks)
        budget: Budget = driver.cache.budget
        deepest = driver.cache.sequences()[0].leased
        counter = Counter()
        counter.watch(driver)
        return counter.of(lambda: (budget.hold(deepest), budget.unhold(deepest, [])))

    same(cost)


def test_one_more_block_at_the_end_of_a_long_sequence() -> None:
    def cost(n_blocks: int) -> int:
        driver = daemon(n_blocks + 1)
        handle = chain(driver, n_blocks)
        counter = Counter()
        counter.watch(driver)
        steps = counter.of(lambda: driver.append(handle, 2 * n_blocks, 1, 2))
        steps += counter.of(driver.work)
        assert driver.counts() == {"active": n_blocks + 1}
        return steps

    same(cost)


def test_memory_of_another_arena() -> None:
    """Evict there, punch, back here: for one block."""

    def cost(n_blocks: int) -> int:
        driver = daemon(n_blocks)
        siblings(driver, n_blocks)
        driver.cache.budget.return_staging(driver.cache.budget.tenant("t"), 200 * PAGE)
        other = driver.context(b"s", driver.register(b"s", "other"))
        handle = driver.alloc(b"s", other)
        arena = driver.cache.budget.arenas[2]
        budget = driver.cache.budget
        budget.spend(arena.tenant, arena.directory_limit - arena.directory_bytes)
        arena.directory_bytes = arena.directory_limit
        budget.charge_staging(arena.tenant, budget.unassigned, [])
        counter = Counter()
        counter.watch(driver)
        steps = counter.of(lambda: driver.append(handle, 0, 1, 2))
        assert driver.counts(1) == {"cached": n_blocks - 1}
        assert driver.counts(2) == {"filling": 1}
        return steps

    same(cost)


def test_evict_of_a_model_without_blocks() -> None:
    def cost(n_blocks: int) -> int:
        driver = daemon(n_blocks)
        siblings(driver, n_blocks)
        counter = Counter()
        counter.watch(driver)
        return counter.of(lambda: driver.ask(b"s", Evict("no such model", 0)))

    same(cost)


def test_a_block_that_fails_beside_a_long_sequence() -> None:
    """A client can make its copies fail: it may write over what it has staged."""

    def cost(n_blocks: int) -> int:
        driver = daemon(n_blocks + 10)
        chain(driver, n_blocks)
        driver.append(driver.alloc(b"s", 1), 0, 1 << 20, 1)
        driver.back()
        counter = Counter()
        counter.watch(driver)
        return counter.of(lambda: driver.copy(0))

    same(cost)


def test_waiting_in_a_long_queue() -> None:
    """To come, to be served, to run out of time, and to ask when that will be."""

    def cost(n_waiters: int) -> int:
        driver = daemon(10)
        handles = [driver.alloc(b"s", 1) for _ in range(4)]
        for number in range(n_waiters):
            driver.ask(b"s", alloc(1, wait_ms=1000 + number))
        counter = Counter()
        counter.watch(driver)
        steps = counter.of(lambda: driver.ask(b"s", alloc(1, wait_ms=500)))
        steps += counter.of(lambda: driver.ask(b"s", release(handles[0])))
        assert len(driver.cache.waiting) == n_waiters
        steps += counter.of(driver.core.next_deadline)
        steps += counter.of(lambda: driver.pass_time(0.5))
        assert len(driver.cache.waiting) == n_waiters - 1
        return steps

    same(cost)


def test_a_commit_behind_many_that_are_not_finished() -> None:
    def cost(n_commits: int) -> int:
        driver = daemon(n_commits + 10)
        handle = driver.alloc(b"s", 1)
        for number in range(n_commits):
            driver.append(handle, 2 * number, 1, 2)
        first, *rest = driver.jobs
        driver.jobs = [first]
        counter = Counter()
        steps = counter.of(driver.back)
        driver.jobs = driver.jobs[-1:]
        steps += counter.of(driver.copy)
        assert len(driver.cache.sessions[b"s"].commits) == n_commits - 1 == len(rest)
        return steps

    same(cost)


def test_many_requests_of_short_lived_sequences_leave_nothing_behind() -> None:
    """Of those that had a day's time to be idle, and of commits that failed."""
    driver = daemon(10)
    for _ in range(1000):
        handle = driver.alloc(b"s", 1, idle_ms=86_400_000)
        driver.ask(b"s", append(handle, 0, 1))
        driver.work(0)
        driver.ask(b"s", release(handle))
    cache = driver.cache
    assert len(cache.deadlines) < 100
    assert (len(cache.jobs), len(cache.sessions[b"s"].commits)) == (0, 0)
    assert driver.ask(b"s", CloseContext(1)) is not None
    assert (cache.contexts, cache.sessions[b"s"].contexts) == ({}, {})


@pytest.mark.parametrize("n_blocks", [FEW, MANY])
def test_get_walks_the_sequence_and_nothing_else(n_blocks: int) -> None:
    driver = daemon(n_blocks + 10)
    siblings(driver, n_blocks)
    handle = driver.alloc(b"s", 1, 7, 7)
    counter = Counter()
    counter.watch(driver)
    assert counter.of(lambda: driver.ask(b"s", Get(*handle.fields, 0))) < 60
