"""The golden vectors: the code gives these bytes, and reads them."""

import json
import struct
from typing import Any

import pytest
import xxhash

import kvd_proto.messages as m
from kvd_proto import codec, layout
from kvd_proto.errors import BY_CODE, BadMessage
from kvd_proto.geometry import Geometry
from kvd_proto.keys import arena_fingerprint, block_key, root_key
from kvd_proto.payload import ArrayBlock, make_format
from tests.proto.blocks import llama_block
from tests.proto.make_vectors import VECTORS, to_json, vectors
from tests.proto.shapes import wire_name

CLASSES = {wire_name(op.request): op for op in m.OPERATIONS}
KINDS = {wire_name(cls): cls for _, cls in m.DATAGRAMS}


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


def from_json(value: Any) -> Any:
    """The inverse of to_json."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"hex"}:
            return bytes.fromhex(value["hex"])
        return {key: from_json(item) for key, item in value.items()}
    return value


MESSAGES = load("messages.json")
DATAGRAMS = load("datagrams.json")["datagrams"]


@pytest.mark.parametrize("name", vectors())
def test_the_files_are_what_the_code_makes(name: str) -> None:
    assert (VECTORS / name).read_text() == vectors()[name], (
        "run python -m tests.proto.make_vectors, and look at the difference: is it wanted?"
    )


def test_no_file_is_left_over() -> None:
    assert {path.name for path in VECTORS.iterdir()} == set(vectors())


def test_every_operation_error_and_datagram_has_a_vector() -> None:
    assert {each["operation"] for each in MESSAGES["requests"]} == set(CLASSES)
    assert {each["operation"] for each in MESSAGES["replies"]} == set(CLASSES)
    assert {each["code"] for each in MESSAGES["errors"]} == set(BY_CODE)
    assert {each["kind"] for each in DATAGRAMS} == set(KINDS)


@pytest.mark.parametrize("vector", MESSAGES["requests"], ids=lambda v: v["operation"])
def test_requests(vector: Any) -> None:
    cls = CLASSES[vector["operation"]].request
    message = cls(**from_json(vector["fields"]))
    frame = bytes.fromhex(vector["hex"])
    assert codec.encode_request(vector["correlation"], message) == frame
    assert codec.decode_request(frame) == (vector["correlation"], message)


@pytest.mark.parametrize("vector", MESSAGES["replies"], ids=lambda v: v["operation"])
def test_replies(vector: Any) -> None:
    operation = CLASSES[vector["operation"]]
    message = operation.reply(**from_json(vector["fields"]))
    frame = bytes.fromhex(vector["hex"])
    correlation = vector["correlation"]
    assert codec.encode_reply(correlation, message) == frame
    assert codec.decode_reply(frame, {correlation: operation.request}) == (correlation, message)


@pytest.mark.parametrize("vector", MESSAGES["errors"], ids=lambda v: v["code"])
def test_errors(vector: Any) -> None:
    frame = bytes.fromhex(vector["hex"])
    correlation = vector["correlation"]
    error = BY_CODE[vector["code"]](vector["message"], **vector["details"])
    assert codec.encode_error(correlation, error) == frame
    told = codec.decode_reply(frame, {correlation: m.Alloc})
    assert told.correlation == correlation
    assert type(told.body) is type(error)
    assert (told.body.message, told.body.details) == (error.message, error.details)


@pytest.mark.parametrize("vector", MESSAGES["refused_requests"], ids=lambda v: v["why"])
def test_refused_requests(vector: Any) -> None:
    with pytest.raises(BadMessage) as caught:
        codec.decode_request(bytes.fromhex(vector["hex"]))
    assert caught.value.details.get("correlation", 0) == vector["correlation"]


@pytest.mark.parametrize("vector", DATAGRAMS, ids=lambda v: v["kind"])
def test_datagrams(vector: Any) -> None:
    message = KINDS[vector["kind"]](**from_json(vector["fields"]))
    datagram = bytes.fromhex(vector["hex"])
    assert codec.encode_datagram(message) == datagram
    assert codec.decode_datagram(datagram) == message


def test_keys() -> None:
    found = load("keys.json")
    arena = arena_fingerprint(
        bytes.fromhex(found["model_fingerprint"]), found["payload_format"], found["block_tokens"]
    )
    assert arena.hex() == found["arena_fingerprint"]
    assert [len(chain["blocks"]) for chain in found["chains"]] == [3, 3]
    for chain in found["chains"]:
        parent = root_key(arena, bytes.fromhex(chain["salt"]))
        assert parent.hex() == chain["root_key"]
        for block in chain["blocks"]:
            parent = block_key(parent, bytes.fromhex(block["tokens"]))
            assert parent.hex() == block["key"]


def test_payload_sizes() -> None:
    for vector in load("payloads.json")["sizes"]:
        geometry = Geometry.from_wire(vector["layers"])
        assert geometry.bytes_per_token == vector["bytes_per_token"]
        assert ArrayBlock(geometry, 64).max_bytes == vector["array_of_64_tokens"]
        form = make_format(vector["payload_format"], geometry, 64)
        for size in vector["payloads"]:
            assert form.size(size["tokens"]) == size["bytes"]


def test_payload_blocks() -> None:
    forms = load("payloads.json")["llama_state_blocks"]
    kinds = ((0, False), (1, False), (0, True))
    for found, (window_layers, m_rope) in zip(forms, kinds, strict=True):
        geometry = Geometry.from_wire(found["layers"])
        form = make_format(found["payload_format"], geometry, 32)
        for vector in found["blocks"]:
            start, n_tokens = vector["start"], vector["tokens"]
            block = bytes.fromhex(vector["hex"])
            assert len(block) == vector["bytes"] == form.size(n_tokens)
            form.validate(block, start, n_tokens)
            assert block == llama_block(
                geometry, start, n_tokens, window_layers=window_layers, m_rope=m_rope
            )
            assert f"{xxhash.xxh3_64_intdigest(block):016x}" == vector["xxh3_64"]


def test_directory() -> None:
    found = load("directory.json")
    header = layout.Header(**from_json(found["header"]["fields"]))
    memory = memoryview(bytearray(layout.directory_length(header.slots, header.block_tokens)))
    layout.write_header(memory, header)
    expected = bytes.fromhex(found["header"]["hex"])
    assert bytes(memory).rstrip(b"\0") == expected
    assert layout.read_header(memory) == header
    record = layout.Record(**from_json(found["record"]["fields"]))
    slot, offset = found["record"]["slot"], found["record"]["offset"]
    content = bytes.fromhex(found["record"]["hex"])
    memory[offset : offset + len(content)] = content
    assert layout.read_record(memory, slot, header.block_tokens) == record
    assert struct.unpack_from("<Q", content)[0] == xxhash.xxh3_64_intdigest(content[16:])
    assert layout.read_last_use(memory, slot, header.block_tokens) == found["record"]["last_use"]
    pin = layout.PinEntry(**from_json(found["pin"]["fields"]))
    place, offset = found["pin"]["place"], found["pin"]["offset"]
    start = layout.pins_offset(header.slots, header.block_tokens)
    assert offset == start + place * layout.PIN_BYTES
    content = bytes.fromhex(found["pin"]["hex"])
    memory[offset : offset + len(content)] = content
    assert layout.read_pin(memory, offset) == pin
    assert struct.unpack_from("<Qd", content) == (
        xxhash.xxh3_64_intdigest(content[16:]),
        pin.expires,
    )


def test_index() -> None:
    """As PROTOCOL.md says it, word by word."""
    found = load("index.json")
    content = bytes.fromhex(found["hex"])
    (n,) = struct.unpack_from("<I", content, 8)
    assert content[:8] == b"KVDIDX\0\1"
    assert content[16:32].hex() == found["root_key"]
    parent = bytes.fromhex(found["root_key"])
    held = {}
    for block in found["blocks"]:
        parent = block_key(parent, bytes.fromhex(block["tokens"]))
        assert parent.hex() == block["key"]
        held[block["slot"]] = int.from_bytes(parent[:8], "little")
    assert n == 1 + max(held)
    for slot in range(5):
        assert struct.unpack_from("<Q", content, 64 + 16 * slot)[0] == held.get(slot, 0)
    for slot, p in held.items():
        k = next(k for k in range(32) if 2**k >= n)
        bucket = p & 2**k - 1
        if bucket >= n:
            bucket = p & 2 ** (k - 1) - 1
        (follower,) = struct.unpack_from("<I", content, 64 + 16 * bucket + 12)
        while follower - 1 != slot:
            assert follower
            (follower,) = struct.unpack_from("<I", content, 64 + 16 * (follower - 1) + 8)


def test_values_survive_json() -> None:
    for value in (b"", b"\0\xff", [1, [b"x"]], {"a": {"b": b"c"}}, (1 << 64) - 1, None, "ü"):
        assert from_json(json.loads(json.dumps(to_json(value)))) == value
