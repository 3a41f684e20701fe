"""What one process computes, another continues bit for bit: bytes and logits, on the real model.

"Equal" is what the design promises: the bytes exported again after an import are the stored ones,
and logits are those of a private context that decoded the same tokens in the same batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.worker import LlamaSequence, LlamaWorker
from tests.e2e.workers import OPTIONS, store_prompts, worker_process
from tests.support import Daemon

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

BLOCK = 32
TEXTS = {
    50: "You are a helpful assistant. Answer in one sentence, and say so if you do not know.\n",
    130: "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n",
    333: "Die Würde des Menschen ist unantastbar. Sie zu achten ist Verpflichtung aller. ",
    700: "Q: Where is the lighthouse? A: On the cape, beyond the harbour. 🗼 ",
    1500: "It was the best of times, it was the worst of times, it was the age of wisdom. ",
}


@dataclass
class Pair:
    """The storing worker in its own process, ours, and a private context to compare with."""

    storer: Connection
    worker: LlamaWorker
    private: LlamaEngine


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def pair(request: pytest.FixtureRequest, daemon: Daemon, smollm2: Path) -> Iterator[Pair]:
    kv_type: str = request.param
    options: dict[str, Any] = {**OPTIONS, "type_k": kv_type, "type_v": kv_type}
    with (
        worker_process(store_prompts, smollm2, daemon.runtime_dir, kv_type) as storer,
        LlamaWorker(smollm2, runtime_dir=daemon.runtime_dir, timeout=10, **options) as worker,
        LlamaEngine(model=worker.engine.model, **options) as private,
    ):
        assert storer.recv() == "ready"
        yield Pair(storer, worker, private)


@pytest.mark.parametrize("n_tokens", TEXTS)
def test_another_process_continues_bit_for_bit(pair: Pair, n_tokens: int) -> None:
    worker, private = pair.worker, pair.private
    prompt = tokens_of(worker, n_tokens)
    pair.storer.send(prompt)
    matched, stored_logits = pair.storer.recv()
    assert matched < BLOCK, "the storing worker has to compute this prompt itself"
    private.prefill(0, prompt, 0)
    assert np.array_equal(private.logits(), stored_logits)

    # A full match. All but the last token come from the cache.
    with worker.open(prompt) as sequence:
        assert sequence.matched_tokens == n_tokens - 1
        assert_bytes_are_the_stored_ones(sequence)
        assert np.array_equal(sequence.prefill(), continued(private, prompt, n_tokens - 1))

    # A match that ends inside of a block, and another suffix.
    inside = n_tokens * 3 // 4 // BLOCK * BLOCK + 11
    other = np.append(prompt[:inside], suffix_of(worker))
    with worker.open(other) as sequence:
        assert sequence.matched_tokens == inside
        assert_bytes_are_the_stored_ones(sequence)
        assert np.array_equal(sequence.prefill(), continued(private, other, inside))
        sequence.close(store=False)
    private.clear(0)


def test_after_eviction_it_is_computed_stored_and_exact_again(pair: Pair) -> None:
    worker, private = pair.worker, pair.private
    prompt = tokens_of(worker, 333)
    assert worker.client.evict().blocks > 0
    assert worker.client.status()["accounting"]["cached_bytes"] == 0
    with worker.open(prompt) as sequence:
        assert sequence.matched_tokens == 0
        ours = sequence.prefill()
        sequence.close(store=False)
    pair.storer.send(prompt)
    matched, stored_logits = pair.storer.recv()
    assert matched == 0
    assert np.array_equal(ours, stored_logits)
    private.prefill(0, prompt, 0)
    with worker.open(prompt) as sequence:
        assert sequence.matched_tokens == len(prompt) - 1
        assert_bytes_are_the_stored_ones(sequence)
        assert np.array_equal(sequence.prefill(), continued(private, prompt, len(prompt) - 1))
    private.clear(0)
    assert worker.client.verify()["ok"]


def tokens_of(worker: LlamaWorker, n_tokens: int) -> np.ndarray:
    found: np.ndarray = worker.engine.tokenize(TEXTS[n_tokens] * n_tokens)[:n_tokens]
    assert len(found) == n_tokens
    return found


def suffix_of(worker: LlamaWorker) -> np.ndarray:
    found: np.ndarray = worker.engine.tokenize("Something else altogether happened")[-9:]
    return found


def continued(private: LlamaEngine, tokens: np.ndarray, matched: int) -> np.ndarray:
    """Logits of a private context that has computed the stored prompt, cut and continued."""
    private.truncate(0, matched)
    private.prefill(0, tokens[matched:], matched)
    return private.logits()


def assert_bytes_are_the_stored_ones(sequence: LlamaSequence) -> None:
    """Export every block that was imported as a whole, and compare with the arena."""
    leased, engine = sequence.leased, sequence.worker.engine
    for index in range(leased.n_blocks):
        is_last = index == leased.n_blocks - 1
        count = leased.last_block_tokens if is_last else BLOCK
        if index * BLOCK + count > sequence.length:
            continue  # it goes beyond the match, and was cut
        stored = np.frombuffer(leased.block(index), np.uint8)
        exported = np.zeros(stored.size, np.uint8)
        engine.export_block(
            sequence.seq_id, index * BLOCK, count, exported.ctypes.data, exported.size
        )
        assert np.array_equal(exported, stored), f"block {index}"
        del stored
