"""The directory's layout in shared memory: one header, then one record for each slot of the arena.

Header, 16 KiB, so that the largest legal registration fits:

    0    8  magic "KVDDIR\\0\\1"
    8    4  record_bytes            12   4  block_tokens
    16   4  slots                   20   4  length of the registration
    24   8  stride_bytes            32   8  xxh3-64 of bytes 0..32 and of the registration
    40  ..  the registration: MessagePack map of tenant, name, fingerprint, format, layers

Record of slot i, at 16384 + i * record_bytes, little-endian:

    0    8  xxh3-64 of bytes 8 .. record_bytes, or 1 where that is 0; zeroed before, and written
            after everything else
    8    4  number of tokens        12   4  position of the first token
    16  16  key                     32  16  parent's key
    48   8  generation              56   8  xxh3-64 of the payload
    64  4B  tokens, zeros after the last

A record counts if its checksum is right and not zero; a torn one is recognised by that and counts
as absent. What a slot's bytes are is told by the payload format (payload.py).
"""

import struct
from typing import Any, NamedTuple

import msgpack
import xxhash

from kvd_proto.geometry import PAGE_BYTES
from kvd_proto.keys import TOKEN_BYTES

MAGIC = b"KVDDIR\0\1"
DIRECTORY_HEADER_BYTES = 4 * PAGE_BYTES
_HEADER = struct.Struct("<8sIIIIQ")
_BODY = struct.Struct("<II16s16sQQ")
_SUM = struct.Struct("<Q")


class Record(NamedTuple):
    """A sealed block, as the directory tells it. `tokens` are little-endian u32."""

    start: int
    tokens: bytes
    key: bytes
    parent_key: bytes
    generation: int
    checksum: int


class Header(NamedTuple):
    """What a directory is for; `registration` names the model and its geometry."""

    block_tokens: int
    slots: int
    stride_bytes: int
    registration: dict[str, Any]


def record_bytes(block_tokens: int) -> int:
    """Bytes of one record."""
    return _SUM.size + _BODY.size + TOKEN_BYTES * block_tokens


def record_offset(slot: int, block_tokens: int) -> int:
    """Where the record of `slot` begins in the directory."""
    return DIRECTORY_HEADER_BYTES + slot * record_bytes(block_tokens)


def write_record(directory: memoryview, slot: int, block_tokens: int, record: Record) -> None:
    """Write a record so that at every moment it is whole or recognisably torn."""
    offset = record_offset(slot, block_tokens)
    end = offset + record_bytes(block_tokens)
    body = _BODY.pack(
        len(record.tokens) // TOKEN_BYTES,
        record.start,
        record.key,
        record.parent_key,
        record.generation,
        record.checksum,
    )
    body += record.tokens.ljust(TOKEN_BYTES * block_tokens, b"\0")
    drop_record(directory, slot, block_tokens)
    directory[offset + _SUM.size : end] = body
    directory[offset : offset + _SUM.size] = _SUM.pack(xxhash.xxh3_64_intdigest(body) or 1)


def drop_record(directory: memoryview, slot: int, block_tokens: int) -> None:
    """Make the slot's record absent."""
    offset = record_offset(slot, block_tokens)
    directory[offset : offset + _SUM.size] = _SUM.pack(0)


def read_record(directory: memoryview, slot: int, block_tokens: int) -> Record | None:
    """The record of `slot`, or None if it is absent or torn."""
    offset = record_offset(slot, block_tokens)
    (checksum,) = _SUM.unpack_from(directory, offset)
    if checksum == 0:
        return None
    body = bytes(directory[offset + _SUM.size : offset + record_bytes(block_tokens)])
    if checksum != (xxhash.xxh3_64_intdigest(body) or 1):
        return None
    n_tokens, start, key, parent_key, generation, payload_sum = _BODY.unpack_from(body)
    if n_tokens > block_tokens:
        return None
    tokens = body[_BODY.size : _BODY.size + TOKEN_BYTES * n_tokens]
    return Record(start, tokens, key, parent_key, generation, payload_sum)


def write_header(directory: memoryview, header: Header) -> None:
    """Write the header; raises ValueError if the registration does not fit its page."""
    registration = msgpack.packb(header.registration)
    fixed = _HEADER.pack(
        MAGIC,
        record_bytes(header.block_tokens),
        header.block_tokens,
        header.slots,
        len(registration),
        header.stride_bytes,
    )
    checksum = _SUM.pack(xxhash.xxh3_64_intdigest(fixed + registration))
    whole = fixed + checksum + registration
    if len(whole) > DIRECTORY_HEADER_BYTES:
        raise ValueError(f"a registration of {len(registration)} bytes does not fit the header")
    directory[: len(whole)] = whole


def read_header(directory: memoryview) -> Header | None:
    """The header, or None if it is not whole or of another format."""
    if len(directory) < DIRECTORY_HEADER_BYTES:
        return None
    fixed = bytes(directory[: _HEADER.size])
    magic, size, block_tokens, slots, length, stride = _HEADER.unpack(fixed)
    (checksum,) = _SUM.unpack_from(directory, _HEADER.size)
    first = _HEADER.size + _SUM.size
    end = min(first + length, DIRECTORY_HEADER_BYTES)
    registration = bytes(directory[first:end])
    if (
        magic != MAGIC
        or len(registration) != length
        or size != record_bytes(block_tokens)
        or checksum != xxhash.xxh3_64_intdigest(fixed + registration)
    ):
        return None
    return Header(block_tokens, slots, stride, msgpack.unpackb(registration))
