"""Blocks in the `llama-state` format, written field by field and not by the code under test."""

import struct

from kvd_proto.geometry import GGML_TYPES, Geometry

MAGIC = 0xAF143CD8


def llama_block(geometry: Geometry, start: int, n_tokens: int, fill: int = 0x11) -> bytearray:
    """A valid block of positions start .. start+n_tokens-1, its rows all `fill`."""
    block = bytearray(struct.pack("<IiII", MAGIC, 0, 1, n_tokens))
    for position in range(start, start + n_tokens):
        block += struct.pack("<iIi", position, 1, 0)
    block += struct.pack("<II", 0, len(geometry.layers))
    for layer in geometry.layers:
        block += struct.pack("<iQ", GGML_TYPES[layer.k_type].ggml_id, layer.k_row_bytes)
        block += bytes([fill]) * (n_tokens * layer.k_row_bytes)
    for layer in geometry.layers:
        block += struct.pack("<iQ", GGML_TYPES[layer.v_type].ggml_id, layer.v_row_bytes)
        block += bytes([fill]) * (n_tokens * layer.v_row_bytes)
    return block


def header_bytes(geometry: Geometry, n_tokens: int) -> list[int]:
    """Offsets of all bytes of a block that are not K/V rows."""
    offsets = list(range(16 + 12 * n_tokens + 8))
    at = len(offsets)
    rows = [layer.k_row_bytes for layer in geometry.layers]
    rows += [layer.v_row_bytes for layer in geometry.layers]
    for row in rows:
        offsets += range(at, at + 12)
        at += 12 + n_tokens * row
    return offsets
