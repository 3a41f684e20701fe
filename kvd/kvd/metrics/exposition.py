"""A snapshot as Prometheus' text. Every series that there is, with its help.

Base units, `_total` for what only grows, no colons. Labels are bounded: an arena's name is its
tenant's and its model's, of which a tenant has at most max_models; operations, states, reasons and
codes are the program's own.
"""

import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from math import inf
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from kvd.core.ages import SAMPLED
from kvd.core.histogram import Histogram
from kvd.metrics.snapshot import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("free", "filling", "active", "cached", "pinned")

_PREFIX_CACHE = {
    "queried_tokens": ("queries", "Tokens of prompts that were looked up."),
    "hit_tokens": ("hits", "Tokens of prompts that were found."),
}
_COUNTED = {
    "stored_blocks": "Blocks that were stored.",
    "stored_bytes": "Bytes of payload that were stored.",
    "present_blocks": "Blocks of appends that were there already.",
    "joined_blocks": "Blocks of appends that another client was storing at that moment.",
    "failed_blocks": "Blocks that could not be stored.",
    "sequences_opened": "Sequences that were opened.",
    "sequences_failed": "Sequences that failed, by their owner's word.",
    "sequences_timed_out": "Sequences that nobody asked for in time.",
    "sequences_not_matched": "Sequences for which nothing was to be matched.",
    "sequences_not_stored": "Sequences of which nothing was to be stored.",
    "sessions_opened": "Sessions of clients that were opened.",
    "adopted_blocks": "Blocks that an earlier daemon had left.",
    "damaged_blocks": "Adopted blocks that were thrown away, since they had changed.",
}
"""Of the report's counters."""


def write(snapshot: Snapshot) -> bytes:
    """The text. Takes some milliseconds, and the process' own numbers from /proc."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(snapshot))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Families:
    """All of a snapshot, as the library wants it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        yield from _about(snapshot)
        yield from _memory(snapshot.report)
        yield from _clients(snapshot)
        yield from _counters(snapshot)
        yield from _histograms(snapshot)


def _about(snapshot: Snapshot) -> Iterator[Metric]:
    version = {"version": snapshot.report["version"], "python": platform.python_version()}
    yield InfoMetricFamily("kvd_build", "The program that runs.", version)
    yield InfoMetricFamily("kvd_config", "Its settings, but for the tenants'.", snapshot.settings)
    yield GaugeMetricFamily(
        "kvd_uptime_seconds", "Since the start of the daemon.", snapshot.report["uptime_seconds"]
    )


def _memory(report: dict[str, Any]) -> Iterator[Metric]:
    accounting = report["accounting"]
    yield GaugeMetricFamily(
        "kvd_memory_budget_bytes", "max_memory: all that there is.", accounting["budget_bytes"]
    )
    memory = GaugeMetricFamily(
        "kvd_memory_bytes", "The budget by what it is used for: adds up to it.", labels=["state"]
    )
    for state in ("unassigned", "directory", "staging", *STATES):
        memory.add_metric([state], accounting[f"{state}_bytes"])
    yield memory
    yield GaugeMetricFamily(
        "kvd_memory_os_bytes",
        "What the operating system has given to arenas, directories and stagings.",
        accounting["os_bytes"],
    )
    yield GaugeMetricFamily(
        "kvd_accounting_drift_bytes",
        "What the operating system says beyond what is accounted for. Anything but 0 is a fault.",
        accounting["drift_bytes"],
    )
    arenas = GaugeMetricFamily(
        "kvd_arena_bytes",
        "Backed slots of an arena (tenant/model), by state.",
        labels=["arena", "state"],
    )
    for (arena, state), n_bytes in _arena_bytes(report["models"]).items():
        arenas.add_metric([arena, state], n_bytes)
    yield arenas
    held = GaugeMetricFamily("kvd_tenant_held_bytes", "What a tenant holds.", labels=["tenant"])
    quota = GaugeMetricFamily(
        "kvd_tenant_quota_bytes", "What it may hold at the most.", labels=["tenant"]
    )
    for tenant in report["tenants"]:
        held.add_metric([tenant["name"]], tenant["held_bytes"])
        quota.add_metric([tenant["name"]], tenant["quota_bytes"])
    yield held
    yield quota
    yield GaugeMetricFamily(
        "kvd_unchecked_blocks",
        "Blocks that an earlier daemon left, and that are not checked yet.",
        report["recovery"]["unchecked_blocks"],
    )


