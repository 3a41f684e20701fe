"""The directory's layout in shared memory: one header, then one record for each slot of the arena,
then, from the next page on, the pins of this arena's blocks.

Header, 16 KiB, so that the largest legal registration fits:

    0    8  magic "KVDDIR\\0\\3"
    8    4  record_bytes            12   4  block_tokens
    16   4  slots                   20   4  length of the registration
    24   8  stride_bytes            32   8  xxh3-64 of bytes 0..32 and of the registration
    40  ..  the registration: MessagePack map of tenant, name, fingerprint, format, layers, boot
    16376 8 life: how many daemons have served this directory, the first one included

Record of slot i, at 16384 + i * record_bytes, little-endian:

    0    8  xxh3-64 of bytes 16 .. record_bytes, or 1 where that is 0; zeroed before, and written
            after everything else
    8    8  last use: a clock that counts uses, not seconds. Not covered by the checksum, since it
            changes alone, in one store; a wrong one would cost nothing but the order of
            eviction
    16   4  number of tokens        20   4  position of the first token
    24  16  key                     40  16  parent's key
    56   8  generation              64   8  xxh3-64 of the payload
    72  4B  tokens, zeros after the last

Pin at place i, at round_up(16384 + slots * record_bytes) + i * 104:

    0    8  xxh3-64 of bytes 16 .. 104, or 1 where that is 0; zeroed before, and written after
            everything else
    8    8  when it ends, a float64: seconds of CLOCK_MONOTONIC, which goes on while the machine
            runs; 0: never. Not covered by the checksum, since it changes alone, in one store: a
            pin that is renewed is there at every moment
    16  16  key of its block
    32   1  length of the owner's name
    33  71  the owner's name, ASCII, 64 bytes at most, then zeros

A record or a pin counts if its checksum is right and not zero; a torn one is recognised by that and
counts as absent. What a slot's bytes are is told by the payload format (payload.py).
"""

import math
import struct
from typing import Any, NamedTuple

import msgpack
import xxhash

from kvd_proto.geometry import PAGE_BYTES, round_up
from kvd_proto.keys import TOKEN_BYTES

MAGIC = b"KVDDIR\0\3"
DIRECTORY_HEADER_BYTES = 4 * PAGE_BYTES
DIRECTORY_CHUNK = 64 * 1024
"""Directories grow by so much: a few hundred records, so that small arenas stay small."""
_HEADER = struct.Struct("<8sIIIIQ")
_BODY = struct.Struct("<II16s16sQQ")
_SUM = struct.Struct("<Q")
_LIFE_OFFSET = DIRECTORY_HEADER_BYTES - _SUM.size
_USED_OFFSET = _SUM.size
_BODY_OFFSET = _USED_OFFSET + _SUM.size
MAX_PINS = 1 << 14
"""Places for pins in one directory. Those that were never used have no memory."""
MAX_OWNER = 64
"""ASCII letters of an owner's name."""
_PIN_BODY = struct.Struct(f"<16s{1 + MAX_OWNER}p7x")
_EXPIRES = struct.Struct("<d")
PIN_BYTES = _SUM.size + _EXPIRES.size + _PIN_BODY.size


class Record(NamedTuple):
    """A sealed block, as the directory tells it. `tokens` are little-endian u32."""

    start: int
    tokens: bytes
    key: bytes
    parent_key: bytes
    generation: int
    checksum: int


class PinEntry(NamedTuple):
    """A pin, as the directory tells it: `owner` keeps the block of this key, and all above it,
    until `expires` (seconds of CLOCK_MONOTONIC; 0.0: for ever)."""

    key: bytes
    owner: str
    expires: float


class Header(NamedTuple):
    """What a directory is for; `registration` names the model and its geometry."""

    block_tokens: int
    slots: int
    stride_bytes: int
    registration: dict[str, Any]


def record_bytes(block_tokens: int) -> int:
    """Bytes of one record."""
    return _BODY_OFFSET + _BODY.size + TOKEN_BYTES * block_tokens


def directory_bytes_for(slots: int, block_tokens: int) -> int:
    """Bytes of a directory that has records for `slots` slots, in whole pages."""
    return round_up(DIRECTORY_HEADER_BYTES + slots * record_bytes(block_tokens))


def directory_growth(high_water: int, slots: int, block_tokens: int) -> int:
    """Bytes of a directory for `slots` slots, from its start, that have memory once those below
    `high_water` have been used: whole chunks, or all of it."""
    if not high_water:
        return DIRECTORY_HEADER_BYTES
    wanted = round_up(directory_bytes_for(high_water, block_tokens), DIRECTORY_CHUNK)
    return min(wanted, directory_bytes_for(slots, block_tokens))


