"""One eviction among many blocks, beside one among few; and what a block takes of memory.

Blocks go in runs: as many as somebody stores, if they are of one arena. So an eviction is measured
in runs of several lengths.

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
from kvd_proto.index import ENTRY_BYTES
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.layout import record_bytes

FEW = 1_000
AT_ONCE = 256
"""Evictions that are timed together."""
RUNS = (1, 4, 32)
"""Blocks that are stored together: 32 are a prompt of 1,024 tokens."""
REPEATS = 50
PROMPT_BLOCKS = 4
BLOCK_TOKENS = 32
MEMORY_BLOCKS = 100_000
PROMISED_BYTES = 500


def measure(n_many: int) -> list[Row]:
    """Rows for an eviction, in microseconds, and for memory, in bytes. For a process of its own:
    from now on it collects cycles as the daemon does."""
    pauses.bound()
    return [_memory(), *_evictions(n_many)]


def _evictions(n_many: int) -> list[Row]:
    numbers = count()
    few, many = Replay(FEW), Replay(n_many)
    _fill(many, n_many, 1, numbers)
    costs: dict[tuple[Replay, int], list[float]] = {
        (replay, run): [] for run in RUNS for replay in (few, many)
    }
    for _ in range(REPEATS):
        for (replay, run), values in costs.items():
            _fill(replay, replay.n_blocks, 1, numbers)
            values.append(_cost(replay, run))
    name = f"one eviction, of {n_many:,} blocks that may go"
    return [
        row(f"{name}, in runs of {run}", costs[many, run], "us", costs[few, run], f"one of {FEW:,}")
        for run in RUNS
    ]


def _cost(replay: Replay, run: int) -> float:
    budget, arena = replay.core.cache.budget, replay.arena
    effects: list[Effect] = []
    started = time.perf_counter()
    for _ in range(AT_ONCE // run):
        budget.pop_oldest(budget.policies, effects, for_arena=arena, most=run)
    return (time.perf_counter() - started) * 1e6 / AT_ONCE


def _memory() -> Row:
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    replay = Replay(MEMORY_BLOCKS, BLOCK_TOKENS)
    _fill(replay, MEMORY_BLOCKS, BLOCK_TOKENS, count())
    gc.collect()
    in_core = (process.memory_info().rss - before) / replay.arena.cached
    in_shm = record_bytes(BLOCK_TOKENS) + ENTRY_BYTES
    beside = in_core + in_shm - 2 * TOKEN_BYTES * BLOCK_TOKENS
    name = "memory of a block beside its tokens: core, directory and index"
    ratio = round(beside / PROMISED_BYTES, 4)
    return Row(name, round(beside, 1), "B", PROMISED_BYTES, "what is promised", ratio, 0.0)


def _fill(replay: Replay, n_blocks: int, block_tokens: int, numbers: "count[int]") -> None:
    """Store prompts until so many blocks are cached."""
    while (room := n_blocks - replay.arena.cached) > 0:
        n_tokens = min(PROMPT_BLOCKS, room) * block_tokens
        replay.request(pack(f"<{n_tokens}I", next(numbers), *range(n_tokens - 1)))
