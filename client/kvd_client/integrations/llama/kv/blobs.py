"""States of whole sequences, cut into blocks and put together from them; no llama.cpp here.

`llama_state_seq_get_data` gives a sequence as a whole, in the order of cells in the context; kvd
keeps blocks in the canonical form of state.py. This module moves the bytes between the two, once:
straight from the state to where the block is to be, and straight from the blocks into one state.

A state may have what a block has not, v_trans = 1: without flash attention V of a layer is
[element][cell] instead of rows, and begins with

    i32 ggml type | u32 element bytes | u32 elements of a row

Elements are only moved, so a block from it is exact. Quantised V has no such form: there an element
is no whole number of bytes. Of models with a sliding window nothing is made here: the state of a
whole sequence has not all cells of their layers.

Bytes may come from anywhere: whatever is not as it must be raises BadState, and no block is made
of it. Rows themselves have no wrong values.
"""

import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable, Reason
from kvd_client.integrations.llama.kv.state import MAGIC, N_STREAM, KvLayout, KvRow

Bytes = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int32]

_HEAD_WORDS = 4
_TAIL_WORDS = 2
_ROW_HEADER = struct.Struct("<iQ")
_COLUMN_HEADER = struct.Struct("<iII")
_HEADER_BYTES = _ROW_HEADER.size
assert _COLUMN_HEADER.size == _HEADER_BYTES

_ELEMENT_BYTES = {0: 4, 1: 2, 30: 2}
"""ggml type number -> bytes of an element, of those types that V can have transposed: f32, f16,
bf16."""


class BadState(LlamaEngineError):
    """The bytes are not what they should be: not the state of a sequence of positions 0 .. n-1 in
    the expected form, or not the block of the expected positions. The message says where."""


class StateForm(NamedTuple):
    """What a context writes of a sequence: the rows of each layer, and in which form."""

    layout: KvLayout
    v_trans: bool = False

    def n_bytes(self, n_tokens: int) -> int:
        """The exact size of the state of so many tokens (at least 1), transposed or not."""
        return self.layout.state_bytes(n_tokens)


class Block(NamedTuple):
    """The payload of a block in the canonical form (uint8, contiguous), and its tokens."""

    payload: Bytes
    n_tokens: int


class _Map:
    """Where everything lies in a state of `n` cells, and the headers before its rows."""

    def __init__(self, form: StateForm, n: int) -> None:
        self.form = form
        self.n = n
        self.n_bytes = form.n_bytes(n)
        self.cell_words = form.layout.cell_words
        self.n_words = _HEAD_WORDS + n * self.cell_words + _TAIL_WORDS
        layers = form.layout.layers
        self.row_bytes = [row.k_row_bytes for row in layers]
        self.row_bytes += [row.v_row_bytes for row in layers]
        headers = [_ROW_HEADER.pack(row.k_type, row.k_row_bytes) for row in layers]
        headers += [_v_header(row, form.v_trans) for row in layers]
        self.offsets: list[int] = []
        """Of the first row of each layer's K, then of each layer's V."""
        offset = 4 * self.n_words
        for size in self.row_bytes:
            offset += _HEADER_BYTES
            self.offsets.append(offset)
            offset += n * size
        starts = np.array(self.offsets, np.int64) - _HEADER_BYTES
        self._header_places = starts[:, None] + np.arange(_HEADER_BYTES)
        self._headers = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _HEADER_BYTES)
        self._first_words = np.array([MAGIC, 0, N_STREAM, n], np.uint32).view(np.int32)

    def words_of(self, state: Bytes) -> npt.NDArray[np.int32]:
        return state[: 4 * self.n_words].view(np.int32)

    def write_headers(self, state: Bytes, start: int, tokens: Tokens) -> None:
        """All but the rows, for `tokens` at positions start .. start+n-1."""
        words = self.words_of(state)
        words[:_HEAD_WORDS] = self._first_words
        words[-_TAIL_WORDS:] = (self.form.v_trans, len(self.form.layout.layers))
        cells = words[_HEAD_WORDS:-_TAIL_WORDS].reshape(self.n, self.cell_words)
        cells[:, 0] = np.arange(start, start + self.n, dtype=np.int32)
        cells[:, 1] = 1
        cells[:, -1] = 0
        if self.form.layout.m_rope:
            cells[:, 2] = cells[:, 3] = cells[:, 0]
            cells[:, 4] = tokens
        state[self._header_places] = self._headers

    def order_of(self, state: Bytes, start: int, tokens: Tokens) -> npt.NDArray[np.intp]:
        """Which cell has position start, start+1, ...; the headers of `state`, whose size is right,
        are checked. `tokens` are those of the first ones, at most n. Raises BadState."""
        words = self.words_of(state)
        magic, n_stream, n_cells = words[0].view(np.uint32), words[2], words[3]
        if magic != MAGIC:
            raise BadState(f"the state begins with {int(magic):#x} instead of {MAGIC:#x}")
        if n_stream != N_STREAM:
            raise BadState(f"the state has {n_stream} streams instead of {N_STREAM}")
        if n_cells != self.n:
            raise BadState(f"the state has {n_cells} cells instead of {self.n}")
        cells = words[_HEAD_WORDS:-_TAIL_WORDS].reshape(self.n, self.cell_words)
        if (cells[:, 1] != 1).any():
            raise BadState("a cell of the state belongs to no sequence or to several")
        order = np.argsort(cells[:, 0], kind="stable")
        wanted = np.arange(start, start + self.n, dtype=np.int32)
        if not np.array_equal(cells[order, 0], wanted):
            raise BadState(
                f"the state has positions {cells[:, 0].min()} .. {cells[:, 0].max()} in {self.n} "
                f"cells, not each of {start} .. {start + self.n - 1} once"
            )
        if self.form.layout.m_rope and not _is_text(cells[order], wanted, tokens):
            raise BadState(
                "a cell of the state is not of the text's token at its place: it is of an image, "
                "or of other tokens"
            )
        v_trans, n_layer = words[-_TAIL_WORDS:].tolist()
        expected = (int(self.form.v_trans), len(self.form.layout.layers))
        if (v_trans, n_layer) != expected:
            raise BadState(
                f"the state has v_trans {v_trans} and {n_layer} layers instead of {expected[0]} "
                f"and {expected[1]}"
            )
        found = state[self._header_places]
        if not np.array_equal(found, self._headers):
            index = int(np.nonzero((found != self._headers).any(axis=1))[0][0])
            raise BadState(
                f"{'KV'[index // n_layer]} of layer {index % n_layer} has the header "
                f"{found[index].tobytes().hex()} instead of {self._headers[index].tobytes().hex()}"
            )
        return order


