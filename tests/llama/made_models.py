"""Models that llama.cpp makes itself from metadata alone, its tensors all zero: one of each family.

A GGUF file without tensors is written with the package `gguf`; llama.cpp loads its metadata, makes
the tensors it says the architecture has, and asks for their content. So no family's tensors need be
known here. What they compute is nothing; how much K/V they keep is what the real ones would.
"""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as bindings

from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.model import LlamaModel

Value = int | float | bool | list[int] | list[bool]

N_VOCAB = 96
WINDOW = 40  # more than a block, less than the longest sequence of the tests
_LAYERS = 4
_HEAD = 32  # a multiple of all types' blocks

_COMMON: dict[str, Value] = {
    "context_length": 512,
    "vocab_size": N_VOCAB,
    "embedding_length": 4 * _HEAD,
    "block_count": _LAYERS,
    "feed_forward_length": 64,
    "leading_dense_block_count": 1,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
}
_EXPERTS: dict[str, Value] = {
    "expert_count": 2,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_feed_forward_length": 64,
    "expert_shared_feed_forward_length": 32,
    "expert_chunk_feed_forward_length": 64,
    "expert_gating_func": 2,
    "expert_group_scale": 1.0,
    "experts_per_group": 1,
    "interleave_moe_layer_step": 2,
}
_ODD_WINDOWS: dict[str, Value] = {
    "attention.sliding_window": WINDOW,
    "attention.sliding_window_pattern": [layer % 2 == 1 for layer in range(_LAYERS)],
}
_WINDOW: dict[str, Value] = {"attention.sliding_window": WINDOW}
_SECTIONS: dict[str, Value] = {"rope.dimension_sections": [4, 4, 4, 4]}
_MLA: dict[str, Value] = {  # the cached row of K: the compressed K and V, and what RoPE turns
    "attention.head_count_kv": 1,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 32,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 64,
    "rope.dimension_count": 32,
}
_COMPRESSED: dict[str, Value] = {  # uncompressed before it is cached
    "attention.head_count_kv": 4,
    "attention.key_length": 64,
    "attention.value_length": 32,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 64,
    "rope.dimension_count": 32,
}


@dataclass(frozen=True)
class Family:
    """An architecture, with what it needs or is tried with beside the common metadata."""

    architecture: str
    changes: Mapping[str, Value] = field(default_factory=dict)
    experts: bool = False
    variant: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.architecture, self.variant)))


def _plain(names: str, changes: Mapping[str, Value] | None = None) -> list[Family]:
    return [Family(name, changes or {}) for name in names.split()]


def _experts(names: str, changes: Mapping[str, Value] | None = None) -> list[Family]:
    return [Family(name, changes or {}, experts=True) for name in names.split()]


FAMILIES = [
    *_plain(
        """
        apertus arcee baichuan bitnet bloom chatglm codeshell cogvlm command-r deci ernie4_5 exaone
        exaone4 falcon gemma glm4 gpt2 gptneox granite granitemoe hunyuan-dense hunyuan_vl internlm2
        jais jais2 llama llama-embed maincoder minicpm mistral3 mpt nemotron olmo openelm orion
        pangu-embedded phi2 phi3 plamo qwen qwen2 qwen3 refact seed_oss smollm3 stablelm starcoder
        starcoder2 talkie xverse
        """
    ),
    *_experts(
        """
        arctic bailingmoe bailingmoe2 dbrx deepseek ernie4_5-moe glm4moe grok grovemoe hunyuan-moe
        hy_v3 minimax-m2 phimoe qwen2moe qwen3moe
        """
    ),
    *_experts("dots1 olmoe deepseek2-ocr", {"attention.head_count_kv": 4}),
    *_plain("minicpm3", _COMPRESSED),
    *_plain("cohere2 gemma2 gemma3 gemma3n muse-glimmer olmo2 plamo3", _WINDOW),
    *_plain("granite_swa spark2_5", _ODD_WINDOWS),
    *_experts("afmoe cohere2moe exaone-moe gpt-oss laguna llama4 mellum smallthinker", _WINDOW),
    *_experts("maple mimo2 step35", _ODD_WINDOWS),
    *_plain("qwen2vl qwen3vl paddleocr", _SECTIONS),
    *_experts("qwen3vlmoe", _SECTIONS),
    *_experts("deepseek2 mistral4", _MLA),
    Family("hrm_text", {"block_count": 6}),
    Family("nanbeige", {"num_loops": 3}),
    Family(
        "graniteswitch",
        {
            "adapters.count": 1,
            "adapters.lora_rank": 2,
            "adapters.token_ids_activate": [5],
            "adapters.token_ids_substitute": [6],
        },
    ),
    Family(
        "gemma4",
        _WINDOW
        | {
            "attention.sliding_window_pattern": [True, False, True, False],
            "embedding_length_per_layer_input": 64,
            "attention.shared_kv_layers": 2,
            "rope.dimension_count_swa": 64,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "attention.key_length_swa": 64,
            "attention.value_length_swa": 64,
        },
    ),
    # How metadata may differ within an architecture.
    Family(
        "deci",
        {"attention.head_count": [4, 4, 0, 4], "attention.head_count_kv": [4, 0, 0, 1]},
        variant="with layers without K/V",
    ),
    Family("openelm", {"attention.head_count_kv": [1, 2, 4, 2]}, variant="with heads by layer"),
    Family(
        "mimo2",
        _ODD_WINDOWS | {"attention.key_length": 96, "attention.value_length": 64},
        experts=True,
        variant="with other lengths of K and V",
    ),
    Family("llama", {"attention.causal": False}, variant="that is not causal"),
    Family("deepseek2", _COMPRESSED, experts=True, variant="without MLA"),
    Family("glm4", _SECTIONS, variant="with M-RoPE"),
    Family("hunyuan_vl", _SECTIONS, variant="with M-RoPE"),
    Family("llama", {"nextn_predict_layers": 1}, variant="with a layer for MTP"),
    Family("exaone4", _WINDOW | {"block_count": 64}, variant="of 64 layers"),
    Family("exaone4", _WINDOW, variant="with a window that is not used"),
    Family("phi3", _WINDOW, variant="with a window that is not used"),
    Family("gemma2", variant="with the default window"),
    Family("gemma3", variant="without a window"),
    Family("gemma3", _ODD_WINDOWS, variant="with windows by layer"),
    Family(
        "gemma3",
        _WINDOW | {"attention.sliding_window_pattern": 2},
        variant="with a window in every other layer",
    ),
]
FAMILIES = [
    Family(each.architecture, {"block_count": 22, **each.changes}, each.experts, each.variant)
    if each.architecture == "gemma3n"  # 20 of them have K/V
    else each
    for each in FAMILIES
]


