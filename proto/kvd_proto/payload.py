"""The payload formats: the exact size of a block's bytes, and their validation.

`llama-state`: what `llama_state_seq_get_data` writes for exactly the block's tokens (one stream, V
not transposed), with the ignored source sequence ids set to 0 so that equal blocks are equal bytes:

    u32 magic | i32 source seq = 0 | u32 n_stream = 1 | u32 n_cells
    per cell   i32 position | u32 n_seq_id = 1 | i32 seq = 0
    u32 v_trans = 0 | u32 n_layer
    for each layer: K as i32 ggml_type | u64 row_bytes | n_cells rows
    for each layer: V in the same form

`llama-state:window=W`: of a model whose last W layers, in the order in which it is registered, see
a sliding window only. llama.cpp keeps them in a cache of their own, so the block has two parts, for
the layers before them and for them, each from n_stream on as above, with all of the block's tokens.

`llama-state:m-rope`, and `llama-state:window=W:m-rope`: of a model with M-RoPE, whose positions
have more dimensions. Each cell says so before its sequence id:

    i32 position | u32 n_seq_id = 1 | i32 x | i32 y | i32 token | i32 seq = 0

For text both x and y are the position, and the token is what it is; for the embedding of a part of
an image they are something else, and the token is -1. Only text is accepted.

`array`: [layer][K|V][token][head][dim], C order, always with room for `block_tokens` tokens, so
that an engine can fill its open block token by token in place. A block of fewer tokens uses the
first rows.

Validation looks at everything but the K/V rows themselves, which have no wrong values.
"""

import re
import struct
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

from kvd_proto.errors import BadMessage, BadPayload
from kvd_proto.geometry import GGML_TYPES, Geometry, LayerGeometry

LLAMA_MAGIC = 0xAF143CD8
_HEAD = struct.Struct("<Ii")
_PART = struct.Struct("<II")
_CELL = struct.Struct("<iIi")
_M_ROPE_CELL = struct.Struct("<iIiiii")
_AFTER_CELLS = struct.Struct("<II")
_ROWS = struct.Struct("<iQ")
_CANONICAL_HEAD = _HEAD.pack(LLAMA_MAGIC, 0)

Buffer = bytes | bytearray | memoryview
"""A payload; of a memoryview the items do not matter, only its bytes."""


class PayloadFormat(Protocol):
    """One way to arrange a block's K/V for one geometry and block size."""

    name: str
    max_bytes: int
    """The size of a full block."""

    def size(self, n_tokens: int) -> int:
        """Exact bytes of a block that holds `n_tokens` tokens (1 to block_tokens)."""
        ...

    def validate(self, payload: Buffer, start: int, n_tokens: int) -> None:
        """Raise BadPayload unless `payload` is a block of positions start .. start+n_tokens-1."""
        ...


class LlamaState:
    """The state blob of one sequence of llama.cpp, see the module's docstring."""

    name = "llama-state"

    def __init__(
        self,
        geometry: Geometry,
        block_tokens: int,
        window_layers: int = 0,
        m_rope: bool = False,
    ) -> None:
        """The last `window_layers` of the layers are in a part of their own, if there are any.
        Raises BadMessage."""
        layers = geometry.layers
        for layer in layers:
            for type_name, row in (
                (layer.k_type, layer.k_row_bytes),
                (layer.v_type, layer.v_row_bytes),
            ):
                _check_row(type_name, row)
        n_full = len(layers) - window_layers
        if n_full < 1:
            raise BadMessage(
                "no layer is left that sees all",
                layers=len(layers),
                window_layers=window_layers,
            )
        self.name = llama_state_name(window_layers, m_rope)
        parts = (layers[:n_full], layers[n_full:]) if window_layers else (layers,)
        self._parts = tuple(_Part(part, m_rope) for part in parts)
        self._block_tokens = block_tokens
        self.max_bytes = self.size(block_tokens)

    def size(self, n_tokens: int) -> int:
        """`8 + sum over parts of (16 + 24 L + N * (12 + sum(rows)))` for N tokens and L layers;
        with M-RoPE 24 instead of 12."""
        return _HEAD.size + sum(part.size(n_tokens) for part in self._parts)

    def validate(self, payload: Buffer, start: int, n_tokens: int) -> None:
        _check_tokens(n_tokens, self._block_tokens)
        view = memoryview(payload).cast("B")
        if len(view) != self.size(n_tokens):
            raise BadPayload(
                f"a {self.name} block has the wrong size",
                expected=self.size(n_tokens),
                got=len(view),
                n_tokens=n_tokens,
            )
        if view[: _HEAD.size] != _CANONICAL_HEAD:
            magic, source = _HEAD.unpack_from(view)
            raise BadPayload(
                f"magic is {magic:#x} and source seq {source}, not {LLAMA_MAGIC:#x} and 0",
                start=start,
                n_tokens=n_tokens,
            )
        at = _HEAD.size
        for part in self._parts:
            part.validate(view, at, start, n_tokens)
            at += part.size(n_tokens)


