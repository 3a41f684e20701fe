"""The size of a model's K/V from its metadata, against what llama.cpp says of real contexts.

One test runs over all families: those made from metadata alone, the tiny models with tensors, and
the real ones.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable, Reason
from kvd_client.integrations.llama.files.architectures import ARCHITECTURES, NoKvShape, kv_shape
from kvd_client.integrations.llama.files.gguf_header import BadModelFile, read_header
from kvd_client.integrations.llama.files.model_size import (
    BadKvType,
    LayerGroup,
    ModelSize,
    model_size,
)
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.runtime.params import ContextParams
from kvd_proto.geometry import GGML_TYPES
from kvd_proto.payload import make_format
from tests.llama import tiny_models
from tests.llama.made_models import FAMILIES, Family, MadeModel, write_metadata

pytestmark = pytest.mark.model

LENGTHS = (1, 32, 33, 100)
BLOCK_TOKENS = 32
QUANTISED = sorted(name for name, size in GGML_TYPES.items() if size.block_elements > 1)
BY_NAME = {family.name: family for family in FAMILIES}


@contextmanager
def context(model: LlamaModel, size: ModelSize, n_ctx: int = 256) -> Iterator[LlamaEngine]:
    with LlamaEngine(
        model=model, n_ctx=n_ctx, n_batch=64, n_ubatch=64, n_threads=1, n_seq_max=1,
        type_k=size.type_k, type_v=size.type_v, require_shareable=False,
    ) as engine:  # fmt: skip
        yield engine


def check(model: LlamaModel, size: ModelSize, lengths: tuple[int, ...] = LENGTHS) -> None:
    """model-size == the engine's geometry == llama_state_seq_get_size, at each length."""
    with context(model, size, max(256, *lengths)) as engine:
        for n_tokens in lengths:
            engine.prefill(0, np.ones(n_tokens, dtype=np.int32), 0)
            got = native.state_seq_get_size(engine._context, 0)
            assert size.state_bytes(n_tokens) == got, n_tokens
            engine.clear(0)
        refusal = engine.not_shareable
        assert (refusal and refusal.reason) == size.shape.unshareable
        if refusal is not None:
            assert size.shape.why
            return
        rows = [row for part in engine.layout.parts for row in part]
        layout = [(row.k_row_bytes, row.v_row_bytes) for row in rows]
        assert [(row.k_row_bytes, row.v_row_bytes) for row in size.geometry.layers] == layout
        assert size.bytes_per_token == size.geometry.bytes_per_token
        window = size.shape.window
        assert engine.layout.window == (window.n_tokens if window else 0)
        # The protocol has a formula of its own, by which the daemon makes slots.
        payload = make_format(size.payload_format, size.geometry, BLOCK_TOKENS)
        assert payload.max_bytes == size.state_bytes(BLOCK_TOKENS)


# --- every family


@pytest.mark.parametrize("name", BY_NAME)
def test_it_is_what_llama_cpp_says_of_each_family(tmp_path: Path, name: str) -> None:
    family = BY_NAME[name]
    path = write_metadata(tmp_path / "model.gguf", family)
    with MadeModel(path) as model:
        check(model, model_size(path))
        if family.architecture != "grok":  # which computes without flash attention
            check(model, model_size(path, "q8_0", "q8_0"))


def test_every_architecture_that_is_known_has_been_compared() -> None:
    assert {family.architecture for family in FAMILIES} == ARCHITECTURES


@pytest.mark.parametrize("name", ["llama", "heads-by-layer", "sliding-window", "m-rope"])
def test_it_is_what_llama_cpp_says_of_models_with_tensors(tiny_dir: Path, name: str) -> None:
    path = tiny_dir / f"{name}.gguf"
    with LlamaModel(path) as model:
        check(model, model_size(path))