def write_metadata(path: Path, family: Family) -> Path:
    """A GGUF file with the family's metadata, and no tensors."""
    writer = gguf.GGUFWriter(path, family.architecture)
    for name, value in {
        **_COMMON,
        **(_EXPERTS if family.experts else {}),
        **_extras(family.architecture),
        **family.changes,
    }.items():
        key = f"{family.architecture}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    for name in ("alpha_n", "alpha_p", "beta", "eps"):
        writer.add_float32(f"xielu.{name}", 1.0)
    writer.add_tokenizer_model("no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _extras(architecture: str) -> dict[str, Value]:
    """What an architecture cannot be loaded without, and does not matter for its K/V."""
    return {
        "hrm_text": {"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2},
        "maple": {"swiglu_clamp_exp": 7.0},
        "gemma3n": {"embedding_length_per_layer_input": 64},
        "olmo": {"attention.clamp_kqv": 1.0},
        "mpt": {"attention.max_alibi_bias": 8.0},
        "bloom": {"attention.max_alibi_bias": 8.0},
        "dbrx": {"attention.clamp_kqv": 1.0},
    }.get(architecture, {})


class _InitParams(ctypes.Structure):
    """struct gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _prototype(library: ctypes.CDLL, name: str, restype: object, *argtypes: object) -> object:
    function = library[name]
    function.restype, function.argtypes = restype, argtypes
    return function


_GGML = ctypes.CDLL(str(Path(bindings.__file__).parent / "lib" / "libggml-base.so"))
_gguf_init = _prototype(_GGML, "gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _InitParams)
_gguf_free = _prototype(_GGML, "gguf_free", None, ctypes.c_void_p)
_nbytes = _prototype(_GGML, "ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
_data = _prototype(_GGML, "ggml_get_data", ctypes.c_void_p, ctypes.c_void_p)
_SetData = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_init = _prototype(
    bindings._lib,
    "llama_model_init_from_user",
    ctypes.c_void_p,
    ctypes.c_void_p,
    _SetData,
    ctypes.c_void_p,
    bindings.llama_model_params,
)


_FRESH = 32 << 20
"""From this size on malloc gives pages that nobody had, which are zero and take no memory as long
as they are only read."""


@_SetData
def _zero(tensor: int, _: object) -> None:
    if _nbytes(tensor) <= _FRESH:
        ctypes.memset(_data(tensor), 0, _nbytes(tensor))


class MadeModel(LlamaModel):
    """The model of a file that has metadata only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamps = ()
        metadata = _gguf_init(os.fsencode(path), _InitParams(True, None))
        assert metadata, path
        params = bindings.llama_model_default_params()
        params.n_gpu_layers = 0
        pointer = _init(metadata, _zero, None, params)
        _gguf_free(metadata)
        assert pointer, native.take_errors()
        self._is_owned = True
        self._take(pointer)
