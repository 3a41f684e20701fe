"""The engine of a worker: a llama.cpp context that moves blocks of K/V to and from memory.

Covers export and import of blocks, and whether this model and context can share at all. Does not
know of the daemon, of block keys or of leases. Decoding is in context.py, loading and tokens in
model.py, the form of the bytes in state.py.

The scheme: the context has one sequence id more than its user, the scratch id. A block is
exported by giving its tokens to the scratch sequence too (metadata only), writing that sequence's
state straight to its destination, and emptying it again; an import runs the other way round.
Between calls the scratch sequence is empty.

An engine belongs to one thread at a time.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple

import llama_cpp.llama_cpp as bindings

from kvd_client.integrations.llama import native
from kvd_client.integrations.llama.context import LlamaContext
from kvd_client.integrations.llama.errors import (
    ImportFailed,
    LlamaEngineError,
    NotExportable,
    NotShareable,
    Reason,
)
from kvd_client.integrations.llama.model import LlamaModel
from kvd_client.integrations.llama.params import (
    ContextParams,
    LoraAdapter,
    RopeParams,
    kv_type_name,
)
from kvd_client.integrations.llama.state import BlockForm, KvLayout, parse_layout

MAX_SEQUENCES = 255
"""LLAMA_MAX_SEQ is 256, and one id is scratch."""


class BlockAt(NamedTuple):
    """A block's bytes in memory: where, how many, and of how many tokens."""

    address: int
    n_bytes: int
    n_tokens: int


