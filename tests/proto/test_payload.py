"""Every lie that a payload can tell is refused, with BadPayload and nothing else."""

import contextlib
import random
import struct
from collections.abc import Callable

import pytest

from kvd_proto.errors import BadMessage, BadPayload
from kvd_proto.geometry import Geometry, LayerGeometry
from kvd_proto.payload import FORMATS, LLAMA_MAGIC, ArrayBlock, LlamaState, make_format
from tests.proto.blocks import MAGIC, header_bytes, llama_block

# Layers that differ, so that a header in the wrong layer is wrong.
GEOMETRY = Geometry(
    (
        LayerGeometry("f16", 8, "q8_0", 34),
        LayerGeometry("q4_0", 18, "f32", 4),
        LayerGeometry("f16", 6, "f16", 2),
    )
)
START, N_TOKENS = 64, 5
FORMAT = LlamaState(GEOMETRY, 8)
WINDOW = make_format("llama-state:window=2", GEOMETRY, 8)
"""The last two layers have a window: a block has two parts."""
AFTER_CELLS = 16 + 12 * N_TOKENS
BUFFERS: list[Callable[[bytearray], bytes | bytearray | memoryview]] = [
    bytes,
    bytearray,
    memoryview,
    lambda block: memoryview(block).toreadonly(),
    lambda block: memoryview(bytearray(3) + block)[3:],  # not aligned
    lambda block: memoryview(block).cast("H"),  # items of two bytes
]


def block() -> bytearray:
    return llama_block(GEOMETRY, START, N_TOKENS)


def test_the_magic_is_that_of_llama_cpp() -> None:
    assert LLAMA_MAGIC == MAGIC == 0xAF143CD8


@pytest.mark.parametrize("as_buffer", BUFFERS)
def test_a_true_block_is_accepted_in_any_buffer(as_buffer: Callable[..., bytes]) -> None:
    FORMAT.validate(as_buffer(block()), START, N_TOKENS)
    ArrayBlock(GEOMETRY, 8).validate(as_buffer(bytearray(8 * 72)), START, N_TOKENS)


@pytest.mark.parametrize("as_buffer", BUFFERS)
def test_a_false_block_is_refused_in_any_buffer(as_buffer: Callable[..., bytes]) -> None:
    wrong = block()
    wrong[0] ^= 1
    with pytest.raises(BadPayload, match="magic"):
        FORMAT.validate(as_buffer(wrong), START, N_TOKENS)
    with pytest.raises(BadPayload, match="wrong size"):
        FORMAT.validate(as_buffer(block() + b"\0\0"), START, N_TOKENS)
    with pytest.raises(BadPayload, match="wrong size"):
        ArrayBlock(GEOMETRY, 8).validate(as_buffer(bytearray(8 * 72 + 2)), START, N_TOKENS)


@pytest.mark.parametrize("n_tokens", range(1, 9))
@pytest.mark.parametrize("start", [0, 1, 64, (1 << 20) - 8])
def test_every_length_at_any_place_is_accepted(start: int, n_tokens: int) -> None:
    found = llama_block(GEOMETRY, start, n_tokens)
    assert len(found) == FORMAT.size(n_tokens)
    FORMAT.validate(found, start, n_tokens)
    with pytest.raises(BadPayload, match="cell 0 is position"):
        FORMAT.validate(found, start + 1, n_tokens)


@pytest.mark.parametrize("n_tokens", range(1, 9))
@pytest.mark.parametrize("window_layers", [1, 2])
def test_blocks_of_two_parts(n_tokens: int, window_layers: int) -> None:
    form = make_format(f"llama-state:window={window_layers}", GEOMETRY, 8)
    found = llama_block(GEOMETRY, START, n_tokens, window_layers=window_layers)
    assert len(found) == form.size(n_tokens) == FORMAT.size(n_tokens) + 16 + 12 * n_tokens
    form.validate(found, START, n_tokens)
    # Neither is a block of the other form, nor one with the parts divided elsewhere.
    for other in (FORMAT, make_format(f"llama-state:window={3 - window_layers}", GEOMETRY, 8)):
        with pytest.raises(BadPayload):
            other.validate(found, START, n_tokens)


@pytest.mark.parametrize("change", [-1, 1, -12, 12, -(12 + 72), 12 + 72])
def test_wrong_sizes_are_refused(change: int) -> None:
    wrong = block() + bytes(change) if change > 0 else block()[:change]
    with pytest.raises(BadPayload, match="wrong size") as caught:
        FORMAT.validate(wrong, START, N_TOKENS)
    assert caught.value.details == {
        "expected": FORMAT.size(N_TOKENS),
        "got": FORMAT.size(N_TOKENS) + change,
        "n_tokens": N_TOKENS,
    }


@pytest.mark.parametrize("n_tokens", [-1, 0, 9, 1 << 40])
def test_wrong_numbers_of_tokens_are_refused(n_tokens: int) -> None:
    for each in (FORMAT, ArrayBlock(GEOMETRY, 8)):
        with pytest.raises(BadPayload, match="1 to 8 tokens"):
            each.validate(b"", 0, n_tokens)


