"""The bytes of one sequence's state, as `llama_state_seq_get_data` writes them; no llama.cpp here.

    word  0        magic 0xaf143cd8
          1        source sequence id (ignored by llama.cpp on import)
    then a part, and of a model with a sliding window another one: the layers that see all of the
    sequence, and those that see a window of it, which llama.cpp keeps in a cache of their own

    word  0        n_stream
          1        n_cells                                     N
          2 + 3i   cell i: position | n_seq_id = 1 | sequence id (ignored on import)
          2 + 3N   v_trans | n_layer                           L
    then, from byte 16 + 12 N of the part:
          K of each of the L layers: i32 ggml type | u64 row bytes | N rows
          V of each of the L layers: the same form

With M-RoPE a cell has three words more before its sequence id: x | y | token. Of text both x and y
are the position; the embedding of a part of an image has other ones, and the token -1.

A context writes no id for a cell whose sequence id is not below its n_seq_max, and n_seq_id 0: a
narrow state, in each part 4 N bytes shorter, of which all else is the same.

The canonical form has both ignored ids 0, in each part positions start .. start+N-1 in this order,
one stream, V not transposed, and nothing but text. So all before the rows follows from (start, N, L
of each part, and with M-RoPE the tokens), and equal K/V is equal bytes. A block is no longer than
the window: of a longer one llama.cpp writes fewer cells into the second part.
"""

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvd_client.integrations.llama.errors import NotShareable, Reason

Words = npt.NDArray[np.int32]

MAGIC = 0xAF143CD8
N_STREAM = 1
V_TRANS = 0
_HEAD_WORDS = 2  # of the state
_PART_WORDS = 2  # of each part, before its cells
_CELL_WORDS = 3
_M_ROPE_WORDS = 3  # of a cell more
_ID_WORDS = 1  # of a cell, the last one: what a narrow state has not
_TAIL_WORDS = 2
_ROW_HEADER = struct.Struct("<iQ")


class KvRow(NamedTuple):
    """One token in one layer: ggml type numbers, and bytes of its K row and of its V row."""

    k_type: int
    k_row_bytes: int
    v_type: int
    v_row_bytes: int


class KvLayout(NamedTuple):
    """The rows of every layer that has K/V of its own, in llama.cpp's order.

    `layers` see the whole sequence, `window_layers` the last `window` tokens of it: a token at
    position p sees those after p - window. Without a window: none, and 0. `m_rope`: whether cells
    have the positions of M-RoPE.
    """

    layers: tuple[KvRow, ...]
    window_layers: tuple[KvRow, ...] = ()
    window: int = 0
    m_rope: bool = False

    @property
    def cell_words(self) -> int:
        """32-bit words of a cell, beside its rows."""
        return _CELL_WORDS + _M_ROPE_WORDS * self.m_rope

    @property
    def parts(self) -> tuple[tuple[KvRow, ...], ...]:
        """The layers of each part of a state."""
        return (self.layers, self.window_layers) if self.window_layers else (self.layers,)

    @property
    def bytes_per_token(self) -> int:
        """K and V rows of all layers, without headers."""
        return sum(row.k_row_bytes + row.v_row_bytes for part in self.parts for row in part)

    def state_bytes(self, n_tokens: int) -> int:
        """The exact size of the state of `n_tokens` tokens (at least 1), of a model with a window
        no more than those."""
        if n_tokens < 1:
            raise ValueError(f"a block has at least one token, not {n_tokens}")
        if self.window and n_tokens > self.window:
            raise ValueError(f"a block has no more tokens than the window of {self.window}")
        parts = (_part_bytes(part, n_tokens, self.cell_words) for part in self.parts)
        return 4 * _HEAD_WORDS + sum(parts)

    def first_seen(self, position: int) -> int:
        """From which position on a token at `position` needs all cells in every layer's cache, if
        it is to be computed as in a context that has never dropped one."""
        return max(0, position - self.window + 1) if self.window else 0


def _part_bytes(layers: Sequence[KvRow], n_tokens: int, cell_words: int) -> int:
    rows = sum(row.k_row_bytes + row.v_row_bytes for row in layers)
    fixed = 4 * (_PART_WORDS + _TAIL_WORDS) + 2 * _ROW_HEADER.size * len(layers)
    return fixed + n_tokens * (4 * cell_words + rows)


