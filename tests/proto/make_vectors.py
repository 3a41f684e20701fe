"""Makes the golden vectors, proto/vectors/*.json: run it after a wanted change, and read the diff.

    python -m tests.proto.make_vectors

Deterministic. In the JSON a byte string is {"hex": "..."}; integers are exact, up to 64 bits. That
the code still gives these bytes, and reads them, is checked by test_vectors.py.
"""

import json
import struct
from pathlib import Path
from typing import Any

import xxhash

import kvd_proto.messages as m
from kvd_proto import PROTOCOL_VERSION, codec, layout
from kvd_proto.errors import BY_CODE
from kvd_proto.geometry import Geometry
from kvd_proto.index import ENTRY_BYTES, INDEX_HEADER_BYTES, IndexWriter, index_length
from kvd_proto.keys import arena_fingerprint, block_key, root_key
from kvd_proto.payload import make_format
from tests.proto.blocks import llama_block
from tests.proto.shapes import wire_name

VECTORS = Path(__file__).parents[2] / "proto" / "vectors"

MODEL_FINGERPRINT = bytes(range(32))
SESSION = b"\x01" + bytes(range(0xA1, 0xB0))
EPOCH = bytes(range(0xE0, 0xF0))
CONTEXT = 0x0123456789ABCD81
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
SMOLLM2 = [["f16", 384, "f16", 384]] * 30
TINY = [["f16", 2, "f16", 2]]
GEMMA3 = [["f16", 512, "f16", 512]] * 18
TRAITS = [["type_k", "q8_0"], ["rope.scaling", "model"]]


def tokens(*ids: int) -> bytes:
    """Token ids, or slots, as they travel: little-endian u32."""
    return struct.pack(f"<{len(ids)}I", *ids)


def offsets(*values: int) -> bytes:
    """Offsets into the staging as they travel: little-endian u64."""
    return struct.pack(f"<{len(values)}Q", *values)


REQUESTS: list[tuple[int, m.Message]] = [
    (1, m.Ping()),
    (U64, m.Ping()),
    (2, m.RegisterModel("SmolLM2-135M", MODEL_FINGERPRINT, "llama-state", 32, SMOLLM2, TRAITS)),
    (3, m.RegisterModel("tiny ü", MODEL_FINGERPRINT, "array", 1, [["float32", 12, "bf16", 6]], [])),
    (4, m.OpenContext(1, 8, [])),
    (5, m.OpenContext(1, 255, [0, 7, 254])),
    (6, m.CloseContext(CONTEXT)),
    (7, m.Alloc(CONTEXT, "request-17", tokens(1, 2, 3, 49151, U32), 0, 0, 0, 1, 1)),
    (8, m.Alloc(CONTEXT, "", b"", 64, 1500, 60_000, 0, 1)),
    (9, m.Append(CONTEXT, 0, 1, 0, tokens(*range(40)), offsets(4096, 745_472))),
    (10, m.Append(CONTEXT, 254, U64, 32, tokens(7), offsets(8192))),
    (11, m.Get(CONTEXT, 0, 1, 0)),
    (12, m.Get(CONTEXT, 3, 2, U32)),
    (13, m.Release(CONTEXT, 0, 1, m.COMPLETED)),
    (14, m.Release(CONTEXT, 1, 2, m.FAILED)),
    (15, m.Flush(0)),
    (16, m.Flush(12)),
    (17, m.Status()),
    (18, m.ListSequences()),
    (19, m.ListClients()),
    (20, m.Verify(1)),
    (21, m.Evict("", 0, "")),
    (22, m.Evict("SmolLM2-135M", 10, "team-a")),
    (23, m.KeepAlive(CONTEXT, [], [])),
    (24, m.KeepAlive(CONTEXT, [0, 254], [1, U64])),
    (25, m.Pin(MODEL_FINGERPRINT, tokens(1, 2, 3, 49151), "team-a", 0)),
    (26, m.Pin(MODEL_FINGERPRINT, tokens(*range(40)), "o" * 64, m.MAX_TTL_MS)),
    (27, m.Unpin("team-a", "")),
    (28, m.Unpin("team-a", "SmolLM2-135M")),
    (29, m.ListPins()),
    (30, m.Explain(MODEL_FINGERPRINT, tokens(1, 2, 3, 49151), "", [])),
    (31, m.Explain(MODEL_FINGERPRINT, b"", "team-a", TRAITS)),
    (32, m.Forget(MODEL_FINGERPRINT, tokens(1, 2, 3, 49151), "team-a")),
    (33, m.Events(0, 0, 1, [], "")),
    (34, m.Events(U64, m.MAX_FOLLOW_MS, m.MAX_EVENTS, ["alloc", "evict"], "SmolLM2-135M")),
    (35, m.Config()),
    (36, m.Reload()),
]

