"""Whatever the bytes: a checked message or BadMessage, in little time and memory.

KVD_FUZZ is how many inputs there are, 120,000 unless set; each goes through all three decoders.
"""

import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd_proto import codec
from kvd_proto.errors import BadMessage
from kvd_proto.messages import (
    MAX_TOKENS,
    OPERATIONS,
    Alloc,
    Append,
    RegisterModel,
    Reported,
    Status,
)
from tests.proto.shapes import ANYTHING, example, fields_of, largest, message_classes, pack

N_FUZZ = int(os.environ.get("KVD_FUZZ", "120000"))
REQUESTS = [op.request for op in OPERATIONS]


def _decode_any_reply(frame: bytes) -> Any:
    return codec.decode_reply(frame, _EVERY_REQUEST)


class _EveryRequest(dict[int, type[Any]]):
    """Every correlation is open, and asked something."""

    def get(self, correlation: int, default: Any = None) -> Any:
        return REQUESTS[correlation % len(REQUESTS)]


_EVERY_REQUEST = _EveryRequest()
DECODERS: tuple[Callable[[bytes], Any], ...] = (
    codec.decode_request,
    _decode_any_reply,
    codec.decode_datagram,
)


def _seeds(rng: random.Random) -> list[bytes]:
    """A few valid frames of every kind."""
    frames = []
    for cls in message_classes():
        values = [example(field.check) for field in fields_of(cls)]
        large = [largest(field.check) for field in fields_of(cls)]
        short = [len(msgpack.packb(value)) < 200 for value in large]
        large = [
            each if fits else small for each, fits, small in zip(large, short, values, strict=True)
        ]
        frames += [pack(cls, values, rng.randrange(20)), pack(cls, large, rng.randrange(1 << 64))]
    tokens = struct.pack("<40I", *range(40))
    frames.append(codec.encode_request(1, Append(1, 2, 3, 0, tokens, struct.pack("<2Q", 1, 2))))
    layer = ["f16", 384, "f16", 384]
    frames.append(
        codec.encode_request(1, RegisterModel("m", b"f" * 32, "llama-state", 32, [layer] * 4))
    )
    return frames


# Bytes that begin something: arrays, maps, strings, byte strings, extensions, with huge lengths.
_HEADS = (
    b"\x80", b"\x81", b"\x8f", b"\x90", b"\x91", b"\x9f", b"\xa0", b"\xbf", b"\xc0", b"\xc1",
    b"\xc4\xff", b"\xc5\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff",
    b"\xc7\x00\xff", b"\xc7\xff\x01", b"\xc9\xff\xff\xff\xff\x05", b"\xca\x7f\xc0\x00\x00",
    b"\xcb\xff\xf0\x00\x00\x00\x00\x00\x00", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7,
    b"\xd4\xff\x00", b"\xd6\xff\x00\x00\x00\x00", b"\xd7\xff" + b"\xff" * 8, b"\xd8\x01",
    b"\xd9\xff", b"\xda\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdc\xff\xff",
    b"\xdd\xff\xff\xff\xff", b"\xdd\x00\x10\x00\x00", b"\xde\xff\xff", b"\xdf\xff\xff\xff\xff",
    b"\x82\xa1a\x01\xa1a\x02", b"\x81\x90\x01", b"\x81\x01\x01", b"\xa2\xed\xa0", b"\xe0", b"\xff",
)  # fmt: skip


