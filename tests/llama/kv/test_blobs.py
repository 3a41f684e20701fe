"""Whole states cut into blocks and put together again: against a slow reference, and with real
states of real contexts."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd_client.integrations.llama.errors import NotShareable
from kvd_client.integrations.llama.kv.blobs import (
    BadState,
    Block,
    SequenceState,
    StateForm,
    merge,
    parse_form,
)
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.kv.state import KvLayout, KvRow
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_proto.geometry import Geometry
from kvd_proto.payload import make_format
from tests.llama.blocks import export_all, prompt
from tests.llama.tiny_models import N_VOCAB

Tokens = npt.NDArray[np.int32]

F32, F16, Q8_0, Q4_0 = 0, 1, 8, 2
MAGIC = 0xAF143CD8
BLOCK = 4

# ------------------------------------------------------------------------------- a slow reference


def cell_bytes(form: StateForm) -> int:
    return 24 if form.layout.m_rope else 12


class Made:
    """Made-up K/V of n tokens: rows[layer] is a list of (K row, V row) by position."""

    def __init__(self, form: StateForm, n: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.form = form
        self.tokens = random.integers(0, 90, n).astype(np.int32)
        self.order = random.permutation(n)
        self.rows = [
            [(random.bytes(row.k_row_bytes), random.bytes(row.v_row_bytes)) for _ in range(n)]
            for row in form.layout.layers
        ]

    def state(self, order: list[int], start: int = 0) -> bytes:
        """The state of these positions, cells in this order, as llama.cpp would write it."""
        form, layers = self.form, self.form.layout.layers
        out = struct.pack("<IiII", MAGIC, 7, 1, len(order))
        for position in order:
            out += struct.pack("<iI", position, 1)
            if form.layout.m_rope:
                out += struct.pack("<iii", position, position, self.tokens[position])
            out += struct.pack("<i", 3)
        out += struct.pack("<II", form.v_trans, len(layers))
        for layer, rows in zip(layers, self.rows, strict=True):
            out += struct.pack("<iQ", layer.k_type, layer.k_row_bytes)
            out += b"".join(rows[position][0] for position in order)
        for layer, rows in zip(layers, self.rows, strict=True):
            if not form.v_trans:
                out += struct.pack("<iQ", layer.v_type, layer.v_row_bytes)
                out += b"".join(rows[position][1] for position in order)
                continue
            size = {F32: 4, F16: 2}[layer.v_type]
            count = layer.v_row_bytes // size
            out += struct.pack("<iII", layer.v_type, size, count)
            for j in range(count):
                out += b"".join(rows[p][1][j * size : (j + 1) * size] for p in order)
        return out

    def block(self, start: int, n: int) -> bytes:
        """The canonical block, by the same code without what a block has not."""
        plain = Made.__new__(Made)
        plain.form = StateForm(self.form.layout)
        plain.tokens, plain.rows = self.tokens, self.rows
        state = bytearray(plain.state(list(range(start, start + n))))
        struct.pack_into("<i", state, 4, 0)
        for cell in range(n):
            struct.pack_into("<i", state, 16 + cell_bytes(self.form) * (cell + 1) - 4, 0)
        return bytes(state)


def cut(state: bytes, form: StateForm, tokens: Tokens, block_tokens: int = BLOCK) -> list[Block]:
    checked = SequenceState(state, form, tokens)
    blocks = []
    for start in range(0, len(tokens), block_tokens):
        count = min(block_tokens, len(tokens) - start)
        payload = np.full(form.layout.state_bytes(count), 0xEE, np.uint8)
        checked.write_block(start, count, payload)
        blocks.append(Block(payload, count))
    return blocks


rows = st.one_of(
    st.tuples(st.just(F16), st.sampled_from([0, 2, 6, 64])),
    st.tuples(st.just(F32), st.sampled_from([4, 12, 128])),
    st.tuples(st.just(Q8_0), st.sampled_from([34, 68])),
    st.tuples(st.just(Q4_0), st.sampled_from([18, 36])),
)


@st.composite
def forms(draw: st.DrawFn) -> StateForm:
    v_trans = draw(st.booleans())
    v_rows = rows.filter(lambda row: row[0] in (F16, F32)) if v_trans else rows
    layers = draw(st.lists(st.tuples(rows, v_rows), min_size=1, max_size=3))
    layout = KvLayout(tuple(KvRow(*k, *v) for k, v in layers), m_rope=draw(st.booleans()))
    return StateForm(layout, v_trans)


@given(forms(), st.integers(1, 3 * BLOCK + 1), st.booleans(), st.integers(0, 1000), st.data())
@settings(max_examples=300)
def test_cut_and_merged_as_the_reference_does(
    form: StateForm, n: int, sorted_cells: bool, seed: int, data: st.DataObject
) -> None:
    made = Made(form, n, seed)
    order = list(range(n)) if sorted_cells else made.order.tolist()
    state = made.state(order)
    assert len(state) == form.n_bytes(n)
    blocks = cut(state, form, made.tokens)
    for index, block in enumerate(blocks):
        assert block.payload.tobytes() == made.block(index * BLOCK, block.n_tokens)
    # All of it, or so much that the last block is needed in part only.
    wanted = data.draw(st.integers(max(1, BLOCK * (len(blocks) - 1) + 1), n))
    merged = merge(form, made.tokens[:wanted], blocks)
    expected = bytearray(made.state(list(range(wanted))))
    struct.pack_into("<i", expected, 4, 0)
    cell = cell_bytes(form)
    for index in range(wanted):
        struct.pack_into("<i", expected, 16 + cell * (index + 1) - 4, 0)
    assert merged.tobytes() == bytes(expected)
    assert merged.flags.writeable


@given(forms(), st.integers(2, 5), st.integers(0, 1000))
def test_the_form_is_read_off_a_state(form: StateForm, n: int, seed: int) -> None:
    made = Made(form, n, seed)
    assert parse_form(made.state(made.order.tolist()), made.tokens) == form


@given(forms(), st.integers(1, 6), st.integers(0, 100), st.data())
@settings(max_examples=300)
def test_a_damaged_state_is_refused_or_the_damage_is_in_the_rows(
    form: StateForm, n: int, seed: int, data: st.DataObject
) -> None:
    """Any byte changed, cut off or added. What may differ: rows, and ids that are ignored."""
    made = Made(form, n, seed)
    state = bytearray(made.state(made.order.tolist()))
    where = data.draw(st.integers(0, len(state) - 1))
    how = data.draw(st.sampled_from(["changed", "cut", "longer"]))
    if how == "changed":
        state[where] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del state[where:]
    else:
        state += bytes(where + 1)
    if how == "changed" and may_differ(form, n, where):
        cut(bytes(state), form, made.tokens)
        return
    with pytest.raises(BadState):
        cut(bytes(state), form, made.tokens)


def may_differ(form: StateForm, n: int, where: int) -> bool:
    if 4 <= where < 8:
        return True  # the source's sequence id
    cell = cell_bytes(form)
    end = 16 + n * cell
    if 16 <= where < end:
        return (where - 16) % cell >= cell - 4
    offset = end + 8
    sizes = [r.k_row_bytes for r in form.layout.layers]
    for size in [*sizes, *(r.v_row_bytes for r in form.layout.layers)]:
        offset += 12
        if offset <= where < offset + n * size:
            return True
        offset += n * size
    return False


LAYOUT = KvLayout((KvRow(F16, 64, Q8_0, 34), KvRow(F16, 32, F16, 16)))
FORM = StateForm(LAYOUT)


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ([0, 1, 1, 3], "positions 0 .. 3 in 4 cells, not each of 0 .. 3 once"),
        ([1, 2, 3, 4], "positions 1 .. 4 in 4 cells"),
        ([-1, 0, 1, 2], "positions -1 .. 2 in 4 cells"),
        ([0, 1, 2, 900], "positions 0 .. 900 in 4 cells"),
    ],
)
def test_positions_that_are_not_those_of_the_tokens(positions: list[int], said: str) -> None:
    made = Made(FORM, 4, 0)
    state = bytearray(made.state([0, 1, 2, 3]))
    for cell, position in enumerate(positions):
        struct.pack_into("<i", state, 16 + 12 * cell, position)
    with pytest.raises(BadState, match=said):
        SequenceState(bytes(state), FORM, made.tokens)


@pytest.mark.parametrize(
    ("offset", "word", "said"),
    [
        (0, 0xAF143CD7, "begins with 0xaf143cd7 instead of 0xaf143cd8"),
        (8, 4, "has 4 streams instead of 1"),
        (12, 3, "has 3 cells instead of 4"),
        (16 + 12 * 4, 1, "v_trans 1 and 2 layers instead of 0 and 2"),
        (16 + 12 * 4 + 4, 3, "v_trans 0 and 3 layers instead of 0 and 2"),
        (20, 2, "belongs to no sequence or to several"),
        (16 + 12 * 4 + 8, Q8_0, "K of layer 0 has the header 08000000"),
    ],
)
def test_a_wrong_header_says_which(offset: int, word: int, said: str) -> None:
    made = Made(FORM, 4, 0)
    state = bytearray(made.state([2, 0, 1, 3]))
    struct.pack_into("<I", state, offset, word)
    with pytest.raises(BadState, match=said):
        SequenceState(bytes(state), FORM, made.tokens)


def test_a_cell_of_an_image_is_refused() -> None:
    form = StateForm(LAYOUT._replace(m_rope=True))
    made = Made(form, 4, 0)
    state = bytearray(made.state([0, 1, 2, 3]))
    struct.pack_into("<i", state, 16 + 2 * 24 + 16, -1)  # token of cell 2: none
    with pytest.raises(BadState, match="image"):
        SequenceState(bytes(state), form, made.tokens)


def test_blocks_of_another_place_order_or_number_are_refused() -> None:
    made = Made(FORM, 3 * BLOCK, 1)
    first, second, third = cut(made.state(made.order.tolist()), FORM, made.tokens)
    tokens = made.tokens
    assert merge(FORM, tokens, [first, second, third]).size == FORM.n_bytes(len(tokens))
    with pytest.raises(BadState, match=r"positions 8 \.\. 11 in 4 cells, not each of 4 \.\. 7"):
        merge(FORM, tokens, [first, third, second])
    with pytest.raises(BadState, match="end at 8, before the 12"):
        merge(FORM, tokens, [first, second])
    with pytest.raises(BadState, match="after the 4 tokens"):
        merge(FORM, tokens[:4], [first, second])
    with pytest.raises(BadState, match="has not"):
        merge(FORM, tokens, [first, second, Block(third.payload[:-1], BLOCK)])
    with pytest.raises(BadState, match="has not"):
        merge(FORM, tokens, [first, second, Block(third.payload, BLOCK - 1)])
    swapped = np.frombuffer(made.state([1, 0, 2, 3]), np.uint8)
    with pytest.raises(BadState, match="canonical order"):
        merge(FORM, tokens, [Block(swapped, BLOCK), second, third])
    wrong = third.payload.copy()
    wrong[16 + 12 * BLOCK + 8] ^= 1  # K's type
    with pytest.raises(BadState, match="K of layer 0"):
        merge(FORM, tokens, [first, second, Block(wrong, BLOCK)])


def test_a_block_is_written_nowhere_but_where_it_belongs() -> None:
    made = Made(FORM, 6, 1)
    checked = SequenceState(made.state([5, 4, 3, 2, 1, 0]), FORM, made.tokens)
    room = np.full(LAYOUT.state_bytes(3) + 20, 0xEE, np.uint8)
    checked.write_block(2, 3, room[10:-10])
    assert room[10:-10].tobytes() == made.block(2, 3)
    assert (room[:10] == 0xEE).all()
    assert (room[-10:] == 0xEE).all()
    for start, n in [(4, 3), (-1, 3), (2, 0)]:
        with pytest.raises(ValueError, match="are not in"):
            checked.write_block(start, n, room)
    with pytest.raises(ValueError, match="bytes, not"):
        checked.write_block(2, 3, room)


def test_blocks_are_what_the_daemon_takes() -> None:
    layers = (("f16", 64, "q8_0", 34), ("f16", 32, "f16", 16))
    payload = make_format("llama-state", Geometry.from_wire(layers), BLOCK)
    made = Made(FORM, 3 * BLOCK - 1, 1)
    for index, block in enumerate(cut(made.state(made.order.tolist()), FORM, made.tokens)):
        payload.validate(block.payload.data, index * BLOCK, block.n_tokens)


# ---------------------------------------------------------------------------------- real contexts


def state_of(engine: LlamaEngine, seq: int) -> bytes:
    """What llama_state_seq_get_data gives, whatever the engine thinks of sharing."""
    size = native.state_seq_get_size(engine._context, seq)
    data = np.empty(size, np.uint8)
    assert native.state_seq_get_data(engine._context, data.ctypes.data, size, seq) == size
    return data.tobytes()


def restore(engine: LlamaEngine, seq: int, state: bytes) -> None:
    data = np.frombuffer(state, np.uint8)
    taken = native.state_seq_set_data(engine._context, data.ctypes.data, data.size, seq)
    assert taken == data.size, native.take_errors()


KINDS = {
    "plain": ("llama", {}),
    "heads by layer": ("heads-by-layer", {}),
    "q8_0": ("llama", {"type_k": "q8_0", "type_v": "q8_0"}),
    "q4_0 and f32": ("llama", {"type_k": "q4_0", "type_v": "f32"}),
    "v transposed": ("llama", {"flash_attn": False}),
    "v transposed, K quantised": ("llama", {"flash_attn": False, "type_k": "q8_0"}),
    "v transposed, f32": ("heads-by-layer", {"flash_attn": False, "type_v": "f32"}),
    "m-rope": ("m-rope", {}),
    "m-rope, v transposed": ("m-rope", {"flash_attn": False}),
    "SmolLM2": ("smollm2", {}),
    "SmolLM2, q8_0": ("smollm2", {"type_k": "q8_0", "type_v": "q8_0"}),
    "SmolLM2, v transposed": ("smollm2", {"flash_attn": False}),
}


@pytest.fixture(params=KINDS)
def engines(
    request: pytest.FixtureRequest, tiny_dir: Path, smollm2: LlamaModel
) -> Iterator[tuple[LlamaEngine, LlamaEngine, LlamaEngine]]:
    """One that computes, and two that restore."""
    name, options = KINDS[request.param]
    with contextlib.ExitStack() as resources:
        model = smollm2
        if name != "smollm2":
            model = resources.enter_context(LlamaModel(tiny_dir / f"{name}.gguf"))
        made = [
            LlamaEngine(
                model=model,
                n_ctx=512,
                n_batch=64,
                n_threads=1,
                n_seq_max=4,
                require_shareable=False,
                **options,
            )
            for _ in range(3)
        ]
        for engine in made:
            resources.callback(engine.close)
        yield made[0], made[1], made[2]


@pytest.mark.model
def test_logits_after_cutting_and_merging_are_equal_bit_for_bit(
    engines: tuple[LlamaEngine, LlamaEngine, LlamaEngine],
) -> None:
    """Cells in any order: three sequences take turns, and one is gone before another comes."""
    computing, whole, merged = engines
    form = form_of(computing)
    tokens = prompt(150, N_VOCAB)
    other = prompt(40, N_VOCAB, seed=1)
    computing.prefill(1, other, 0)
    computing.prefill(0, tokens[:60], 0)
    computing.prefill(2, other, 0)
    computing.clear(1)
    computing.prefill(0, tokens[60:], 60)  # partly where sequence 1 was
    state = state_of(computing, 0)
    assert len(state) == form.n_bytes(150)
    cell = cell_bytes(form)
    found = [struct.unpack_from("<i", state, 16 + cell * index)[0] for index in range(150)]
    assert found != sorted(found), "the test wants cells in another order"
    blocks = cut(state, form, tokens, 32)
    if computing.not_shareable is None:
        # The very bytes that the engine exports.
        exported = [block.payload for block in export_all(computing, 0)]
        assert [b.payload.tobytes() for b in blocks] == [e.tobytes() for e in exported]
    for wanted in (150, 131):
        suffix = prompt(9, N_VOCAB, seed=wanted)
        restore(whole, 0, in_order(state, form, tokens))
        whole.truncate(0, wanted)
        restore(merged, 0, merge(form, tokens[:wanted], blocks).tobytes())
        logits = []
        for engine in (whole, merged):
            assert native.memory_seq_pos_min(engine._memory, 0) == 0
            assert engine.length(0) == wanted
            engine.prefill(0, suffix, wanted)
            logits.append(engine.logits())
            # What is stored again of it is what was stored.
            again = cut(state_of(engine, 0), form, np.concatenate([tokens[:wanted], suffix]), 32)
            assert again[3].payload.tobytes() == blocks[3].payload.tobytes()
            engine.clear(0)
        assert np.array_equal(logits[0], logits[1])
        assert np.isfinite(logits[0]).all()


def form_of(engine: LlamaEngine) -> StateForm:
    pair = prompt(2, N_VOCAB, seed=5)
    engine.prefill(3, pair, 0)
    form = parse_form(state_of(engine, 3), pair)
    engine.clear(3)
    return form


def in_order(state: bytes, form: StateForm, tokens: Tokens) -> bytes:
    """The same state with its cells sorted, not by the code under test: as the reference writes it,
    from rows picked out of the original one by one."""
    n, layers = len(tokens), form.layout.layers
    cell = cell_bytes(form)
    positions = [struct.unpack_from("<i", state, 16 + cell * i)[0] for i in range(n)]
    made = Made.__new__(Made)
    made.form, made.tokens = form, tokens
    found: list[list[dict[int, bytes]]] = []
    offset = 16 + cell * n + 8
    for is_v in (False, True):
        for layer in layers:
            size = layer.v_row_bytes if is_v else layer.k_row_bytes
            offset += 12
            data = state[offset : offset + n * size]
            if is_v and form.v_trans:
                unit = {F32: 4, F16: 2}[layer.v_type]
                by_cell = np.frombuffer(data, np.uint8).reshape(-1, n, unit).transpose(1, 0, 2)
                data = by_cell.tobytes()
            found.append([{p: data[i * size : (i + 1) * size] for i, p in enumerate(positions)}])
            offset += n * size
    n_layer = len(layers)
    made.rows = [
        [(found[i][0][p], found[n_layer + i][0][p]) for p in range(n)] for i in range(n_layer)
    ]
    return made.state(list(range(n)))


@pytest.mark.model
@pytest.mark.parametrize("name", ["sliding-window", "recurrent"])
def test_states_of_another_kind_are_refused(tiny_dir: Path, name: str) -> None:
    with (
        LlamaModel(tiny_dir / f"{name}.gguf") as model,
        LlamaEngine(
            model=model, n_ctx=256, n_batch=64, n_threads=1, n_seq_max=4, require_shareable=False
        ) as engine,
        pytest.raises(NotShareable, match="in another form"),
    ):
        form_of(engine)


@pytest.mark.model
def test_several_streams_are_refused(tiny: LlamaModel) -> None:
    with (
        LlamaEngine(
            model=tiny,
            n_ctx=2048,
            n_batch=64,
            n_threads=1,
            n_seq_max=4,
            kv_unified=False,
            require_shareable=False,
        ) as engine,
        pytest.raises(NotShareable, match="kv_unified=True"),
    ):
        form_of(engine)
