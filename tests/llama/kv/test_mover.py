"""Blocks in and out of a context that an ordinary Llama has made, where the scratch id is beyond
its n_seq_max. That of an engine's own context is in test_engine.py."""

from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from kvd_client.integrations.llama.errors import NotExportable
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.kv.mover import BlockAt, BlockMover, ScratchSequence, read_layout
from kvd_client.integrations.llama.runtime import native
from tests.llama.blocks import Block, export_all, prompt
from tests.llama.tiny_models import N_VOCAB

pytestmark = pytest.mark.model

LENGTH = 200  # six full blocks of 32 and a tail of 8


def open_llama(path: Path) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=64, n_threads=1, flash_attn=True, verbose=False
    )


@pytest.fixture(params=["llama", "sliding-window", "m-rope"])
def name(request: pytest.FixtureRequest) -> str:
    """Of a model whose state has one part, or two, or longer cells."""
    found: str = request.param
    return found


@pytest.fixture
def llama(tiny_dir: Path, name: str) -> Iterator[llama_cpp.Llama]:
    llama = open_llama(tiny_dir / f"{name}.gguf")
    yield llama
    llama.close()


def mover_of(llama: llama_cpp.Llama) -> BlockMover:
    """Of a context whose sequence 0 has a token at least."""
    context = llama.ctx
    memory = llama_cpp.llama_get_memory(context)
    scratch = ScratchSequence(context, memory, 1, is_narrow=True)
    native.memory_seq_cp(memory, 0, 1, 0, 1)
    layout = read_layout(scratch)
    assert native.memory_seq_pos_max(memory, 1) == -1
    return BlockMover(scratch, layout, llama.n_ctx())


def export(mover: BlockMover, start: int, n: int) -> Block:
    payload = np.full(mover.layout.state_bytes(n), 0xEE, dtype=np.uint8)
    assert mover.export_block(0, start, n, payload.ctypes.data, len(payload)) == len(payload)
    assert native.memory_seq_pos_max(mover.scratch.memory, 1) == -1
    return Block(start, n, payload)


def logits(llama: llama_cpp.Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),)).copy()


def test_blocks_equal_those_of_an_engine(llama: llama_cpp.Llama, tiny_dir: Path, name: str) -> None:
    tokens = prompt(LENGTH, N_VOCAB)
    llama.eval(tokens.tolist())
    mover = mover_of(llama)
    path = tiny_dir / f"{name}.gguf"
    with LlamaEngine(model_path=path, n_ctx=256, n_batch=64, n_threads=1) as engine:
        assert mover.layout == engine.layout
        engine.prefill(0, tokens, 0)
        for theirs in export_all(engine, 0):
            assert np.array_equal(export(mover, theirs.start, theirs.n).payload, theirs.payload)


def test_imported_blocks_compute_the_same(
    llama: llama_cpp.Llama, tiny_dir: Path, name: str
) -> None:
    tokens = prompt(LENGTH, N_VOCAB)
    llama.eval(tokens.tolist())
    mover = mover_of(llama)
    blocks = [export(mover, at, min(32, LENGTH - at)) for at in range(0, LENGTH, 32)]
    other = open_llama(tiny_dir / f"{name}.gguf")
    try:
        other.eval([0])
        taking = mover_of(other)
        other._ctx.kv_cache_clear()
        taking.import_blocks(
            0, 0, (BlockAt(b.payload.ctypes.data, len(b.payload), b.n) for b in blocks)
        )
        taking.check_range(0, 0, LENGTH)
        other.n_tokens = LENGTH
        llama.eval([5])
        other.eval([5])
        assert np.array_equal(logits(llama), logits(other))
    finally:
        other.close()


def test_cells_out_of_order_are_sorted(llama: llama_cpp.Llama) -> None:
    tokens = prompt(64, N_VOCAB).tolist()
    llama.eval(tokens)
    mover = mover_of(llama)
    first, second = export(mover, 0, 32), export(mover, 32, 32)
    # The second half is put in first, so the block's cells lie in the order 32 .. 63, 0 .. 31.
    llama._ctx.kv_cache_clear()
    context, memory, scratch, _ = mover.scratch
    for block in (second, first):
        at, size = block.payload.ctypes.data, len(block.payload)
        assert native.state_seq_set_data(context, at, size, scratch) == size
        native.memory_seq_cp(memory, scratch, 0, -1, -1)
        native.memory_seq_rm(memory, scratch, -1, -1)
    both = export(mover, 0, 64)
    step = mover.layout.cell_words
    words = both.payload[: 4 * (6 + step * 64)].view(np.int32)
    assert words[4:-2:step].tolist() == list(range(64))
    again = open_llama(Path(llama.model_path))
    try:
        again.eval(tokens)
        assert np.array_equal(export(mover_of(again), 0, 64).payload, both.payload)
    finally:
        again.close()


def test_a_state_in_an_unknown_form_is_refused(llama: llama_cpp.Llama) -> None:
    """As it were of a llama.cpp that writes the ids of cells whatever n_seq_max is."""
    llama.eval(prompt(32, N_VOCAB).tolist())
    mover = mover_of(llama)
    native.memory_seq_cp(mover.scratch.memory, 0, 1, 0, 32)
    missing = 4 * 32 * len(mover.layout.parts)
    size = mover.layout.state_bytes(32) - missing
    state = np.zeros(missing + size, np.uint8)
    address = state.ctypes.data + missing
    assert native.state_seq_get_data(mover.scratch.context, address, size, 1) == size
    native.memory_seq_rm(mover.scratch.memory, 1, -1, -1)
    form = mover._form(32)
    state[missing + 4 * 5] = 1  # what says how many ids the first cell has
    before = state.tobytes()
    assert not form.widen(state.ctypes.data)
    assert state.tobytes() == before
    with pytest.raises(NotExportable, match="ends at 32, before tokens"):
        mover.export_block(0, 32, 32, state.ctypes.data, len(state))
