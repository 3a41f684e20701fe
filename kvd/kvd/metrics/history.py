"""The last hour, in samples: what the status page draws.

A sample keeps running totals; what happened between two of them is worked out when it is asked for.
Pure: the time comes with the sample.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvd.metrics.snapshot import Snapshot
from kvd.timing import BOUNDS

SAMPLE_SECONDS = 10.0
SAMPLES = 361
"""An hour, and the end of it."""
STATES = ("active", "pinned", "cached", "filling", "free", "staging", "directory")
"""What a byte of the budget may be used for."""
OPERATION = "alloc"
"""Whose latency is shown: it is what a prompt waits for."""
QUANTILES = {"p50": 0.5, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes by state, and totals since the start."""

    time: float
    n_bytes: tuple[int, ...]
    queried_tokens: int
    hit_tokens: int
    evicted_blocks: int
    durations: tuple[int, ...]
    """Of the operation: how many requests in each bucket."""


class History:
    """A ring of samples."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)

    def add(self, snapshot: Snapshot, time: float) -> None:
        """Take a sample of what is known now. `time`: seconds since 1970."""
        accounting, counters = snapshot.report["accounting"], snapshot.report["counters"]
        self._samples.append(
            Sample(
                time,
                tuple(accounting[f"{state}_bytes"] for state in STATES),
                counters["queried_tokens"],
                counters["hit_tokens"],
                counters["evicted_blocks"],
                tuple(snapshot.durations[OPERATION].counts),
            )
        )

    def columns(self) -> dict[str, Any]:
        """A list for each series, all as long as `time`. What lies between two samples is at the
        later one; null where there is nothing to tell: at the first, or if nobody asked."""
        samples = list(self._samples)
        rates: dict[str, list[float | None]] = {
            name: [None] * len(samples) for name in ("hit_rate", "evictions_per_second", *QUANTILES)
        }
        for index, (before, after) in enumerate(pairwise(samples), 1):
            queried = after.queried_tokens - before.queried_tokens
            if queried:
                rates["hit_rate"][index] = (after.hit_tokens - before.hit_tokens) / queried
            evicted = after.evicted_blocks - before.evicted_blocks
            seconds = max(after.time - before.time, 1e-3)  # the clock may be set
            rates["evictions_per_second"][index] = evicted / seconds
            counts = [b - a for a, b in zip(before.durations, after.durations, strict=True)]
            for name, part in QUANTILES.items():
                rates[name][index] = quantile(BOUNDS, counts, part)
        return {
            "sample_seconds": SAMPLE_SECONDS,
            "operation": OPERATION,
            "time": [round(each.time, 3) for each in samples],
            "memory": {
                state: [each.n_bytes[index] for each in samples]
                for index, state in enumerate(STATES)
            },
            **rates,
        }


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float | None:
    """The value below which `part` of what was counted lies, if a bucket's values lie evenly in it;
    None if nothing was counted. What is above all bounds counts as the last of them."""
    rank = part * sum(counts)
    if not rank:
        return None
    low, below = 0.0, 0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return low + (bound - low) * (rank - below) / count
        low, below = bound, below + count
    return bounds[-1]