LIES = {
    "magic": (0, "<I", 0, "magic is 0x0"),
    "source seq": (4, "<i", 3, "source seq 3"),
    "no stream": (8, "<I", 0, "n_stream is 0"),
    "two streams": (8, "<I", 2, "n_stream is 2"),
    "no cells": (12, "<I", 0, "0 cells, not 5"),
    "fewer cells": (12, "<I", N_TOKENS - 1, "4 cells, not 5"),
    "more cells": (12, "<I", N_TOKENS + 1, "6 cells, not 5"),
    "huge number of cells": (12, "<I", 0xFFFFFFFF, "4294967295 cells"),
    "first position": (16, "<i", 0, "cell 0 is position 0"),
    "negative position": (16, "<i", -1, "cell 0 is position -1"),
    "swapped positions": (16 + 12, "<i", START + 2, "cell 1 is position 66"),
    "last position": (16 + 48, "<i", START + 5, "cell 4 is position 69"),
    "no sequence": (20, "<I", 0, "0 sequences"),
    "two sequences": (20 + 24, "<I", 2, "cell 2 .* 2 sequences"),
    "seq id": (24, "<i", 1, "seq 1"),
    "negative seq id": (24 + 48, "<i", -1, "cell 4 .* seq -1"),
    "v_trans": (AFTER_CELLS, "<I", 1, "v_trans and n_layer"),
    "n_layer": (AFTER_CELLS + 4, "<I", 2, "v_trans and n_layer"),
    "K type": (AFTER_CELLS + 8, "<i", 30, "of K in layer 0"),
    "K row bytes": (AFTER_CELLS + 12, "<Q", 16, "of K in layer 0"),
    "huge K row bytes": (AFTER_CELLS + 12, "<Q", (1 << 64) - 1, "of K in layer 0"),
    "type of a later layer": (AFTER_CELLS + 8 + 52, "<i", 20, "of K in layer 1"),
    "V type": (AFTER_CELLS + 8 + 36 + 5 * 32, "<i", 1, "of V in layer 0"),
    "row bytes of the last V": (len(block()) - 10 - 8, "<Q", 0, "of V in layer 2"),
}


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_refused_by_name(lie: str) -> None:
    offset, form, value, named = LIES[lie]
    wrong = block()
    before = struct.unpack_from(form, wrong, offset)[0]
    struct.pack_into(form, wrong, offset, value)
    assert value != before
    with pytest.raises(BadPayload, match=named) as caught:
        FORMAT.validate(memoryview(wrong), START, N_TOKENS)
    assert caught.value.details


@pytest.mark.parametrize("lie", [name for name, lie in LIES.items() if lie[0] >= 8])
def test_every_lie_in_the_second_part_is_refused_by_name(lie: str) -> None:
    """The same fields of a part that begins behind another one."""
    offset, form, value, named = LIES[lie]
    first = Geometry((LayerGeometry("f16", 2, "f16", 4),))
    both = Geometry((*first.layers, *GEOMETRY.layers))
    wrong = llama_block(both, START, N_TOKENS, window_layers=3)
    before = len(llama_block(first, START, N_TOKENS))
    struct.pack_into(form, wrong, before + offset - 8, value)
    with pytest.raises(BadPayload, match=named) as caught:
        LlamaState(both, 8, window_layers=3).validate(wrong, START, N_TOKENS)
    assert caught.value.details


M_ROPE_LIES = {
    "x": (16 + 8, START - 1, "cell 0 is at x 63, y 64"),
    "y of a later cell": (16 + 2 * 24 + 12, 0, "cell 2 is at x 66, y 0"),
    "embedding": (16 + 24 + 16, -1, "cell 1 is at x 65, y 65 with token -1, which is not text"),
    "position": (16 + 4 * 24, START, "cell 4 is position 64"),
    "seq id": (16 + 4 * 24 + 20, 3, "cell 4 .* seq 3"),
    "n_seq": (16 + 4, 0, "0 sequences"),
}


@pytest.mark.parametrize("lie", M_ROPE_LIES)
def test_what_is_not_text_is_refused_by_name(lie: str) -> None:
    offset, value, named = M_ROPE_LIES[lie]
    form = make_format("llama-state:m-rope", GEOMETRY, 8)
    wrong = llama_block(GEOMETRY, START, N_TOKENS, m_rope=True)
    form.validate(wrong, START, N_TOKENS)
    assert len(wrong) == form.size(N_TOKENS) == FORMAT.size(N_TOKENS) + 12 * N_TOKENS
    struct.pack_into("<i", wrong, offset, value)
    with pytest.raises(BadPayload, match=named):
        form.validate(wrong, START, N_TOKENS)


def test_any_token_is_text() -> None:
    form = make_format("llama-state:m-rope", GEOMETRY, 8)
    found = llama_block(GEOMETRY, START, N_TOKENS, m_rope=True)
    for token in (0, (1 << 31) - 1):
        struct.pack_into("<i", found, 16 + 24 + 16, token)
        form.validate(found, START, N_TOKENS)


