"""One eviction among many blocks, beside one among few; and what a block takes of memory.

The core alone, without a daemon. Prompts have four blocks that nobody else has, so that a quarter
of all are children of the root. Few and many are asked in turn, so that noise meets both alike.
"""

import gc
import time
from itertools import count
from struct import pack

import psutil

from bench.report import Row, row
from kvd import pauses
from kvd.core.events import Effect
from kvd.replay import Replay
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.layout import record_bytes

FEW = 1_000
AT_ONCE = 200
"""Evictions that are timed together."""
REPEATS = 50
PROMPT_BLOCKS = 4
BLOCK_TOKENS = 32
MEMORY_BLOCKS = 100_000
PROMISED_BYTES = 500


def measure(n_many: int) -> list[Row]:
    """Rows for an eviction, in microseconds, and for memory, in bytes. For a process of its own:
    from now on it collects cycles as the daemon does."""
    pauses.bound()
    return [_memory(), _evictions(n_many)]


def _evictions(n_many: int) -> Row:
    numbers = count()
    few, many = Replay(FEW), Replay(n_many)
    _fill(many, n_many, 1, numbers)
    costs: dict[Replay, list[float]] = {few: [], many: []}
    for _ in range(REPEATS):
        for replay, values in costs.items():
            _fill(replay, replay.n_blocks, 1, numbers)
            values.append(_cost(replay))
    name = f"one eviction, of {n_many:,} blocks that may go"
    return row(name, costs[many], "us", costs[few], f"one of {FEW:,}")


def _cost(replay: Replay) -> float:
    budget = replay.core.cache.budget
    effects: list[Effect] = []
    started = time.perf_counter()
    for _ in range(AT_ONCE):
        budget.pop_oldest(effects)
    return (time.perf_counter() - started) * 1e6 / AT_ONCE


def _memory() -> Row:
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    replay = Replay(MEMORY_BLOCKS, BLOCK_TOKENS)
    _fill(replay, MEMORY_BLOCKS, BLOCK_TOKENS, count())
    gc.collect()
    in_core = (process.memory_info().rss - before) / replay.arena.cached
    beside = in_core + record_bytes(BLOCK_TOKENS) - 2 * TOKEN_BYTES * BLOCK_TOKENS
    name = "memory of a block beside its tokens: core and directory"
    ratio = round(beside / PROMISED_BYTES, 4)
    return Row(name, round(beside, 1), "B", PROMISED_BYTES, "what is promised", ratio, 0.0)


def _fill(replay: Replay, n_blocks: int, block_tokens: int, numbers: "count[int]") -> None:
    """Store prompts until so many blocks are cached."""
    while (room := n_blocks - replay.arena.cached) > 0:
        n_tokens = min(PROMPT_BLOCKS, room) * block_tokens
        replay.request(pack(f"<{n_tokens}I", next(numbers), *range(n_tokens - 1)))
