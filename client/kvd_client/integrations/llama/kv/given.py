"""What llama.cpp was given for a model and a context that somebody else has made: what of it is in
the fingerprint, and what cannot be, so that its K/V is refused.

Whoever has made them hands over llama.cpp's own structures; attached/llama_params.py takes
those of a Llama, foreign.py those of a program of its own.
"""

from itertools import takewhile
from typing import Any, NamedTuple

import llama_cpp.llama_cpp as bindings

from kvd_client.integrations.llama.errors import NotShareable, Reason
from kvd_client.integrations.llama.runtime.params import KV_TYPES, ROPE_SCALING_TYPES, RopeParams


class GivenParams(NamedTuple):
    """KvParams of fingerprint.py."""

    type_k: str
    type_v: str
    rope: RopeParams


def read_given(model: "bindings.llama_model_params", context: Any) -> GivenParams:
    """The parameters that change K/V, of llama_model_params and llama_context_params.

    Raises NotShareable, with what to change, for one that the fingerprint does not cover.
    """
    # Ends with an empty key, which is all that there is of it if nothing is overridden.
    overrides = takewhile(lambda each: each.key, model.kv_overrides or ())
    names = ", ".join(each.key.decode("utf-8", "replace") for each in overrides)
    if names:
        raise NotShareable(
            Reason.OVERRIDES,
            f"it has kv_overrides ({names}), which change the model in ways that its file does not "
            "tell: write them into the file (gguf-set-metadata), leave them out, or use it without "
            "sharing",
        )
    if model.load_mtp:
        raise NotShareable(
            Reason.LAYOUT,
            "a model with its draft layers keeps K/V of another form: do without draft-mtp",
        )
    if context.embeddings:
        raise NotShareable(
            Reason.EMBEDDINGS,
            "it is made for embeddings, which no K/V is kept of: use another one for them",
        )
    if bindings.llama_supports_gpu_offload() and (
        model.n_gpu_layers or context.offload_kqv or context.op_offload
    ):
        raise NotShareable(
            Reason.GPU,
            "this llama.cpp can compute on a GPU, whose K/V differs in its last bits: make it with "
            "n_gpu_layers=0, offload_kqv=False, op_offload=False",
        )
    # Whoever sets these does more than is known here.
    usual = bindings.llama_model_default_params()
    odd = [
        name
        for name in (
            "use_extra_bufts",
            "no_host",
            "no_alloc",
            "devices",
            "tensor_buft_overrides",
        )
        if getattr(model, name) != getattr(usual, name)
    ]
    odd += [name for name in ("ctx_type", "cb_eval", "ctx_other") if getattr(context, name)]
    if odd:
        raise NotShareable(
            Reason.PARAMETERS, f"it has unusual parameters, which may change K/V: {', '.join(odd)}"
        )
    return GivenParams(_kv_type(context.type_k), _kv_type(context.type_v), _rope(context))


def _kv_type(number: int) -> str:
    """The name of a K/V type that a context was given. Raises NotShareable for an unknown one."""
    for name, known in KV_TYPES.items():
        if known == number:
            return name
    raise NotShareable(Reason.LAYOUT, f"its type_k or type_v is {number}, which is not known here")


def _rope(given: Any) -> RopeParams:
    """The parameters in llama.cpp's structure. There is 0 in it, or a negative number for YaRN's
    factors, where nothing is given."""
    names = {number: name for name, number in ROPE_SCALING_TYPES.items()}
    scaling = given.rope_scaling_type
    if scaling not in names and scaling >= 0:
        raise NotShareable(Reason.PARAMETERS, f"its rope_scaling_type {scaling} is not known here")

    def positive(value: float) -> float | None:
        return value if value > 0 else None

    def factor(value: float) -> float | None:
        return value if value >= 0 else None

    return RopeParams(
        scaling_type=names.get(scaling),
        freq_base=positive(given.rope_freq_base),
        freq_scale=positive(given.rope_freq_scale),
        yarn_ext_factor=factor(given.yarn_ext_factor),
        yarn_attn_factor=factor(given.yarn_attn_factor),
        yarn_beta_fast=factor(given.yarn_beta_fast),
        yarn_beta_slow=factor(given.yarn_beta_slow),
        yarn_orig_ctx=given.yarn_orig_ctx or None,
    )
