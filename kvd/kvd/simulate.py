"""`kvd simulate`: what would a cache of this size have hit, of these requests?

Replays a trace through the daemon's core (replay.py), once for each capacity, beside Belady's
optimum (optimum.py). A hit is a block of the prefix of a request that is cached when it comes;
requests come one after the other, and each stores all of its blocks.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from struct import pack
from typing import Any

from kvd.kinds import Size
from kvd.optimum import most_hits
from kvd.replay import Replay
from kvd.trace import Trace, read

DEFAULT_CAPACITIES = "2%,5%,10%,30%"
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")
_BLOCKS = re.compile(r"[0-9]+")
_BYTES = Size(1, 1 << 60)


class BadCapacity(Exception):
    """Which one, and what it may be."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one capacity. Hits, and what was evicted, are counted in blocks."""

    capacity: str
    """As it was asked for."""
    blocks: int
    hits: int
    most_hits: int
    """Belady's."""
    evicted: int
    seconds: float
    """That the replay took."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", type=Path, metavar="TRACE.jsonl", help='lines of JSON with "hash_ids"'
    )
    parser.add_argument(
        "--capacity",
        default=DEFAULT_CAPACITIES,
        metavar="C[,C...]",
        help="a part of the different blocks (5%%), a number of blocks (20000), or, with "
        f"--block-bytes, a size (4GiB); default: {DEFAULT_CAPACITIES.replace('%', '%%')}",
    )
    parser.add_argument("--block-bytes", metavar="SIZE", help="what a block of the trace takes")
    parser.add_argument("--json", action="store_true", help="print it for programs")


def run(options: argparse.Namespace) -> int:
    """Raises BadTrace or BadCapacity; returns the exit code."""
    names = options.capacity.split(",")
    block_bytes = (
        None if options.block_bytes is None else _size("--block-bytes", options.block_bytes)
    )
    for name in names:  # before the trace is read, which may take long
        blocks_of(name, 1 << 60, block_bytes)
    trace = read(options.trace)
    capacities = [(name, blocks_of(name, trace.n_blocks, block_bytes)) for name in names]
    outcomes = [simulate(trace, name, blocks) for name, blocks in capacities]
    if options.json:
        print(json.dumps(report(trace, outcomes), indent=2))
    else:
        print(table(trace, outcomes))
    return 0


def blocks_of(capacity: str, n_different: int, block_bytes: int | None) -> int:
    """How many blocks fit a capacity. Raises BadCapacity."""
    if percent := _PERCENT.fullmatch(capacity):
        blocks = int(n_different * Fraction(percent[1]) / 100)
    elif _BLOCKS.fullmatch(capacity):
        blocks = int(capacity)
    else:
        n_bytes = _size("--capacity", capacity)
        if block_bytes is None:
            raise BadCapacity(f"--capacity {capacity}: a size needs --block-bytes")
        blocks = n_bytes // block_bytes
    if not blocks:
        raise BadCapacity(f"--capacity {capacity}: not even one block fits")
    return blocks


def simulate(trace: Trace, name: str, blocks: int) -> Outcome:
    """Replay the whole trace with room for so many blocks."""
    references = trace.references
    replay = Replay(min(blocks, trace.n_blocks))
    progress = Progress(name, len(trace.requests))
    started = time.perf_counter()
    hits = 0
    for number, request in enumerate(trace.requests):
        progress.show(number)
        hits += replay.request(pack(f"<{len(request)}I", *request))
    seconds = time.perf_counter() - started
    progress.clear()
    most = most_hits(references, blocks)
    return Outcome(name, blocks, hits, most, replay.evicted_blocks, round(seconds, 3))


class Progress:
    """How far a replay is, if standard error is a terminal."""

    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._total = total
        self._shown = ""

    def show(self, done: int) -> None:
        if done % 500 == 0 and sys.stderr.isatty():
            self._shown = f"capacity {self._name}: {100 * done // self._total} % replayed"
            print(f"\r{self._shown}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print(f"\r{' ' * len(self._shown)}\r", end="", file=sys.stderr, flush=True)


def report(trace: Trace, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For programs. Rates are parts of all blocks of all requests."""
    n_references = sum(map(len, trace.requests))
    return {
        "requests": len(trace.requests),
        "blocks": n_references,
        "different_blocks": trace.n_blocks,
        "capacities": [
            {
                **asdict(each),
                "hit_rate": each.hits / n_references,
                "most_hit_rate": each.most_hits / n_references,
            }
            for each in outcomes
        ],
    }


def table(trace: Trace, outcomes: Sequence[Outcome]) -> str:
    """For people."""
    n_references = sum(map(len, trace.requests))
    repeated = _percent(n_references - trace.n_blocks, n_references)
    lines = [
        f"{len(trace.requests):,} requests for {n_references:,} blocks, {trace.n_blocks:,} of them "
        "different:",
        f"no cache can hit more than {repeated} of them",
        "",
        f"{'capacity':<12}{'blocks':>12}{'hits':>10}{'Belady':>10}{'evicted':>13}{'took':>9}",
    ]
    lines += [
        f"{each.capacity:<12}{each.blocks:>12,}{_percent(each.hits, n_references):>10}"
        f"{_percent(each.most_hits, n_references):>10}{each.evicted:>13,}{each.seconds:>7.1f} s"
        for each in outcomes
    ]
    return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _size(flag: str, text: str) -> int:
    try:
        return _BYTES.read(text)
    except ValueError:
        raise BadCapacity(
            f"{flag} {text}: it is no size, like 4GiB"
            + (", no number of blocks and no part, like 5%" if flag == "--capacity" else "")
        ) from None
