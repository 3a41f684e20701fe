"""The directory: what was written comes back whole, or is recognisably not there."""

import random
import struct
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvd_proto import layout
from kvd_proto.geometry import MAX_ROW_BYTES, Geometry
from kvd_proto.layout import DIRECTORY_HEADER_BYTES, Header, Record
from kvd_proto.messages import RegisterModel
from tests.proto.shapes import legal_message

BLOCK_TOKENS = 5
SIZE = layout.record_bytes(BLOCK_TOKENS)
OLD = Record(0, struct.pack("<5I", 1, 2, 3, 4, 5), b"k" * 16, b"p" * 16, 7, 0x1122334455667788)
USED = 0x99AABBCCDDEEFF00
NEW = Record(5, struct.pack("<2I", 9, 8), b"K" * 16, b"P" * 16, 8, (1 << 64) - 1)

RECORDS = st.builds(
    Record,
    st.integers(0, (1 << 32) - 1),
    st.integers(1, BLOCK_TOKENS).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n)),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
)


class Written(NamedTuple):
    """One assignment to a range of the directory."""

    offset: int
    content: bytes


class Recorder:
    """Stands in for a directory, and remembers what is written where, in order."""

    def __init__(self) -> None:
        self.writes: list[Written] = []

    def __setitem__(self, where: slice, content: bytes) -> None:
        assert where.step is None
        assert where.stop - where.start == len(content)
        self.writes.append(Written(where.start, bytes(content)))


def directory(n_slots: int = 3) -> memoryview:
    return memoryview(bytearray(DIRECTORY_HEADER_BYTES + n_slots * SIZE))


def content_of(memory: bytes | bytearray | memoryview) -> bytes:
    """Slot 1's record without its last use, which is told apart from the record."""
    first = layout.record_offset(1, BLOCK_TOKENS)
    return bytes(memory[first : first + 8]) + bytes(memory[first + 16 : first + SIZE])


def read(memory: memoryview, slot: int = 1) -> Record | None:
    return layout.read_record(memory, slot, BLOCK_TOKENS)


# --- records


def test_a_record_has_72_bytes_and_its_tokens() -> None:
    assert layout.record_bytes(32) == 72 + 4 * 32
    assert layout.record_offset(0, 32) == 16384
    assert layout.record_offset(3, 32) == 16384 + 3 * 200


@given(record=RECORDS, slot=st.integers(0, 2))
def test_a_record_comes_back_as_it_was_written(record: Record, slot: int) -> None:
    memory = directory()
    layout.write_record(memory, slot, BLOCK_TOKENS, record, USED)
    assert [read(memory, each) == record for each in range(3)] == [
        each == slot for each in range(3)
    ]
    others = bytes(memory[: layout.record_offset(slot, BLOCK_TOKENS)])
    others += bytes(memory[layout.record_offset(slot + 1, BLOCK_TOKENS) :])
    assert not any(others), "it wrote outside of its slot"
    layout.drop_record(memory, slot, BLOCK_TOKENS)
    assert read(memory, slot) is None


def test_a_later_record_replaces_an_earlier_one() -> None:
    memory = directory()
    for record in (OLD, NEW, OLD):
        layout.write_record(memory, 1, BLOCK_TOKENS, record, USED)
        assert read(memory) == record


def test_an_empty_directory_has_no_records() -> None:
    assert [read(directory(), slot) for slot in range(3)] == [None] * 3


@given(first=st.integers(0, (1 << 64) - 1), second=st.integers(0, (1 << 64) - 1))
def test_the_last_use_changes_alone(first: int, second: int) -> None:
    memory = directory()
    layout.write_record(memory, 1, BLOCK_TOKENS, OLD, first)
    assert layout.read_last_use(memory, 1, BLOCK_TOKENS) == first
    layout.write_last_use(memory, 1, BLOCK_TOKENS, second)
    assert layout.read_last_use(memory, 1, BLOCK_TOKENS) == second
    assert read(memory) == OLD
    assert not any(memory[: layout.record_offset(1, BLOCK_TOKENS)])
    assert not any(memory[layout.record_offset(2, BLOCK_TOKENS) :])


