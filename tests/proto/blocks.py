"""Blocks in the `llama-state` formats, written field by field and not by the code under test."""

import struct

from kvd_proto.geometry import GGML_TYPES, Geometry, LayerGeometry

MAGIC = 0xAF143CD8


def llama_block(
    geometry: Geometry,
    start: int,
    n_tokens: int,
    fill: int = 0x11,
    window_layers: int = 0,
    m_rope: bool = False,
) -> bytearray:
    """A valid block of positions start .. start+n_tokens-1, its rows all `fill`. With M-RoPE its
    tokens are 100 + position."""
    block = bytearray(struct.pack("<Ii", MAGIC, 0))
    for layers in _parts(geometry, window_layers):
        block += struct.pack("<II", 1, n_tokens)
        for position in range(start, start + n_tokens):
            block += struct.pack("<iI", position, 1)
            if m_rope:
                block += struct.pack("<iii", position, position, 100 + position)
            block += struct.pack("<i", 0)
        block += struct.pack("<II", 0, len(layers))
        for layer in layers:
            block += struct.pack("<iQ", GGML_TYPES[layer.k_type].ggml_id, layer.k_row_bytes)
            block += bytes([fill]) * (n_tokens * layer.k_row_bytes)
        for layer in layers:
            block += struct.pack("<iQ", GGML_TYPES[layer.v_type].ggml_id, layer.v_row_bytes)
            block += bytes([fill]) * (n_tokens * layer.v_row_bytes)
    return block


def header_bytes(geometry: Geometry, n_tokens: int, window_layers: int = 0) -> list[int]:
    """Offsets of all bytes of a block that are not K/V rows."""
    offsets, at = list(range(8)), 8
    for layers in _parts(geometry, window_layers):
        offsets += range(at, at + 8 + 12 * n_tokens + 8)
        at += 8 + 12 * n_tokens + 8
        rows = [layer.k_row_bytes for layer in layers] + [layer.v_row_bytes for layer in layers]
        for row in rows:
            offsets += range(at, at + 12)
            at += 12 + n_tokens * row
    return offsets


def _parts(geometry: Geometry, window_layers: int) -> list[tuple[LayerGeometry, ...]]:
    """The layers of each part of a block: those that see all, and those with a window."""
    n_full = len(geometry.layers) - window_layers
    return [geometry.layers[:n_full], *([geometry.layers[n_full:]] if window_layers else [])]
