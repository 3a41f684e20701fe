"""Moves blocks of K/V between a llama.cpp context and memory, whoever has made the context.

Covers export and import of blocks, and reading the layout of a context's rows. Does not know of the
daemon, nor what may share with what. The form of the bytes is in state.py.

The scheme: one sequence id of the context is the scratch id, which nobody else uses. A block is
exported by giving its tokens to the scratch sequence too (metadata only), writing that sequence's
state straight to its destination, and emptying it again; an import runs the other way round.
Between calls the scratch sequence is empty.

The scratch id may be one more than the context was made for (n_seq_max): a context with one stream
has cells for all LLAMA_MAX_SEQ ids, and only llama_decode refuses the others. Such a state
comes without the ids of its cells (state.py, `narrow`), and is widened where it lies.

Of a model with a sliding window llama.cpp keeps the layers that have one in a second cache, and may
give cells there that nobody sees any more to other tokens: always without `swa_full`, whose cache
has room for the window alone, and now and then with it. So a block can be exported only as
long as the window cache has all of it, and a sequence can be continued from where all is there that
its next token sees; an import of a whole sequence ends like that. Both are checked here.

A mover belongs to the thread that uses its context.
"""

import ctypes
from collections.abc import Iterable
from typing import NamedTuple

import llama_cpp.llama_cpp as bindings

from kvd_client.integrations.llama.errors import (
    ImportFailed,
    LlamaEngineError,
    NotExportable,
)
from kvd_client.integrations.llama.kv.state import (
    BlockForm,
    KvLayout,
    parse_layout,
)
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.model import M_ROPE_TYPES


class BlockAt(NamedTuple):
    """A block's bytes in memory: where, how many, and of how many tokens."""

    address: int
    n_bytes: int
    n_tokens: int


class ScratchSequence(NamedTuple):
    """A context and the sequence id in it that is scratch; valid as long as the context is.

    `is_narrow`: the id is not below the context's n_seq_max.
    """

    context: int
    memory: int
    seq: int
    is_narrow: bool


def read_layout(scratch: ScratchSequence) -> KvLayout:
    """The layout, from the one token that the scratch sequence has, which it loses here.

    Raises NotShareable if blocks of this context cannot be shared.
    """
    size = native.state_seq_get_size(scratch.context, scratch.seq)
    state = ctypes.create_string_buffer(size)
    got = native.state_seq_get_data(scratch.context, state, size, scratch.seq)
    native.memory_seq_rm(scratch.memory, scratch.seq, -1, -1)
    if not size or got != size:
        raise LlamaEngineError(f"cannot read the state of a token: {native.take_errors()}")
    model = bindings.llama_get_model(scratch.context)
    window = bindings.llama_model_n_swa(model)
    m_rope = bindings.llama_model_rope_type(model) in M_ROPE_TYPES
    return parse_layout(state.raw, window, m_rope=m_rope, is_narrow=scratch.is_narrow)