class _Part:
    """One of llama.cpp's caches: a block's cells in it, and the rows of its layers."""

    def __init__(self, layers: tuple[LayerGeometry, ...], m_rope: bool) -> None:
        self._cell = _M_ROPE_CELL if m_rope else _CELL
        self._fixed_bytes = _PART.size + _AFTER_CELLS.size + 2 * _ROWS.size * len(layers)
        row_bytes = sum(layer.k_row_bytes + layer.v_row_bytes for layer in layers)
        self._token_bytes = self._cell.size + row_bytes
        # A few, for full blocks and the lengths in use: all of them can be 100 MB.
        self._skeleton = lru_cache(maxsize=16)(partial(_skeleton, layers))

    def size(self, n_tokens: int) -> int:
        return self._fixed_bytes + n_tokens * self._token_bytes

    def validate(self, view: memoryview, at: int, start: int, n_tokens: int) -> None:
        """Raise BadPayload unless the part that begins at byte `at` is one of these tokens."""
        first = at + _PART.size
        after = first + n_tokens * self._cell.size
        cells = view[first:after].cast("i")
        step = self._cell.size // 4
        positions = list(range(start, start + n_tokens))
        if (
            view[at:first] != _PART.pack(1, n_tokens)
            or cells[0::step].tolist() != positions
            or cells[1::step].tolist() != [1] * n_tokens
            or cells[step - 1 :: step].tolist() != [0] * n_tokens
            or (
                step > 3
                and (
                    cells[2::step].tolist() != positions
                    or cells[3::step].tolist() != positions
                    or min(cells[4::step].tolist()) < 0
                )
            )
        ):
            fault = _name_fault(view, at, self._cell, start, n_tokens)
            raise BadPayload(fault, start=start, n_tokens=n_tokens)
        skeleton = self._skeleton(n_tokens)
        found = skeleton.fields.unpack_from(view, after)
        if found != skeleton.expected:
            raise _header_fault(found, skeleton.expected)


