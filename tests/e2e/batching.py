"""What the tests of the batching worker share: a worker that looks closer, and what is right.

A request is right if its logits are those of a private context, but for the last bits, which depend
on who else is in the context. Measured with the tiny model: 0.02 at the most. If one token of the
prompt were another's, they would differ by 0.4 at the least.
"""

from typing import Any

import numpy as np

from kvd_client.integrations.llama.batching.schedule import Job
from kvd_client.integrations.llama.batching.worker import BatchingWorker
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.worker import LlamaSequence

BLOCK = 32
LAST_BITS = 0.1
TINY: dict[str, Any] = {"n_ctx": 1024, "n_batch": 64, "n_threads": 1, "timeout": 10.0}


class Recorder:
    """Picks tokens, so that texts are unlike each other, and keeps the logits that it was given."""

    def __init__(self, seed: int = 0) -> None:
        self.logits: list[np.ndarray] = []
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        self.logits.append(logits)
        return int((logits + 2 * self._random.gumbel(size=len(logits))).argmax())


def difference(
    alone: LlamaEngine, prompt: np.ndarray, answer: list[int], logits: list[np.ndarray]
) -> float:
    """The largest difference of any logit to those of an otherwise empty context."""
    assert len(answer) == len(logits) > 0
    tokens = np.append(prompt, answer)[:-1].astype(np.int32)
    alone.clear(0)
    alone.decode(tokens, np.arange(len(tokens)), 0, np.arange(len(tokens)) >= len(prompt) - 1)
    first = len(prompt) - 1
    rows = [alone.logits(first + index) for index in range(len(answer))]
    return max(
        float(np.abs(ours - theirs).max()) for ours, theirs in zip(rows, logits, strict=True)
    )


class ExactWorker(BatchingWorker):
    """A batching worker that exports each block again that it has imported, and compares."""

    checked_blocks = 0

    def open_sequence(self, job: Job, like: LlamaSequence | None) -> LlamaSequence:
        sequence = super().open_sequence(job, like)
        leased = sequence.leased
        for index in range(leased.n_blocks):
            is_last = index == leased.n_blocks - 1
            count = leased.last_block_tokens if is_last else BLOCK
            if index * BLOCK + count > sequence.length:
                continue  # it goes beyond the match, and was cut
            stored = np.frombuffer(leased.block(index), np.uint8)
            again = np.zeros(stored.size, np.uint8)
            self.engine.export_block(
                sequence.seq_id, index * BLOCK, count, again.ctypes.data, again.size
            )
            # What was shared with another sequence need only be as exact as that one's, which may
            # have been computed here at the same time as by somebody else.
            if index * BLOCK >= sequence.copied_tokens:
                assert np.array_equal(again, stored), f"block {index} is not what was imported"
                self.checked_blocks += 1
            del stored
        return sequence
