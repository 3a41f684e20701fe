"""What the loop tells the metrics' thread: the state of one moment, in copies that nothing changes
any more. Taking one costs the loop about a millisecond, the status report above all.
"""

from dataclasses import dataclass
from typing import Any

from kvd.core.cache import Cache
from kvd.core.histogram import Histogram
from kvd.settings import ABOUT, Settings
from kvd.timing import RequestTimes
from kvd_proto.messages import Reported


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Times in seconds."""

    report: dict[str, Any]
    """As `kvctl status --json` has it; its keys are in PROTOCOL.md."""
    settings: dict[str, str]
    evicted: dict[str, int]
    """Blocks, by reason."""
    sequences: dict[str, int]
    """Open ones and those who wait for one, by state."""
    durations: dict[str, Histogram]
    """Of requests, by operation."""
    errors: dict[str, int]
    """Requests that were answered with an error, by its code."""
    evicting: Histogram
    """How long the core took for events in which it evicted."""
    idle: Histogram
    lifetime: Histogram
    reuse_gap: Histogram


def take(
    report: Reported, cache: Cache, times: RequestTimes, evicting: Histogram, settings: Settings
) -> Snapshot:
    """Copy what changes. On the loop."""
    ages = cache.budget.ages
    openings, timed_out = len(cache.openings), cache.timed_out_sequences
    return Snapshot(
        report=report.report,
        settings=_shown(settings),
        evicted=report.report["counters"]["evicted"],
        sequences={
            "pending": report.report["sequences"]["waiting"] + openings,
            "processing": cache.open_sequences - openings - timed_out,
            "timed_out": timed_out,
        },
        durations={name: each.copy() for name, each in times.durations.items()},
        errors=dict(times.errors),
        evicting=evicting.copy(),
        idle=ages.idle.copy(),
        lifetime=ages.lifetime.copy(),
        reuse_gap=ages.reuse_gap.copy(),
    )


def _shown(settings: Settings) -> dict[str, str]:
    """Those in effect, but for tables: they are no labels, and those of tenants hold salts."""
    values = {name: settings.effective(name) for name in ABOUT}
    return {
        name: "" if value is None else str(value)
        for name, value in values.items()
        if value is None or isinstance(value, str | int | float)
    }