def _is_text(cells: npt.NDArray[np.int32], wanted: npt.NDArray[np.int32], tokens: Tokens) -> bool:
    """Whether M-RoPE's words in sorted cells are those of text, and of these tokens."""
    found = cells[:, 4]
    return (
        np.array_equal(cells[:, 2], wanted)
        and np.array_equal(cells[:, 3], wanted)
        and np.array_equal(found[: len(tokens)], tokens)
        and bool((found >= 0).all())
    )


def _v_header(row: KvRow, v_trans: bool) -> bytes:
    if not v_trans:
        return _ROW_HEADER.pack(row.v_type, row.v_row_bytes)
    size = _ELEMENT_BYTES[row.v_type]
    return _COLUMN_HEADER.pack(row.v_type, size, row.v_row_bytes // size)


# Blocks of the lengths in use; a map of a block is a few KiB.
_block_map = lru_cache(maxsize=64)(_Map)


class SequenceState:
    """A checked state of positions 0 .. n-1, which is cut into blocks.

    `data` is the state (uint8 [bytes], or anything contiguous), and is neither copied nor changed;
    `tokens` are int32 [n], n >= 1. Raises BadState.
    """

    def __init__(self, data: Any, form: StateForm, tokens: Tokens) -> None:
        self.form = form
        self.n_tokens = len(tokens)
        self._data: Bytes = np.frombuffer(data, np.uint8)
        if self.n_tokens < 1:
            raise BadState("a state has at least one token")
        if self._data.size != form.n_bytes(self.n_tokens):
            raise BadState(
                f"the state of {self.n_tokens} tokens has {form.n_bytes(self.n_tokens)} bytes, "
                f"not {self._data.size}"
            )
        self._tokens = tokens
        self._map = _Map(form, self.n_tokens)
        order = self._map.order_of(self._data, 0, tokens)
        in_order = np.array_equal(order, np.arange(self.n_tokens))
        self._order = None if in_order else order

    def write_block(self, start: int, n: int, target: Any) -> None:
        """Write the block of positions start .. start+n-1 to `target`, writable and of exactly
        layout.state_bytes(n) bytes. ValueError if it is not, or the positions are not there."""
        if start < 0 or n < 1 or start + n > self.n_tokens:
            raise ValueError(f"{start} .. {start + n - 1} are not in 0 .. {self.n_tokens - 1}")
        out: Bytes = np.frombuffer(target, np.uint8)
        where = _block_map(StateForm(self.form.layout), n)
        if out.size != where.n_bytes:
            raise ValueError(f"a block of {n} tokens has {where.n_bytes} bytes, not {out.size}")
        where.write_headers(out, start, self._tokens[start : start + n])
        cells = slice(start, start + n) if self._order is None else self._order[start : start + n]
        n_layer = len(self.form.layout.layers)
        whole = self._map
        for index, size in enumerate(whole.row_bytes):
            if not size:
                continue
            source = whole.offsets[index]
            rows = self._data[source : source + self.n_tokens * size]
            at = where.offsets[index]
            block = out[at : at + n * size]
            if self.form.v_trans and index >= n_layer:
                element = f"u{_ELEMENT_BYTES[self.form.layout.layers[index - n_layer].v_type]}"
                columns = rows.view(element).reshape(-1, self.n_tokens)
                block.view(element).reshape(n, -1)[:] = columns[:, cells].T
            elif isinstance(cells, slice):
                block[:] = rows[start * size : (start + n) * size]
            else:
                # Without `clip` numpy would copy by way of a buffer of its own.
                rows = rows.reshape(-1, size)
                np.take(rows, cells, axis=0, out=block.reshape(n, size), mode="clip")


def merge(form: StateForm, tokens: Tokens, blocks: Iterable[Block]) -> Bytes:
    """The state of `tokens` (int32 [n], n >= 1) from blocks of positions 0 .. m-1, m >= n: uint8,
    writable, the caller's own. The last block may have more tokens than are wanted.

    Raises BadState for a block that is not of its place, and if they are too few or too many.
    """
    n = len(tokens)
    whole = _Map(form, n)
    state = np.empty(whole.n_bytes, np.uint8)
    whole.write_headers(state, 0, tokens)
    plain = StateForm(form.layout)
    n_layer = len(form.layout.layers)
    start = 0
    for payload, count in blocks:
        if start >= n:
            raise BadState(f"there are blocks after the {n} tokens that are wanted")
        if count < 1 or payload.size != form.layout.state_bytes(count):
            raise BadState(f"a block of {count} tokens has not {payload.size} bytes")
        where = _block_map(plain, count)
        order = where.order_of(payload, start, tokens[start : start + count])
        if not np.array_equal(order, np.arange(count)):
            raise BadState(f"the block at {start} is not in the canonical order")
        taken = min(count, n - start)
        for index, size in enumerate(whole.row_bytes):
            if not size:
                continue
            source = where.offsets[index]
            rows = payload[source : source + taken * size]
            at = whole.offsets[index]
            if form.v_trans and index >= n_layer:
                element = f"u{_ELEMENT_BYTES[form.layout.layers[index - n_layer].v_type]}"
                columns = state[at : at + n * size].view(element).reshape(-1, n)
                columns[:, start : start + taken] = rows.view(element).reshape(taken, -1).T
            else:
                state[at + start * size : at + (start + taken) * size] = rows
        start += taken
    if start < n:
        raise BadState(f"the blocks end at {start}, before the {n} tokens that are wanted")
    return state


def parse_form(state: bytes, tokens: Tokens) -> StateForm:
    """The form of a context's states, from one of a few tokens (at least two: position 0 has the
    same numbers in more forms than one). NotShareable if it is none of those above."""
    found = []
    for m_rope in (False, True):
        form = _parse(state, len(tokens), m_rope)
        if form is not None:
            try:
                SequenceState(state, form, tokens)
            except BadState:
                continue
            found.append(form)
    if len(found) != 1:
        raise NotShareable(
            Reason.LAYOUT,
            f"the state of {len(tokens)} tokens ({len(state)} bytes) is not K and V rows of each "
            "layer alone: the context has several streams (create it with kv_unified=True), or "
            "this model keeps its attention in another form; use it without sharing",
        )
    return found[0]


def _parse(state: bytes, n: int, m_rope: bool) -> StateForm | None:
    """Read the layers of a state of `n` cells; None if they do not end with the state."""
    cell_words = KvLayout((), m_rope=m_rope).cell_words
    offset = 4 * (_HEAD_WORDS + n * cell_words + _TAIL_WORDS)
    if len(state) < offset:
        return None
    v_trans, n_layer = struct.unpack_from("<II", state, offset - 4 * _TAIL_WORDS)
    if v_trans not in (0, 1) or n_layer < 1:
        return None
    rows: list[tuple[int, int]] = []
    while len(rows) < 2 * n_layer and offset + _HEADER_BYTES <= len(state):
        if v_trans and len(rows) >= n_layer:
            ggml_type, element_bytes, elements = _COLUMN_HEADER.unpack_from(state, offset)
            if _ELEMENT_BYTES.get(ggml_type) != element_bytes:
                return None
            size = element_bytes * elements
        else:
            ggml_type, size = _ROW_HEADER.unpack_from(state, offset)
        rows.append((ggml_type, size))
        offset += _HEADER_BYTES + n * size
    if offset != len(state) or len(rows) != 2 * n_layer:
        return None
    layers = zip(rows[:n_layer], rows[n_layer:], strict=True)
    layout = KvLayout(tuple(KvRow(*k, *v) for k, v in layers), m_rope=m_rope)
    return StateForm(layout, bool(v_trans))
