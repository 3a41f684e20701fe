"""The payload formats: the exact size of a block's bytes, and their validation.

`llama-state`: what `llama_state_seq_get_data` writes for exactly the block's tokens (one stream, V
not transposed), with the ignored source sequence ids set to 0 so that equal blocks are equal bytes:

    u32 magic | i32 source seq = 0 | u32 n_stream = 1 | u32 n_cells
    per cell   i32 position | u32 n_seq_id = 1 | i32 seq = 0
    u32 v_trans = 0 | u32 n_layer
    for each layer: K as i32 ggml_type | u64 row_bytes | n_cells rows
    for each layer: V in the same form

`array`: [layer][K|V][token][head][dim], C order, always with room for `block_tokens` tokens, so
that an engine can fill its open block token by token in place. A block of fewer tokens uses the
first rows.

Validation looks at everything but the K/V rows themselves, which have no wrong values.
"""

import struct
from typing import Protocol

from kvd_proto.errors import BadMessage, BadPayload
from kvd_proto.geometry import GGML_TYPES, Geometry

LLAMA_MAGIC = 0xAF143CD8
_HEAD = struct.Struct("<IiII")
_CELL = struct.Struct("<iIi")
_AFTER_CELLS = struct.Struct("<II")
_ROWS = struct.Struct("<iQ")


class PayloadFormat(Protocol):
    """One way to arrange a block's K/V for one geometry and block size."""

    name: str
    max_bytes: int
    """The size of a full block."""

    def size(self, n_tokens: int) -> int:
        """Exact bytes of a block that holds `n_tokens` tokens (1 to block_tokens)."""
        ...

    def validate(self, payload: memoryview, start: int, n_tokens: int) -> None:
        """Raise BadPayload unless `payload` is a block of positions start .. start+n_tokens-1."""
        ...


class LlamaState:
    """The state blob of one sequence of llama.cpp, see the module's docstring."""

    name = "llama-state"

    def __init__(self, geometry: Geometry, block_tokens: int) -> None:
        for layer in geometry.layers:
            for type_name, row in (
                (layer.k_type, layer.k_row_bytes),
                (layer.v_type, layer.v_row_bytes),
            ):
                _check_row(type_name, row)
        self._geometry = geometry
        self._block_tokens = block_tokens
        self._skeletons: dict[int, list[tuple[int, bytes]]] = {}
        self.max_bytes = self.size(block_tokens)

    def size(self, n_tokens: int) -> int:
        """`16 + 12 N + 8 + 24 L + N * sum(rows)` for N tokens and L layers."""
        return (
            _HEAD.size
            + n_tokens * _CELL.size
            + _AFTER_CELLS.size
            + 2 * _ROWS.size * len(self._geometry.layers)
            + n_tokens * self._geometry.bytes_per_token
        )

    def validate(self, payload: memoryview, start: int, n_tokens: int) -> None:
        if len(payload) != self.size(n_tokens):
            raise BadPayload(
                "a llama-state block has the wrong size",
                expected=self.size(n_tokens),
                got=len(payload),
                n_tokens=n_tokens,
            )
        cells = payload[_HEAD.size : _HEAD.size + n_tokens * _CELL.size].cast("i")
        if (
            payload[: _HEAD.size] != _HEAD.pack(LLAMA_MAGIC, 0, 1, n_tokens)
            or cells[0::3].tolist() != list(range(start, start + n_tokens))
            or cells[1::3].tolist() != [1] * n_tokens
            or cells[2::3].tolist() != [0] * n_tokens
        ):
            raise BadPayload(_name_fault(payload, start, n_tokens), start=start, n_tokens=n_tokens)
        for offset, header in self._skeleton(n_tokens):
            if payload[offset : offset + len(header)] != header:
                raise BadPayload(
                    "a layer header does not match the model's geometry",
                    offset=offset,
                    expected=header.hex(),
                    got=bytes(payload[offset : offset + len(header)]).hex(),
                )

    def _skeleton(self, n_tokens: int) -> list[tuple[int, bytes]]:
        """Where each constant header of an n-token block lies, and its bytes."""
        found = self._skeletons.get(n_tokens)
        if found is None:
            offset = _HEAD.size + n_tokens * _CELL.size
            found = [(offset, _AFTER_CELLS.pack(0, len(self._geometry.layers)))]
            offset += _AFTER_CELLS.size
            layers = self._geometry.layers
            rows = [(layer.k_type, layer.k_row_bytes) for layer in layers]
            rows += [(layer.v_type, layer.v_row_bytes) for layer in layers]
            for type_name, row_bytes in rows:
                found.append((offset, _ROWS.pack(GGML_TYPES[type_name].ggml_id, row_bytes)))
                offset += _ROWS.size + n_tokens * row_bytes
            self._skeletons[n_tokens] = found
        return found


class ArrayBlock:
    """[layer][K|V][token][head][dim] with room for block_tokens, see the module's docstring."""

    name = "array"

    def __init__(self, geometry: Geometry, block_tokens: int) -> None:
        self.max_bytes = geometry.bytes_per_token * block_tokens

    def size(self, n_tokens: int) -> int:
        """The same for every number of tokens: an array block always has room for all of them."""
        return self.max_bytes

    def validate(self, payload: memoryview, start: int, n_tokens: int) -> None:
        if len(payload) != self.max_bytes:
            raise BadPayload(
                "an array block has the wrong size", expected=self.max_bytes, got=len(payload)
            )


FORMATS: dict[str, type[LlamaState] | type[ArrayBlock]] = {
    LlamaState.name: LlamaState,
    ArrayBlock.name: ArrayBlock,
}


def make_format(name: str, geometry: Geometry, block_tokens: int) -> PayloadFormat:
    """The format called `name` for this geometry; raises BadMessage for an unknown name or type."""
    try:
        cls = FORMATS[name]
    except KeyError:
        raise BadMessage("unknown payload format", format=name, known=", ".join(FORMATS)) from None
    return cls(geometry, block_tokens)


def _check_row(type_name: str, row_bytes: int) -> None:
    known = GGML_TYPES.get(type_name)
    if known is None:
        raise BadMessage("unknown ggml type", type=type_name, known=", ".join(GGML_TYPES))
    if row_bytes % known.block_bytes:
        raise BadMessage(
            f"a row of {type_name} is a multiple of {known.block_bytes} bytes", row_bytes=row_bytes
        )


def _name_fault(payload: memoryview, start: int, n_tokens: int) -> str:
    """Say which field of a block's head or cells is wrong; called only when one is."""
    magic, source, n_stream, n_cells = _HEAD.unpack_from(payload)
    if magic != LLAMA_MAGIC:
        return f"magic is {magic:#x}, not {LLAMA_MAGIC:#x}"
    if source != 0 or n_stream != 1:
        return f"source seq is {source} and n_stream {n_stream}, not 0 and 1"
    if n_cells != n_tokens:
        return f"the block holds {n_cells} cells, not {n_tokens}"
    for index in range(n_tokens):
        position, n_seq, seq = _CELL.unpack_from(payload, _HEAD.size + index * _CELL.size)
        if (position, n_seq, seq) != (start + index, 1, 0):
            return (
                f"cell {index} is position {position}, {n_seq} sequences, seq {seq}; "
                f"expected position {start + index}, 1, 0"
            )
    return "the block changed while it was validated"
