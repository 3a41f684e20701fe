"""The parameters of a llama.cpp context that this package lets its user choose."""

import os
import re
from dataclasses import dataclass

import llama_cpp.llama_cpp as bindings

KV_TYPES = {
    "f32": bindings.GGML_TYPE_F32,
    "f16": bindings.GGML_TYPE_F16,
    "bf16": 30,  # GGML_TYPE_BF16 of ggml.h; the bindings leave it out
    "q8_0": bindings.GGML_TYPE_Q8_0,
    "q5_1": bindings.GGML_TYPE_Q5_1,
    "q5_0": bindings.GGML_TYPE_Q5_0,
    "q4_1": bindings.GGML_TYPE_Q4_1,
    "q4_0": bindings.GGML_TYPE_Q4_0,
    "iq4_nl": bindings.GGML_TYPE_IQ4_NL,
}
"""ggml type numbers of the element types llama.cpp can keep K and V in."""

ROPE_SCALING_TYPES = {"none": 0, "linear": 1, "yarn": 2, "longrope": 3}
"""enum llama_rope_scaling_type of llama.h."""


def kv_type_name(kv_type: str | int) -> str:
    """The name of an element type given by name or ggml number; ValueError if it is not one."""
    for name, number in KV_TYPES.items():
        if kv_type in (name, number):
            return name
    raise ValueError(f"a K/V type is one of {', '.join(KV_TYPES)}, not {kv_type!r}")


def env_int(name: str) -> int:
    """An environment variable as llama.cpp reads it, with C's atoi: 0 if unset or not a number."""
    match = re.match(r"\s*[+-]?\d+", os.environ.get(name, ""))
    return int(match[0]) if match else 0


@dataclass(frozen=True, slots=True)
class RopeParams:
    """RoPE and YaRN parameters; None leaves what the model's file says."""

    scaling_type: str | None = None
    freq_base: float | None = None
    freq_scale: float | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_orig_ctx: int | None = None

    def __post_init__(self) -> None:
        if self.scaling_type is not None and self.scaling_type not in ROPE_SCALING_TYPES:
            raise ValueError(f"scaling_type is one of {', '.join(ROPE_SCALING_TYPES)}")
        # 0, and a negative number for YaRN's factors, means "the model's own" to llama.cpp.
        for name in ("freq_base", "freq_scale", "yarn_orig_ctx"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, not {value}")


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A LoRA adapter file (GGUF) and the strength it is applied with."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ContextParams:
    """What a context is made with; `n_seq_max` counts its user's ids, without the scratch id."""

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_threads: int | None
    n_seq_max: int
    type_k: str
    type_v: str
    rope: RopeParams
    flash_attn: bool
    kv_unified: bool
    swa_full: bool

    def __post_init__(self) -> None:
        if min(self.n_ctx, self.n_batch, self.n_ubatch) < 1:
            raise ValueError(
                f"n_ctx {self.n_ctx}, n_batch {self.n_batch}, n_ubatch {self.n_ubatch}: at least 1"
            )
        if min(self.n_ctx, self.n_batch) <= self.n_seq_max:
            # llama.cpp reserves logits for each sequence, in a buffer for one batch, and ends the
            # process when they do not fit.
            raise ValueError(
                f"n_ctx {self.n_ctx} and n_batch {self.n_batch} must exceed n_seq_max "
                f"{self.n_seq_max}"
            )

    def to_native(self) -> "bindings.llama_context_params":
        """llama.cpp's own structure, all else at its defaults."""
        params = bindings.llama_context_default_params()
        params.n_ctx = self.n_ctx
        params.n_batch = self.n_batch
        params.n_ubatch = self.n_ubatch
        params.n_seq_max = self.n_seq_max + 1
        n_threads = self.n_threads or len(os.sched_getaffinity(0))
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = KV_TYPES[self.type_k]
        params.type_v = KV_TYPES[self.type_v]
        params.flash_attn_type = (
            bindings.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if self.flash_attn
            else bindings.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.kv_unified = self.kv_unified
        params.swa_full = self.swa_full
        # All on the CPU, as the model is (model.py).
        params.offload_kqv = params.op_offload = False
        rope = self.rope
        if rope.scaling_type is not None:
            params.rope_scaling_type = ROPE_SCALING_TYPES[rope.scaling_type]
        if rope.freq_base is not None:
            params.rope_freq_base = rope.freq_base
        if rope.freq_scale is not None:
            params.rope_freq_scale = rope.freq_scale
        if rope.yarn_ext_factor is not None:
            params.yarn_ext_factor = rope.yarn_ext_factor
        if rope.yarn_attn_factor is not None:
            params.yarn_attn_factor = rope.yarn_attn_factor
        if rope.yarn_beta_fast is not None:
            params.yarn_beta_fast = rope.yarn_beta_fast
        if rope.yarn_beta_slow is not None:
            params.yarn_beta_slow = rope.yarn_beta_slow
        if rope.yarn_orig_ctx is not None:
            params.yarn_orig_ctx = rope.yarn_orig_ctx
        return params
