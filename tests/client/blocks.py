"""A tiny model and its blocks: K/V bytes that follow from the tokens, so that everybody can tell
what must come back."""

import os
import time
from collections.abc import Callable, Sequence
from hashlib import shake_128
from pathlib import Path

import kvd_client

BLOCK_TOKENS = 8
PAYLOAD_BYTES = BLOCK_TOKENS * 2 * 64
"""Two layers, each with a K row and a V row of 32 bytes for a token."""
STRIDE = 4096
MODEL = kvd_client.Model(
    "tiny", bytes(32), "array", (("f16", 32, "f16", 32), ("f16", 32, "f16", 32)), BLOCK_TOKENS
)
assert MODEL.format().max_bytes == PAYLOAD_BYTES


def payload(prefix: Sequence[int]) -> bytes:
    """K/V of the last block of `prefix`: another one for each prefix."""
    return shake_128(repr(list(prefix)).encode()).digest(PAYLOAD_BYTES)


def payloads(tokens: Sequence[int], start: int = 0) -> list[bytes]:
    """K/V of the blocks of tokens[start:]."""
    ends = range(start + BLOCK_TOKENS, len(tokens) + BLOCK_TOKENS, BLOCK_TOKENS)
    return [payload(tokens[: min(end, len(tokens))]) for end in ends]


def store(context: kvd_client.Context, tokens: Sequence[int]) -> None:
    """Store what is not stored of `tokens`, and wait until everybody finds it."""
    with context.alloc(tokens) as sequence:
        rest = tokens[sequence.full_tokens :]
        if rest:
            commit = sequence.append(rest, payloads(tokens, sequence.full_tokens))
            flushed = context.client.flush(commit)  # type: ignore[attr-defined]
            assert flushed.failures == []


def holds(sequence: kvd_client.Sequence, tokens: Sequence[int]) -> bool:
    """Whether the sequence's blocks are exactly those of `tokens`."""
    expected = payloads(tokens)
    return sequence.n_blocks == len(expected) and all(
        bytes(sequence.block(index)) == block for index, block in enumerate(expected)
    )


def eventually(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until it holds, and fail if it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def open_files() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def mappings() -> list[str]:
    """What this process has mapped of a daemon's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "kvd-staging" in line or "/dev/shm/kvd-" in line]
