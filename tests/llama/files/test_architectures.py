"""Shapes from metadata: whatever the values are, a shape that can be sized or a refusal that says
why. That the shapes are those of llama.cpp: test_model_size.py."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvd_client.integrations.llama.files.architectures import (
    ARCHITECTURES,
    MAX_ELEMENTS,
    MAX_LAYERS,
    NoKvShape,
    kv_shape,
)
from kvd_client.integrations.llama.files.gguf_header import BadModelFile, GgufHeader
from kvd_client.integrations.llama.files.model_size import BadKvType, ModelSize
from kvd_proto.geometry import GGML_TYPES

KEYS = [
    "block_count",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.shared_kv_layers",
    "attention.causal",
    "nextn_predict_layers",
    "num_loops",
    "rope.dimension_sections",
    "context_length",
]
numbers = st.one_of(
    st.integers(0, 8), st.sampled_from([32, 64, 128, 512, 513, MAX_ELEMENTS, (1 << 64) - 1, -1])
)
values = st.one_of(
    numbers,
    st.booleans(),
    st.floats(),
    st.text(max_size=3),
    st.lists(numbers, max_size=5).map(tuple),
    st.lists(st.booleans(), max_size=5).map(tuple),
    st.lists(st.floats(), max_size=5).map(tuple),
)
LIKELY = {"block_count": 4, "embedding_length": 128, "attention.head_count": 4}


@settings(max_examples=500)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES | {"mamba", "t5", "bert", "unheard of"})),
    changes=st.dictionaries(st.sampled_from(KEYS), values, max_size=6),
    type_k=st.sampled_from(sorted(GGML_TYPES)),
    n_tokens=st.integers(1, 1 << 20),
)
def test_any_values_make_a_size_or_a_refusal(
    architecture: str, changes: dict[str, Any], type_k: str, n_tokens: int
) -> None:
    metadata = {f"{architecture}.{key}": value for key, value in (LIKELY | changes).items()}
    header = GgufHeader(Path("m.gguf"), 3, 0, {"general.architecture": architecture, **metadata})
    with suppress(NoKvShape, BadModelFile, BadKvType):
        shape = kv_shape(header)
        size = ModelSize(shape, type_k, type_k)
        assert 0 <= len(shape.layers) + len(shape.window_layers) <= MAX_LAYERS
        assert size.bytes_per_token == sum(
            group.n_layers * (group.k_row_bytes + (group.v_row_bytes or 0)) for group in size.groups
        )
        one, many = size.state_bytes(1), size.state_bytes(n_tokens)
        assert 0 < one <= many <= one * n_tokens
        assert many <= size.stride_bytes(n_tokens) < many + 4096


def test_the_likely_values_are_a_model() -> None:
    """The test above would mean little if each example were refused."""
    metadata = {f"llama.{key}": value for key, value in LIKELY.items()}
    header = GgufHeader(Path("m.gguf"), 3, 0, {"general.architecture": "llama", **metadata})
    assert ModelSize(kv_shape(header)).bytes_per_token == 4 * 2 * 128 * 2
