"""The bytes of one sequence's state, as `llama_state_seq_get_data` writes them; no llama.cpp here.

    word  0        magic 0xaf143cd8
          1        source sequence id (ignored by llama.cpp on import)
          2        n_stream
          3        n_cells                                     N
          4 + 3i   cell i: position | n_seq_id = 1 | sequence id (ignored on import)
          4 + 3N   v_trans | n_layer                           L
    then, from byte 24 + 12 N:
          K of each of the L layers: i32 ggml type | u64 row bytes | N rows
          V of each of the L layers: the same form

A context writes no id for a cell whose sequence id is not below its n_seq_max, and n_seq_id 0: a
narrow state, 4 N bytes shorter, of which all else is the same.

The canonical form has both ignored ids 0, positions start .. start+N-1 in this order, one stream,
and V not transposed. So all before the rows follows from (start, N, L), and equal K/V is equal
bytes.
"""

import ctypes
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvd_client.integrations.llama.errors import NotShareable, Reason

Words = npt.NDArray[np.int32]

MAGIC = 0xAF143CD8
N_STREAM = 1
V_TRANS = 0
_HEAD_WORDS = 4
_CELL_WORDS = 3
_TAIL_WORDS = 2
_ROW_HEADER = struct.Struct("<iQ")


class KvRow(NamedTuple):
    """One token in one layer: ggml type numbers, and bytes of its K row and of its V row."""

    k_type: int
    k_row_bytes: int
    v_type: int
    v_row_bytes: int


class KvLayout(NamedTuple):
    """The rows of every layer that has K/V of its own, in llama.cpp's order."""

    layers: tuple[KvRow, ...]

    @property
    def bytes_per_token(self) -> int:
        """K and V rows of all layers, without headers."""
        return sum(row.k_row_bytes + row.v_row_bytes for row in self.layers)

    def state_bytes(self, n_tokens: int) -> int:
        """The exact size of the state of `n_tokens` tokens (at least 1)."""
        if n_tokens < 1:
            raise ValueError(f"a block has at least one token, not {n_tokens}")
        cell = 4 * _CELL_WORDS + self.bytes_per_token
        fixed = 4 * (_HEAD_WORDS + _TAIL_WORDS) + 2 * _ROW_HEADER.size * len(self.layers)
        return fixed + n_tokens * cell


def parse_layout(state: bytes) -> KvLayout:
    """Read the layout from the state of one token; NotShareable if such blocks cannot be shared.

    Everything in `state` must be accounted for: a model that keeps more than K and V rows (a
    second cache, an extension to each cell, K without V) is told by what is left over or missing.
    """
    odd = NotShareable(
        Reason.LAYOUT,
        f"the state of one token ({len(state)} bytes) is not K and V rows of each layer alone: "
        "this model keeps its attention in another form; use it without sharing",
    )
    if len(state) < 4 * (_HEAD_WORDS + _CELL_WORDS + _TAIL_WORDS):
        raise odd
    magic, _, n_stream = struct.unpack_from("<IiI", state)
    if magic != MAGIC:
        raise odd
    if n_stream != N_STREAM:
        raise NotShareable(
            Reason.STREAMS,
            f"the context has {n_stream} streams: create it with kv_unified=True",
        )
    n_cells, _, n_seq_id, _, v_trans, n_layer = struct.unpack_from("<IiIiII", state, 12)
    if n_cells != 1 or n_seq_id != 1 or v_trans not in (0, 1):
        raise odd
    if v_trans != V_TRANS:
        raise NotShareable(
            Reason.FLASH_ATTENTION,
            "V is stored transposed, because flash attention is off or not possible with this "
            "model: create the context with flash_attn=True, or use it without sharing",
        )
    rows: list[tuple[int, int]] = []
    offset = 4 * (_HEAD_WORDS + _CELL_WORDS + _TAIL_WORDS)
    while offset + _ROW_HEADER.size <= len(state) and len(rows) < 2 * n_layer:
        ggml_type, row_bytes = _ROW_HEADER.unpack_from(state, offset)
        rows.append((ggml_type, row_bytes))
        offset += _ROW_HEADER.size + row_bytes
    if offset != len(state) or len(rows) != 2 * n_layer or n_layer == 0:
        raise odd
    return KvLayout(
        tuple(
            KvRow(k_type, k_bytes, v_type, v_bytes)
            for (k_type, k_bytes), (v_type, v_bytes) in zip(
                rows[:n_layer], rows[n_layer:], strict=True
            )
        )
    )


