"""Models with M-RoPE: text is shared exactly, and nothing else is ever exported.

What stands in for an image here is a batch of embeddings with positions of their own, as its
projector would hand them to llama.cpp.
"""

import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path

import llama_cpp.llama_cpp as bindings
import numpy as np
import pytest

from kvd_client.integrations.llama.errors import ImportFailed, NotExportable
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.worker import model_of
from kvd_proto.geometry import Geometry
from kvd_proto.payload import make_format
from tests.llama.blocks import (
    Block,
    export,
    export_all,
    import_all,
    import_one,
    prompt,
    same_bytes,
)
from tests.llama.tiny_models import N_EMBD, N_VOCAB

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def m_rope(tiny_dir: Path) -> Iterator[LlamaModel]:
    with LlamaModel(tiny_dir / "m-rope.gguf") as model:
        yield model


def engine_of(model: LlamaModel) -> LlamaEngine:
    return LlamaEngine(model=model, n_ctx=256, n_batch=64, n_threads=1, n_seq_max=2)


def embed(engine: LlamaEngine, positions: np.ndarray) -> None:
    """Decode embeddings in sequence 0 at positions int32 [4, n]: time, y, x, and another."""
    n = positions.shape[1]
    values = np.random.default_rng(1).standard_normal((n, N_EMBD)).astype(np.float32)
    flat = np.ascontiguousarray(positions, np.int32)
    ids = (bindings.llama_seq_id * 1)(0)
    seq_ids = (ctypes.POINTER(bindings.llama_seq_id) * n)(*[ids] * n)
    batch = bindings.llama_batch(
        n_tokens=n,
        embd=values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        pos=flat.ctypes.data_as(ctypes.POINTER(bindings.llama_pos)),
        n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
        seq_id=seq_ids,
        logits=(ctypes.c_int8 * n)(),
    )
    assert bindings.llama_decode(engine._context, batch) == 0


def as_text(start: int, n: int) -> np.ndarray:
    """Positions that text would have."""
    return np.tile(np.arange(start, start + n), (4, 1))


@pytest.mark.parametrize("matched", [150, 137, 96])
def test_logits_after_an_import_are_bit_equal(m_rope: LlamaModel, matched: int) -> None:
    tokens, suffix = prompt(150, N_VOCAB), prompt(20, N_VOCAB, seed=1)
    with engine_of(m_rope) as private, engine_of(m_rope) as importing:
        private.prefill(0, tokens, 0)
        blocks = export_all(private, 0)
        private.truncate(0, matched)
        private.prefill(0, suffix, matched)
        import_all(importing, 0, blocks)
        assert same_bytes(export_all(importing, 0), blocks)
        importing.truncate(0, matched)
        importing.prefill(0, suffix, matched)
        assert np.array_equal(importing.logits(), private.logits())


def test_each_cell_has_its_position_thrice_and_its_token(m_rope: LlamaModel) -> None:
    tokens = prompt(70, N_VOCAB)
    with engine_of(m_rope) as engine:
        engine.prefill(1, tokens, 0)
        block = export(engine, 1, 32, 32)
        model = model_of(engine)
        assert model.payload_format == "llama-state:m-rope"
        form = make_format(model.payload_format, Geometry.from_wire(model.layers), 32)
    form.validate(block.payload.tobytes(), 32, 32)
    cells = block.payload[16 : 16 + 24 * 32].view(np.int32).reshape(32, 6)
    at = np.arange(32, 64)
    expected = np.stack([at, np.ones(32), at, at, tokens[32:64], np.zeros(32)], axis=1)
    assert np.array_equal(cells, expected)


def test_an_image_is_not_exported(m_rope: LlamaModel) -> None:
    """Its parts have one time and places of their own; then text goes on."""
    grid = np.arange(16)
    with engine_of(m_rope) as engine:
        engine.prefill(0, prompt(32, N_VOCAB), 0)
        text = export(engine, 0, 0, 32)
        embed(engine, np.stack([np.full(16, 32), 32 + grid // 4, 32 + grid % 4, 0 * grid]))
        assert engine.length(0) == 33
        engine.prefill(0, prompt(60, N_VOCAB, seed=2), 33)
        for start, n in ((32, 1), (0, 33), (32, 32), (20, 20)):
            with pytest.raises(NotExportable, match="cells of text"):
                export(engine, 0, start, n)
        assert same_bytes([export(engine, 0, 0, 32)], [text])


@pytest.mark.parametrize("n", [1, 8, 32])
def test_an_embedding_at_the_positions_of_text_is_not_exported(m_rope: LlamaModel, n: int) -> None:
    """Nothing but the token, -1, tells it from text."""
    with engine_of(m_rope) as engine:
        engine.prefill(0, prompt(32, N_VOCAB), 0)
        embed(engine, as_text(32, n))
        engine.prefill(0, prompt(64 - n, N_VOCAB), 32 + n)
        with pytest.raises(NotExportable, match="cells of text"):
            export(engine, 0, 32, 32)
        export(engine, 0, 0, 32)


@pytest.mark.parametrize("word", [2, 3])
def test_text_has_no_other_place(m_rope: LlamaModel, word: int) -> None:
    """x or y of one cell is another one, as llama.cpp itself would restore it."""
    with engine_of(m_rope) as engine:
        engine.prefill(0, prompt(32, N_VOCAB), 0)
        state = export(engine, 0, 0, 32).payload
        for change, is_text in ((0, True), (1, False)):
            state[16 + 24 * 5 + 4 * word] += change
            set_state = native.state_seq_set_data
            assert set_state(engine._context, state.ctypes.data, state.size, 0) == state.size
            engine.check_range(0, 0, 32)
            if is_text:
                export(engine, 0, 0, 32)
                continue
            with pytest.raises(NotExportable, match="cells of text"):
                export(engine, 0, 0, 32)


@pytest.mark.parametrize(("word", "value"), [(2, 31), (3, 33), (4, -1), (0, 33), (1, 0), (5, 1)])
def test_a_block_that_is_not_text_is_not_taken(m_rope: LlamaModel, word: int, value: int) -> None:
    """x, y, token, and what is checked in every cell; of the second block's first one."""
    with engine_of(m_rope) as computing, engine_of(m_rope) as engine:
        computing.prefill(0, prompt(64, N_VOCAB), 0)
        first, second = export_all(computing, 0)
        damaged = second.payload.copy()
        damaged[16 + 4 * word : 20 + 4 * word] = np.frombuffer(struct.pack("<i", value), np.uint8)
        import_one(engine, 0, first)
        with pytest.raises(ImportFailed, match="not a block of tokens 32"):
            import_one(engine, 0, Block(32, 32, damaged))
        engine.check_range(0, 0, 32)
        assert same_bytes(export_all(engine, 0), [first])
        import_one(engine, 0, second)