def parse_layout(
    state: bytes, window: int = 0, *, m_rope: bool = False, is_narrow: bool = False
) -> KvLayout:
    """Read the layout from the state of one token; NotShareable if such blocks cannot be shared.

    `window` and `m_rope`: what llama.cpp says of the model. Some models speak of a window and have
    none; of the rest a state has two parts.
    Everything in `state` must be accounted for: a model that keeps more than K and V rows (another
    cache, an extension to each cell, K without V) is told by what is left over or missing.
    """
    odd = NotShareable(
        Reason.LAYOUT,
        f"the state of one token ({len(state)} bytes) is not K and V rows of each layer alone: "
        "this model keeps its attention in another form; use it without sharing",
    )
    if len(state) < 4 * _HEAD_WORDS or struct.unpack_from("<I", state)[0] != MAGIC:
        raise odd
    cell_words = _CELL_WORDS + _M_ROPE_WORDS * m_rope - _ID_WORDS * is_narrow
    parts: list[tuple[KvRow, ...]] = []
    at = 4 * _HEAD_WORDS
    while not parts or (at < len(state) and window and len(parts) == 1):
        part = _parse_part(state, at, cell_words, is_narrow)
        if part is None:
            raise odd
        parts.append(part)
        at += _part_bytes(part, 1, cell_words)
    if at != len(state):
        raise odd
    if len(parts) == 1:
        return KvLayout(parts[0], m_rope=m_rope)
    return KvLayout(parts[0], parts[1], window, m_rope)


def _parse_part(
    state: bytes, at: int, cell_words: int, is_narrow: bool
) -> tuple[KvRow, ...] | None:
    """The layers of the part that begins at byte `at`; None if it is not one of one token."""
    n_words = _PART_WORDS + cell_words + _TAIL_WORDS
    if len(state) < at + 4 * n_words:
        return None
    words = struct.unpack_from(f"<{n_words}I", state, at)
    n_stream, n_cells, n_seq_id = words[0], words[1], words[_PART_WORDS + 1]
    v_trans, n_layer = words[-_TAIL_WORDS:]
    if n_stream != N_STREAM:
        raise NotShareable(
            Reason.STREAMS,
            f"the context has {n_stream} streams: create it with kv_unified=True",
        )
    if n_cells != 1 or n_seq_id != (not is_narrow) or v_trans not in (0, 1) or n_layer == 0:
        return None
    if v_trans != V_TRANS:
        raise NotShareable(
            Reason.FLASH_ATTENTION,
            "V is stored transposed, because flash attention is off or not possible with this "
            "model: create the context with flash_attn=True, or use it without sharing",
        )
    rows: list[tuple[int, int]] = []
    at += 4 * n_words
    while at + _ROW_HEADER.size <= len(state) and len(rows) < 2 * n_layer:
        ggml_type, row_bytes = _ROW_HEADER.unpack_from(state, at)
        rows.append((ggml_type, row_bytes))
        at += _ROW_HEADER.size + row_bytes
    if at > len(state) or len(rows) != 2 * n_layer:
        return None
    return tuple(
        KvRow(k_type, k_bytes, v_type, v_bytes)
        for (k_type, k_bytes), (v_type, v_bytes) in zip(rows[:n_layer], rows[n_layer:], strict=True)
    )


class BlockForm:
    """The size of a block of `n_tokens` in one layout, and the words before its rows.

    Made once for each block length and kept, so that a block costs no more than a comparison of its
    few hundred header bytes. Not for use by two threads at once.
    """

    def __init__(self, layout: KvLayout, n_tokens: int) -> None:
        self.n_bytes = layout.state_bytes(n_tokens)
        self._parts: list[_PartForm] = []
        head = [MAGIC, 0]  # before the first part
        at = 0
        for layers in layout.parts:
            self._parts.append(_PartForm(layers, n_tokens, at, head, layout.cell_words))
            at += 4 * len(head) + _part_bytes(layers, n_tokens, layout.cell_words)
            head = []
        self.narrow_bytes = 4 * _ID_WORDS * n_tokens * len(self._parts)
        """By how much a narrow state is shorter."""

    def widen(self, address: int) -> bool:
        """Make the block's form of a narrow state that ends where the block at `address` does, in
        place. False, and nothing is changed, if it is not a narrow state.

        The last part's rows are where they belong; those of the one before it are moved.
        """
        gap = self.narrow_bytes // len(self._parts)
        shifts = [gap * left for left in range(len(self._parts), 0, -1)]
        headers = [
            part.narrow_header(address + shift)
            for part, shift in zip(self._parts, shifts, strict=True)
        ]
        if any(header is None for header in headers):
            return False
        for part, header, shift in zip(self._parts, headers, shifts, strict=True):
            assert header is not None
            part.put(address, header, shift - gap)
        return True

    def canonicalise(self, address: int, start: int) -> bool:
        """Make the state at `address` canonical, in place: the ignored ids 0, and the cells, with
        their rows, in the order of positions. llama.cpp writes them as they lie in the context.

        False, the content then undefined, if it is not that of text at positions start ..
        start+n_tokens-1.
        """
        return all(part.canonicalise(address, start) for part in self._parts)

    def is_canonical(self, address: int, start: int) -> bool:
        """Whether at `address` is a block of text at positions start .. start+n_tokens-1."""
        return all(part.is_canonical(part.header(address), start) for part in self._parts)


