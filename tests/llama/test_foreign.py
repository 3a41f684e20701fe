"""Contexts that somebody else has made: the form of their states, their fingerprint, refusals."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as bindings
import pytest

from kvd_client.integrations.llama.errors import NotShareable, Reason
from kvd_client.integrations.llama.foreign import Before, ForeignContext
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.kv.fingerprint import fingerprint
from kvd_client.integrations.llama.runtime.params import KV_TYPES, LoraAdapter, RopeParams
from kvd_client.integrations.llama.worker import model_of

pytestmark = pytest.mark.model


@contextlib.contextmanager
def foreign(
    path: Path,
    *,
    loras: tuple[LoraAdapter, ...] = (),
    kv_overrides: Any = None,
    odd: dict[str, Any] | None = None,
    **changes: Any,
) -> Iterator[ForeignContext]:
    """As somebody who does not know of kvd makes them; all else at llama.cpp's defaults, but what
    is `odd` among the model's parameters."""
    before = Before.now(path, loras)
    model_params = bindings.llama_model_default_params()
    model = bindings.llama_model_load_from_file(str(path).encode(), model_params)
    if kv_overrides is not None:
        model_params.kv_overrides = kv_overrides
    for name, value in (odd or {}).items():
        setattr(model_params, name, value)
    params = bindings.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max, params.kv_unified = 256, 64, 4, True
    params.n_threads = params.n_threads_batch = 1
    for name, value in changes.items():
        setattr(params, name, value)
    context = bindings.llama_init_from_model(model, params)
    try:
        yield ForeignContext(path, model, model_params, context, params, before)
        # It is left as empty as it came.
        memory = bindings.llama_get_memory(context)
        assert bindings.llama_memory_seq_pos_max(memory, 0) == -1
    finally:
        bindings.llama_free(context)
        bindings.llama_model_free(model)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"n_ctx": 1024}, {"n_ctx": 1024}),
        ({"n_ctx": 1024}, {}),  # only beyond the original length a context is another
        (
            {"type_k": KV_TYPES["q8_0"], "type_v": KV_TYPES["q4_0"]},
            {"type_k": "q8_0", "type_v": "q4_0"},
        ),
        (
            {"rope_freq_base": 5e5, "rope_scaling_type": 2, "yarn_orig_ctx": 64},
            {"rope": RopeParams(scaling_type="yarn", freq_base=5e5, yarn_orig_ctx=64)},
        ),
        ({"yarn_ext_factor": -1.0, "rope_freq_scale": 0.0}, {}),
    ],
)
def test_its_fingerprint_is_that_of_an_engine_with_the_same_parameters(
    tiny_dir: Path, given: dict[str, Any], options: dict[str, Any]
) -> None:
    path = tiny_dir / "llama.gguf"
    arguments: dict[str, Any] = {"n_ctx": 256, "n_batch": 64, "n_threads": 1} | options
    with LlamaEngine(model_path=path, **arguments) as engine, foreign(path, **given) as context:
        differs = given.get("n_ctx", 256) != arguments["n_ctx"]
        assert (fingerprint(engine) != fingerprint(context)) == differs
        assert (model_of(engine) != model_of(context)) == differs
        assert engine.layout == context.layout


def test_an_adapter_is_part_of_it(tiny_dir: Path) -> None:
    path = tiny_dir / "llama.gguf"
    six, seven = (LoraAdapter(str(tiny_dir / f"lora-{n}.gguf"), 0.5) for n in (6, 7))
    with LlamaEngine(model_path=path, n_ctx=256, n_batch=64, n_threads=1, loras=[six]) as engine:
        expected = fingerprint(engine)
    found = []
    for loras in [(six,), (seven,), (), (six, LoraAdapter(seven.path, 0.0))]:
        with foreign(path, loras=loras) as context:
            found.append(fingerprint(context) == expected)
    assert found == [True, False, False, True]