def slots_recorded(directory_bytes: int, slots: int, block_tokens: int) -> int:
    """So many of `slots`, from the first one, have room for their records in the first
    `directory_bytes` of the directory."""
    room = max(0, directory_bytes - DIRECTORY_HEADER_BYTES)
    return min(slots, room // record_bytes(block_tokens))


def record_offset(slot: int, block_tokens: int) -> int:
    """Where the record of `slot` begins in the directory."""
    return DIRECTORY_HEADER_BYTES + slot * record_bytes(block_tokens)


def write_record(
    directory: memoryview, slot: int, block_tokens: int, record: Record, last_use: int
) -> None:
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
    directory[offset + _USED_OFFSET : end] = _SUM.pack(last_use) + body
    _store(directory, offset, xxhash.xxh3_64_intdigest(body) or 1)


def drop_record(directory: memoryview, slot: int, block_tokens: int) -> None:
    """Make the slot's record absent."""
    offset = record_offset(slot, block_tokens)
    _store(directory, offset, 0)


def write_last_use(directory: memoryview, slot: int, block_tokens: int, last_use: int) -> None:
    """Say that the slot's block was used; its record stays as it is."""
    _store(directory, record_offset(slot, block_tokens) + _USED_OFFSET, last_use)


def read_last_use(directory: memoryview, slot: int, block_tokens: int) -> int:
    """What was last written as the slot's last use."""
    (last_use,) = _SUM.unpack_from(directory, record_offset(slot, block_tokens) + _USED_OFFSET)
    return int(last_use)


def write_life(directory: memoryview, life: int) -> None:
    """Say which daemon, counted from 1, serves this directory now."""
    _store(directory, _LIFE_OFFSET, life)


def read_life(directory: memoryview) -> int:
    """Which daemon served this directory last."""
    (life,) = _SUM.unpack_from(directory, _LIFE_OFFSET)
    return int(life)


def read_record(directory: memoryview, slot: int, block_tokens: int) -> Record | None:
    """The record of `slot`, or None if it is absent or torn."""
    offset = record_offset(slot, block_tokens)
    (checksum,) = _SUM.unpack_from(directory, offset)
    if checksum == 0:
        return None
    body = bytes(directory[offset + _BODY_OFFSET : offset + record_bytes(block_tokens)])
    if checksum != (xxhash.xxh3_64_intdigest(body) or 1):
        return None
    n_tokens, start, key, parent_key, generation, payload_sum = _BODY.unpack_from(body)
    if n_tokens > block_tokens:
        return None
    tokens = body[_BODY.size : _BODY.size + TOKEN_BYTES * n_tokens]
    return Record(start, tokens, key, parent_key, generation, payload_sum)


def is_absent(directory: memoryview, offset: int) -> bool:
    """Whether nothing is said where a record or a pin begins: what is there and is no whole one, is
    torn."""
    (checksum,) = _SUM.unpack_from(directory, offset)
    return bool(checksum == 0)


def pins_offset(slots: int, block_tokens: int) -> int:
    """Where the pins begin in the directory: on a page of their own."""
    return round_up(record_offset(slots, block_tokens))


def directory_length(slots: int, block_tokens: int) -> int:
    """Bytes of the whole segment, of which most have no memory."""
    return pins_offset(slots, block_tokens) + round_up(MAX_PINS * PIN_BYTES)


def write_pin(directory: memoryview, offset: int, pin: PinEntry) -> None:
    """Write a pin so that at every moment it is whole or recognisably torn. `offset` is that of its
    place."""
    body = _PIN_BODY.pack(pin.key, pin.owner.encode("ascii"))
    drop_pin(directory, offset)
    directory[offset + _SUM.size : offset + PIN_BYTES] = _EXPIRES.pack(pin.expires) + body
    _store(directory, offset, xxhash.xxh3_64_intdigest(body) or 1)


def renew_pin(directory: memoryview, offset: int, expires: float) -> None:
    """Say when a pin ends now; it is there at every moment."""
    start = offset + _SUM.size
    directory[start : start + _EXPIRES.size] = _EXPIRES.pack(expires)


def drop_pin(directory: memoryview, offset: int) -> None:
    """Make the pin at this place absent."""
    _store(directory, offset, 0)


def read_pin(directory: memoryview, offset: int) -> PinEntry | None:
    """The pin at this place, or None if it is absent or torn."""
    (checksum,) = _SUM.unpack_from(directory, offset)
    if checksum == 0:
        return None
    body = bytes(directory[offset + _SUM.size + _EXPIRES.size : offset + PIN_BYTES])
    if checksum != (xxhash.xxh3_64_intdigest(body) or 1):
        return None
    key, owner = _PIN_BODY.unpack(body)
    (expires,) = _EXPIRES.unpack_from(directory, offset + _SUM.size)
    if not owner or not owner.isascii() or not 0 <= expires < math.inf:
        return None
    return PinEntry(key, owner.decode("ascii"), expires)


def _store(directory: memoryview, offset: int, number: int) -> None:
    """Write 8 bytes at once: pack_into() would write them one by one, and a crash could come
    between."""
    directory[offset : offset + _SUM.size] = _SUM.pack(number)


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
    if len(whole) > _LIFE_OFFSET:
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
    end = min(first + length, _LIFE_OFFSET)
    registration = bytes(directory[first:end])
    if (
        magic != MAGIC
        or len(registration) != length
        or size != record_bytes(block_tokens)
        or checksum != xxhash.xxh3_64_intdigest(fixed + registration)
    ):
        return None
    return Header(block_tokens, slots, stride, msgpack.unpackb(registration))
