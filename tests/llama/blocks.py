"""Helpers of the llama.cpp tests: prompts, and blocks in memory of the test."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.kv.mover import BlockAt

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Block:
    start: int
    n: int
    payload: npt.NDArray[np.uint8]


def prompt(n: int, n_vocab: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(1, n_vocab, n, dtype=np.int32)


def export(engine: LlamaEngine, seq: int, start: int, n: int) -> Block:
    payload = np.full(engine.layout.state_bytes(n), 0xEE, dtype=np.uint8)
    written = engine.export_block(seq, start, n, payload.ctypes.data, len(payload))
    assert written == len(payload)
    return Block(start, n, payload)


def export_all(engine: LlamaEngine, seq: int, block_tokens: int = 32) -> list[Block]:
    """All full blocks and the tail."""
    length = engine.length(seq)
    return [
        export(engine, seq, start, min(block_tokens, length - start))
        for start in range(0, length, block_tokens)
    ]


def import_all(engine: LlamaEngine, seq: int, blocks: list[Block]) -> None:
    for block in blocks:
        import_one(engine, seq, block)
    last = blocks[-1]
    engine.check_range(seq, 0, last.start + last.n)


def import_one(engine: LlamaEngine, seq: int, block: Block) -> None:
    payload = block.payload
    engine.import_blocks(seq, block.start, [BlockAt(payload.ctypes.data, len(payload), block.n)])


def same_bytes(one: list[Block], other: list[Block]) -> bool:
    return len(one) == len(other) and all(
        (a.start, a.n) == (b.start, b.n) and np.array_equal(a.payload, b.payload)
        for a, b in zip(one, other, strict=True)
    )
