"""Ages of blocks: idle when evicted, lifetime, and the gap until a prefix is used again."""

import pytest

from kvd.core.ages import BOUNDS, MOST_MOMENTS, RESOLUTION, Ages
from kvd.core.histogram import Histogram
from kvd_proto.messages import COMPLETED, Evict, Release
from tests.core.driver import Driver


def release(driver: Driver, handle: object) -> None:
    driver.ask(b"s", Release(*handle.fields, COMPLETED))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Every eviction, and every reuse, is looked at."""
    monkeypatch.setattr("kvd.core.dropping.SAMPLED", 1)
    monkeypatch.setattr("kvd.core.ages.SAMPLED", 1)
    driver = Driver()
    driver.now = 5000.0
    driver.connect("s")
    driver.register(b"s")
    driver.context(b"s")
    return driver


def test_a_histogram_counts_a_value_at_the_first_bound_that_is_not_below_it() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3, 4):
        histogram.observe(value)
    assert (histogram.counts, histogram.total) == ([2, 2, 2], 12.0)
    copy = histogram.copy()
    histogram.observe(1)
    assert (copy.counts, copy.total) == ([2, 2, 2], 12.0)


def test_an_evicted_block_was_idle_since_its_last_use_and_lived_since_it_was_sealed(
    driver: Driver,
) -> None:
    handle = driver.alloc(b"s", 1)
    driver.store(handle, 0, 1, 2)  # sealed at 5000
    driver.now += 200
    release(driver, handle)  # used until 5200
    driver.now += 3500
    driver.ask(b"s", Evict("", 0))
    found = driver.cache.budget.ages
    assert (found.idle.total, found.lifetime.total) == (3500, 3700)
    assert (sum(found.idle.counts), sum(found.lifetime.counts)) == (1, 1)


def test_the_gap_is_from_the_last_use_to_the_next(driver: Driver) -> None:
    handle = driver.alloc(b"s", 1)
    driver.store(handle, 0, 1, 2, 3, 4)
    release(driver, handle)
    found = driver.cache.budget.ages
    driver.now += 40
    first = driver.alloc(b"s", 1, 1, 2, 3, 4)
    second = driver.alloc(b"s", 1, 1, 2, 3, 4)  # not cached: it is in use
    assert (sum(found.reuse_gap.counts), found.reuse_gap.total) == (1, 40)
    release(driver, first)
    driver.now += 7
    release(driver, second)
    driver.now += 100
    driver.alloc(b"s", 1, 1, 2, 3, 4)
    assert (sum(found.reuse_gap.counts), found.reuse_gap.total) == (2, 140)


def test_a_use_counts_from_its_end_though_nothing_else_has_happened(driver: Driver) -> None:
    """The clock has not moved since the block was sealed, but for the second that has passed."""
    handle = driver.alloc(b"s", 1)
    driver.store(handle, 0, 1, 2)
    driver.now += 1000
    release(driver, handle)
    driver.now += 10
    driver.alloc(b"s", 1, 1, 2)
    assert driver.cache.budget.ages.reuse_gap.total == 10


def test_one_eviction_in_so_many_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd.core.dropping.SAMPLED", 4)
    driver = Driver()
    driver.connect("s")
    driver.register(b"s")
    driver.context(b"s")
    handle = driver.alloc(b"s", 1)
    driver.store(handle, 0, *range(18))  # nine blocks
    release(driver, handle)
    driver.ask(b"s", Evict("", 0))
    assert driver.cache.budget.evictions == 9
    assert sum(driver.cache.budget.ages.idle.counts) == 3


def test_what_an_earlier_daemon_left_counts_from_this_ones_start() -> None:
    found = Ages()
    found.begin(0, 100.0)
    found.begin(5000, 130.0)  # it was adopted, with the clock at 5000
    assert (found.time_of(0), found.time_of(4999), found.time_of(5001)) == (100.0, 100.0, 130.0)


def test_moments_are_bounded_and_an_age_is_known_to_a_part_of_it() -> None:
    found = Ages()
    seconds = 100_000
    most = 0
    for second in range(seconds):
        found.begin(second, float(second))
        most = max(most, len(found._clocks))
    assert most == MOST_MOMENTS
    for age in (1, 10, 300, 1000, 5000, 20_000, 99_000):
        told = seconds - 1 - found.time_of(seconds - age)
        assert age <= told <= age * (1 + 1 / RESOLUTION) + 1, age


def test_the_bounds_are_in_order() -> None:
    assert list(BOUNDS) == sorted(BOUNDS)
