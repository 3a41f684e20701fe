"""A small engine in NumPy that shares its K/V with other processes through kvd.

    python examples/array_engine.py "What is a contribution?"
    python examples/array_engine.py "Who is the licensor?"

The second process finds most of its prompt's K/V in the cache. All that concerns kvd is in `main`
and in the three calls of the cache in `forward`. The model is a transformer with random weights
that reads bytes: it says nothing of sense, but its K/V is as real as any.

Its sums do not depend on how a prompt is split into chunks (each row is computed alone), so
the logits are the same to the last bit whether a prefix was computed or found.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

import kvd_client
from kvd_client.arrays import KV, ArrayContext, ArrayLayer, ArrayModel

DOCUMENT = "You are a helpful assistant. Answer in one sentence, and only from this licence.\n" * 4
HEADS, WIDTH, VOCABULARY = 4, 48, 256
LAYERS = (ArrayLayer(2, 16, 16), ArrayLayer(1, 16, 8), ArrayLayer(2, 8, 12))
"""Grouped-query heads; K and V may differ from each other and from layer to layer."""


class Cache(Protocol):
    """What `forward` needs: an ArraySequence of kvd has it, and so has PrivateCache."""

    def extend(self, tokens: Sequence[int]) -> range: ...
    def write(self, layer: int, k: np.ndarray, v: np.ndarray) -> None: ...
    def views(self, layer: int) -> list[KV]: ...


class PrivateCache:
    """The same K/V in plain arrays of this process, for comparison."""

    def __init__(self, block_tokens: int, capacity: int = 2048) -> None:
        self.block_tokens = block_tokens
        self.positions = range(0)
        self.layers = [
            KV(
                np.zeros((capacity, layer.kv_heads, layer.k_dim), np.float32),
                np.zeros((capacity, layer.kv_heads, layer.v_dim), np.float32),
            )
            for layer in LAYERS
        ]

    def extend(self, tokens: Sequence[int]) -> range:
        self.positions = range(self.positions.stop, self.positions.stop + len(tokens))
        return self.positions

    def write(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self.layers[layer].k[self.positions.start : self.positions.stop] = k
        self.layers[layer].v[self.positions.start : self.positions.stop] = v

    def views(self, layer: int) -> list[KV]:
        k, v = self.layers[layer]
        size = self.block_tokens
        blocks = [KV(k[at : at + size], v[at : at + size]) for at in range(0, len(k), size)]
        return first_tokens(blocks, self.positions.stop)


class Weights(NamedTuple):
    """One layer's matrices, [in][out]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray
    up: np.ndarray
    down: np.ndarray


class Transformer:
    """Decoder-only, rotary positions, float32."""

    def __init__(self, seed: int = 1, block_tokens: int = 16) -> None:
        self.seed = seed
        draw = np.random.default_rng(seed)

        def matrix(rows: int, columns: int) -> np.ndarray:
            return (draw.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)

        self.embedding = matrix(VOCABULARY, WIDTH) * 16
        self.weights = [
            Weights(
                matrix(WIDTH, HEADS * k_dim),
                matrix(WIDTH, kv_heads * k_dim),
                matrix(WIDTH, kv_heads * v_dim),
                matrix(HEADS * v_dim, WIDTH),
                matrix(WIDTH, 4 * WIDTH),
                matrix(4 * WIDTH, WIDTH),
            )
            for kv_heads, k_dim, v_dim in LAYERS
        ]
        self.output = matrix(WIDTH, VOCABULARY)
        # The identity says all that the values of K/V depend on. A real engine names its version,
        # and a hash of its weights.
        identity = f"array_engine.py 1, seed {seed}"
        self.model = ArrayModel("tiny-bytes", identity, LAYERS, np.float32, block_tokens)

    def forward(self, tokens: Sequence[int], cache: Cache) -> np.ndarray:
        """Logits [token][vocabulary] of `tokens`, which follow what the cache holds."""
        positions = cache.extend(tokens)
        hidden = self.embedding[list(tokens)]
        for layer, (w, (kv_heads, k_dim, v_dim)) in enumerate(
            zip(self.weights, LAYERS, strict=True)
        ):
            x = each(normalise, hidden)
            q = rotate(multiply(x, w.q).reshape(-1, HEADS, k_dim), positions)
            k = rotate(multiply(x, w.k).reshape(-1, kv_heads, k_dim), positions)
            v = multiply(x, w.v).reshape(-1, kv_heads, v_dim)
            cache.write(layer, k, v)
            heard = attend(q, cache.views(layer), positions)
            hidden = hidden + multiply(heard, w.o)
            x = each(normalise, hidden)
            hidden = hidden + multiply(np.tanh(multiply(x, w.up)), w.down)
        return multiply(each(normalise, hidden), self.output)

    def generate(self, tokens: Sequence[int], cache: Cache, n_tokens: int) -> np.ndarray:
        """Read `tokens`, then decode greedily: the logits [n_tokens][vocabulary] of each choice."""
        logits = [self.forward(tokens, cache)[-1]]
        while len(logits) < n_tokens:
            logits.append(self.forward([int(logits[-1].argmax())], cache)[-1])
        return np.stack(logits)