REPLIES: list[tuple[int, type[Any], m.Message]] = [
    (1, m.Ping, m.Pong("0.1.0", "default", 4242, 123_456)),
    (2, m.RegisterModel, m.ModelRegistered(1, 1, 738_408, 741_376, 5793)),
    (4, m.OpenContext, m.ContextOpened(CONTEXT, [])),
    (5, m.OpenContext, m.ContextOpened(CONTEXT, [1, 2, 3])),
    (6, m.CloseContext, m.Done()),
    (7, m.Alloc, m.Allocated(0, 1, 5, 32, tokens(12))),
    (8, m.Alloc, m.Allocated(7, 300, 0, 0, b"")),
    (9, m.Append, m.Appended(1, 2, 0, 0)),
    (10, m.Append, m.Appended(2, 0, 0, 1)),
    (11, m.Get, m.Blocks(40, 8, tokens(12, 13))),
    (13, m.Release, m.Done()),
    (15, m.Flush, m.Flushed(0, [])),
    (16, m.Flush, m.Flushed(12, [[11, "bad_payload", "magic is 0x0, not 0xaf143cd8"]])),
    (17, m.Status, m.Reported({"version": "0.1.0", "clients": 2, "sequences": {"max": 100}})),
    (18, m.ListSequences, m.Reported({"sequences": []})),
    (19, m.ListClients, m.Reported({"clients": []})),
    (20, m.Verify, m.Reported({"ok": True, "terms": {}, "differences": []})),
    (21, m.Evict, m.Evicted(31, 31 * 741_376)),
    (23, m.KeepAlive, m.KeptAlive([])),
    (24, m.KeepAlive, m.KeptAlive([254])),
    (25, m.Pin, m.Pinned(4)),
    (26, m.Pin, m.Pinned(0)),
    (27, m.Unpin, m.Unpinned(12)),
    (29, m.ListPins, m.Reported({"pins": [{"owner": "team-a", "expires_seconds": None}]})),
    (30, m.Explain, m.Reported({"matched_tokens": 4, "missing": None})),
    (32, m.Forget, m.Forgotten(4, 12, 1, 12 * 741_376)),
    (33, m.Events, m.Reported({"events": [], "next": 0, "lost": 0})),
    (35, m.Config, m.Reported({"settings": [{"name": "max_pins", "value": 1000}], "beyond": []})),
    (36, m.Reload, m.Reported({"ok": False, "errors": ["kvd.toml: max_pins = -1"]})),
]

DETAILS: dict[str, Any] = {
    "seq_id": 3,
    "model": "SmolLM2-135M",
    "waited": 0.5,
    "busy": True,
    "current_generation": None,
}

DATAGRAMS: list[m.Message] = [
    m.Hello(PROTOCOL_VERSION, "worker 1", 67_108_864),
    m.Hello(PROTOCOL_VERSION, "kvctl", 0),
    m.Welcome(PROTOCOL_VERSION, SESSION, EPOCH, "default", 67_112_960),
    m.SegmentShared(1, 5793 * 741_376),
    m.Refused("unsupported_version", "the daemon speaks another", {"daemon": 1, "client": 2}),
]

# Frames that a daemon answers with bad_message: why, and the correlation of that answer.
REFUSED: list[tuple[str, str, int]] = [
    ("not MessagePack", "c1", 0),
    ("not an array", "01", 0),
    ("cut off behind the correlation", "9705", 0),
    ("no correlation", "9101", 0),
    ("unknown operation", "926309", 9),
    ("true is not an operation", "92c309", 9),
    ("negative correlation", "9201ff", 0),
    ("a field too many", "93010900", 9),
    ("a field too few", "9204" + "09", 9),
    ("true is not an integer", "930409c3", 9),
    ("a float is not an integer", "930409cb3ff0000000000000", 9),
    ("negative", "930409ff", 9),
    ("half a token", "9a050901a0c4020101" + "000000" + "0101", 9),
    ("text where bytes belong", "9a050901a0a00000000101", 9),
    ("a map", "93040980", 9),
    ("a timestamp", "930409d6ff00000000", 9),
    ("something behind the message", "92010900", 9),
]