class LlamaEngine(LlamaContext):
    """A context with sequence ids 0 .. n_seq_max-1 for its user.

    `model` may be shared with other engines; with `model_path` the engine loads and owns one.
    `n_ctx` is in tokens, for all sequences together; llama.cpp rounds it up to a multiple of 256
    (attribute `n_ctx`). `n_threads` is by default all CPUs this process may use. `type_k` and
    `type_v` are names or numbers of params.KV_TYPES. Adapters of scale 0 are left out.

    Raises NotShareable if K/V cannot be shared exactly. With `require_shareable=False` that is
    left in `not_shareable`, and only the calls that need sharing raise it (layout, export_block,
    import_blocks, copy_prefix). All is freed if the constructor raises, and by close().
    """

    not_shareable: NotShareable | None

    def __init__(
        self,
        *,
        model_path: str | os.PathLike[str] | None = None,
        model: LlamaModel | None = None,
        n_ctx: int,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_seq_max: int = 8,
        type_k: str | int = "f16",
        type_v: str | int = "f16",
        rope: RopeParams | None = None,
        loras: Sequence[LoraAdapter] = (),
        flash_attn: bool = True,
        kv_unified: bool = True,
        require_shareable: bool = True,
    ) -> None:
        if not 1 <= n_seq_max <= MAX_SEQUENCES:
            raise NotShareable(
                Reason.SEQUENCE_IDS,
                f"n_seq_max must be 1 to {MAX_SEQUENCES}, not {n_seq_max}: llama.cpp has "
                f"{MAX_SEQUENCES + 1} ids in a context, and one is scratch",
            )
        params = ContextParams(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            n_seq_max=n_seq_max,
            type_k=kv_type_name(type_k),
            type_v=kv_type_name(type_v),
            rope=rope or RopeParams(),
            flash_attn=flash_attn,
            kv_unified=kv_unified,
        )
        loras = [adapter for adapter in loras if adapter.scale]
        with contextlib.ExitStack() as resources:
            if model is None:
                if model_path is None:
                    raise ValueError("give a model or a model_path")
                model = resources.enter_context(LlamaModel(model_path))
            elif model_path is not None:
                raise ValueError("give a model or a model_path, not both")
            self.not_shareable = _unshareable_kind(model, loras)
            if self.not_shareable is not None and require_shareable:
                raise self.not_shareable
            super().__init__(model, params, loras, resources)
            if self.not_shareable is None:
                self.not_shareable = self._probe_layout()
                if self.not_shareable is not None and require_shareable:
                    raise self.not_shareable
            self._resources = resources.pop_all()

    def _probe_layout(self) -> NotShareable | None:
        """Decode one token in the scratch sequence, read its state, and empty the context again."""
        if not self._memory or not bindings.llama_get_causal_attn(self._context):
            return NotShareable(
                Reason.NOT_CAUSAL,
                "the model's attention is not causal, so a prefix has no K/V of its own; use it "
                "without sharing",
            )
        self._decode([0], 0, self._scratch, False)
        size = native.state_seq_get_size(self._context, self._scratch)
        state = ctypes.create_string_buffer(size)
        got = native.state_seq_get_data(self._context, state, size, self._scratch)
        native.memory_seq_rm(self._memory, self._scratch, -1, -1)
        if not size or got != size:
            raise LlamaEngineError(f"cannot read the state of a token: {native.take_errors()}")
        try:
            self._layout = parse_layout(state.raw)
        except NotShareable as reason:
            return reason
        self._forms: dict[int, BlockForm] = {}
        return None

    @property
    def layout(self) -> KvLayout:
        """Types and row bytes of each layer's K and V; NotShareable if they cannot be shared."""
        self._check_shareable()
        return self._layout

    def _form(self, n: int) -> BlockForm:
        self._check_shareable()
        form = self._forms.get(n)
        if form is None:
            if not 1 <= n <= self.n_ctx:
                raise ValueError(f"a block has 1 to {self.n_ctx} tokens here, not {n}")
            form = self._forms[n] = BlockForm(self._layout, n)
        return form

    def _check_shareable(self) -> None:
        if self.not_shareable is not None:
            raise self.not_shareable.with_traceback(None)

    def export_block(self, seq: int, start: int, n: int, dst_address: int, capacity: int) -> int:
        """Write the state of tokens [start, start+n) to memory at `dst_address`; returns its bytes.

        That is always layout.state_bytes(n), in the canonical form of state.py; `capacity` must
        be enough (ValueError, nothing written). Cells that lie in another order, as they can where
        sequences come and go, are sorted in the destination, at the cost of another copy. Raises
        NotExportable if the range is not in the sequence as a whole; the memory's content is then
        undefined. The sequence is not changed.
        """
        self._check(seq)
        form = self._form(n)
        size = form.n_bytes
        if size > capacity:
            raise ValueError(f"a block of {n} tokens has {size} bytes, no more than {capacity} fit")
        memory, scratch = self._memory, self._scratch
        end = native.memory_seq_pos_max(memory, seq) + 1
        if not 0 <= start <= end - n:
            raise NotExportable(
                f"sequence {seq} ends at {end}, before tokens {start} .. {start + n - 1}"
            )
        try:
            native.memory_seq_cp(memory, seq, scratch, start, start + n)
            written = native.state_seq_get_data(self._context, dst_address, size, scratch)
        finally:
            native.memory_seq_rm(memory, scratch, -1, -1)
        if written == size:
            header = form.header(dst_address)
            form.canonicalise(header)
            if form.is_canonical(header, start):
                return size
            if form.sort(dst_address, start) and form.is_canonical(header, start):
                return size
        native.take_errors()
        raise NotExportable(
            f"the state of tokens {start} .. {start + n - 1} of sequence {seq} is not {n} cells"
        )

    def import_blocks(self, seq: int, start: int, blocks: Iterable[BlockAt]) -> None:
        """Append blocks to a sequence that ends at `start`, each where the one before it ends.

        Each must be exactly what export_block wrote for its range in a context of the same
        fingerprint. ImportFailed otherwise, and when the context has not enough free cells; the
        sequence then has what it had, the blocks before the one that failed, and nothing else.
        """
        self._check(seq)
        self._check_shareable()
        memory, scratch = self._memory, self._scratch
        end = native.memory_seq_pos_max(memory, seq) + 1
        if end != start:
            raise ImportFailed(f"sequence {seq} ends at {end}, the block begins at {start}")
        try:
            for address, n_bytes, n_tokens in blocks:
                form = self._form(n_tokens)
                if n_bytes != form.n_bytes:
                    raise ImportFailed(
                        f"a block of {n_tokens} tokens has {form.n_bytes} bytes, not {n_bytes}"
                    )
                end = start + n_tokens
                if not form.is_canonical(form.header(address), start):
                    raise ImportFailed(f"the bytes are not a block of tokens {start} .. {end - 1}")
                # This also empties the scratch sequence of the block before.
                if native.state_seq_set_data(self._context, address, n_bytes, scratch) != n_bytes:
                    raise ImportFailed(
                        f"tokens {start} .. {end - 1} of sequence {seq} were not taken: "
                        f"{native.take_errors()}"
                    )
                native.memory_seq_cp(memory, scratch, seq, -1, -1)
                start = end
        finally:
            native.memory_seq_rm(memory, scratch, -1, -1)

    def check_range(self, seq: int, start: int, end: int) -> None:
        """Raise ImportFailed unless the sequence's first position is `start` and its last end-1."""
        self._check(seq)
        first = native.memory_seq_pos_min(self._memory, seq)
        last = native.memory_seq_pos_max(self._memory, seq)
        if (first, last) != ((start, end - 1) if start < end else (-1, -1)):
            raise ImportFailed(
                f"sequence {seq} has positions {first} .. {last} instead of {start} .. {end - 1}"
            )

    def copy_prefix(self, src: int, dst: int, n: int) -> None:
        """Give tokens 0 .. n-1 of `src` to the empty sequence `dst` too; no bytes are copied."""
        self._check(src)
        self._check(dst)
        self._check_shareable()
        if self.length(dst) != 0 or not 0 <= n <= self.length(src):
            raise ValueError(
                f"cannot copy {n} tokens from sequence {src} ({self.length(src)} tokens) to {dst} "
                f"({self.length(dst)} tokens)"
            )
        if n:
            native.memory_seq_cp(self._memory, src, dst, 0, n)

    def close(self) -> None:
        """Free the context, the adapters and a model of its own. Closing twice does nothing."""
        self._context = self._memory = self._n_rows = 0
        self._resources.close()

    def __enter__(self) -> "LlamaEngine":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


def _unshareable_kind(model: LlamaModel, loras: Sequence[LoraAdapter]) -> NotShareable | None:
    """What is known before there is a context."""
    if len(loras) > 1:
        # llama.cpp adds them up in the order of a hash table of pointers.
        return NotShareable(
            Reason.LORA,
            f"{len(loras)} LoRA adapters at once are added in an order that differs between "
            "processes: merge them into one, or use them without sharing",
        )
    return model.unshareable_kind()
