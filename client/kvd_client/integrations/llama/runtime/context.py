"""A llama.cpp context: its creation, decoding for several sequences, logits.

What makes it share blocks is in kv/engine.py, which builds on this class; the parameters are in
params.py, the batch in batch.py.
"""

import contextlib
import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as bindings
import numpy as np
import numpy.typing as npt

from kvd_client.integrations.llama.errors import (
    DecodeFailed,
    LlamaEngineError,
    NotShareable,
    Reason,
)
from kvd_client.integrations.llama.files.model_hash import file_digest
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.batch import Batch
from kvd_client.integrations.llama.runtime.model import LlamaModel, Tokens
from kvd_client.integrations.llama.runtime.params import ContextParams, LoraAdapter, env_int


def not_causal(context: int) -> NotShareable | None:
    """Why no prefix has K/V of its own in a context (a llama_context pointer), if that is so."""
    if bindings.llama_get_memory(context) and bindings.llama_get_causal_attn(context):
        return None
    return NotShareable(
        Reason.NOT_CAUSAL,
        "the model's attention is not causal, so a prefix has no K/V of its own; use it without "
        "sharing",
    )


class LlamaContext:
    """The part of LlamaEngine that computes.

    Registers all that must be freed with `resources`, which its creator closes. The context has
    one sequence id more than `params.n_seq_max`: the last one, `_scratch`, which no caller may
    use.
    """

    def __init__(
        self,
        model: LlamaModel,
        params: ContextParams,
        loras: Sequence[LoraAdapter],
        resources: contextlib.ExitStack,
    ) -> None:
        self.model = model
        self.params = params
        self.loras = tuple(loras)
        self.n_seq_max = params.n_seq_max
        self._scratch = params.n_seq_max
        model.retain()
        resources.callback(model.release)
        # Hashed before they are loaded: what they are called may be another file later.
        self.lora_digests = tuple(file_digest(Path(adapter.path)) for adapter in self.loras)
        adapters = [self._load_adapter(adapter, resources) for adapter in self.loras]
        # llama.cpp reads this variable when it makes the K/V cache, and never again.
        self.attn_rot_disabled = env_int("LLAMA_ATTN_ROT_DISABLE") != 0
        context = bindings.llama_init_from_model(model.pointer, params.to_native())
        if context is None:
            raise LlamaEngineError(f"cannot create a context: {native.take_errors()}")
        resources.callback(bindings.llama_free, context)
        self._context: int = context
        # A model without K/V has none; llama.cpp's memory calls take NULL then.
        self._memory: int = bindings.llama_get_memory(context) or 0
        self.n_ctx: int = bindings.llama_n_ctx(context)
        if adapters:
            count = len(adapters)
            pointers = (ctypes.c_void_p * count)(*adapters)
            scales = (ctypes.c_float * count)(*(adapter.scale for adapter in self.loras))
            native.set_adapters_lora(context, pointers, count, scales)
        self._batch = Batch(bindings.llama_n_batch(context))
        self._n_rows = 0
        self._row_type: Any = ctypes.c_float * model.n_vocab

    def _load_adapter(self, adapter: LoraAdapter, resources: contextlib.ExitStack) -> int:
        pointer = native.adapter_lora_init(self.model.pointer, os.fsencode(adapter.path))
        if pointer is None:
            raise LlamaEngineError(f"cannot load {adapter.path}: {native.take_errors()}")
        resources.callback(native.adapter_lora_free, pointer)
        return int(pointer)

    @property
    def n_batch(self) -> int:
        """Tokens of the largest batch that `decode` takes."""
        return self._batch.capacity

    @property
    def n_vocab(self) -> int:
        """Token ids are 0 .. n_vocab-1."""
        return self.model.n_vocab

    def tokenize(self, text: str) -> Tokens:
        """int32 [n], special tokens recognised; LlamaModel.tokenize has the other ways."""
        return self.model.tokenize(text)

    def detokenize(self, tokens: npt.ArrayLike) -> str:
        """The text of the tokens, without special ones."""
        return self.model.detokenize(tokens)

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return self.model.is_eog(token)

    def length(self, seq: int) -> int:
        """Tokens in the sequence, counted from position 0."""
        self._check(seq)
        return int(native.memory_seq_pos_max(self._memory, seq)) + 1

    def decode(
        self,
        tokens: npt.ArrayLike,
        positions: npt.ArrayLike,
        seq_ids: npt.ArrayLike,
        logits_flags: npt.ArrayLike,
    ) -> None:
        """Decode one batch of 1 to n_batch tokens, of any sequences.

        All four are [n], or a scalar that holds for all n tokens; `tokens` is int32 [n].
        Positions of a sequence follow its last one without a gap. Logits are kept for the rows
        whose flag is true, until the next decode. Raises DecodeFailed, whose docstring says what
        is left in the context.
        """
        ids = np.asarray(seq_ids)
        if ids.size:
            self._check(int(ids.min()))
            self._check(int(ids.max()))
        self._decode(tokens, positions, ids, logits_flags)

    def _decode(
        self,
        tokens: npt.ArrayLike,
        positions: npt.ArrayLike,
        seq_ids: npt.ArrayLike,
        logits_flags: npt.ArrayLike,
    ) -> None:
        self._n_rows = 0
        self._batch.fill(tokens, positions, seq_ids, logits_flags)
        code = bindings.llama_decode(self._context, self._batch.native)
        if code != 0:
            raise DecodeFailed(code, native.take_errors())
        self._n_rows = len(self._batch)

    def prefill(self, seq: int, tokens: Tokens, start_pos: int, logits_last: bool = True) -> None:
        """Append tokens (int32 [n], n >= 1) to a sequence that ends at `start_pos`.

        They are decoded in pieces of n_batch. With `logits_last` the last token's logits are at
        row -1. If a piece fails (DecodeFailed), the pieces before it are taken out again, so the
        sequence ends at `start_pos` as before; if the cache of a sliding window no longer has what
        the next token sees there, the whole sequence is, and the error says so.
        """
        n = len(tokens)
        if n == 0:
            raise ValueError("no tokens to prefill")
        if start_pos != self.length(seq):
            raise ValueError(f"sequence {seq} ends at {self.length(seq)}, not at {start_pos}")
        try:
            for first in range(0, n, self.n_batch):
                piece = tokens[first : first + self.n_batch]
                flags = np.zeros(len(piece), dtype=np.int8)
                flags[-1] = logits_last and first + len(piece) == n
                begin = start_pos + first
                self._decode(
                    piece, np.arange(begin, begin + len(piece), dtype=np.int32), seq, flags
                )
        except DecodeFailed as error:
            native.memory_seq_rm(self._memory, seq, start_pos, -1)
            if start_pos and not self._has_window(seq, start_pos):
                native.memory_seq_rm(self._memory, seq, -1, -1)
                raise DecodeFailed(
                    error.code, f"{error.detail}; the sequence is emptied, its window was lost"
                ) from error
            raise

    def logits(self, row: int = -1) -> npt.NDArray[np.float32]:
        """A copy of one row's logits, float32 [n_vocab]; `row` counts the last batch's tokens.

        IndexError for a row that is not in the last batch or had no flag.
        """
        return self._logits_view(row).copy()

    def argmax(self, row: int = -1) -> int:
        """The most likely token at that row (the first of equals), as `logits` counts rows."""
        return int(self._logits_view(row).argmax())

    def _logits_view(self, row: int) -> npt.NDArray[np.float32]:
        index = row + self._n_rows if row < 0 else row
        if not 0 <= index < self._n_rows or not self._batch.has_logits(index):
            raise IndexError(f"row {row} of a batch of {self._n_rows} tokens has no logits")
        address = native.get_logits_ith(self._context, index)
        if not address:
            raise LlamaEngineError(f"no logits for row {row}: {native.take_errors()}")
        view: npt.NDArray[np.float32] = np.frombuffer(
            self._row_type.from_address(address), dtype=np.float32
        )
        return view

    def truncate(self, seq: int, pos: int) -> None:
        """Remove the tokens from position `pos` on.

        LlamaEngineError if the model cannot, or if the cache of a sliding window no longer has what
        the next token sees there (nothing is removed then).
        """
        self._check(seq)
        if pos < 0:
            raise ValueError(f"a position is not negative: {pos}")
        if 0 < pos < self.length(seq) and not self._has_window(seq, pos):
            raise LlamaEngineError(
                f"sequence {seq} cannot be cut at {pos}: the cells before it have left the cache "
                f"of the window of {self.model.window} tokens; clear it instead"
            )
        if not native.memory_seq_rm(self._memory, seq, pos, -1):
            raise LlamaEngineError(f"sequence {seq} cannot be cut at {pos}: clear it instead")

    def _has_window(self, seq: int, pos: int) -> bool:
        """Whether all is there that a token at `pos` sees, in the layers with a window."""
        window = self.model.window
        kept = native.memory_seq_pos_min(self._memory, seq)
        return not window or 0 <= kept <= max(0, pos - window + 1)

    def clear(self, seq: int) -> None:
        """Remove all tokens of the sequence."""
        self._check(seq)
        if not native.memory_seq_rm(self._memory, seq, -1, -1):
            raise LlamaEngineError(f"sequence {seq} cannot be cleared: {native.take_errors()}")

    def _check(self, seq: int) -> None:
        # llama.cpp ends the process on an id it does not have.
        if not self._context:
            raise LlamaEngineError("the engine is closed")
        if not 0 <= seq < self.n_seq_max:
            raise ValueError(f"a sequence id is 0 .. {self.n_seq_max - 1}, not {seq}")
