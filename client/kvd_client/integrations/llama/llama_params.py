"""What a `llama_cpp.Llama` that somebody has made computes with, and whether its K/V can be shared.

Whatever changes K/V must be in the fingerprint, so all of it is read from the object here, and what
cannot be read, or is not in the fingerprint, is refused. What cannot be seen at all: adapters and
parameters that are set later by calls of llama.cpp itself, and LLAMA_ATTN_ROT_DISABLE, which must
be what it was when the Llama was made.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp.llama_cpp as bindings

from kvd_client.integrations.llama import native
from kvd_client.integrations.llama.batch import Batch
from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable, Reason
from kvd_client.integrations.llama.model import LlamaModel
from kvd_client.integrations.llama.model_hash import file_digest, model_files
from kvd_client.integrations.llama.mover import BlockMover, ScratchSequence, read_layout
from kvd_client.integrations.llama.params import (
    KV_TYPES,
    ROPE_SCALING_TYPES,
    LoraAdapter,
    RopeParams,
    env_int,
)
from kvd_client.integrations.llama.state import KvLayout

SCRATCH: int = bindings.llama_max_parallel_sequences() - 1
"""The last of llama.cpp's sequence ids (LLAMA_MAX_SEQ), of which a Llama uses the first."""

CLOCK_TICK = time.clock_getres(5)  # CLOCK_REALTIME_COARSE, which Python has no name for
"""Seconds by which a file's ctime may lie before the moment of the change."""


class LlamaKvParams(NamedTuple):
    """KvParams of fingerprint.py."""

    type_k: str
    type_v: str
    rope: RopeParams


@dataclass(frozen=True)
class LlamaSource:
    """A KvSource (fingerprint.py), and what moves its blocks; valid until the Llama is closed."""

    model: LlamaModel
    params: LlamaKvParams
    loras: Sequence[LoraAdapter]
    lora_digests: Sequence[bytes]
    n_ctx: int
    attn_rot_disabled: bool
    mover: BlockMover
    not_shareable: NotShareable | None = None

    @property
    def layout(self) -> KvLayout:
        """Types and row bytes of each layer's K and V."""
        return self.mover.layout


def read_llama(llama: Any) -> LlamaSource:
    """Read a `llama_cpp.Llama`. Raises NotShareable if its K/V cannot be shared exactly.

    If its context is empty one token is decoded in it, and removed.
    """
    if llama._ctx.ctx is None:
        raise LlamaEngineError("the Llama is closed")
    _check_parameters(llama)
    paths = [Path(os.fsdecode(llama.model_path))]
    if llama.lora_path:
        paths.append(Path(os.fsdecode(llama.lora_path)))
    _check_files(llama, paths)
    model = LlamaModel.of_loaded(llama._model.model, paths[0])
    reason = model.unshareable_kind()
    if reason is not None:
        raise reason
    if not bindings.llama_get_causal_attn(llama._ctx.ctx):
        raise NotShareable(
            Reason.NOT_CAUSAL, "its attention is not causal, so a prefix has no K/V of its own"
        )
    mover = _open_mover(llama._ctx.ctx)
    if mover.layout.window and not llama.context_params.swa_full:
        raise NotShareable(
            Reason.SLIDING_WINDOW,
            f"its context keeps little more than the model's window of {mover.layout.window} "
            "tokens, and a Llama cuts a sequence without asking whether what is left has a whole "
            "window: construct it with Llama(..., swa_full=True)",
        )
    loras = [LoraAdapter(str(path), llama.lora_scale) for path in paths[1:]]
    return LlamaSource(
        model,
        LlamaKvParams(
            kv_type(llama.context_params.type_k),
            kv_type(llama.context_params.type_v),
            rope_params(llama.context_params),
        ),
        loras,
        [file_digest(path) for path in paths[1:]],
        bindings.llama_n_ctx(llama._ctx.ctx),
        env_int("LLAMA_ATTN_ROT_DISABLE") != 0,
        mover,
    )


