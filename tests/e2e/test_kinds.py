"""Every kind of model: what one process has stored another continues, to the byte and to the bit.

For each prompt, and each kind of model and context:

- a worker in another process computes it, after whatever it finds cached, and stores it;
- its logits equal those of a private context that has computed the same in the same batches;
- our worker finds all of it but the last token; the sequence's positions are as they should be;
  the bytes that it exports again are those in the arena; its logits too are the private context's;
- for some prompts, so is the greedy text that goes on from there, to its last token's logits.

Tiny models take all prompts. The real ones take some, and all of them with KVD_ALL_PROMPTS=1.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd_client.integrations.llama.errors import NotExportable
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.params import LoraAdapter, RopeParams
from kvd_client.integrations.llama.worker import LlamaSequence, LlamaWorker
from tests.e2e.prompts import Prompt, bytes_as_tokens, prompts, some
from tests.e2e.workers import worker_process
from tests.llama import tiny_models
from tests.support import Daemon, running_daemon

pytestmark = pytest.mark.model

BLOCK = 32
TEXT_TOKENS = 33
"""More than a block."""
TEXTS = {"1025 tokens", "3000 tokens"}
"""Prompts that a text is made of: longer than every window, and for the longest one its cells."""


@dataclass(frozen=True)
class Kind:
    """A model's file is written by `write`, or found if it is a real one.

    `window_cells`: so many are in the window's cache, without swa_full. A longer prompt goes round
    it. Then a context that has cut a prompt goes on in other cells than one that has imported what
    is left, so longer prompts are computed as a whole.
    """

    write: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    is_real: bool = False
    window_cells: int = 1 << 20

    def context(self, folder: Path) -> dict[str, Any]:
        """The options of its contexts. One thread: the last bits of one-token decodes depend on
        their number."""
        options = {"n_ctx": 3328, "n_batch": 256, "n_threads": 1, "n_seq_max": 1, **self.options}
        if self.lora:
            options["loras"] = [LoraAdapter(str(tiny_models.write_lora(folder / "lora.gguf")), 0.5)]
        return options


def quantised(type_k: str, type_v: str) -> dict[str, str]:
    return {"type_k": type_k, "type_v": type_v}


KINDS = {
    "plain": Kind(tiny_models.write_llama),
    "K/V in q8_0": Kind(tiny_models.write_llama, quantised("q8_0", "q8_0")),
    "K in q8_0, V in q4_0": Kind(tiny_models.write_llama, quantised("q8_0", "q4_0")),
    "K/V in bf16": Kind(tiny_models.write_llama, quantised("bf16", "bf16")),
    "heads by layer": Kind(tiny_models.write_heads_by_layer),
    "LoRA": Kind(tiny_models.write_llama, lora=True),
    "YaRN": Kind(
        tiny_models.write_llama,
        {"rope": RopeParams("yarn", freq_scale=0.25, yarn_orig_ctx=512)},
    ),
    "M-RoPE": Kind(tiny_models.write_m_rope),
    "window": Kind(tiny_models.write_sliding_window),
    "window, swa_full off": Kind(
        tiny_models.write_sliding_window,
        {"swa_full": False, "n_batch": 64, "n_ubatch": 64, "n_seq_max": 3},
        window_cells=512,  # 4 windows and a batch, rounded up to 256
    ),
    "window, K/V in q8_0": Kind(tiny_models.write_sliding_window, quantised("q8_0", "q8_0")),
    "SmolLM2": Kind(lambda _: tiny_models.smollm2_path(), is_real=True),
    "Gemma 3": Kind(lambda _: tiny_models.gemma3_path(), is_real=True),
    "Gemma 3, swa_full off": Kind(
        lambda _: tiny_models.gemma3_path(),
        {"swa_full": False},
        is_real=True,
        window_cells=1280,  # 2 windows and a batch, rounded up to 256
    ),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("run") / "kvd"
    with running_daemon("--max-memory", "1GiB", runtime_dir=directory) as running:
        yield running


def store_each(pipe: Connection, model: Path, runtime_dir: Path, options: dict[str, Any]) -> None:
    """For each prompt that comes, and whether to use what is cached: compute it and store it;
    answer with the tokens that were cached, its logits, and what was not stored and why."""
    with LlamaWorker(
        model, runtime_dir=runtime_dir, name="storer", timeout=30, **options
    ) as worker:
        pipe.send("ready")
        with contextlib.suppress(EOFError):
            while True:
                tokens, use = pipe.recv()
                with worker.open(tokens, use=use) as sequence:
                    logits = sequence.prefill()
                failures = worker.client.flush().failures
                problems = [*failures, *filter(None, [sequence.problem])]
                pipe.send((sequence.matched_tokens, logits, problems))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", KINDS)
def test_every_prompt_is_continued_to_the_bit(daemon: Daemon, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    path = kind.write(tmp_path / "model.gguf")
    options = kind.context(tmp_path)
    with (
        worker_process(store_each, path, daemon.runtime_dir, options) as storer,
        LlamaWorker(path, runtime_dir=daemon.runtime_dir, timeout=30, **options) as worker,
        LlamaEngine(model=worker.engine.model, **options) as private,
    ):
        assert storer.recv() == "ready"
        found = prompts_of(worker, kind)
        previous = np.empty(0, np.int32)
        goes_on = [each.goes_on and len(each.tokens) <= kind.window_cells for each in found]
        for prompt, use, is_used in zip(found, goes_on, [*goes_on[1:], False], strict=True):
            if prompt.goes_on and not use:
                worker.client.evict()  # what is cached was computed in other batches
            storer.send((prompt.tokens, use))
            matched = common(previous, prompt.tokens) if use else 0
            go_on(private, matched, prompt)  # while the other process computes it
            found_there, stored_logits, problem = storer.recv()
            assert (found_there, problem) == (matched, []), prompt.name
            assert np.array_equal(private.logits(), stored_logits), prompt.name
            check_full_match(worker, private, prompt)
            if is_used:
                # Alone, its last token had other K/V than in its batch, in the last bits.
                go_on(private, matched, prompt)
            previous = prompt.tokens
        assert worker.client.verify()["ok"]
        worker.client.evict()


def go_on(private: LlamaEngine, matched: int, prompt: Prompt) -> None:
    """Compute what is behind the first `matched` tokens, which are there already."""
    private.truncate(0, matched)
    private.prefill(0, prompt.tokens[matched:], matched)


def prompts_of(worker: LlamaWorker, kind: Kind) -> list[Prompt]:
    model = worker.engine.model
    if not kind.is_real:
        return prompts(bytes_as_tokens(model.n_vocab), model.n_vocab)
    found = prompts(lambda text: model.tokenize(text, add_special=False), model.n_vocab)
    return found if os.environ.get("KVD_ALL_PROMPTS") == "1" else some(found)


def check_full_match(worker: LlamaWorker, private: LlamaEngine, prompt: Prompt) -> None:
    """Our worker goes on from the last but one token, as `private`, which has just computed it."""
    tokens = prompt.tokens
    n = len(tokens) - 1
    with worker.open(tokens) as sequence:
        assert sequence.matched_tokens == n, prompt.name
        check_positions(sequence)
        n_compared = compare_bytes(sequence)
        assert n_compared >= min(n // BLOCK, 1), prompt.name
        private.truncate(0, n)
        private.prefill(0, tokens[n:], n)
        assert np.array_equal(sequence.prefill(), private.logits()), prompt.name
        if prompt.name in TEXTS:
            compare_text(sequence, private, prompt.name)
        sequence.close(store=False)


def compare_text(sequence: LlamaSequence, private: LlamaEngine, name: str) -> None:
    """Both go on greedily from the same logits, token by token, past the end of a text, too."""
    ours: list[int] = []
    theirs: list[int] = []
    while len(ours) < TEXT_TOKENS:
        assert sequence.logits is not None
        ours.append(int(sequence.logits.argmax()))
        theirs.append(private.argmax())
        private.prefill(0, np.array(theirs[-1:], np.int32), sequence.length)
        sequence.decode(ours[-1])
    assert ours == theirs, name
    assert np.array_equal(sequence.logits, private.logits()), name


def check_positions(sequence: LlamaSequence) -> None:
    """Those of the prefix; where a window drops cells, at least those that the next token sees."""
    engine, n = sequence.worker.engine, sequence.matched_tokens
    first = native.memory_seq_pos_min(engine._memory, sequence.seq_id)
    last = native.memory_seq_pos_max(engine._memory, sequence.seq_id)
    assert last == n - 1
    if engine.drops_cells and n:
        assert 0 <= first <= engine.layout.first_seen(n)
    else:
        assert first == (0 if n else -1)


def compare_bytes(sequence: LlamaSequence) -> int:
    """Export every block again that was imported as a whole and is still there; compare it with the
    arena. Returns how many those were."""
    leased, engine = sequence.leased, sequence.worker.engine
    first = native.memory_seq_pos_min(engine._memory, sequence.seq_id)
    n_compared = 0
    for index in range(leased.n_blocks):
        start = index * BLOCK
        count = leased.last_block_tokens if index == leased.n_blocks - 1 else BLOCK
        if start + count > sequence.length:
            continue  # it goes beyond the match, and was cut
        with leased.block(index) as view:
            stored = np.frombuffer(view, np.uint8).copy()
        exported = np.zeros(stored.size, np.uint8)
        arguments = (sequence.seq_id, start, count, exported.ctypes.data, exported.size)
        if engine.drops_cells and start < first:
            with pytest.raises(NotExportable):
                engine.export_block(*arguments)
            continue
        assert engine.export_block(*arguments) == stored.size
        assert np.array_equal(exported, stored), f"block {index}"
        n_compared += 1
    return n_compared


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that both begin with, the last one of `other` not counted."""
    n = min(len(one), len(other) - 1)
    different = np.flatnonzero(one[:n] != other[:n])
    return int(different[0]) if different.size else n