class _PartForm:
    """A part of a block: `at` bytes behind its begin, with `head` before its own words."""

    def __init__(
        self, layers: Sequence[KvRow], n_tokens: int, at: int, head: list[int], cell_words: int
    ) -> None:
        self._at = at
        self._cell_words = cell_words
        self._first = len(head) + _PART_WORDS  # the first cell's first word
        self._n_words = self._first + cell_words * n_tokens + _TAIL_WORDS
        self._array_type: Any = ctypes.c_int32 * self._n_words
        self._canonical = np.zeros(self._n_words, dtype=np.int32)
        words = np.array([*head, N_STREAM, n_tokens], dtype=np.uint32)
        self._canonical[: self._first] = words.view(np.int32)
        self._canonical[-_TAIL_WORDS:] = (V_TRANS, len(layers))
        cells = self._cells(self._canonical)
        cells[:, 1] = 1
        self._positions = cells[:, 0]
        self._m_rope = cells[:, 2:5].T if cell_words > _CELL_WORDS else None
        self._from_zero = np.arange(n_tokens, dtype=np.int32)
        self._rows: list[tuple[int, int]] = []  # (byte offset of N rows, bytes of each)
        offset = first_row = at + 4 * self._n_words
        for size in [row.k_row_bytes for row in layers] + [row.v_row_bytes for row in layers]:
            offset += _ROW_HEADER.size
            self._rows.append((offset, size))
            offset += n_tokens * size
        self._rows_at, self._row_bytes = first_row, offset - first_row

    def _cells(self, header: Words, fewer: int = 0) -> Words:
        """[n_tokens, words of a cell, less `fewer`], not a copy."""
        return header[self._first : -_TAIL_WORDS].reshape(-1, self._cell_words - fewer)

    def header(self, address: int) -> Words:
        """The words of the block at `address`, not a copy; valid as long as that memory is."""
        memory = self._array_type.from_address(address + self._at)
        words: Words = np.frombuffer(memory, dtype=np.int32)
        return words

    def narrow_header(self, address: int) -> Words | None:
        """A copy of the words of a narrow state, whose part begins `at` bytes behind `address`."""
        n = self._from_zero.size
        header = self.header(address)[: self._n_words - _ID_WORDS * n].copy()
        n_seq_ids = self._cells(header, _ID_WORDS)[:, 1]
        return None if n_seq_ids.any() else header

    def put(self, address: int, narrow: Words, shift: int) -> None:
        """Write a narrow header as one of the block at `address`, and move the rows, which lie
        `shift` bytes behind their place."""
        if shift:
            to = address + self._rows_at
            ctypes.memmove(to, to + shift, self._row_bytes)
        header = self.header(address)
        header[: self._first] = narrow[: self._first]
        header[-_TAIL_WORDS:] = narrow[-_TAIL_WORDS:]
        cells = self._cells(header)
        cells[:, :-_ID_WORDS] = self._cells(narrow, _ID_WORDS)
        cells[:, 1] = 1
        cells[:, -_ID_WORDS:] = 0

    def canonicalise(self, address: int, start: int) -> bool:
        """See BlockForm."""
        header = self.header(address)
        if self._at == 0:
            header[1] = 0
        header[self._first + self._cell_words - 1 : -_TAIL_WORDS : self._cell_words] = 0
        return self.is_canonical(header, start) or (
            self._sort(address, header, start) and self.is_canonical(header, start)
        )

    def _sort(self, address: int, header: Words, start: int) -> bool:
        """Sort the cells, and their rows, by position. Returns False, and changes nothing, unless
        they are positions start .. start+n_tokens-1 in some order."""
        cells = self._cells(header)
        order = np.argsort(cells[:, 0])
        if not np.array_equal(cells[order, 0], self._from_zero + start):
            return False
        for offset, size in self._rows:
            if size:
                kind: Any = ctypes.c_uint8 * (order.size * size)
                memory = kind.from_address(address + offset)
                rows = np.frombuffer(memory, dtype=np.uint8).reshape(order.size, size)
                rows[:] = rows[order]
        cells[:] = cells[order]
        return True

    def is_canonical(self, header: Words, start: int) -> bool:
        """Whether this is the header of text at positions start .. start+n_tokens-1, in order."""
        np.add(self._from_zero, start, out=self._positions)
        if self._m_rope is not None:
            # Which token it is follows from nothing here, but only text has one.
            tokens = self._cells(header)[:, _CELL_WORDS + 1]
            if tokens.min() < 0:
                return False
            x, y, expected = self._m_rope
            x[:] = y[:] = self._positions
            expected[:] = tokens
        return header.tobytes() == self._canonical.tobytes()
