"""How large a model's K/V is: per layer, per token, per block, to the byte.

The geometry says nothing about the bytes' arrangement: that is the payload format's (payload.py).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from kvd_proto.checks import Ascii, Int, Items, Row
from kvd_proto.errors import BadMessage

PAGE_BYTES = 4096
"""A block's stride is a multiple of this, so that a block can be given back to the system alone."""

MAX_LAYERS = 512
MAX_ROW_BYTES = 1 << 24
_TYPE = Ascii(1, 8)  # not any letter: a registration must fit the directory's header, see layout.py
_ROW_BYTES = Int(0, MAX_ROW_BYTES)
LAYERS = Items(1, MAX_LAYERS, Row((_TYPE, _ROW_BYTES, _TYPE, _ROW_BYTES)))
"""The check of a geometry on the wire."""


class TypeSize(NamedTuple):
    """How a ggml type stores elements: `block_bytes` for each `block_elements`."""

    ggml_id: int
    block_elements: int
    block_bytes: int


# ggml.h (enum ggml_type) and ggml-common.h (struct block_*): ids and bytes per block.
GGML_TYPES: dict[str, TypeSize] = {
    "f32": TypeSize(0, 1, 4),
    "f16": TypeSize(1, 1, 2),
    "q4_0": TypeSize(2, 32, 18),
    "q4_1": TypeSize(3, 32, 20),
    "q5_0": TypeSize(6, 32, 22),
    "q5_1": TypeSize(7, 32, 24),
    "q8_0": TypeSize(8, 32, 34),
    "iq4_nl": TypeSize(20, 32, 18),
    "bf16": TypeSize(30, 1, 2),
}


class LayerGeometry(NamedTuple):
    """One layer's K row and V row of one token: element type names and bytes. A layer without K/V
    has rows of 0 bytes where its format has headers for it."""

    k_type: str
    k_row_bytes: int
    v_type: str
    v_row_bytes: int


class Geometry(NamedTuple):
    """The layers of a model, in order; at least one of them has K or V."""

    layers: tuple[LayerGeometry, ...]

    @property
    def bytes_per_token(self) -> int:
        """K and V rows of all layers, without any format's headers."""
        return sum(layer.k_row_bytes + layer.v_row_bytes for layer in self.layers)

    @classmethod
    def from_wire(cls, rows: Iterable[Any]) -> "Geometry":
        """Build from `[[k_type, k_row_bytes, v_type, v_row_bytes], ...]`; raises BadMessage."""
        layers = [list(row) if isinstance(row, tuple) else row for row in rows]
        LAYERS("layers", layers)
        geometry = cls(tuple(LayerGeometry(*layer) for layer in layers))
        if not geometry.bytes_per_token:
            raise BadMessage("none of the layers has K or V")
        return geometry


def round_up(n_bytes: int, multiple: int = PAGE_BYTES) -> int:
    """The smallest multiple of `multiple` that is at least `n_bytes`."""
    return -(-n_bytes // multiple) * multiple
