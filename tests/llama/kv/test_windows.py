"""Models with a sliding window: exactness, and what a context still has, with and without swa_full.

The tiny model sees 64 tokens in every other layer. Without `swa_full` the cache of those layers has
256 cells here, whatever n_ctx is, so that a prompt of 500 tokens goes round it. That workers share
such models through a daemon is in tests/e2e.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from kvd_client.integrations.llama.attached.llama_params import read_llama
from kvd_client.integrations.llama.errors import (
    DecodeFailed,
    ImportFailed,
    LlamaEngineError,
    NotExportable,
    NotShareable,
    Reason,
)
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.kv.fingerprint import fingerprint
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.worker import model_of
from tests.llama.blocks import (
    Block,
    export,
    export_all,
    import_all,
    import_one,
    prompt,
    same_bytes,
)
from tests.llama.tiny_models import N_VOCAB

pytestmark = pytest.mark.model

WINDOW = 64
N_BATCH = 64
CELLS = 256
"""Of the window's cache without swa_full: windows of two sequences and a batch, rounded up."""
LONG = 500
SWA_FULL = pytest.mark.parametrize("swa_full", [True, False])


@pytest.fixture(scope="module")
def window_model(tiny_dir: Path) -> Iterator[LlamaModel]:
    with LlamaModel(tiny_dir / "sliding-window.gguf") as model:
        yield model


@pytest.fixture
def make(window_model: LlamaModel) -> Callable[..., LlamaEngine]:
    def make(swa_full: bool, **changes: object) -> LlamaEngine:
        arguments: dict[str, object] = {
            "n_ctx": 768, "n_batch": N_BATCH, "n_ubatch": N_BATCH, "n_threads": 1, "n_seq_max": 1,
        }  # fmt: skip
        return LlamaEngine(
            model=window_model, swa_full=swa_full, **(arguments | changes)  # type: ignore[arg-type]
        )  # fmt: skip

    return make


def compute(engine: LlamaEngine, tokens: np.ndarray, block_tokens: int = 32) -> list[Block]:
    """Decode in batches, and export the blocks of each before the next one: all, and the tail."""
    blocks: list[Block] = []
    at = 0
    for first in range(0, len(tokens), N_BATCH):
        engine.prefill(0, tokens[first : first + N_BATCH], first)
        is_last = first + N_BATCH >= len(tokens)
        while (n := min(block_tokens, engine.length(0) - at)) == block_tokens or (n and is_last):
            blocks.append(export(engine, 0, at, n))
            at += n
    return blocks


