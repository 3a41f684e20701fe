"""Prompts that share prefixes, and K/V that follows from them: every wrong byte is seen.

The row of a token depends on all tokens before it, on its layer and on K or V. So a block that was
stored for other tokens, at another place, or only in part differs in every row that is wrong.
"""

import random

import numpy as np
import numpy.typing as npt

from kvd_client.arrays import ArrayLayer, ArrayModel

BLOCK_TOKENS = 8
N_LAYERS = 2
ROW_BYTES = 128
MODEL = ArrayModel(
    "soak", "soak 1", [ArrayLayer(1, ROW_BYTES, ROW_BYTES)] * N_LAYERS, np.uint8, BLOCK_TOKENS
)
BLOCK_BYTES = MODEL.block_bytes
assert BLOCK_BYTES == 4096  # a page, so that the stride has no padding

_WORDS = np.arange(ROW_BYTES // 4, dtype=np.uint32)
_PLANES = np.array([[0x9E3779B1, 0x85EBCA77], [0xC2B2AE3D, 0x27D4EB2F]], dtype=np.uint32)
"""An odd factor for K and V of each layer."""

N_DOCUMENTS, DOCUMENT_TOKENS, N_BRANCHES, BRANCH_TOKENS = 6, (24, 40, 61), 12, 72


def prompt(chance: random.Random) -> list[int]:
    """A document, or its beginning, and one of some continuations, cut anywhere."""
    document = 1000 * chance.randrange(N_DOCUMENTS)
    branch = 100_000 + 1000 * chance.randrange(N_BRANCHES)
    n_branch = chance.randrange(1, BRANCH_TOKENS)
    return [
        *range(document, document + chance.choice(DOCUMENT_TOKENS)),
        *range(branch, branch + n_branch),
    ]


def rows(tokens: list[int], start: int = 0) -> npt.NDArray[np.uint8]:
    """K/V of the tokens from position `start` on: [layer][K or V][token][byte]."""
    state, states = 0, []
    for token in tokens:
        state = (state * 0x01000193 + token + 1) & 0xFFFFFFFF
        states.append(state)
    column = np.array(states[start:], dtype=np.uint32).reshape(1, 1, -1, 1)
    words = (column * _PLANES.reshape(N_LAYERS, 2, 1, 1)) ^ _WORDS
    return words.view(np.uint8)


def blocks(tokens: list[int], start: int) -> list[bytes]:
    """The payloads of the blocks that begin at `start`, a multiple of BLOCK_TOKENS."""
    whole = rows(tokens, start)
    payloads = []
    for at in range(0, len(tokens) - start, BLOCK_TOKENS):
        part = whole[:, :, at : at + BLOCK_TOKENS]
        block = np.zeros((N_LAYERS, 2, BLOCK_TOKENS, ROW_BYTES), np.uint8)
        block[:, :, : part.shape[2]] = part
        payloads.append(block.tobytes())
    return payloads


def block_rows(payload: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A block's bytes as `rows` has them."""
    return payload.reshape(N_LAYERS, 2, BLOCK_TOKENS, ROW_BYTES)
