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
from typing import Any

import llama_cpp.llama_cpp as bindings

from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable, Reason
from kvd_client.integrations.llama.files.model_hash import file_digest, model_files
from kvd_client.integrations.llama.kv.given import GivenParams, read_given
from kvd_client.integrations.llama.kv.mover import BlockMover, ScratchSequence, read_layout
from kvd_client.integrations.llama.kv.state import V_TRANS, KvLayout
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.batch import Batch
from kvd_client.integrations.llama.runtime.context import not_causal
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.runtime.params import LoraAdapter, env_int

SCRATCH: int = bindings.llama_max_parallel_sequences() - 1
"""The last of llama.cpp's sequence ids (LLAMA_MAX_SEQ), of which a Llama uses the first."""

CLOCK_TICK = time.clock_getres(5)  # CLOCK_REALTIME_COARSE, which Python has no name for
"""Seconds by which a file's ctime may lie before the moment of the change."""


@dataclass(frozen=True)
class LlamaSource:
    """A KvSource (kv/fingerprint.py), and what moves its blocks; valid until the Llama is
    closed."""

    model: LlamaModel
    params: GivenParams
    loras: Sequence[LoraAdapter]
    lora_digests: Sequence[bytes]
    n_ctx: int
    attn_rot_disabled: bool
    mover: BlockMover
    v_trans: int = V_TRANS
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
    params = read_given(llama.model_params, llama.context_params)
    _check_context(llama)
    paths = [Path(os.fsdecode(llama.model_path))]
    if llama.lora_path:
        paths.append(Path(os.fsdecode(llama.lora_path)))
    _check_files(llama, paths)
    model = LlamaModel.of_loaded(llama._model.model, paths[0])
    reason = model.unshareable_kind() or not_causal(llama._ctx.ctx)
    if reason is not None:
        raise reason
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
        params,
        loras,
        [file_digest(path) for path in paths[1:]],
        bindings.llama_n_ctx(llama._ctx.ctx),
        env_int("LLAMA_ATTN_ROT_DISABLE") != 0,
        mover,
    )


def _check_context(llama: Any) -> None:
    given = llama.context_params
    if given.flash_attn_type != bindings.LLAMA_FLASH_ATTN_TYPE_ENABLED:
        raise NotShareable(
            Reason.FLASH_ATTENTION,
            "its flash attention is off, so V lies transposed, and has other last bits: it does "
            "not fit those with flash attention; construct it with "
            "Llama(..., flash_attn=True)",
        )
    if given.n_seq_max != 1:
        raise NotShareable(
            Reason.SEQUENCE_IDS, f"its context has {given.n_seq_max} sequences; a Llama has one"
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
