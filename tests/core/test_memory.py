"""What a block takes of the daemon's memory, beside its tokens: counted by tracemalloc on the real
core, with chains and branches as prompts make them.
"""

import gc
import tracemalloc
from random import Random

from kvd.core.siblings import RUN
from kvd.replay import Replay
from kvd_proto.index import ENTRY_BYTES
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.layout import record_bytes
from tests.core.driver import packed

BLOCK_TOKENS = 32
N_BLOCKS = 10_000
MOST_BYTES = 450
"""Of the core, the directory and the index. The promise is 500 of the daemon, where each object
takes up to 15 bytes more than it asked for."""


def fill(replay: Replay, random: Random, fresh: int) -> None:
    """Prompts of 4 to 32 blocks; of these, so many in a hundred begin anew, the others below a
    block of one of the latest."""
    latest: list[list[int]] = []
    while replay.arena.high_water < replay.n_blocks:
        tokens: list[int] = []
        if latest and random.randrange(100) >= fresh:
            before = random.choice(latest[-30:])
            tokens = before[: BLOCK_TOKENS * random.randint(1, len(before) // BLOCK_TOKENS)]
        n_more = min(random.choice((4, 8, 16, 32)), replay.n_blocks - replay.arena.high_water)
        tokens = tokens + random.choices(range(1 << 17), k=BLOCK_TOKENS * n_more)
        latest = [*latest[-30:], tokens]
        replay.request(packed(*tokens))


def bytes_of_a_block(fresh: int) -> float:
    """Beside its tokens, of which the daemon has one copy, and the directory another."""
    replay = Replay(N_BLOCKS, BLOCK_TOKENS)
    random = Random(fresh)
    gc.collect()
    tracemalloc.start()
    try:
        fill(replay, random, fresh)
        gc.collect()
        traced, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert replay.arena.cached == N_BLOCKS
    assert replay.evicted_blocks == 0
    in_core = traced / N_BLOCKS - TOKEN_BYTES * BLOCK_TOKENS
    return in_core + record_bytes(BLOCK_TOKENS) - TOKEN_BYTES * BLOCK_TOKENS + ENTRY_BYTES


def test_a_block_of_prompts_that_go_on_from_each_other() -> None:
    assert bytes_of_a_block(fresh=10) < MOST_BYTES


def test_a_block_of_prompts_that_share_nothing() -> None:
    assert bytes_of_a_block(fresh=100) < MOST_BYTES


def test_a_block_among_siblings() -> None:
    n_blocks = 3_000
    replay = Replay(n_blocks)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(n_blocks):
            replay.request(packed(number))
        gc.collect()
        traced, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(replay.arena.root.children) == n_blocks > 2 * RUN
    assert traced / n_blocks + record_bytes(1) - 2 * TOKEN_BYTES < MOST_BYTES
