"""Watches what is done to the context of a Llama, so that no token is taken for known that is not.

Everything in llama_cpp that changes a context goes through methods of `Llama._ctx`, but for what
decodes embeddings, which begins with an empty context or goes on from `n_tokens`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from kvd_client.integrations.llama.attached.hooks import Hooks
from kvd_client.integrations.llama.attached.known import KnownTokens

_SEQ = 0


class ContextWatch:
    """Replaces methods of `context` (`llama_cpp._internals.LlamaContext`) until its end; cuts
    `known` where they change what the context has."""

    def __init__(self, context: Any, known: KnownTokens) -> None:
        self._context = context
        self._known = known
        self._evaluates = False
        self.is_shifted = False
        """Whether the next decode turns the keys of all cells: also of those that come before."""
        self._hooks = Hooks(
            context,
            {
                "decode": self._decode,
                "encode": self._encode,
                "kv_cache_clear": self._kv_cache_clear,
                "kv_cache_seq_rm": self._kv_cache_seq_rm,
                "kv_cache_seq_cp": self._kv_cache_seq_cp,
                "kv_cache_seq_keep": self._kv_cache_seq_keep,
                "kv_cache_seq_shift": self._kv_cache_seq_shift,
            },
        )

    def end(self) -> None:
        """Let the context be as it was."""
        self._hooks.remove(self._context)

    @contextlib.contextmanager
    def of_known_tokens(self) -> Iterator[None]:
        """What is decoded meanwhile is known to whoever decodes."""
        self._evaluates = True
        try:
            yield
        finally:
            self._evaluates = False

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._hooks.call(self._context, name, *arguments)

    def _decode(self, batch: Any) -> None:
        if not self._evaluates:
            self._known.cut(0)
        self._call("decode", batch)
        self.is_shifted = False

    def _encode(self, batch: Any) -> None:
        self._known.cut(0)
        self._call("encode", batch)

    def _kv_cache_clear(self) -> None:
        self._known.cut(0)
        self._call("kv_cache_clear")

    def _kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> Any:
        if seq_id <= _SEQ:  # LlamaContext takes a negative one for the first
            self._known.cut(p0)
        return self._call("kv_cache_seq_rm", seq_id, p0, p1)

    def _kv_cache_seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
        if seq_id_dst == _SEQ:
            self._known.cut(0)
        self._call("kv_cache_seq_cp", seq_id_src, seq_id_dst, p0, p1)

    def _kv_cache_seq_keep(self, seq_id: int) -> None:
        if seq_id != _SEQ:
            self._known.cut(0)
        self._call("kv_cache_seq_keep", seq_id)

    def _kv_cache_seq_shift(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        # All of it: quantised keys are rounded anew when others are turned.
        self._known.cut(0)
        self.is_shifted = True
        self._call("kv_cache_seq_shift", seq_id, p0, p1, shift)