def _mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    frame = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(frame) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(frame):
            frame[at] = rng.randrange(256)
        elif kind == 1 and at < len(frame):
            frame[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            frame[at:at] = rng.choice(_HEADS)
        elif kind == 3:
            frame[at : at + rng.randrange(4)] = rng.choice(_HEADS)
        elif kind == 4:
            del frame[at:]
        elif kind == 5:
            frame[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        else:
            other = rng.choice(seeds)
            frame[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(frame)


def _fuzz(frames: Iterator[bytes]) -> int:
    """Decode every frame in every way; anything but a result or BadMessage comes out. Returns how
    many were messages."""
    messages = longest = 0
    for frame in frames:
        for decoder in DECODERS:
            try:
                decoder(frame)
                messages += 1
            except BadMessage as error:
                longest = max(longest, len(str(error)))
    assert longest < 1000
    return messages


def test_fuzz_random_bytes() -> None:
    rng = random.Random(20260701)
    _fuzz(rng.randbytes(rng.randrange(60)) for _ in range(N_FUZZ // 4))
    # An array of the right length gets past the first check.
    heads = [bytes([0x90 + n, code]) for n in range(1, 9) for code in range(15)]
    _fuzz(rng.choice(heads) + rng.randbytes(rng.randrange(30)) for _ in range(N_FUZZ // 4))


def test_fuzz_mutated_messages() -> None:
    rng = random.Random(20260702)
    seeds = _seeds(rng)
    messages = _fuzz(_mutate(rng, seeds) for _ in range(N_FUZZ // 2))
    assert messages > N_FUZZ // 100, "the mutations are too wild to test anything behind the start"


@settings(max_examples=300)
@given(start=st.lists(st.integers(0, 16), max_size=2), fields=st.lists(ANYTHING, max_size=8))
def test_fuzz_well_formed_arrays(start: list[int], fields: list[Any]) -> None:
    _fuzz(iter([msgpack.packb([*start, *fields])]))


@pytest.mark.parametrize("depth", [10, 400, 511, 512, 513, 900, 1000, 1023, 1024, 1025, 100_000])
@pytest.mark.parametrize("head", [b"\x91", b"\x81\xa0", b"\xdc\x00\x01", b"\x92\x01", b"\x95\x05"])
def test_nested_values_are_refused(head: bytes, depth: int) -> None:
    for prefix in (b"", b"\x92", b"\x92\x0b", b"\x98\x05\x07", b"\x93\x07\x00", b"\x93\x07\x01"):
        for end in (b"\x90", b"\x00", b"\x80", b""):
            frame = prefix + head * depth + end
            _fuzz(iter([frame]))
            with pytest.raises(BadMessage):
                codec.decode_request(frame + b"\x00" * (frame[:1] == b"\x92"))


def test_duplicate_keys_and_foreign_types_are_refused_in_requests() -> None:
    for value in (
        b"\x82\xa1a\x01\xa1a\x02",  # a key twice
        b"\xc7\x00\x05",  # an extension without data
        b"\xd4\x05\x00",  # an extension of one byte
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xd7\xff\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # not a number
    ):
        with pytest.raises(BadMessage):
            codec.decode_request(b"\x93\x04\x07" + value)
        with pytest.raises(BadMessage):
            codec.decode_datagram(b"\x94\x01\x01\xa1c" + value)


@pytest.mark.parametrize(
    "value",
    [
        b"\xc7\x01\x05\x00",  # an extension of one byte
        b"\xd4\x05\x00",
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\x81\x01\x01",  # keys that are no text
        b"\x81\xc0\x01",
        b"\x81\x90\x01",
        b"\x81\xca\x00\x00\x00\x00\x01",
    ],
)
def test_reports_hold_only_plain_values(value: bytes) -> None:
    good = b"\x93\x07\x00\x81\xa1a" + b"\x01"
    assert codec.decode_reply(good, {7: Status}).body == Reported({"a": 1})
    with pytest.raises(BadMessage, match="not a MessagePack message"):
        codec.decode_reply(good[:-1] + value, {7: Status})


def test_last_of_equal_keys_counts_in_replies() -> None:
    frame = b"\x93\x07\x00" + b"\x82\xa1a\x01\xa1a\x02"
    assert codec.decode_reply(frame, {7: Status}).body == Reported({"a": 2})


LIMIT = codec.MAX_MESSAGE_BYTES
EMPTIES = b"\xdc\x02\x00" + b"\x90" * 512
MAPS = b"\xdc\x02\x00" + b"\x80" * 512
WIDE_LETTERS = b"\xda\xff\xff" + "\N{GRINNING FACE}".encode() + b"x" * 65531
BOMBS: dict[str, Callable[[], bytes]] = {
    "many messages": lambda: b"\x90" * LIMIT,
    "empty arrays": lambda: b"\xdc\x02\x00" + EMPTIES * 512,
    "empty maps": lambda: b"\xdc\x02\x00" + MAPS * 512,
    "arrays of arrays": lambda: b"\xdc\x00\x3e" + (b"\xdc\x02\x00" + EMPTIES * 512) * 62,
    "wide and deep": lambda: (b"\xdc\x02\x00" + b"\x90" * 511) * 30_000,
    "wide and deep, of maps": lambda: (b"\xdc\x02\x00" + b"\x80" * 511) * 30_000,
    "deep, nothing in it": lambda: b"\xdc\x02\x00" * 300_000,
    "huge arrays declared": lambda: b"\xdd\x00\x10\x00\x00" * 10_000,
    "huge byte string declared": lambda: b"\x92\x05\xc6\xff\xff\xff\xff",
    "small arrays, deep": lambda: b"\x98" * (LIMIT // 2),
    "letters of four bytes": lambda: b"\xdc\x01\x00" + WIDE_LETTERS * 255,
    "too short to be counted": lambda: b"\x98" + EMPTIES * 120,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_hostile_requests_take_little_memory(bomb: str) -> None:
    """16 MiB of empty maps could become 1.2 GB: a request may take a few times its own length."""
    frame = BOMBS[bomb]()
    assert len(frame) <= LIMIT
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage):
            codec.decode_request(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(frame) + (48 << 20)


def test_frames_beyond_the_limit_are_refused_unread() -> None:
    frame = b"\x92\x01\x07" + b"\x00" * codec.MAX_MESSAGE_BYTES
    for decoder in DECODERS:
        with pytest.raises(BadMessage, match="at most"):
            decoder(frame)
    with pytest.raises(BadMessage, match="at most"):
        codec.decode_datagram(b"\x00" * (codec.MAX_DATAGRAM_BYTES + 1))


@pytest.mark.parametrize("n_tokens", [MAX_TOKENS + 1, 3 * MAX_TOKENS])
def test_too_many_tokens_are_answered_to_whoever_sent_them(n_tokens: int) -> None:
    frame = codec.encode_request(77, Alloc(1, "", b"\0" * 4 * n_tokens, 0, 0, 0))
    with pytest.raises(BadMessage, match=r"Alloc\.tokens") as caught:
        codec.decode_request(frame)
    assert caught.value.details["correlation"] == 77


@pytest.mark.parametrize(
    ("frame", "correlation"),
    [
        (b"\x93\x05\x4d", 77),  # cut off
        (b"\x93\x05\xcf" + b"\xff" * 8, (1 << 64) - 1),
        (b"\xdd\x00\x00\x00\x03\xcf" + b"\x00" * 7 + b"\x05\xcf" + b"\x00" * 7 + b"\x4d\xc1", 77),
        (b"\x93\x05\x4d\x81\xa0\xa0", 77),  # a map
        (b"\x92\x05\x4d\x00", 77),  # more than a message
        (b"\x93\xa4ping\x4d\xc1", 77),
        (b"\x93\x05\xff\xc1", None),  # negative
        (b"\x93\x05\xc3\xc1", None),  # true
        (b"\x93\x05\xc1", None),
        (b"\x93\xc1", None),
        (b"\xc1", None),
        (b"", None),
    ],
)
def test_correlation_is_found_in_what_cannot_be_decoded(
    frame: bytes, correlation: int | None
) -> None:
    with pytest.raises(BadMessage, match="not a MessagePack message") as caught:
        codec.decode_request(frame)
    assert caught.value.details.get("correlation") == correlation