def attend(q: np.ndarray, blocks: list[KV], positions: range) -> np.ndarray:
    """Causal attention of each row of q over the K/V blocks, which are read where they lie."""
    heard = []
    for row, position in zip(q, positions, strict=True):
        seen = first_tokens(blocks, position + 1)
        for head in range(HEADS):
            group = head * seen[0].k.shape[1] // HEADS
            scores = np.concatenate([k[:, group] @ row[head] for k, _ in seen])
            weights = softmax(scores / np.float32(q.shape[2] ** 0.5))
            total, at = np.float32(0), 0
            for _, v in seen:
                total = total + weights[at : at + len(v)] @ v[:, group]
                at += len(v)
            heard.append(total)
    return np.reshape(heard, (len(q), -1))


def first_tokens(blocks: list[KV], n_tokens: int) -> list[KV]:
    """The blocks of the first `n_tokens` tokens, the last one cut."""
    found = []
    for k, v in blocks:
        if n_tokens <= 0:
            break
        found.append(KV(k[:n_tokens], v[:n_tokens]))
        n_tokens -= len(k)
    return found


def each(function: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Apply to every row alone, so that its result does not depend on how many there are."""
    return np.stack([function(row) for row in rows])


def multiply(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return each(lambda row: row @ matrix, rows)


def normalise(row: np.ndarray) -> np.ndarray:
    return row / np.sqrt(np.mean(row * row) + np.float32(1e-6))


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def rotate(rows: np.ndarray, positions: range) -> np.ndarray:
    """Rotary positions: [token][head][dim], pairs (i, i + dim/2)."""
    half = rows.shape[2] // 2
    angles = np.outer(positions, 10_000.0 ** (-np.arange(half) / half))
    cos, sin = np.float32(np.cos(angles))[:, None], np.float32(np.sin(angles))[:, None]
    a, b = rows[..., :half], rows[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question", nargs="?", default="What is a contribution?")
    parser.add_argument("--runtime-dir", help="of the daemon; one is started if none runs")
    parser.add_argument("--tokens", type=int, default=24, help="to decode (default: 24)")
    options = parser.parse_args()

    engine = Transformer()
    prompt = list((DOCUMENT + options.question).encode())
    with (
        kvd_client.connect(options.runtime_dir, start_private=True) as client,
        ArrayContext(client, engine.model) as context,
    ):
        started = time.perf_counter()
        # The last token is always computed: its logits are what we want.
        with context.alloc(prompt[:-1]) as sequence:
            matched = sequence.matched_tokens
            logits = engine.generate(prompt[matched:], sequence, options.tokens)
        # The end of the block has stored what was new.
        print(f"{matched} of {len(prompt)} prompt tokens were in the cache")
        print(f"{options.tokens} tokens after {time.perf_counter() - started:.2f} s")

    alone = engine.generate(prompt, PrivateCache(engine.model.block_tokens), options.tokens)
    print("logits equal those of a private cache:", np.array_equal(logits, alone))


if __name__ == "__main__":
    main()
