"""A llama.cpp context that somebody else has made: how its K/V is shared all the same.

Covers what must be known of it: the form of its states (kv/blobs.py), and all that its fingerprint
is made of, which equals that of a LlamaEngine with the same model and parameters. Does not cover
moving its states, which its owner does, with llama.cpp's own calls.

What counts is what llama.cpp was given, so the owner hands over llama.cpp's own structures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import llama_cpp.llama_cpp as bindings
import numpy as np

from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable, Reason
from kvd_client.integrations.llama.files.model_hash import (
    FileStamp,
    file_digest,
    file_stamp,
    model_files,
)
from kvd_client.integrations.llama.kv.blobs import StateForm, parse_form
from kvd_client.integrations.llama.kv.given import read_given
from kvd_client.integrations.llama.kv.state import KvLayout
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.batch import Batch
from kvd_client.integrations.llama.runtime.context import not_causal
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.runtime.params import LoraAdapter, env_int


class Before(NamedTuple):
    """What can only be known for certain before the model is loaded and the context is made."""

    stamps: tuple[FileStamp, ...]
    loras: tuple[LoraAdapter, ...]
    lora_digests: tuple[bytes, ...]
    attn_rot_disabled: bool

    @classmethod
    def now(cls, path: Path, loras: Sequence[LoraAdapter]) -> "Before":
        """Look at the files that are about to be loaded. OSError if one is not there."""
        applied = tuple(adapter for adapter in loras if adapter.scale)
        return cls(
            tuple(file_stamp(part) for part in model_files(path)),
            applied,
            tuple(file_digest(Path(adapter.path)) for adapter in applied),
            env_int("LLAMA_ATTN_ROT_DISABLE") != 0,
        )


class ForeignContext:
    """A model and a context, empty and not in use by another thread while this is made.

    `model_params` and `context_params` are what llama.cpp was given for them. Raises NotShareable,
    with what to change, if the K/V cannot be shared exactly.
    """

    not_shareable: NotShareable | None = None

    def __init__(
        self,
        path: Path,
        model: int,
        model_params: "bindings.llama_model_params",
        context: int,
        context_params: "bindings.llama_context_params",
        before: Before,
    ) -> None:
        self.model = LlamaModel.of_loaded(model, path)
        self.loras = before.loras
        self.lora_digests = before.lora_digests
        self.attn_rot_disabled = before.attn_rot_disabled
        self.n_ctx: int = bindings.llama_n_ctx(context)
        self.params = read_given(model_params, context_params)
        _refuse(self.model, context, context_params, before)
        self.form: StateForm = _probe(self.model, context)

    @property
    def layout(self) -> KvLayout:
        """Types and row bytes of each layer's K and V."""
        return self.form.layout

    @property
    def v_trans(self) -> int:
        """See KvSource."""
        return int(self.form.v_trans)


def _refuse(
    model: LlamaModel,
    context: int,
    context_params: "bindings.llama_context_params",
    before: Before,
) -> None:
    """Raise NotShareable for what blocks cannot be made of."""
    unshareable = model.unshareable_kind(before.loras)
    if unshareable is not None:
        raise unshareable
    if tuple(file_stamp(part) for part in model_files(model.path)) != before.stamps:
        raise NotShareable(
            Reason.MODEL_FILE, f"{model.path} has changed since it was loaded: start anew"
        )
    if not context_params.kv_unified:
        raise NotShareable(
            Reason.STREAMS, "the context has a stream for each sequence: set kv_unified to true"
        )
    unshareable = not_causal(context)
    if unshareable is not None:
        raise unshareable


def _probe(model: LlamaModel, context: int) -> StateForm:
    """Decode two tokens, one after the other, read their state, and empty the context again."""
    memory = bindings.llama_get_memory(context)
    tokens = np.array([0, 0], np.int32)
    batch = Batch(1)  # llama.cpp ends the process if there are more than the context's n_batch
    try:
        for position, token in enumerate(tokens):
            batch.fill([token], position, 0, False)
            code = bindings.llama_decode(context, batch.native)
            if code:
                raise LlamaEngineError(f"cannot decode two tokens: llama_decode returned {code}")
        state = np.empty(native.state_seq_get_size(context, 0), np.uint8)
        got = native.state_seq_get_data(context, state.ctypes.data, state.size, 0)
    finally:
        bindings.llama_memory_clear(memory, True)
    if not got or got != state.size:
        raise LlamaEngineError("cannot read the state of two tokens")
    try:
        return parse_form(state.tobytes(), tokens)
    except NotShareable:
        if not model.window:
            raise
        raise NotShareable(
            Reason.SLIDING_WINDOW,
            f"the model has a sliding window of {model.window} tokens: the state of a whole "
            "sequence has no cells of those before it; share it by a LlamaWorker, or use it "
            "without sharing",
        ) from None