class ArrayBlock:
    """[layer][K|V][token][head][dim] with room for block_tokens, see the module's docstring."""

    name = "array"

    def __init__(self, geometry: Geometry, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self.max_bytes = geometry.bytes_per_token * block_tokens

    def size(self, n_tokens: int) -> int:
        """The same for every number of tokens: an array block always has room for all of them."""
        return self.max_bytes

    def validate(self, payload: Buffer, start: int, n_tokens: int) -> None:
        _check_tokens(n_tokens, self._block_tokens)
        n_bytes = memoryview(payload).nbytes
        if n_bytes != self.max_bytes:
            raise BadPayload(
                "an array block has the wrong size", expected=self.max_bytes, got=n_bytes
            )


FORMATS: dict[str, type[LlamaState] | type[ArrayBlock]] = {
    LlamaState.name: LlamaState,
    ArrayBlock.name: ArrayBlock,
}
"""By the name, or what of it is before the first colon."""

_LLAMA_STATE = re.compile(r"llama-state(?::window=([1-9][0-9]{0,2}))?(:m-rope)?", re.ASCII)


def llama_state_name(window_layers: int = 0, m_rope: bool = False) -> str:
    """The name of the format of a model of which so many layers have a sliding window, and whose
    cells have the positions of M-RoPE."""
    window = f":window={window_layers}" if window_layers else ""
    return f"{LlamaState.name}{window}{':m-rope' if m_rope else ''}"


def make_format(name: str, geometry: Geometry, block_tokens: int) -> PayloadFormat:
    """The format called `name` for this geometry; raises BadMessage for an unknown name or type,
    and for a window of more layers than there are. A format has one name, however written."""
    if name == ArrayBlock.name:
        return ArrayBlock(geometry, block_tokens)
    if found := _LLAMA_STATE.fullmatch(name):
        return LlamaState(geometry, block_tokens, int(found[1] or 0), bool(found[2]))
    raise BadMessage("unknown payload format", format=name, known=", ".join(FORMATS))


class _Skeleton(NamedTuple):
    """All constant bytes behind the cells: the fields after them, then each header of rows."""

    fields: struct.Struct
    """Reads them in one call, beginning at the end of the cells."""
    expected: tuple[bytes, ...]


def _skeleton(layers: tuple[LayerGeometry, ...], n_tokens: int) -> _Skeleton:
    """The skeleton of a part of `n_tokens` tokens."""
    rows = [(layer.k_type, layer.k_row_bytes) for layer in layers]
    rows += [(layer.v_type, layer.v_row_bytes) for layer in layers]
    layout = [f"<{_AFTER_CELLS.size}s"]
    expected = [_AFTER_CELLS.pack(0, len(layers))]
    before = 0
    for type_name, row_bytes in rows:
        layout.append(f"{before}x{_ROWS.size}s")
        expected.append(_ROWS.pack(GGML_TYPES[type_name].ggml_id, row_bytes))
        before = n_tokens * row_bytes
    return _Skeleton(struct.Struct("".join(layout)), tuple(expected))


def _check_tokens(n_tokens: int, block_tokens: int) -> None:
    if not 1 <= n_tokens <= block_tokens:
        raise BadPayload(f"a block holds 1 to {block_tokens} tokens", n_tokens=n_tokens)


def _check_row(type_name: str, row_bytes: int) -> None:
    known = GGML_TYPES.get(type_name)
    if known is None:
        raise BadMessage("unknown ggml type", type=type_name, known=", ".join(GGML_TYPES))
    if row_bytes % known.block_bytes:
        raise BadMessage(
            f"a row of {type_name} is a multiple of {known.block_bytes} bytes", row_bytes=row_bytes
        )


def _header_fault(found: tuple[bytes, ...], expected: tuple[bytes, ...]) -> BadPayload:
    """Say which constant is wrong; called only when one is."""
    index = next(
        at for at, pair in enumerate(zip(found, expected, strict=True)) if len({*pair}) > 1
    )
    n_layers = (len(expected) - 1) // 2
    if index == 0:
        what = "v_trans and n_layer"
    else:
        part = "K" if index <= n_layers else "V"
        what = f"type and row bytes of {part} in layer {(index - 1) % n_layers}"
    return BadPayload(
        f"{what} are not those of the model's geometry",
        expected=expected[index].hex(),
        got=found[index].hex(),
    )


def _name_fault(
    payload: memoryview, at: int, cell: struct.Struct, start: int, n_tokens: int
) -> str:
    """Say which field of a part's head or cells is wrong; called only when one is."""
    n_stream, n_cells = _PART.unpack_from(payload, at)
    if n_stream != 1:
        return f"n_stream is {n_stream}, not 1"
    if n_cells != n_tokens:
        return f"the block holds {n_cells} cells, not {n_tokens}"
    for index in range(n_tokens):
        offset = at + _PART.size + index * cell.size
        position, n_seq, *where, seq = cell.unpack_from(payload, offset)
        if (position, n_seq, seq) != (start + index, 1, 0):
            return (
                f"cell {index} is position {position}, {n_seq} sequences, seq {seq}; "
                f"expected position {start + index}, 1, 0"
            )
        if where and (where[:2] != [position, position] or where[2] < 0):
            return (
                f"cell {index} is at x {where[0]}, y {where[1]} with token {where[2]}, which is "
                f"not text: there x and y are {position}, and a token is not negative"
            )
    return "the block changed while it was validated"