def narrow_bytes(n_tokens: int) -> int:
    """By how many bytes a narrow state of so many tokens is shorter."""
    return 4 * n_tokens


def widen_token(state: bytes) -> bytes:
    """The state of one token from a narrow one; unchanged if it is not one."""
    at = 4 * (_HEAD_WORDS + 1)
    if state[at : at + 4] != bytes(4):
        return state
    return state[:at] + struct.pack("<Ii", 1, 0) + state[at + 4 :]


class BlockForm:
    """The size of a block of `n_tokens` in one layout, and the words before its rows.

    Made once for each block length and kept, so that a block costs no more than a comparison of its
    few hundred header bytes. Not for use by two threads at once.
    """

    def __init__(self, layout: KvLayout, n_tokens: int) -> None:
        self.n_bytes = layout.state_bytes(n_tokens)
        n_words = _HEAD_WORDS + _CELL_WORDS * n_tokens + _TAIL_WORDS
        self._array_type: Any = ctypes.c_int32 * n_words
        self._canonical = np.zeros(n_words, dtype=np.int32)
        head = np.array([MAGIC, 0, N_STREAM, n_tokens], dtype=np.uint32)
        self._canonical[:_HEAD_WORDS] = head.view(np.int32)
        self._canonical[-_TAIL_WORDS:] = (V_TRANS, len(layout.layers))
        cells = self._canonical[_HEAD_WORDS:-_TAIL_WORDS].reshape(n_tokens, _CELL_WORDS)
        cells[:, 1] = 1
        self._positions = cells[:, 0]
        self._rows: list[tuple[int, int]] = []  # (byte offset of N rows, bytes of each)
        offset = 4 * n_words
        row_sizes = [row.k_row_bytes for row in layout.layers]
        row_sizes += [row.v_row_bytes for row in layout.layers]
        for size in row_sizes:
            offset += _ROW_HEADER.size
            self._rows.append((offset, size))
            offset += n_tokens * size
        self._from_zero = np.arange(n_tokens, dtype=np.int32)

    def header(self, address: int) -> Words:
        """The words at `address`, not a copy; valid as long as that memory is mapped."""
        words: Words = np.frombuffer(self._array_type.from_address(address), dtype=np.int32)
        return words

    def widen(self, header: Words) -> bool:
        """Make of a narrow state's header, which ends where this one does, the header of the
        same cells, in place. False, and nothing is changed, if it is not a narrow state's."""
        n = self._from_zero.size
        narrow = header[n:].copy()
        cells = narrow[_HEAD_WORDS:-_TAIL_WORDS].reshape(n, _CELL_WORDS - 1)
        if cells[:, 1].any():
            return False
        header[:_HEAD_WORDS] = narrow[:_HEAD_WORDS]
        wide = header[_HEAD_WORDS:-_TAIL_WORDS].reshape(n, _CELL_WORDS)
        wide[:, 0] = cells[:, 0]
        wide[:, 1] = 1
        return True

    def canonicalise(self, header: Words) -> None:
        """Set the ignored ids to 0, in place."""
        header[1] = 0
        header[_HEAD_WORDS + 2 : -_TAIL_WORDS : _CELL_WORDS] = 0

    def sort(self, address: int, start: int) -> bool:
        """Sort the cells at `address`, and their rows, by position, in place.

        llama.cpp writes cells in the order in which they lie in the context. Returns False, and
        changes nothing, unless they are positions start .. start+n_tokens-1 in some order.
        """
        header = self.header(address)
        positions = header[_HEAD_WORDS:-_TAIL_WORDS:_CELL_WORDS]
        order = np.argsort(positions)
        if not np.array_equal(positions[order], self._from_zero + start):
            return False
        for offset, size in self._rows:
            if size:
                kind: Any = ctypes.c_uint8 * (order.size * size)
                memory = kind.from_address(address + offset)
                rows = np.frombuffer(memory, dtype=np.uint8).reshape(order.size, size)
                rows[:] = rows[order]
        positions[:] = positions[order]
        return True

    def is_canonical(self, header: Words, start: int) -> bool:
        """Whether this is the header of positions start .. start+n_tokens-1, in this order."""
        np.add(self._from_zero, start, out=self._positions)
        return header.tobytes() == self._canonical.tobytes()