# -- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_tokens", [16, 32, WINDOW])
@pytest.mark.parametrize("length", [40, 63, 64, 65, 200, LONG])
@SWA_FULL
def test_logits_after_an_import_are_bit_equal(
    make: Callable[..., LlamaEngine], swa_full: bool, length: int, block_tokens: int
) -> None:
    """From the prompt's end, from the middle of its last block, and with a long suffix."""
    tokens = prompt(length, N_VOCAB)
    with make(swa_full) as computing:
        blocks = compute(computing, tokens, block_tokens)
    last = blocks[-1]
    with make(swa_full) as importing:
        for matched, n_suffix in ((length, 1), (last.start + (last.n + 1) // 2, 1), (length, 130)):
            suffix = prompt(n_suffix, N_VOCAB, seed=matched)
            expected = continued(make, swa_full, tokens, matched, suffix)
            import_all(importing, 0, blocks)
            importing.truncate(0, matched)
            importing.check_range(0, 0, matched)
            importing.prefill(0, suffix, matched)
            assert np.array_equal(importing.logits(), expected), (matched, n_suffix)
            importing.clear(0)


def continued(
    make: Callable[..., LlamaEngine],
    swa_full: bool,
    tokens: np.ndarray,
    matched: int,
    suffix: np.ndarray,
) -> np.ndarray:
    """Logits of a private context that has computed the prompt, cut and continued."""
    with make(swa_full) as private:
        compute(private, tokens)
        private.truncate(0, matched)
        private.prefill(0, suffix, matched)
        return private.logits()


@pytest.mark.parametrize("length", [CELLS - 1, LONG])
@SWA_FULL
def test_contexts_of_both_kinds_share(
    make: Callable[..., LlamaEngine], swa_full: bool, length: int
) -> None:
    """What the one has computed the other continues. To the bit as if it had computed it itself,
    as long as cells lie alike, which they do until the window's cache without swa_full is full."""
    tokens, suffix = prompt(length, N_VOCAB), prompt(1, N_VOCAB, seed=1)
    with make(swa_full) as computing, make(not swa_full) as importing:
        assert fingerprint(computing).digest == fingerprint(importing).digest
        assert model_of(computing) == model_of(importing)
        blocks = compute(computing, tokens)
        import_all(importing, 0, blocks)
        importing.prefill(0, suffix, length)
        expected = continued(make, not swa_full, tokens, length, suffix)
        difference = np.abs(importing.logits() - expected).max()
        assert difference == 0 if length < CELLS else 0 < difference < 1e-5


@SWA_FULL
def test_what_is_still_there_is_exported_again_as_it_came(
    make: Callable[..., LlamaEngine], swa_full: bool
) -> None:
    with make(not swa_full) as computing:
        blocks = compute(computing, prompt(LONG, N_VOCAB))
    with make(swa_full) as importing:
        import_all(importing, 0, blocks)
        # The oldest cells have gone, block by block, to those that came after.
        gone = 0 if swa_full else -(-(LONG - CELLS) // 32)
        assert gone == (0 if swa_full else 8)
        again = [export(importing, 0, block.start, block.n) for block in blocks[gone:]]
        assert same_bytes(again, blocks[gone:])
        for block in blocks[:gone]:
            with pytest.raises(NotExportable, match=r"begins at 2\d\d: export them earlier"):
                export(importing, 0, block.start, block.n)


def test_the_window_decides(make: Callable[..., LlamaEngine]) -> None:
    """The tests above could not fail if the layers with a window did not matter: a sequence whose
    window cells are another's computes something else."""
    tokens, other_tokens = prompt(128, N_VOCAB), prompt(128, N_VOCAB, seed=5)
    with make(True) as computing, make(True) as importing:
        blocks = compute(computing, tokens)
        computing.clear(0)
        others = compute(computing, other_tokens)
        at = computing.layout.state_bytes(32) - len(blocks[-1].payload[_first_part(computing) :])
        mixed = blocks[-1].payload.copy()
        mixed[at:] = others[-1].payload[at:]
        logits = []
        for last in (blocks[-1].payload, mixed):
            import_all(importing, 0, [*blocks[:-1], Block(96, 32, last)])
            importing.decode([1], 128, 0, True)
            logits.append(importing.logits())
            importing.clear(0)
    assert not np.array_equal(*logits)


def _first_part(engine: LlamaEngine) -> int:
    """Bytes of a block of 32 before the layers with a window."""
    rows = sum(row.k_row_bytes + row.v_row_bytes for row in engine.layout.layers)
    return 8 + 16 + 24 * len(engine.layout.layers) + 32 * (12 + rows)


def test_cells_out_of_order_are_sorted_in_both_parts(make: Callable[..., LlamaEngine]) -> None:
    """A sequence that was continued in cells that another has left, in front of its own."""
    with make(True, n_ctx=256, n_seq_max=2) as engine, make(True) as other:
        engine.prefill(1, prompt(100, N_VOCAB, seed=1), 0)
        engine.prefill(0, prompt(140, N_VOCAB), 0)
        engine.clear(1)
        engine.prefill(0, prompt(30, N_VOCAB, seed=2), 140)
        blocks = export_all(engine, 0)
        import_all(other, 0, blocks)
        assert same_bytes(export_all(other, 0), blocks)


# -- sizes and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
def test_the_formula_is_llama_cpps_size(make: Callable[..., LlamaEngine], kv_type: str) -> None:
    with make(True, type_k=kv_type, type_v=kv_type) as engine:
        assert (len(engine.layout.layers), len(engine.layout.window_layers)) == (1, 1)
        assert engine.layout.window == WINDOW
        for n in (1, 31, 32, WINDOW):
            engine.prefill(0, prompt(n, N_VOCAB), 0)
            size = native.state_seq_get_size(engine._context, 0)
            assert engine.layout.state_bytes(n) == size
            engine.clear(0)


def test_a_block_is_no_longer_than_the_window(make: Callable[..., LlamaEngine]) -> None:
    with make(True) as engine:
        engine.prefill(0, prompt(100, N_VOCAB), 0)
        export(engine, 0, 36, WINDOW)
        memory = np.full(1 << 20, 0xEE, np.uint8)
        with pytest.raises(ValueError, match="1 to 64 tokens here, not 65"):
            engine.export_block(0, 0, WINDOW + 1, memory.ctypes.data, memory.size)
        assert (memory == 0xEE).all()
        with pytest.raises(ValueError, match="window of 64"):
            engine.layout.state_bytes(WINDOW + 1)
        assert model_of(engine, WINDOW).payload_format == "llama-state:window=1"
        with pytest.raises(ValueError, match="at most 64, the model's window, not 65"):
            model_of(engine, WINDOW + 1)


def test_a_sequence_is_not_cut_where_its_window_has_gone(
    make: Callable[..., LlamaEngine],
) -> None:
    """llama.cpp cuts it, and computes something else from there on."""
    with make(False) as engine, make(False) as private:
        assert engine.drops_cells
        engine.prefill(0, prompt(LONG, N_VOCAB), 0)
        first = native.memory_seq_pos_min(engine._memory, 0)
        assert 0 < first < LONG - WINDOW
        lowest = first + WINDOW - 1
        for position in (1, 100, lowest - 1):
            with pytest.raises(LlamaEngineError, match=r"cannot be cut .* window of 64"):
                engine.truncate(0, position)
            assert engine.length(0) == LONG
        engine.truncate(0, LONG + 5)
        engine.truncate(0, lowest)
        engine.decode([1], lowest, 0, True)
        compute(private, prompt(LONG, N_VOCAB)[:lowest])
        private.decode([1], lowest, 0, True)
        # Not to the bit: the cells lie otherwise. Cut earlier, it differs by far.
        assert np.abs(engine.logits() - private.logits()).max() < 2e-3
        native.memory_seq_rm(engine._memory, 0, lowest - 32, -1)
        engine.decode([1], lowest - 32, 0, True)
        private.truncate(0, lowest - 32)
        private.decode([1], lowest - 32, 0, True)
        assert np.abs(engine.logits() - private.logits()).max() > 2e-2
        engine.truncate(0, 0)
        assert engine.length(0) == 0
    with make(True) as engine:
        assert not engine.drops_cells
        engine.prefill(0, prompt(LONG, N_VOCAB), 0)
        engine.truncate(0, 1)
        assert engine.length(0) == 1


def test_a_prefix_is_not_copied_where_its_window_has_gone(
    make: Callable[..., LlamaEngine],
) -> None:
    with make(False, n_seq_max=2) as engine:
        tokens = prompt(700, N_VOCAB)
        blocks = compute(engine, tokens)
        first = native.memory_seq_pos_min(engine._memory, 0)
        lowest = first + WINDOW - 1
        with pytest.raises(NotExportable, match="cannot be copied up to"):
            engine.copy_prefix(0, 1, lowest - 1)
        assert engine.length(1) == 0
        engine.copy_prefix(0, 1, lowest)
        engine.check_range(1, 0, lowest)
        assert engine.length(0) == len(tokens)
        last = [block for block in blocks if block.start >= first and block.start + 32 <= lowest]
        assert last
        assert same_bytes([export(engine, 1, block.start, block.n) for block in last], last)


def test_a_failed_prefill_empties_a_sequence_whose_window_it_has_overwritten(
    make: Callable[..., LlamaEngine],
) -> None:
    """There is room for three batches of it, which go round the window's cache."""
    with make(False, n_ctx=512) as engine:
        engine.prefill(0, prompt(100, N_VOCAB), 0)
        with pytest.raises(DecodeFailed, match=r"no room.*emptied"):
            engine.prefill(0, prompt(450, N_VOCAB, seed=1), 100)
        assert engine.length(0) == 0
    with make(True, n_ctx=512) as engine:
        engine.prefill(0, prompt(100, N_VOCAB), 0)
        before = export_all(engine, 0)
        with pytest.raises(DecodeFailed, match="no room"):
            engine.prefill(0, prompt(450, N_VOCAB, seed=1), 100)
        assert engine.length(0) == 100
        assert same_bytes(export_all(engine, 0), before)


def test_check_range_knows_what_the_next_token_sees(make: Callable[..., LlamaEngine]) -> None:
    with make(False) as engine:
        engine.prefill(0, prompt(LONG, N_VOCAB), 0)
        first = native.memory_seq_pos_min(engine._memory, 0)
        engine.check_range(0, 0, LONG)
        # As llama.cpp itself would cut it: the position before the lowest one lacks a cell.
        for end, is_whole in ((first + WINDOW - 1, True), (first + WINDOW - 2, False)):
            native.memory_seq_rm(engine._memory, 0, end, -1)
            if is_whole:
                engine.check_range(0, 0, end)
                continue
            with pytest.raises(ImportFailed, match=f"positions {first} .. {end - 1} instead of 0"):
                engine.check_range(0, 0, end)


def test_an_import_without_room_in_the_windows_cache_leaves_what_was_there(
    make: Callable[..., LlamaEngine],
) -> None:
    """The first part is taken, and given back when the second is not: a copied prefix keeps all of
    the window's cells busy, while the other cache has room."""
    with make(True) as computing:
        blocks = compute(computing, prompt(64, N_VOCAB, seed=3))
    with make(False, n_ctx=1024, n_seq_max=3) as engine:  # 4 * 64 + 64, rounded up: 512 cells
        engine.prefill(0, prompt(480, N_VOCAB), 0)
        engine.copy_prefix(0, 1, 480)
        import_all(engine, 2, blocks[:1])
        with pytest.raises(ImportFailed, match=r"32 \.\. 63 of sequence 2 were not taken.*cells"):
            import_one(engine, 2, blocks[1])
        engine.check_range(2, 0, 32)
        assert same_bytes(export_all(engine, 2), blocks[:1])
        engine.clear(1)
        import_one(engine, 2, blocks[1])
        assert same_bytes(export_all(engine, 2), blocks)


def test_a_llama_is_shared_with_swa_full_alone(tiny_dir: Path) -> None:
    """It cuts a sequence at the longest common prefix, whatever the window's cache has lost."""

    def llama(swa_full: bool) -> llama_cpp.Llama:
        return llama_cpp.Llama(
            str(tiny_dir / "sliding-window.gguf"), n_ctx=512, n_batch=64, flash_attn=True,
            swa_full=swa_full, verbose=False,
        )  # fmt: skip

    with contextlib.closing(llama(True)) as full:
        assert read_llama(full).layout.window == WINDOW
    with (
        contextlib.closing(llama(False)) as other,
        pytest.raises(NotShareable, match=r"swa_full=True") as refusal,
    ):
        read_llama(other)
    assert refusal.value.reason is Reason.SLIDING_WINDOW
