"""A loaded model and its vocabulary. The context that computes with it is in kv/engine.py.

Models are loaded for the CPU: K/V computed on a GPU differs in its last bits, so it must not be
mixed with what other workers computed, and nothing here is tested on one.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import llama_cpp.llama_cpp as bindings
import numpy as np
import numpy.typing as npt

from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable, Reason
from kvd_client.integrations.llama.files.architectures import CHUNKED_WINDOWS
from kvd_client.integrations.llama.files.model_hash import (
    FileStamp,
    file_stamp,
    model_digest,
    model_files,
)
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.params import LoraAdapter

Tokens = npt.NDArray[np.int32]

M_ROPE_TYPES = (bindings.LLAMA_ROPE_TYPE_MROPE, bindings.LLAMA_ROPE_TYPE_IMROPE)
"""Those of models whose cells have positions of more dimensions."""


class LlamaModel:
    """The weights of one GGUF file (or of all parts of a split one).

    Several engines of one process may share it; it can be closed when none of them is open. Reading
    (tokenize, detokenize) is safe from several threads, closing is not.
    """

    _is_owned = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._stamps = _stamps(self.path)
        params = bindings.llama_model_default_params()
        params.n_gpu_layers = 0
        pointer = bindings.llama_model_load_from_file(os.fsencode(self.path), params)
        if pointer is None:
            raise LlamaEngineError(f"cannot load the model {self.path}: {native.take_errors()}")
        self._take(pointer)

    @classmethod
    def of_loaded(cls, pointer: int, path: str | os.PathLike[str]) -> Self:
        """A model that somebody else has loaded and will free, from what `path` still is.

        Valid as long as that model is; closing it here does nothing.
        """
        model = cls.__new__(cls)
        model._is_owned = False
        model.path = Path(path)
        model._stamps = _stamps(model.path)
        model._take(pointer)
        return model

    def _take(self, pointer: int) -> None:
        self._pointer = pointer
        self._engines = 0
        self.n_vocab: int = bindings.llama_vocab_n_tokens(self._vocab)
        self.bos: int = bindings.llama_vocab_bos(self._vocab)
        self.eos: int = bindings.llama_vocab_eos(self._vocab)

    @property
    def pointer(self) -> int:
        """llama.cpp's own pointer; LlamaEngineError if the model is closed."""
        if not self._pointer:
            raise LlamaEngineError("the model is closed")
        return self._pointer

    @property
    def _vocab(self) -> int:
        return int(bindings.llama_model_get_vocab(self.pointer))

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation (end of text, of turn, ...)."""
        return bool(bindings.llama_vocab_is_eog(self._vocab, token))

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a conversation, or None."""
        template = bindings.llama_model_chat_template(self.pointer, None)
        return None if template is None else template.decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        """How the vocabulary writes a token; empty for -1, which stands for one it has not."""
        if token < 0:
            return ""
        text = bindings.llama_vocab_get_text(self._vocab, token)
        return bytes(text or b"").decode("utf-8", "replace")

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> Tokens:
        """int32 [n]; with the begin token if the model wants one, special tokens recognised."""
        raw = text.encode("utf-8")
        tokens = np.empty(len(raw) + 8, dtype=np.int32)
        count = self._tokenize(raw, tokens, add_special, parse_special)
        if count < 0:
            tokens = np.empty(-count, dtype=np.int32)
            count = self._tokenize(raw, tokens, add_special, parse_special)
        if count < 0:
            raise LlamaEngineError(f"cannot tokenize the text: {native.take_errors()}")
        return tokens[:count].copy()

    def _tokenize(self, raw: bytes, tokens: Tokens, add_special: bool, parse_special: bool) -> int:
        return int(
            native.tokenize(
                self._vocab,
                raw,
                len(raw),
                tokens.ctypes.data,
                len(tokens),
                add_special,
                parse_special,
            )
        )

    def detokenize(self, tokens: npt.ArrayLike, *, special: bool = False) -> str:
        """The text of the tokens, special ones shown only if asked; broken UTF-8 becomes U+FFFD."""
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n_vocab:
            raise ValueError(f"a token id is not in 0 .. {self.n_vocab - 1}")
        buffer = ctypes.create_string_buffer(16 * len(ids) + 16)
        count = self._detokenize(ids, buffer, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._detokenize(ids, buffer, special)
        return buffer.raw[:count].decode("utf-8", "replace")

    def _detokenize(self, ids: Tokens, buffer: "ctypes.Array[ctypes.c_char]", special: bool) -> int:
        return int(
            native.detokenize(
                self._vocab,
                ids.ctypes.data,
                len(ids),
                ctypes.addressof(buffer),
                len(buffer),
                False,
                special,
            )
        )

    def metadata(self, key: str) -> str | None:
        """A scalar metadata value of the file as text, or None."""
        buffer = ctypes.create_string_buffer(256)
        length = bindings.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    @property
    def rope_original_context(self) -> int:
        """Above this context length llama.cpp takes the long RoPE factors, if there are any."""
        arch = self.metadata("general.architecture")
        value = self.metadata(f"{arch}.rope.scaling.original_context_length")
        return int(value or self.metadata(f"{arch}.context_length") or 0)

    @property
    def window(self) -> int:
        """How many tokens the layers with a sliding window see, themselves among them; 0: none.
        Some files speak of a window that llama.cpp does not use."""
        return int(bindings.llama_model_n_swa(self.pointer))

    def content_digest(self) -> bytes:
        """model_digest of the weights that were loaded: one to two seconds a GB if not cached.

        LlamaEngineError if a file is not the one that was loaded any more.
        """
        try:
            digest = model_digest(self.path)
            unchanged = _stamps(self.path) == self._stamps
        except OSError as error:
            raise LlamaEngineError(f"the model cannot be read any more: {error}") from error
        if not unchanged:
            raise LlamaEngineError(f"{self.path} has changed since it was loaded: load it again")
        return digest

    def unshareable_kind(self, loras: Sequence[LoraAdapter] = ()) -> NotShareable | None:
        """What in the model's kind, or in the adapters applied to it, rules out exact sharing of
        single blocks, or None."""
        if len(loras) > 1:
            # llama.cpp adds them up in the order of a hash table of pointers.
            return NotShareable(
                Reason.LORA,
                f"{len(loras)} LoRA adapters at once are added in an order that differs between "
                "processes: merge them into one, or use them without sharing",
            )
        if bindings.llama_model_is_recurrent(self.pointer) or bindings.llama_model_is_hybrid(
            self.pointer
        ):
            return NotShareable(
                Reason.RECURRENT,
                "the model is recurrent or hybrid: its state has a constant size and cannot be cut "
                "into blocks; use it without sharing",
            )
        if bindings.llama_model_has_encoder(self.pointer) or bindings.llama_model_is_diffusion(
            self.pointer
        ):
            return NotShareable(
                Reason.ENCODER,
                "the model has an encoder or is a diffusion model: K/V of a token depends on what "
                "follows it; use it without sharing",
            )
        if self.window and self.metadata("general.architecture") in CHUNKED_WINDOWS:
            # Each chunk would have to be tried at its end, 8,192 tokens on, before it is trusted.
            return NotShareable(
                Reason.SLIDING_WINDOW,
                f"the model's window of {self.window} tokens is chunked, which is not tried with "
                "kvd; use it without sharing",
            )
        if bindings.llama_model_rope_type(self.pointer) == bindings.LLAMA_ROPE_TYPE_VISION:
            return NotShareable(
                Reason.M_ROPE,
                "the model's positions are those of images; use it without sharing",
            )
        return None

    def close(self) -> None:
        """Free the weights; refused while an engine uses them. Closing twice does nothing."""
        if self._engines:
            raise LlamaEngineError(f"{self._engines} engines still use the model: close them first")
        if self._pointer and self._is_owned:
            bindings.llama_model_free(self._pointer)
        self._pointer = 0

    def retain(self) -> None:
        """An engine starts to use the model."""
        self._engines += 1

    def release(self) -> None:
        """An engine no longer uses the model."""
        self._engines -= 1

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


def _stamps(path: Path) -> tuple[FileStamp, ...]:
    return tuple(file_stamp(part) for part in model_files(path))