def _check_parameters(llama: Any) -> None:
    """Refuse what changes K/V and is not in the fingerprint."""
    given = llama.context_params
    if given.flash_attn_type != bindings.LLAMA_FLASH_ATTN_TYPE_ENABLED:
        raise NotShareable(
            Reason.FLASH_ATTENTION,
            "its flash attention is off, so V lies transposed, and has other last bits: it does "
            "not fit those with flash attention; construct it with "
            "Llama(..., flash_attn=True)",
        )
    if llama.kv_overrides:
        raise NotShareable(
            Reason.OVERRIDES,
            f"it has kv_overrides ({', '.join(llama.kv_overrides)}), which change the model in "
            "ways that its file does not tell: leave them out, or use it without sharing",
        )
    if given.embeddings:
        raise NotShareable(
            Reason.EMBEDDINGS,
            "it is made for embeddings, which no K/V is kept of: use another Llama for them",
        )
    if bindings.llama_supports_gpu_offload() and (
        llama.model_params.n_gpu_layers or given.offload_kqv or given.op_offload
    ):
        raise NotShareable(
            Reason.GPU,
            "this llama.cpp can compute on a GPU, whose K/V differs in its last bits: construct it "
            "with Llama(..., n_gpu_layers=0, offload_kqv=False, op_offload=False)",
        )
    if given.n_seq_max != 1:
        raise NotShareable(
            Reason.SEQUENCE_IDS, f"its context has {given.n_seq_max} sequences; a Llama has one"
        )
    # What Llama's constructor has no argument for: whoever sets it does more than is known here.
    usual = bindings.llama_model_default_params()
    odd = [
        name
        for name in ("use_extra_bufts", "no_host", "no_alloc")
        if getattr(llama.model_params, name) != getattr(usual, name)
    ]
    odd += [name for name in ("ctx_type", "cb_eval", "ctx_other") if getattr(given, name)]
    if odd:
        raise NotShareable(
            Reason.PARAMETERS, f"it has unusual parameters, which may change K/V: {', '.join(odd)}"
        )


def kv_type(number: int) -> str:
    """The name of a K/V type that a context was given. Raises NotShareable for an unknown one."""
    for name, known in KV_TYPES.items():
        if known == number:
            return name
    raise NotShareable(Reason.LAYOUT, f"its type_k or type_v is {number}, which is not known here")


def rope_params(given: Any) -> RopeParams:
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


def _check_files(llama: Any, paths: Sequence[Path]) -> None:
    """Refuse unless the files are those that were loaded.

    The Llama was made before anything here could look at them. But llama.cpp knows when it began
    to load, and a change of a file, or of a link to it, since then has left its ctime behind.
    """
    began_ms = bindings.llama_perf_context(llama._ctx.ctx).t_start_ms
    began = time.time() - (time.clock_gettime(time.CLOCK_MONOTONIC) - began_ms / 1e3)
    try:
        for path in paths:
            for part in model_files(path):
                if _last_change(part) > began - CLOCK_TICK:
                    raise NotShareable(
                        Reason.MODEL_FILE,
                        f"{part} has changed since it was loaded, or just before: nothing tells "
                        "what K/V was computed with; make the Llama anew",
                    )
        # With `verbose` each completion sets llama.cpp's clocks back, that of the beginning too.
        if llama.verbose and llama._sampler is not None:
            raise NotShareable(
                Reason.MODEL_FILE,
                "nothing tells any more when its model was loaded: share it before its first "
                "completion, or construct it with Llama(..., verbose=False)",
            )
    except OSError as error:
        raise NotShareable(
            Reason.MODEL_FILE, f"a file that was loaded cannot be read any more: {error}"
        ) from error


def _last_change(path: Path) -> float:
    """When the file, or a link on the way to it, was changed last: seconds since the epoch."""
    changed = path.stat().st_ctime
    path = path.absolute()
    seen = 0
    while True:
        links = [each for each in (path, *path.parents) if each.is_symlink()]
        if not links:
            return changed
        seen += 1
        if seen > 40:
            raise OSError(f"{path}: too many symbolic links")
        link = links[-1]  # the outermost; what it leads to may lie below further ones
        changed = max(changed, link.lstat().st_ctime)
        path = link.parent / link.readlink() / path.relative_to(link)


def _open_mover(context: int) -> BlockMover:
    memory = bindings.llama_get_memory(context)
    scratch = ScratchSequence(context, memory, SCRATCH, is_narrow=True)
    if native.memory_seq_pos_max(memory, SCRATCH) >= 0:
        raise NotShareable(
            Reason.SEQUENCE_IDS, f"its context has tokens in sequence {SCRATCH}, which kvd needs"
        )
    first = native.memory_seq_pos_min(memory, 0)
    if first < 0:
        batch = Batch(1)
        batch.fill([0], 0, 0, False)
        code = bindings.llama_decode(context, batch.native)
        if code != 0:
            raise LlamaEngineError(f"llama_decode returned {code}: {native.take_errors()}")
    native.memory_seq_cp(memory, 0, SCRATCH, max(first, 0), max(first, 0) + 1)
    layout = read_layout(scratch)
    if first < 0:
        native.memory_seq_rm(memory, 0, -1, -1)
    return BlockMover(scratch, layout, bindings.llama_n_ctx(context))