def test_a_life_is_told_apart_from_the_header() -> None:
    memory = directory()
    header = Header(1024, 7, 4096, largest_registration())
    layout.write_life(memory, 1)
    layout.write_header(memory, header)
    whole = layout.read_header(memory)
    assert whole is not None
    layout.write_life(memory, (1 << 64) - 1)
    assert layout.read_life(memory) == (1 << 64) - 1
    assert layout.read_header(memory) == whole
    assert not any(memory[DIRECTORY_HEADER_BYTES:])


def test_a_record_that_cannot_be_written_leaves_the_old_one() -> None:
    memory = directory()
    layout.write_record(memory, 1, BLOCK_TOKENS, OLD, USED)
    with pytest.raises(struct.error):
        layout.write_record(memory, 1, BLOCK_TOKENS, NEW._replace(generation=1 << 64), USED)
    assert read(memory) == OLD


@pytest.mark.parametrize("before", [None, OLD, NEW])
@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_a_record_torn_at_any_byte_is_absent(before: Record | None, order: str) -> None:
    """The writer may die after any byte. Within one range bytes may be written in any order."""
    recorder: Any = Recorder()
    layout.write_record(recorder, 1, BLOCK_TOKENS, NEW, USED)
    memory = directory()
    if before is not None:
        layout.write_record(memory, 1, BLOCK_TOKENS, before, USED)
    untouched = bytes(memory)
    rng = random.Random(3)
    steps = []
    for write in recorder.writes:
        part = [(write.offset + index, byte) for index, byte in enumerate(write.content)]
        if order == "backwards":
            part.reverse()
        elif order == "shuffled":
            rng.shuffle(part)
        steps += part
    finished = bytearray(untouched)
    for offset, byte in steps:
        finished[offset] = byte
    seen = []
    for offset, byte in steps:
        memory[offset] = byte
        found = read(memory)
        seen.append(found)
        if content_of(memory) == content_of(finished):
            assert found == NEW
        elif content_of(memory) != content_of(untouched):
            assert found is None
    assert len(seen) == 8 + SIZE
    assert seen[-1] == NEW
    assert seen.count(None) >= SIZE - 8
    assert read(memory, 0) is read(memory, 2) is None


def test_no_damaged_record_is_taken_for_a_record() -> None:
    memory = directory()
    layout.write_record(memory, 1, BLOCK_TOKENS, OLD, USED)
    first = layout.record_offset(1, BLOCK_TOKENS)
    for offset in [*range(first, first + 8), *range(first + 16, first + SIZE)]:
        for bit in range(8):
            memory[offset] ^= 1 << bit
            assert read(memory) is None
            memory[offset] ^= 1 << bit
    assert read(memory) == OLD


@given(noise=st.binary(min_size=SIZE, max_size=SIZE))
def test_noise_is_no_record(noise: bytes) -> None:
    memory = directory()
    memory[layout.record_offset(1, BLOCK_TOKENS) : layout.record_offset(2, BLOCK_TOKENS)] = noise
    assert read(memory) is None


def test_a_record_of_too_many_tokens_is_none_even_if_its_checksum_is_right() -> None:
    recorder: Any = Recorder()
    layout.write_record(recorder, 1, 6, Record(0, bytes(24), bytes(16), bytes(16), 1, 1), USED)
    memory = memoryview(bytearray(DIRECTORY_HEADER_BYTES + 2 * layout.record_bytes(6)))
    for offset, content in recorder.writes:
        memory[offset : offset + len(content)] = content
    assert layout.read_record(memory, 1, 6) is not None
    body = bytearray(memory[layout.record_offset(1, 6) + 16 : layout.record_offset(2, 6)])
    struct.pack_into("<I", body, 0, 7)
    memory[layout.record_offset(1, 6) + 16 : layout.record_offset(2, 6)] = body
    struct.pack_into(
        "<Q", memory, layout.record_offset(1, 6), layout.xxhash.xxh3_64_intdigest(body)
    )
    assert layout.read_record(memory, 1, 6) is None


# --- pins

PIN = layout.PinEntry(b"k" * 16, "team-a", 1234.5)
OTHER_PIN = layout.PinEntry(b"K" * 16, "o" * layout.MAX_OWNER, 0.0)
PINS = st.builds(
    layout.PinEntry,
    st.binary(min_size=16, max_size=16),
    st.text(st.characters(codec="ascii"), min_size=1, max_size=layout.MAX_OWNER),
    st.floats(0, allow_infinity=False, allow_nan=False),
)