@pytest.mark.parametrize("type_k", GGML_TYPES)
@pytest.mark.parametrize("type_v", ["f16", "q4_0"])
def test_each_type_of_k_and_of_v(tmp_path: Path, type_k: str, type_v: str) -> None:
    path = write_metadata(tmp_path / "model.gguf", BY_NAME["minicpm3"])  # K of 64, V of 32
    with MadeModel(path) as model:
        check(model, model_size(path, type_k, type_v))
        check(model, model_size(path, type_v, type_k))


def test_smollm2(smollm2: LlamaModel) -> None:
    for kv_type in ("f16", "q8_0", "q4_0"):
        check(smollm2, model_size(smollm2.path, kv_type, kv_type), (1, 33, 64))
    size = model_size(smollm2.path)
    assert size.bytes_per_token == 23_040
    assert size.state_bytes(32) == 738_408
    assert size.stride_bytes(32) == 741_376
    assert size.groups == (LayerGroup(30, False, 384, 384),)


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("name", ["gemma2", "gemma4", "llama4"])
def test_whether_older_cells_are_kept_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, swa_full: bool
) -> None:
    """Longer than the window, and than what a context keeps of it without `swa_full`."""
    make = ContextParams.to_native

    def to_native(params: ContextParams) -> object:
        native_params = make(params)
        native_params.swa_full = swa_full
        return native_params

    monkeypatch.setattr(ContextParams, "to_native", to_native)
    path = write_metadata(tmp_path / "model.gguf", BY_NAME[name])
    with MadeModel(path) as model:
        check(model, model_size(path), (33, 600))


def test_gemma3_with_its_window() -> None:
    """The first 64 MB of the file have the metadata: llama.cpp makes the rest."""
    path = tiny_models.gemma3_head()
    with MadeModel(path) as model:
        check(model, model_size(path), (1, 33, 520))
        check(model, model_size(path, "q8_0", "q4_0"), (33,))
    size = model_size(path)
    assert size.groups == (LayerGroup(3, False, 512, 512), LayerGroup(15, True, 512, 512))
    assert size.state_bytes(64) == 1_181_656


# --- what is told beside the size


def test_layers_are_grouped(tmp_path: Path) -> None:
    def groups(name: str) -> tuple[LayerGroup, ...]:
        return model_size(write_metadata(tmp_path / "model.gguf", BY_NAME[name])).groups

    assert groups("deci with layers without K/V") == (
        LayerGroup(1, False, 256, 256),
        LayerGroup(2, False, 0, 0),
        LayerGroup(1, False, 64, 64),
    )
    assert groups("gemma3 with windows by layer") == (
        LayerGroup(2, False, 128, 128),
        LayerGroup(2, True, 128, 128),
    )
    assert groups("deepseek2") == (LayerGroup(4, False, 192, None),)