def to_json(value: Any) -> Any:
    """Values of messages as JSON: byte strings as {"hex": ...}, tuples as arrays."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def _fields(message: Any) -> dict[str, Any]:
    return {name: to_json(value) for name, value in message._asdict().items()}


def messages() -> dict[str, Any]:
    """Requests, replies, an error of each code, and frames that are refused."""
    return {
        "protocol_version": PROTOCOL_VERSION,
        "requests": [
            {
                "operation": wire_name(type(message)),
                "correlation": correlation,
                "fields": _fields(message),
                "hex": codec.encode_request(correlation, message).hex(),
            }
            for correlation, message in REQUESTS
        ],
        "replies": [
            {
                "operation": wire_name(request),
                "correlation": correlation,
                "fields": _fields(message),
                "hex": codec.encode_reply(correlation, message).hex(),
            }
            for correlation, request, message in REPLIES
        ],
        "errors": [
            {
                "correlation": 300 + index,
                "code": code,
                "message": "what went wrong",
                "details": DETAILS,
                "hex": _error(300 + index, code).hex(),
            }
            for index, code in enumerate(sorted(BY_CODE))
        ],
        "refused_requests": [
            {"why": why, "hex": frame, "correlation": correlation}
            for why, frame, correlation in REFUSED
        ],
    }


def _error(correlation: int, code: str) -> bytes:
    return codec.encode_error(correlation, BY_CODE[code]("what went wrong", **DETAILS))


def datagrams() -> dict[str, Any]:
    """Every datagram of the lifeline."""
    return {
        "datagrams": [
            {
                "kind": wire_name(type(message)),
                "fields": _fields(message),
                "hex": codec.encode_datagram(message).hex(),
            }
            for message in DATAGRAMS
        ]
    }


def keys() -> dict[str, Any]:
    """Chains of three blocks, with and without a salt."""
    arena = arena_fingerprint(MODEL_FINGERPRINT, "llama-state", 4)
    chunks = [tokens(1, 2, 3, 4), tokens(5, 6, 7, U32), tokens(9)]
    chains = []
    for salt in (b"", b"tenant a"):
        parent = root = root_key(arena, salt)
        blocks = []
        for chunk in chunks:
            parent = block_key(parent, chunk)
            blocks.append({"tokens": chunk.hex(), "key": parent.hex()})
        chains.append({"salt": salt.hex(), "root_key": root.hex(), "blocks": blocks})
    return {
        "model_fingerprint": MODEL_FINGERPRINT.hex(),
        "payload_format": "llama-state",
        "block_tokens": 4,
        "arena_fingerprint": arena.hex(),
        "chains": chains,
    }


def payloads() -> dict[str, Any]:
    """Sizes of blocks, and the smallest blocks of each form byte by byte."""
    differing = [["q8_0", 34, "q4_0", 18], ["f32", 4, "bf16", 2]]
    sizes = []
    for name, rows, payload_format, lengths in (
        ("SmolLM2-135M, f16", SMOLLM2, "llama-state", (1, 31, 32, 64)),
        ("one layer of two bytes", TINY, "llama-state", (1, 2, 32, 64)),
        ("layers that differ", differing, "llama-state", (1, 64)),
        ("Gemma 3 270M, f16", GEMMA3, "llama-state:window=15", (1, 32, 64)),
        ("the second layer with a window", differing, "llama-state:window=1", (1, 64)),
        ("with M-RoPE", differing, "llama-state:m-rope", (1, 64)),
        ("with both", differing, "llama-state:window=1:m-rope", (1, 64)),
    ):
        geometry = Geometry.from_wire(rows)
        form = make_format(payload_format, geometry, 64)
        sizes.append(
            {
                "name": name,
                "layers": rows,
                "bytes_per_token": geometry.bytes_per_token,
                "payload_format": payload_format,
                "payloads": [{"tokens": n, "bytes": form.size(n)} for n in lengths],
                "array_of_64_tokens": geometry.bytes_per_token * 64,
            }
        )
    forms = []
    for payload_format, rows, window_layers, m_rope in (
        ("llama-state", TINY, 0, False),
        ("llama-state:window=1", [*TINY, ["f32", 4, "bf16", 2]], 1, False),
        ("llama-state:m-rope", TINY, 0, True),
    ):
        blocks = []
        for start, n_tokens in ((0, 1), (32, 2)):
            geometry = Geometry.from_wire(rows)
            block = bytes(
                llama_block(geometry, start, n_tokens, window_layers=window_layers, m_rope=m_rope)
            )
            blocks.append(
                {
                    "start": start,
                    "tokens": n_tokens,
                    "bytes": len(block),
                    "hex": block.hex(),
                    "xxh3_64": f"{xxhash.xxh3_64_intdigest(block):016x}",
                }
            )
        forms.append({"payload_format": payload_format, "layers": rows, "blocks": blocks})
    return {"sizes": sizes, "llama_state_blocks": forms}


def directory() -> dict[str, Any]:
    """A header, a record in slot 2, and a pin at place 1."""
    arena = arena_fingerprint(MODEL_FINGERPRINT, "llama-state", 4)
    parent = block_key(root_key(arena), tokens(1, 2, 3, 4))
    registration: dict[str, Any] = {
        "tenant": "default",
        "name": "tiny",
        "fingerprint": arena,
        "format": "llama-state",
        "layers": TINY,
        "boot": bytes(range(16)),
    }
    header = layout.Header(4, 3, 4096, registration)
    record = layout.Record(4, tokens(5, 6), block_key(parent, tokens(5, 6)), parent, 9, U64 - 1)
    memory = memoryview(bytearray(layout.directory_length(3, 4)))
    layout.write_header(memory, header)
    header_bytes = bytes(memory[: layout.DIRECTORY_HEADER_BYTES]).rstrip(b"\0")
    layout.write_record(memory, 2, 4, record, 77)
    first = layout.record_offset(2, 4)
    pin = layout.PinEntry(record.key, "team-a", 1234.5)
    pin_offset = layout.pins_offset(3, 4) + layout.PIN_BYTES
    layout.write_pin(memory, pin_offset, pin)
    return {
        "header": {"fields": _fields(header), "hex": header_bytes.hex()},
        "record": {
            "slot": 2,
            "offset": first,
            "last_use": 77,
            "fields": _fields(record),
            "hex": bytes(memory[first : first + layout.record_bytes(4)]).hex(),
        },
        "pin": {
            "place": 1,
            "offset": pin_offset,
            "fields": _fields(pin),
            "hex": bytes(memory[pin_offset : pin_offset + layout.PIN_BYTES]).hex(),
        },
    }


def index() -> dict[str, Any]:
    """Three blocks in an index of five slots, in four buckets."""
    root = parent = root_key(arena_fingerprint(MODEL_FINGERPRINT, "llama-state", 4))
    memory = memoryview(bytearray(index_length(5)))
    writer = IndexWriter(memory)
    writer.start(root)
    blocks = []
    for slot, chunk in ((1, tokens(1, 2, 3, 4)), (3, tokens(5, 6, 7, 8)), (0, tokens(9, 9, 9, 9))):
        parent = block_key(parent, chunk)
        writer.add(slot, parent)
        blocks.append({"slot": slot, "tokens": chunk.hex(), "key": parent.hex()})
    return {
        "root_key": root.hex(),
        "blocks": blocks,
        "hex": bytes(memory[: INDEX_HEADER_BYTES + 5 * ENTRY_BYTES]).hex(),
    }


def vectors() -> dict[str, str]:
    """The text of every file, by its name."""
    contents = {
        "messages.json": messages(),
        "datagrams.json": datagrams(),
        "keys.json": keys(),
        "payloads.json": payloads(),
        "directory.json": directory(),
        "index.json": index(),
    }
    return {
        name: json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for name, content in contents.items()
    }


def main() -> None:
    """Write all files."""
    VECTORS.mkdir(exist_ok=True)
    for name, text in vectors().items():
        (VECTORS / name).write_text(text)


if __name__ == "__main__":
    main()