class BlockMover:
    """Moves blocks of `layout` through `scratch`; a block has 1 to `n_ctx` tokens, and no more than
    a window has."""

    def __init__(self, scratch: ScratchSequence, layout: KvLayout, n_ctx: int) -> None:
        self.scratch = scratch
        self.layout = layout
        self._max_tokens = min(n_ctx, layout.window or n_ctx)
        self._forms: dict[int, BlockForm] = {}

    def _form(self, n: int) -> BlockForm:
        form = self._forms.get(n)
        if form is None:
            if not 1 <= n <= self._max_tokens:
                raise ValueError(f"a block has 1 to {self._max_tokens} tokens here, not {n}")
            form = self._forms[n] = BlockForm(self.layout, n)
        return form

    def export_block(self, seq: int, start: int, n: int, dst_address: int, capacity: int) -> int:
        """Write the state of tokens [start, start+n) to memory at `dst_address`; returns its bytes.

        That is always layout.state_bytes(n), in the canonical form of state.py; `capacity` must
        be enough (ValueError, nothing written). Cells that lie in another order, as they can where
        sequences come and go, are sorted in the destination, at the cost of another copy. Raises
        NotExportable if the range is not in the sequence as a whole, no longer in the window's
        cache, or, with M-RoPE, not text alone; the memory's content is then undefined. The sequence
        is not changed.
        """
        form = self._form(n)
        size = form.n_bytes
        if size > capacity:
            raise ValueError(f"a block of {n} tokens has {size} bytes, no more than {capacity} fit")
        context, memory, scratch, is_narrow = self.scratch
        end = native.memory_seq_pos_max(memory, seq) + 1
        if not 0 <= start <= end - n:
            raise NotExportable(
                f"sequence {seq} ends at {end}, before tokens {start} .. {start + n - 1}"
            )
        kept = native.memory_seq_pos_min(memory, seq)
        if kept > start:
            raise NotExportable(
                f"tokens {start} .. {start + n - 1} of sequence {seq} are no longer in the cache "
                f"of the window, which begins at {kept}: export them earlier, or create the "
                "context with swa_full=True"
            )
        # The last rows of a narrow state land where they belong, and its header before them.
        missing = form.narrow_bytes if is_narrow else 0
        try:
            native.memory_seq_cp(memory, seq, scratch, start, start + n)
            written = native.state_seq_get_data(
                context, dst_address + missing, size - missing, scratch
            )
        finally:
            native.memory_seq_rm(memory, scratch, -1, -1)
        if written == size - missing:
            if is_narrow and not form.widen(dst_address):
                raise NotExportable(
                    f"llama.cpp wrote the state of sequence {scratch}, an id beyond those the "
                    "context was made for, in a form that is not known"
                )
            if form.canonicalise(dst_address, start):
                return size
        native.take_errors()
        raise NotExportable(
            f"the state of tokens {start} .. {start + n - 1} of sequence {seq} is not {n} cells of "
            "text"
        )

    def import_blocks(self, seq: int, start: int, blocks: Iterable[BlockAt]) -> None:
        """Append blocks to a sequence that ends at `start`, each where the one before it ends.

        Each must be exactly what export_block wrote for its range in a context of the same
        fingerprint. ImportFailed otherwise, and when the context has not enough free cells; the
        sequence then has what it had, the blocks before the one that failed, and nothing else. (A
        window's cache may have dropped what nobody sees any more, as when tokens are decoded.)
        """
        context, memory, scratch, _ = self.scratch
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
                if not form.is_canonical(address, start):
                    raise ImportFailed(f"the bytes are not a block of tokens {start} .. {end - 1}")
                # This also empties the scratch sequence of the block before.
                if native.state_seq_set_data(context, address, n_bytes, scratch) != n_bytes:
                    raise ImportFailed(
                        f"tokens {start} .. {end - 1} of sequence {seq} were not taken: "
                        f"{native.take_errors()}"
                    )
                native.memory_seq_cp(memory, scratch, seq, -1, -1)
                start = end
        finally:
            native.memory_seq_rm(memory, scratch, -1, -1)

    def check_range(self, seq: int, start: int, end: int) -> None:
        """Raise ImportFailed unless the sequence has positions `start` to end-1: its last one is
        end-1 and its first one `start`, or, in a window's cache, one from which on all is there
        that a token at `end` sees."""
        memory = self.scratch.memory
        first = native.memory_seq_pos_min(memory, seq)
        last = native.memory_seq_pos_max(memory, seq)
        expected = (start, end - 1) if start < end else (-1, -1)
        if self.layout.window and start < first <= self.layout.first_seen(end):
            expected = (first, end - 1)
        if (first, last) != expected:
            raise ImportFailed(
                f"sequence {seq} has positions {first} .. {last} instead of {start} .. {end - 1}"
            )

    def copy_prefix(self, src: int, dst: int, n: int) -> None:
        """Give tokens 0 .. n-1 of `src` to the empty sequence `dst` too; no bytes are copied.

        NotExportable, and nothing is done, if a window's cache has no longer all that the token
        after them sees.
        """
        memory = self.scratch.memory
        src_end = native.memory_seq_pos_max(memory, src) + 1
        dst_end = native.memory_seq_pos_max(memory, dst) + 1
        if dst_end != 0 or not 0 <= n <= src_end:
            raise ValueError(
                f"cannot copy {n} tokens from sequence {src} ({src_end} tokens) to {dst} "
                f"({dst_end} tokens)"
            )
        kept = native.memory_seq_pos_min(memory, src)
        if n and kept > self.layout.first_seen(n):
            raise NotExportable(
                f"sequence {src} cannot be copied up to {n}: the cache of the window begins at "
                f"{kept}, and the next token sees {self.layout.first_seen(n)} and what follows"
            )
        if n:
            native.memory_seq_cp(memory, src, dst, 0, n)