REFUSED = {
    "recurrent": Reason.RECURRENT,
    "encoder": Reason.ENCODER,
    "not-causal": Reason.NOT_CAUSAL,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_keeps_no_k_and_v_is_refused_with_the_engines_reason(
    tiny_dir: Path, name: str
) -> None:
    path = tiny_dir / f"{name}.gguf"
    with pytest.raises(NoKvShape) as refusal:
        model_size(path)
    with LlamaModel(path) as model, pytest.raises(NotShareable) as engines:
        LlamaEngine(model=model, n_ctx=256, n_seq_max=1)
    assert refusal.value.reason is engines.value.reason is REFUSED[name]


@pytest.mark.parametrize("architecture", ["jamba", "qwen3next", "rwkv7", "deepseek32", "t5"])
def test_other_kinds_of_memory_are_refused(tmp_path: Path, architecture: str) -> None:
    path = write_metadata(tmp_path / "model.gguf", Family(architecture))
    with pytest.raises(NoKvShape, match="kvd does not share it"):
        model_size(path)


# --- types that a model cannot have


def test_types_that_llama_cpp_refuses_are_refused(tmp_path: Path) -> None:
    """Heads that are no whole number of a type's blocks; two types where there is K alone."""
    odd = write_metadata(
        tmp_path / "odd.gguf",
        Family("llama", {"embedding_length": 4 * 48}),
    )
    mla = write_metadata(tmp_path / "mla.gguf", BY_NAME["deepseek2"])
    cases = [(odd, name, "f16") for name in QUANTISED] + [(odd, "f16", "q8_0")]
    cases += [(mla, "f16", "q8_0"), (mla, "f32", "f16")]
    for path, type_k, type_v in cases:
        with pytest.raises(BadKvType):
            model_size(path, type_k, type_v)
        with MadeModel(path) as model, pytest.raises(LlamaEngineError, match="cannot create"):
            LlamaEngine(
                model=model, n_ctx=256, n_seq_max=1, type_k=type_k, type_v=type_v,
                require_shareable=False,
            )  # fmt: skip
    with pytest.raises(BadKvType, match="one of f32"):
        model_size(odd, "q9_9")


# --- files


def write_values(path: Path, architecture: str, **values: object) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in values.items():
        key = name.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WHOLE = {
    "llama__block_count": 2,
    "llama__embedding_length": 128,
    "llama__attention__head_count": 4,
}


@pytest.mark.parametrize("missing", WHOLE)
def test_a_key_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "model.gguf"
    assert model_size(write_values(path, "llama", **WHOLE)).bytes_per_token == 1024
    write_values(path, "llama", **{key: WHOLE[key] for key in WHOLE if key != missing})
    with pytest.raises(BadModelFile, match=missing.replace("__", r"\.")):
        model_size(path)


@pytest.mark.parametrize(
    ("architecture", "values", "said"),
    [
        ("lama", {}, "architecture 'lama' is not one"),
        ("llama", {"llama__block_count": 0}, "not a number from 1 to 512"),
        ("llama", {"llama__block_count": 513}, "not a number from 1 to 512"),
        ("llama", {"llama__block_count": 2.0}, "not a number"),
        ("llama", {"llama__block_count": "2"}, "not a number"),
        ("llama", {"llama__attention__head_count": 0}, "is 0 in the first layer"),
        ("llama", {"llama__attention__head_count_kv": [1, 2, 3]}, "3 numbers, not 2"),
        ("llama", {"llama__attention__key_length": (1 << 32) - 1}, "not a number from 0"),
        ("llama", {"llama__attention__key_length": 1 << 24}, "more than 16777216 elements"),
        ("llama", {"general__type": "adapter"}, "type 'adapter'"),
        ("gemma4", {"gemma4__attention__sliding_window": 8}, "no array gemma4"),
        ("cohere2", {}, "no cohere2.attention.sliding_window"),
    ],
)
def test_metadata_that_makes_no_model_is_named(
    tmp_path: Path, architecture: str, values: dict[str, object], said: str
) -> None:
    whole = {key.replace("llama", architecture): value for key, value in WHOLE.items()}
    path = write_values(tmp_path / "model.gguf", architecture, **whole | values)
    with pytest.raises(BadModelFile, match=said):
        model_size(path)


def test_of_a_split_model_the_first_file_tells(tmp_path: Path) -> None:
    first = tmp_path / "model-00001-of-00003.gguf"
    last = tmp_path / "model-00003-of-00003.gguf"
    write_values(last, "llama", split__no=2, split__count=3)
    with pytest.raises(BadModelFile, match="name that one"):
        model_size(last)
    write_values(first, "llama", **WHOLE, split__no=0, split__count=3)
    assert model_size(first).bytes_per_token == 1024
    assert model_size(last).bytes_per_token == 1024


def test_nothing_is_loaded_for_it(tiny_dir: Path) -> None:
    """Neither llama.cpp, which need not be there, nor `gguf`."""
    program = (
        "import sys\n"
        "from kvd_client.integrations.llama.files.model_size import model_size\n"
        "print(model_size(sys.argv[1]).bytes_per_token)\n"
        "assert not {'llama_cpp', 'gguf'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tiny_dir / "llama.gguf"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("512\n", "")


def test_the_default_window_of_gemma2_is_that_of_llama_cpp(tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "model.gguf", BY_NAME["gemma2 with the default window"])
    window = kv_shape(read_header(path)).window
    assert window is not None
    assert window.n_tokens == 4096
