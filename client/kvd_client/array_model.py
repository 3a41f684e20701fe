"""What the K/V of an array engine looks like, and where each row lies in a block.

    a block    layer 0: K [token][head][dim], V [token][head][dim] | layer 1: K, V | ...
               C order, no padding, always with room for block_tokens tokens

Covers geometry, element types and the fingerprint. The memory of blocks is array_block.py's, and
what an engine calls is in arrays.py.
"""

import math
import struct
from collections.abc import Iterable
from hashlib import blake2b
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvd_client.asking import traits_of
from kvd_client.context import Model
from kvd_client.errors import BadMessage
from kvd_proto.keys import FINGERPRINT_BYTES
from kvd_proto.payload import ArrayBlock

ELEMENTS = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
}
"""Element types by NumPy's name, and what the registration of the model calls them."""


class ArrayLayer(NamedTuple):
    """One layer's K/V: so many K/V heads, K rows of `k_dim` elements a head, V rows of `v_dim`."""

    kv_heads: int
    k_dim: int
    v_dim: int


class KV(NamedTuple):
    """K and V of one layer for the same tokens: [token][head][dim] each."""

    k: npt.NDArray[Any]
    v: npt.NDArray[Any]


class Plane(NamedTuple):
    """The K or V rows of one layer in a block: where they begin, in bytes, and their shape."""

    offset: int
    shape: tuple[int, int, int]


class LayerPlanes(NamedTuple):
    k: Plane
    v: Plane


class ArrayModel:
    """A model whose K/V is kept as arrays.

    `identity` names everything that determines the values: weights, position scheme, the engine and
    its version, attention variant. Say too much rather than too little: engines of equal identity
    and layout read each other's K/V. `layers` are the layers that have K/V, in order. `dtype` is a
    NumPy type or its name; "bfloat16" is a uint16 with the same bits (with ml_dtypes, give its
    `bfloat16` instead: blocks of the two are the same). `block_tokens` is 1 to 1024.

    `model` is what the client registers. Its fingerprint covers the identity, the heads and dims of
    each layer and the element type, so layouts of equal row bytes never match each other. `dtype`
    is the type of the arrays; `planes` says where they lie in a block of `block_bytes` bytes.
    """

    def __init__(
        self,
        name: str,
        identity: str | bytes,
        layers: Iterable[ArrayLayer],
        dtype: npt.DTypeLike = "float32",
        block_tokens: int = 32,
    ) -> None:
        """Raises BadMessage for a model that cannot be."""
        self.layers = tuple(ArrayLayer(*layer) for layer in layers)
        self.block_tokens = block_tokens
        self.dtype, element = _element(dtype)
        if not identity:
            raise BadMessage("a model's identity is what keeps its K/V apart: it cannot be empty")
        for index, layer in enumerate(self.layers):
            if any(type(size) is not int or size < 1 for size in layer):
                raise BadMessage(
                    "a layer has whole numbers of heads and elements, at least 1",
                    layer=index,
                    got=repr(layer),
                )
        code = ELEMENTS[element]
        item = self.dtype.itemsize
        self.model = Model(
            name,
            _fingerprint(identity, element, self.layers),
            ArrayBlock.name,
            tuple(
                (code, heads * k_dim * item, code, heads * v_dim * item)
                for heads, k_dim, v_dim in self.layers
            ),
            block_tokens,
            traits_of(_fields(identity, element, self.layers)),
        )
        self.block_bytes = self.model.format().max_bytes
        self.planes = self._lay_out()

    def show(self, layer: int, block: npt.NDArray[np.uint8] | memoryview) -> KV:
        """The layer's arrays in a whole block of `block_bytes` bytes, as writable as that is."""
        (k_at, k_shape), (v_at, v_shape) = self.planes[layer]
        # Half the time of a slice, a view and a reshape; each keeps `block` alive, too.
        return KV(
            np.ndarray(k_shape, self.dtype, block, k_at),
            np.ndarray(v_shape, self.dtype, block, v_at),
        )

    def _lay_out(self) -> tuple[LayerPlanes, ...]:
        planes: list[LayerPlanes] = []
        offset = 0
        for heads, k_dim, v_dim in self.layers:
            pair: list[Plane] = []
            for dim in (k_dim, v_dim):
                shape = (self.block_tokens, heads, dim)
                pair.append(Plane(offset, shape))
                offset += math.prod(shape) * self.dtype.itemsize
            planes.append(LayerPlanes(*pair))
        return tuple(planes)


def _element(dtype: npt.DTypeLike) -> tuple[np.dtype[Any], str]:
    """The arrays' type, and the name of the element type that it stands for."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        return np.dtype(np.uint16), dtype
    try:
        element = np.dtype(dtype)
    except TypeError:
        raise BadMessage("not a NumPy type", dtype=repr(dtype)) from None
    if element.name not in ELEMENTS or not element.isnative:
        raise BadMessage(
            "K/V elements have one of these types, in the machine's byte order",
            dtype=str(element),
            known=", ".join(ELEMENTS),
        )
    return element, element.name


def _fields(identity: str | bytes, element: str, layers: tuple[ArrayLayer, ...]) -> dict[str, str]:
    """What the fingerprint covers, in words."""
    runs = [(layer, len(list(same))) for layer, same in groupby(layers)]
    return {
        "identity": identity if isinstance(identity, str) else identity.hex(),
        "dtype": element,
        "layers": ", ".join(
            f"{n} of {kv_heads} heads, k {k_dim}, v {v_dim}" for (kv_heads, k_dim, v_dim), n in runs
        ),
    }


def _fingerprint(identity: str | bytes, element: str, layers: tuple[ArrayLayer, ...]) -> bytes:
    """Everything that may make K/V of equal tokens differ. The daemon adds format and block
    size."""
    said = identity.encode() if isinstance(identity, str) else identity
    digest = blake2b(digest_size=FINGERPRINT_BYTES, person=b"kvd-array-1")
    digest.update(struct.pack("<Q", len(said)) + said)
    digest.update(struct.pack("<Q", len(element)) + element.encode())
    for layer in layers:
        digest.update(struct.pack("<QQQ", *layer))
    return digest.digest()
