"""How many bytes a model's K/V takes, from its GGUF file's metadata alone.

    state_bytes(n) == what llama_state_seq_get_size says of a sequence of n tokens
                   == 8 + the part of the layers that see all + with a window, the part of the rest
    a part         == 8 + cells * (12 or with M-RoPE 24) + 8 + 12 * K and V of each layer
                      + cells * the bytes of their rows

of a context as the engine makes it: one stream, V not transposed (flash attention). Of the rest,
the window keeps the cells that are still seen, so whether a context has `swa_full` changes nothing
here: it only decides for how long older cells can still be had. No llama.cpp here either.
"""

import os
from pathlib import Path
from typing import NamedTuple

from kvd_client.integrations.llama.files.architectures import KvShape, LayerShape, Window, kv_shape
from kvd_client.integrations.llama.files.gguf_header import BadModelFile, GgufHeader, read_header
from kvd_client.integrations.llama.files.model_hash import model_files
from kvd_proto.geometry import GGML_TYPES, Geometry, LayerGeometry, round_up
from kvd_proto.payload import llama_state_name

_SEQUENCE_HEAD = 8  # magic, source sequence
_PART_HEAD = 8  # streams, cells
_CELL = 12  # position, number of sequences, sequence
_POSITIONS = 12  # x, y, token
_BEFORE_ROWS = 8  # v_trans, number of layers
_ROWS_HEAD = 12  # type, bytes of a row


class BadKvType(ValueError):
    """There is no such element type, or llama.cpp makes no such context of this model."""


class LayerGroup(NamedTuple):
    """Layers whose rows are alike. `v_row_bytes` is None where K alone is kept."""

    n_layers: int
    has_window: bool
    k_row_bytes: int
    v_row_bytes: int | None


class ModelSize:
    """The bytes of one model's K/V, kept in these element types."""

    def __init__(self, shape: KvShape, type_k: str = "f16", type_v: str = "f16") -> None:
        """Raises BadKvType."""
        self.shape = shape
        self.type_k = type_k
        self.type_v = type_v
        _check_types(shape, type_k, type_v)
        self._full = _Part(shape.layers, type_k, type_v, shape.has_positions)
        self._seeing = _Part(shape.window_layers, type_k, type_v, shape.has_positions)

    @property
    def bytes_per_token(self) -> int:
        """K and V rows of all layers, those with a window included; no headers."""
        return self._full.token_bytes + self._seeing.token_bytes

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers by their rows, those that see all first."""
        return (*self._full.groups(False), *self._seeing.groups(True))

    @property
    def geometry(self) -> Geometry:
        """As it is registered; only of a model that can be shared."""
        if self.shape.unshareable is not None:
            raise ValueError(f"it cannot be shared: {self.shape.why}")
        return Geometry(
            tuple(
                LayerGeometry(self.type_k, k_bytes, self.type_v, v_bytes or 0)
                for k_bytes, v_bytes in (*self._full.rows, *self._seeing.rows)
            )
        )

    @property
    def payload_format(self) -> str:
        """The name of the form of its blocks; only of a model that can be shared."""
        return llama_state_name(len(self._seeing.rows), self.shape.has_positions)

    def state_bytes(self, n_tokens: int) -> int:
        """Of a sequence, or a block, of positions 0 .. n_tokens-1 (at least 1)."""
        if n_tokens < 1:
            raise ValueError(f"a sequence has at least one token, not {n_tokens}")
        n_bytes = _SEQUENCE_HEAD + self._full.state_bytes(n_tokens)
        if self.shape.window is not None:
            n_bytes += self._seeing.state_bytes(_seen(self.shape.window, n_tokens))
        return n_bytes

    def stride_bytes(self, block_tokens: int) -> int:
        """What a block takes in an arena: its state in whole pages."""
        return round_up(self.state_bytes(block_tokens))


class _Part:
    """One of llama.cpp's caches: those of its layers, and the bytes of their rows."""

    def __init__(
        self, layers: tuple[LayerShape, ...], type_k: str, type_v: str, has_positions: bool
    ) -> None:
        self.rows = tuple(
            (
                _row_bytes(layer.k_elements, type_k),
                None if layer.v_elements is None else _row_bytes(layer.v_elements, type_v),
            )
            for layer in layers
        )
        self.token_bytes = sum(k_bytes + (v_bytes or 0) for k_bytes, v_bytes in self.rows)
        n_rows = sum(1 if v_bytes is None else 2 for _, v_bytes in self.rows)
        self._fixed_bytes = _PART_HEAD + _BEFORE_ROWS + n_rows * _ROWS_HEAD
        self._cell_bytes = self.token_bytes + _CELL + (_POSITIONS if has_positions else 0)

    def state_bytes(self, n_cells: int) -> int:
        return self._fixed_bytes + n_cells * self._cell_bytes

    def groups(self, has_window: bool) -> list[LayerGroup]:
        counts: dict[tuple[int, int | None], int] = {}
        for row in self.rows:
            counts[row] = counts.get(row, 0) + 1
        return [LayerGroup(n, has_window, *row) for row, n in counts.items()]


def model_size(path: str | os.PathLike[str], type_k: str = "f16", type_v: str = "f16") -> ModelSize:
    """Of the model in the file, or in the files of which this is one. Raises BadModelFile,
    NoKvShape, BadKvType."""
    return ModelSize(kv_shape(first_header(path)), type_k, type_v)


def first_header(path: str | os.PathLike[str]) -> GgufHeader:
    """The header of the file at `path`; of a split model that of its first file, which has all the
    metadata. Raises BadModelFile."""
    header = read_header(path)
    number = header.values.get("split.no", 0)
    if number:
        first = model_files(Path(path))[0]
        header = read_header(first)
        if header.values.get("split.no", 0):
            raise BadModelFile(
                f"{path} is file {number} of a split model, counted from 0, and not the first "
                "one, which has the metadata: name that one"
            )
    return header


def _check_types(shape: KvShape, type_k: str, type_v: str) -> None:
    for name in (type_k, type_v):
        if name not in GGML_TYPES:
            raise BadKvType(f"a K/V type is one of {', '.join(GGML_TYPES)}, not {name!r}")
    layers = (*shape.layers, *shape.window_layers)
    if type_k != type_v and any(layer.v_elements is None for layer in layers):
        raise BadKvType("a model with MLA has one type for both: --type-k is --type-v")
    for what, name, heads in (
        ("K", type_k, {layer.k_head for layer in layers}),
        ("V", type_v, {layer.v_head for layer in layers}),
    ):
        together = GGML_TYPES[name].block_elements
        for head in heads:
            if head % together:
                raise BadKvType(
                    f"{name} stores {together} elements together, and a head of {what} has {head}: "
                    "llama.cpp makes no such context"
                )


def _row_bytes(elements: int, type_name: str) -> int:
    known = GGML_TYPES[type_name]
    return elements // known.block_elements * known.block_bytes


def _seen(window: Window, n_tokens: int) -> int:
    """How many of the tokens its last one sees."""
    if window.is_chunked:
        return n_tokens - (n_tokens - 1) // window.n_tokens * window.n_tokens
    return min(n_tokens, window.n_tokens)