def test_without_flash_attention_it_is_another(tiny_dir: Path) -> None:
    """The blocks have the same form, and other last bits."""
    path = tiny_dir / "llama.gguf"
    with foreign(path) as on, foreign(path, flash_attn_type=0) as off:
        assert off.form.v_trans
        assert not on.form.v_trans
        assert on.layout == off.layout
        fields = fingerprint(off).fields
        assert fields == {**fingerprint(on).fields, "v_trans": "1"}
        assert fingerprint(off).digest != fingerprint(on).digest


def test_batches_of_one_token_are_enough(tiny_dir: Path) -> None:
    """More than n_batch tokens at once would end the process."""
    path = tiny_dir / "llama.gguf"
    with (
        foreign(path) as usual,
        foreign(path, n_batch=1, n_ubatch=1, n_seq_max=1) as context,
    ):
        assert context.form == usual.form


@pytest.mark.parametrize("name", ["heads-by-layer", "m-rope"])
def test_other_kinds_are_shared_with_engines_too(tiny_dir: Path, name: str) -> None:
    path = tiny_dir / f"{name}.gguf"
    with (
        LlamaEngine(model_path=path, n_ctx=256, n_batch=64, n_threads=1) as engine,
        foreign(path) as context,
    ):
        assert context.layout == engine.layout
        assert context.layout.m_rope == (name == "m-rope")
        assert model_of(context) == model_of(engine)


@pytest.mark.parametrize(
    ("name", "given", "reason", "said"),
    [
        ("recurrent", {}, Reason.RECURRENT, "recurrent"),
        ("sliding-window", {}, Reason.SLIDING_WINDOW, "window of 64"),
        ("llama-not-causal", {}, Reason.NOT_CAUSAL, "not causal"),
        ("llama", {"kv_unified": False, "n_ctx": 1024}, Reason.STREAMS, "set kv_unified to true"),
        ("llama", {"embeddings": True}, Reason.EMBEDDINGS, "for embeddings"),
        ("llama", {"odd": {"load_mtp": True}}, Reason.LAYOUT, "without draft-mtp"),
        ("llama", {"odd": {"use_extra_bufts": False}}, Reason.PARAMETERS, "use_extra_bufts"),
        ("llama", {"odd": {"no_host": True}}, Reason.PARAMETERS, "no_host"),
        ("llama", {"odd": {"devices": 1}}, Reason.PARAMETERS, "devices"),
        (
            "llama",
            {"odd": {"tensor_buft_overrides": 1}},
            Reason.PARAMETERS,
            "tensor_buft_overrides",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(
    tiny_dir: Path, name: str, given: dict[str, Any], reason: Reason, said: str
) -> None:
    with (
        pytest.raises(NotShareable, match=said) as refused,
        foreign(tiny_dir / f"{name}.gguf", **given),
    ):
        pass
    assert refused.value.reason is reason


def test_overridden_metadata_is_refused(tiny_dir: Path) -> None:
    overrides = (bindings.llama_model_kv_override * 2)()
    overrides[0].key = b"llama.rope.freq_base"
    with (
        pytest.raises(NotShareable, match=r"llama\.rope\.freq_base"),
        foreign(tiny_dir / "llama.gguf", kv_overrides=overrides),
    ):
        pass


def test_no_overrides_are_none(tiny_dir: Path) -> None:
    """What a program gives llama.cpp that was told to override nothing: the end of the list."""
    path = tiny_dir / "llama.gguf"
    nothing = (bindings.llama_model_kv_override * 1)()
    with foreign(path) as plain, foreign(path, kv_overrides=nothing) as context:
        assert fingerprint(context) == fingerprint(plain)


def test_two_adapters_are_refused(tiny_dir: Path) -> None:
    loras = tuple(LoraAdapter(str(tiny_dir / f"lora-{n}.gguf")) for n in (6, 7))
    with (
        pytest.raises(NotShareable, match="2 LoRA adapters"),
        foreign(tiny_dir / "llama.gguf", loras=loras),
    ):
        pass