def test_a_window_and_m_rope() -> None:
    form = make_format("llama-state:window=1:m-rope", GEOMETRY, 8)
    found = llama_block(GEOMETRY, START, N_TOKENS, window_layers=1, m_rope=True)
    assert form.name == "llama-state:window=1:m-rope"
    form.validate(found, START, N_TOKENS)
    second = len(llama_block(Geometry(GEOMETRY.layers[:2]), START, N_TOKENS, m_rope=True))
    struct.pack_into("<i", found, second + 8 + 8, 0)
    with pytest.raises(BadPayload, match="cell 0 is at x 0"):
        form.validate(found, START, N_TOKENS)


def test_the_block_of_another_geometry_of_the_same_size_is_refused() -> None:
    rows = [LayerGeometry("f16", 8, "f16", 6), LayerGeometry("f16", 6, "f16", 8)]
    wanted, other = Geometry(tuple(rows)), Geometry(tuple(reversed(rows)))
    with pytest.raises(BadPayload, match="of K in layer 0"):
        LlamaState(wanted, 8).validate(llama_block(other, 0, 3), 0, 3)


@pytest.mark.parametrize("window_layers", [0, 2])
def test_no_changed_header_byte_is_ever_accepted(window_layers: int) -> None:
    """Each bit of each byte that is not a K/V row."""
    form = WINDOW if window_layers else FORMAT
    good = bytes(llama_block(GEOMETRY, START, N_TOKENS, window_layers=window_layers))
    for offset in header_bytes(GEOMETRY, N_TOKENS, window_layers):
        for bit in range(8):
            wrong = bytearray(good)
            wrong[offset] ^= 1 << bit
            with pytest.raises(BadPayload):
                form.validate(wrong, START, N_TOKENS)


def test_many_changed_header_bytes_are_never_accepted() -> None:
    rng = random.Random(7)
    good = bytes(block())
    places = header_bytes(GEOMETRY, N_TOKENS)
    for _ in range(3000):
        wrong = bytearray(good)
        for offset in rng.sample(places, rng.randrange(1, 20)):
            wrong[offset] = rng.randrange(256)
        if wrong == good:
            continue
        with pytest.raises(BadPayload):
            FORMAT.validate(wrong, START, N_TOKENS)


def test_rows_may_be_anything() -> None:
    rng = random.Random(8)
    found = block()
    headers = set(header_bytes(GEOMETRY, N_TOKENS))
    for offset in range(len(found)):
        if offset not in headers:
            found[offset] = rng.randrange(256)
    FORMAT.validate(found, START, N_TOKENS)


def test_validation_keeps_no_view() -> None:
    """A mapping can be closed right after its payload was checked, whatever came out."""
    found = block()
    with memoryview(found) as view:
        FORMAT.validate(view, START, N_TOKENS)
    with contextlib.suppress(BadPayload):
        FORMAT.validate(memoryview(found), START + 1, N_TOKENS)
    found += b"x"  # BufferError while a view is left


def test_formats_by_name() -> None:
    for name, cls in FORMATS.items():
        made = make_format(name, GEOMETRY, 8)
        assert type(made) is cls
        assert made.name == name
        assert made.max_bytes == made.size(8)
    assert WINDOW.name == "llama-state:window=2"
    for name in (
        "LLAMA-STATE", "llama-state:", "llama-state:window=0", "llama-state:window=02",
        "llama-state:window=2 ", "llama-state:window=2:window=2", "llama-state:window=1000",
        "llama-state:window=\uff12", "array:window=2",
        "llama-state:m-rope:window=2", "llama-state:M-ROPE",
    ):  # fmt: skip
        with pytest.raises(BadMessage, match="unknown payload format"):
            make_format(name, GEOMETRY, 8)
    for window_layers in (3, 4, 999):
        with pytest.raises(BadMessage, match="no layer is left"):
            make_format(f"llama-state:window={window_layers}", GEOMETRY, 8)


def test_llama_state_knows_its_types_and_whole_blocks_only() -> None:
    for layer in (("f17", 2, "f16", 2), ("f16", 2, "nope", 2)):
        with pytest.raises(BadMessage, match="unknown ggml type"):
            make_format("llama-state", Geometry.from_wire([layer]), 8)
    for layer in (("f16", 3, "f16", 2), ("f16", 2, "q8_0", 35), ("q4_0", 19, "f16", 2)):
        with pytest.raises(BadMessage, match="multiple"):
            make_format("llama-state", Geometry.from_wire([layer]), 8)


def test_array_blocks_take_any_type_and_always_have_room_for_all_tokens() -> None:
    made = make_format("array", Geometry.from_wire([("float32", 12, "?", 5)] * 3), 8)
    assert [made.size(n) for n in (1, 7, 8)] == [3 * 17 * 8] * 3


def test_largest_geometry() -> None:
    rows = [("f32", 1 << 24, "f32", 1 << 24)] * 512
    made = make_format("llama-state", Geometry.from_wire(rows), 1024)
    assert made.max_bytes == 24 + 12 * 1024 + 24 * 512 + (1 << 44)
    with pytest.raises(BadPayload, match="wrong size"):
        made.validate(bytes(1000), 0, 1024)