def _arena_bytes(models: Iterable[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """Arenas of one tenant whose models are called the same count as one: a series is unique."""
    total: Counter[tuple[str, str]] = Counter()
    for model in models:
        for state in STATES:
            n_bytes = model["blocks"][state] * model["stride_bytes"]
            total[f"{model['tenant']}/{model['name']}", state] += n_bytes
    return total


def _clients(snapshot: Snapshot) -> Iterator[Metric]:
    report = snapshot.report
    yield GaugeMetricFamily("kvd_sessions", "Clients that are connected.", report["clients"])
    yield GaugeMetricFamily(
        "kvd_sessions_stopped",
        "Of these, clients whose process is stopped.",
        report["stopped_clients"],
    )
    yield GaugeMetricFamily(
        "kvd_sequences_max", "max_sequences: how many may be open.", report["sequences"]["max"]
    )
    sequences = GaugeMetricFamily(
        "kvd_sequences", "Open sequences, and allocs that wait for one.", labels=["state"]
    )
    for state, count in snapshot.sequences.items():
        sequences.add_metric([state], count)
    yield sequences


def _counters(snapshot: Snapshot) -> Iterator[Metric]:
    counters = snapshot.report["counters"]
    for name, (suffix, text) in _PREFIX_CACHE.items():
        yield CounterMetricFamily(f"kvd_prefix_cache_{suffix}", text, counters[name])
    for name, text in _COUNTED.items():
        yield CounterMetricFamily(f"kvd_{name}", text, counters[name])
    evicted = CounterMetricFamily(
        "kvd_evicted_blocks", "Blocks that were evicted, by what for.", labels=["reason"]
    )
    for reason, count in snapshot.evicted.items():
        evicted.add_metric([reason], count)
    yield evicted
    errors = CounterMetricFamily(
        "kvd_request_errors", "Requests that were answered with an error.", labels=["code"]
    )
    for code, count in snapshot.errors.items():
        errors.add_metric([code], count)
    yield errors


def _histograms(snapshot: Snapshot) -> Iterator[Metric]:
    requests = HistogramMetricFamily(
        "kvd_request_duration_seconds",
        "From when the loop takes a request in to its answer, with what it waits for.",
        labels=["operation"],
    )
    for operation, durations in snapshot.durations.items():
        _add(requests, [operation], durations)
    yield requests
    sample = f"Looked at: one eviction in {SAMPLED}."
    for name, text, found in (
        (
            "kvd_eviction_duration_seconds",
            "What the core took for an event in which it evicted anything, however much.",
            snapshot.evicting,
        ),
        (
            "kvd_block_lifetime_seconds",
            f"From when a block was stored to its eviction. {sample}",
            snapshot.lifetime,
        ),
        (
            "kvd_block_idle_before_eviction_seconds",
            f"From a block's last use to its eviction. {sample}",
            snapshot.idle,
        ),
        (
            "kvd_block_reuse_gap_seconds",
            "From the last use of a cached prefix to its next: of its deepest block.",
            snapshot.reuse_gap,
        ),
    ):
        family = HistogramMetricFamily(name, text, labels=[])
        _add(family, [], found)
        yield family


def _add(family: HistogramMetricFamily, labels: list[str], found: Histogram) -> None:
    below = 0
    buckets = []
    for bound, count in zip((*found.bounds, inf), found.counts, strict=True):
        below += count
        buckets.append((f"{bound:g}" if bound != inf else "+Inf", below))
    family.add_metric(labels, buckets, found.total)