def places() -> memoryview:
    return memoryview(bytearray(3 * layout.PIN_BYTES))


@given(pin=PINS, place=st.integers(0, 2))
def test_a_pin_comes_back_as_it_was_written(pin: layout.PinEntry, place: int) -> None:
    memory = places()
    layout.write_pin(memory, place * layout.PIN_BYTES, pin)
    found = [layout.read_pin(memory, each * layout.PIN_BYTES) for each in range(3)]
    assert found == [pin if each == place else None for each in range(3)]
    layout.drop_pin(memory, place * layout.PIN_BYTES)
    assert layout.read_pin(memory, place * layout.PIN_BYTES) is None


@pytest.mark.parametrize("before", [None, OTHER_PIN])
@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_a_pin_torn_at_any_byte_is_absent(before: layout.PinEntry | None, order: str) -> None:
    recorder: Any = Recorder()
    layout.write_pin(recorder, 0, PIN)
    memory = places()
    if before is not None:
        layout.write_pin(memory, 0, before)
    rng = random.Random(3)
    steps = []
    for write in recorder.writes:
        part = [(write.offset + index, byte) for index, byte in enumerate(write.content)]
        if order == "backwards":
            part.reverse()
        elif order == "shuffled":
            rng.shuffle(part)
        steps += part
    seen = []
    for offset, byte in steps:
        memory[offset] = byte
        seen.append(layout.read_pin(memory, 0))
    whole = seen.index(PIN)
    assert seen[whole:] == [PIN] * (len(seen) - whole)
    assert len(seen) - whole < 8, "before its checksum was written"
    assert set(seen[:whole]) <= {None, before}
    assert seen[7] is None, "not cleared before"


def test_a_pin_that_is_renewed_is_there_at_every_moment() -> None:
    recorder: Any = Recorder()
    layout.renew_pin(recorder, 0, 99.25)
    ((offset, content),) = recorder.writes
    assert (offset % 8, len(content)) == (0, 8), "one aligned store"
    memory = places()
    layout.write_pin(memory, 0, PIN)
    layout.renew_pin(memory, 0, 99.25)
    assert layout.read_pin(memory, 0) == PIN._replace(expires=99.25)


def test_no_damaged_pin_is_taken_for_a_pin() -> None:
    memory = places()
    layout.write_pin(memory, 0, PIN)
    for offset in [*range(8), *range(16, layout.PIN_BYTES)]:
        for bit in range(8):
            memory[offset] ^= 1 << bit
            assert layout.read_pin(memory, 0) is None
            memory[offset] ^= 1 << bit
    assert layout.read_pin(memory, 0) == PIN


@pytest.mark.parametrize("expires", [-1.0, float("nan"), float("inf"), float("-inf")])
def test_a_pin_that_ends_at_no_time_is_none(expires: float) -> None:
    memory = places()
    layout.write_pin(memory, 0, PIN)
    layout.renew_pin(memory, 0, expires)
    assert layout.read_pin(memory, 0) is None


@pytest.mark.parametrize("name", [b"", b"\xc3\xa9t\xc3\xa9"])
def test_a_pin_of_nobody_is_none_even_if_its_checksum_is_right(name: bytes) -> None:
    memory = places()
    body = b"k" * 16 + bytes([len(name)]) + name.ljust(layout.PIN_BYTES - 33, b"\0")
    checksum = struct.pack("<Q", layout.xxhash.xxh3_64_intdigest(body))
    memory[: layout.PIN_BYTES] = checksum + bytes(8) + body
    assert layout.read_pin(memory, 0) is None


def test_pins_lie_behind_all_records_on_pages_of_their_own() -> None:
    for slots in (1, 3, 1000):
        start = layout.pins_offset(slots, BLOCK_TOKENS)
        assert start % 4096 == 0
        assert 0 <= start - layout.record_offset(slots, BLOCK_TOKENS) < 4096
        end = start + layout.MAX_PINS * layout.PIN_BYTES
        assert 0 <= layout.directory_length(slots, BLOCK_TOKENS) - end < 4096
    assert layout.PIN_BYTES % 8 == 0


# --- the header


