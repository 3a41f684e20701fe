"""Sizes, to the byte, against the figures measured on llama.cpp."""

from typing import Any

import pytest

from kvd_proto.errors import BadMessage
from kvd_proto.geometry import (
    GGML_TYPES,
    MAX_LAYERS,
    MAX_ROW_BYTES,
    PAGE_BYTES,
    Geometry,
    LayerGeometry,
    round_up,
)
from kvd_proto.payload import ArrayBlock, LlamaState

SMOLLM2 = Geometry((LayerGeometry("f16", 384, "f16", 384),) * 30)

BYTES_PER_32 = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
}


def test_bytes_of_32_elements_of_every_type() -> None:
    sizes = {
        name: 32 * size.block_bytes // size.block_elements for name, size in GGML_TYPES.items()
    }
    assert sizes == BYTES_PER_32


def test_types_are_told_apart_by_their_number() -> None:
    assert len({size.ggml_id for size in GGML_TYPES.values()}) == len(GGML_TYPES)


def test_smollm2() -> None:
    assert SMOLLM2.bytes_per_token == 23_040
    assert LlamaState(SMOLLM2, 32).max_bytes == 738_408
    assert LlamaState(SMOLLM2, 64).max_bytes == 1_476_072
    assert LlamaState(SMOLLM2, 64).size(32) == 738_408
    assert round_up(738_408) == 741_376
    assert ArrayBlock(SMOLLM2, 32).max_bytes == 737_280


@pytest.mark.parametrize("name", GGML_TYPES)
def test_block_size_follows_from_the_rows_of_each_type(name: str) -> None:
    """3 heads of 64 elements in K, and other sizes in V: formula against a sum over the parts."""
    k_row = 6 * BYTES_PER_32[name]
    v_row = 4 * BYTES_PER_32[name]
    geometry = Geometry((LayerGeometry(name, k_row, name, v_row),) * 5)
    for n_tokens in (1, 7, 32):
        head = 4 + 4 + 4 + 4
        cells = n_tokens * (4 + 4 + 4)
        layers = 5 * (4 + 8 + n_tokens * k_row) + 5 * (4 + 8 + n_tokens * v_row)
        assert LlamaState(geometry, 32).size(n_tokens) == head + cells + 4 + 4 + layers


def test_layers_may_differ() -> None:
    geometry = Geometry.from_wire([["f16", 128, "q8_0", 68], ("q4_0", 36, "f32", 256)])
    assert geometry.bytes_per_token == 128 + 68 + 36 + 256
    assert geometry.layers[1] == LayerGeometry("q4_0", 36, "f32", 256)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [["f16", 2, "f16", 2]] * (MAX_LAYERS + 1),
        [None],
        [7],
        ["four"],
        [b"four"],
        [{"a": 1, "b": 2, "c": 3, "d": 4}],
        [["f16", 2, "f16"]],
        [["f16", 2, "f16", 2, 2]],
        [["", 2, "f16", 2]],
        [["nine_long", 2, "f16", 2]],
        [["\N{GRINNING FACE}", 2, "f16", 2]],
        [[b"f16", 2, "f16", 2]],
        [[1, 2, "f16", 2]],
        [["f16", 0, "f16", 0]] * 2,
        [["f16", -2, "f16", 2]],
        [["f16", 2, "f16", MAX_ROW_BYTES + 1]],
        [["f16", True, "f16", 2]],
        [["f16", 2.0, "f16", 2]],
        [["f16", "2", "f16", 2]],
        [["f16", 1 << 5000, "f16", 2]],
        [["f16", [[[]]], "f16", b"x" * 1_000_000]],
    ],
)
def test_wrong_layers_are_refused(rows: list[Any]) -> None:
    with pytest.raises(BadMessage, match="layers") as caught:
        Geometry.from_wire(rows)
    assert len(str(caught.value)) < 200


def test_a_layer_without_kv_has_headers_and_no_rows() -> None:
    with_it = Geometry.from_wire([["f16", 64, "f16", 64], ["f16", 0, "f16", 0]])
    without = Geometry.from_wire([["f16", 64, "f16", 64]])
    assert LlamaState(with_it, 32).max_bytes == LlamaState(without, 32).max_bytes + 2 * 12


def test_round_up() -> None:
    assert [round_up(n) for n in (0, 1, 4095, 4096, 4097)] == [0, 4096, 4096, 4096, 8192]
    assert round_up(65, 64) == 128
    assert PAGE_BYTES == 4096
