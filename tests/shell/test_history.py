"""The last hour in samples: what lies between two of them, and quantiles of what was counted."""

import random

import pytest

from kvd.core.histogram import Histogram
from kvd.metrics.history import SAMPLES, STATES, History, quantile
from kvd.metrics.snapshot import Snapshot
from kvd.timing import BOUNDS


def snapshot(queried: int = 0, hit: int = 0, evicted: int = 0, waits: tuple[float, ...] = ()):
    durations = Histogram(BOUNDS)
    for each in waits:
        durations.observe(each)
    empty = Histogram(BOUNDS)
    counters = {"queried_tokens": queried, "hit_tokens": hit, "evicted_blocks": evicted}
    accounting = {f"{state}_bytes": index * 1000 for index, state in enumerate(STATES)}
    report = {"counters": counters, "accounting": accounting}
    return Snapshot(report, {}, {}, {}, {"alloc": durations}, {}, empty, empty, empty, empty)


def test_nothing_is_known_before_the_second_sample() -> None:
    history = History()
    assert history.columns()["time"] == []
    history.add(snapshot(queried=10, hit=5), 100.0)
    columns = history.columns()
    assert columns["time"] == [100.0]
    assert columns["memory"] == {state: [n * 1000] for n, state in enumerate(STATES)}
    assert columns["hit_rate"] == columns["evictions_per_second"] == columns["p50"] == [None]


def test_rates_are_of_what_happened_since_the_sample_before() -> None:
    history = History()
    history.add(snapshot(queried=1000, hit=1000, evicted=7), 100.0)
    history.add(snapshot(queried=1100, hit=1025, evicted=27, waits=(0.0004,) * 4), 110.0)
    history.add(snapshot(queried=1100, hit=1025, evicted=27, waits=(0.0004,) * 4), 120.0)
    columns = history.columns()
    assert columns["hit_rate"] == [None, 0.25, None]
    assert columns["evictions_per_second"] == [None, 2.0, 0.0]
    assert columns["p50"] == [None, pytest.approx(0.000375), None]


def test_an_hour_is_kept_and_no_more() -> None:
    history = History()
    for number in range(2 * SAMPLES):
        history.add(snapshot(queried=number), 10.0 * number)
    columns = history.columns()
    assert len(columns["time"]) == SAMPLES
    assert columns["time"][-1] - columns["time"][0] == 3600
    lengths = {len(columns[name]) for name in ("hit_rate", "evictions_per_second", "p50", "p99")}
    assert lengths == {SAMPLES}
    assert {len(values) for values in columns["memory"].values()} == {SAMPLES}


def test_a_clock_that_was_set_back_makes_no_sample_wrong() -> None:
    history = History()
    history.add(snapshot(evicted=0), 100.0)
    history.add(snapshot(evicted=1), 40.0)
    assert history.columns()["evictions_per_second"][1] > 0


def test_quantiles_are_those_of_the_values_as_far_as_buckets_tell() -> None:
    chance = random.Random(7)
    values = [chance.lognormvariate(-8, 1) for _ in range(5000)]
    histogram = Histogram(BOUNDS)
    for each in values:
        histogram.observe(each)
    values.sort()
    for part in (0.01, 0.5, 0.9, 0.99):
        true = values[int(part * len(values))]
        low, high = max([0, *(b for b in BOUNDS if b < true)]), min(b for b in BOUNDS if b >= true)
        assert low <= quantile(BOUNDS, histogram.counts, part) <= high * 1.0001, part


def test_quantiles_of_nothing_and_of_what_is_above_all_bounds() -> None:
    assert quantile((1, 2), (0, 0, 0), 0.5) is None
    assert quantile((1, 2), (0, 0, 3), 0.5) == 2
    assert quantile((1, 2), (4, 0, 0), 0.5) == 0.5
    assert quantile((1, 2), (0, 4, 0), 1.0) == 2