def registration_of(message: RegisterModel, tenant: str = "default") -> dict[str, Any]:
    return {
        "tenant": tenant,
        "name": message.name,
        "fingerprint": message.fingerprint,
        "format": message.payload_format,
        "layers": Geometry.from_wire(message.layers).layers,
        "boot": b"b" * 16,
    }


@given(
    message=legal_message(RegisterModel),
    slots=st.integers(0, (1 << 32) - 1),
    stride=st.integers(0, (1 << 64) - 1),
)
def test_a_header_comes_back_as_it_was_written(
    message: RegisterModel, slots: int, stride: int
) -> None:
    assume(any(k_bytes or v_bytes for _, k_bytes, _, v_bytes in message.layers))
    memory = directory()
    layout.write_header(
        memory, Header(message.block_tokens, slots, stride, registration_of(message))
    )
    found = layout.read_header(memory)
    assert found is not None
    assert found[:3] == (message.block_tokens, slots, stride)
    layers = found.registration.pop("layers")
    assert Geometry.from_wire(layers) == Geometry.from_wire(message.layers)
    assert found.registration == {
        "tenant": "default",
        "name": message.name,
        "fingerprint": message.fingerprint,
        "format": message.payload_format,
        "boot": b"b" * 16,
    }


def largest_registration() -> dict[str, Any]:
    layer = ["x" * 8, MAX_ROW_BYTES, "x" * 8, MAX_ROW_BYTES]
    wide = "\N{GRINNING FACE}" * 200
    message = RegisterModel(wide, b"f" * 32, "llama-state", 1024, [layer] * 512)
    return registration_of(message, tenant="x" * 200)


def test_the_largest_legal_registration_fits_the_header() -> None:
    memory = directory()
    header = Header(1024, (1 << 32) - 1, (1 << 64) - 1, largest_registration())
    layout.write_header(memory, header)
    assert layout.read_header(memory) is not None
    assert not any(memory[DIRECTORY_HEADER_BYTES:]), "it wrote into the first record"


def test_a_registration_that_does_not_fit_is_refused_before_anything_is_written() -> None:
    memory = directory()
    too_large = {**largest_registration(), "more": "x" * 4096}
    with pytest.raises(ValueError, match="does not fit"):
        layout.write_header(memory, Header(1024, 1, 4096, too_large))
    assert not any(memory)


def test_a_header_torn_at_any_byte_is_none() -> None:
    memory = directory()
    layout.write_header(memory, Header(32, 5, 4096, {"tenant": "t", "layers": [["f16", 2]]}))
    whole = bytes(memory)
    length = len(whole.rstrip(b"\0"))
    for end in range(length):
        assert layout.read_header(memoryview(whole[:end] + bytes(len(whole) - end))) is None
    for offset in range(length):
        wrong = bytearray(whole)
        wrong[offset] ^= 0x10
        assert layout.read_header(memoryview(wrong)) is None
    assert layout.read_header(memoryview(whole)) is not None


@pytest.mark.parametrize("length", [DIRECTORY_HEADER_BYTES - 47, 1 << 31, (1 << 32) - 1])
def test_a_header_that_claims_a_long_registration_is_none(length: int) -> None:
    memory = directory(1000)
    struct.pack_into("<8sIIIIQ", memory, 0, layout.MAGIC, 72 + 4 * 32, 32, 5, length, 4096)
    assert layout.read_header(memory) is None


def test_a_header_whose_registration_is_cut_off_is_none_even_if_its_checksum_is_right() -> None:
    memory = directory(1000)
    fixed = struct.pack("<8sIIIIQ", layout.MAGIC, 72 + 4 * 32, 32, 5, 1 << 20, 4096)
    within = bytes([0x80]) * (DIRECTORY_HEADER_BYTES - 48)
    checksum = layout.xxhash.xxh3_64_intdigest(fixed + within)
    memory[: DIRECTORY_HEADER_BYTES - 8] = fixed + struct.pack("<Q", checksum) + within
    assert layout.read_header(memory) is None


@pytest.mark.parametrize("length", [0, 8, 39, 40, DIRECTORY_HEADER_BYTES - 1])
def test_what_is_shorter_than_a_header_is_none(length: int) -> None:
    memory = directory()
    layout.write_header(memory, Header(32, 5, 4096, {"tenant": "t"}))
    assert layout.read_header(memory[:length]) is None
