"""Every message there and back, and every way in which one can be wrong."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd_proto import codec
from kvd_proto.checks import show
from kvd_proto.errors import BadMessage, InternalError, KvdError, RequestError, StaleHandle
from kvd_proto.geometry import MAX_LAYERS, Geometry
from kvd_proto.messages import (
    MAX_ERROR_TEXT,
    OPERATIONS,
    Alloc,
    Allocated,
    ErrorReply,
    Hello,
    Ping,
    Refused,
    RegisterModel,
    Reported,
)
from tests.proto.shapes import (
    ANYTHING,
    CODE_OF,
    KIND_OF,
    PLAIN,
    Field,
    decode,
    example,
    fields_of,
    illegal,
    largest,
    legal_message,
    message_classes,
    pack,
)

CORRELATIONS = st.integers(0, (1 << 64) - 1)


# --- legal messages


@pytest.mark.parametrize("cls", CODE_OF, ids=lambda cls: cls.__name__)
@given(data=st.data(), correlation=CORRELATIONS)
def test_request_round_trip(cls: type[Any], data: Any, correlation: int) -> None:
    message = data.draw(legal_message(cls))
    frame = codec.encode_request(correlation, message)
    assert codec.decode_request(frame) == (correlation, message)
    assert type(codec.decode_request(frame).message) is cls
    assert frame == pack(cls, list(message), correlation)


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.request.__name__)
@given(data=st.data(), correlation=CORRELATIONS)
def test_reply_round_trip(op: Any, data: Any, correlation: int) -> None:
    message = data.draw(legal_message(op.reply))
    frame = codec.encode_reply(correlation, message)
    reply = codec.decode_reply(frame, {correlation: op.request})
    assert reply == (correlation, message)
    assert type(reply.body) is op.reply


@pytest.mark.parametrize("cls", KIND_OF, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_datagram_round_trip(cls: type[Any], data: Any) -> None:
    message = data.draw(legal_message(cls))
    decoded = codec.decode_datagram(codec.encode_datagram(message))
    assert decoded == message
    assert type(decoded) is cls


@given(
    correlation=CORRELATIONS,
    message=st.text(max_size=100),
    details=st.dictionaries(st.text(max_size=20), PLAIN, max_size=6),
)
def test_error_round_trip(correlation: int, message: str, details: dict[str, Any]) -> None:
    error = StaleHandle(message)
    error.details = details
    reply = codec.decode_reply(codec.encode_error(correlation, error), {correlation: Alloc})
    assert type(reply.body) is StaleHandle
    assert (reply.correlation, reply.body.message) == (correlation, message)
    assert reply.body.details == details


@pytest.mark.parametrize("cls", message_classes(), ids=lambda cls: cls.__name__)
def test_largest_message_of_each_class_fits_the_limits(cls: type[Any]) -> None:
    """The limits on the frame, on arrays and on strings are above what the fields may have."""
    values = [largest(field.check) for field in fields_of(cls)]
    decoded = decode(cls, pack(cls, values))
    if cls is ErrorReply:
        assert (decoded.code, decoded.message, decoded.details) == tuple(values)
    else:
        assert decoded == cls(*values)


def test_largest_registration_decodes() -> None:
    layer = ["f" * 8, 1 << 24, "f" * 8, 1 << 24]
    message = RegisterModel("\N{GRINNING FACE}" * 200, b"f" * 32, "array", 1024, [layer] * 512)
    decoded = codec.decode_request(codec.encode_request(1, message)).message
    assert len(Geometry.from_wire(decoded.layers).layers) == MAX_LAYERS


def test_named_tuples_are_encoded_as_arrays() -> None:
    geometry = Geometry.from_wire([["f16", 2, "f16", 2]])
    message = RegisterModel("m", b"f" * 32, "array", 1, list(geometry.layers))
    assert codec.decode_request(codec.encode_request(1, message)).message.layers == [
        ["f16", 2, "f16", 2]
    ]


# --- wrong fields


FIELDS = [
    pytest.param(cls, field, id=f"{cls.__name__}.{field.name}")
    for cls in message_classes()
    for field in fields_of(cls)
]


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_wrong_value_is_refused_by_name(cls: type[Any], field: Field) -> None:
    values = [example(each.check) for each in fields_of(cls)]
    decode(cls, pack(cls, values))
    for bad in illegal(field.check):
        wrong = [*values[: field.index], bad, *values[field.index + 1 :]]
        with pytest.raises(BadMessage) as caught:
            decode(cls, pack(cls, wrong))
        error = caught.value
        # Some are too large for any message of that kind: then msgpack refuses them first.
        beyond = error.message == "not a MessagePack message, or beyond its limits"
        assert beyond or f"{cls.__name__}.{field.name}" in error.message, (bad, error)
        if cls in CODE_OF:
            assert error.details["correlation"] == 7


@pytest.mark.parametrize("cls", message_classes(), ids=lambda cls: cls.__name__)
def test_missing_and_extra_fields_are_refused(cls: type[Any]) -> None:
    values = [example(field.check) for field in fields_of(cls)]
    for wrong in ([*values, 0], [*values, 0, 0], values[:-1]):
        if wrong == values:
            continue  # a message without fields has none to miss
        with pytest.raises(BadMessage, match=f"{cls.__name__} has {len(values)} fields"):
            decode(cls, pack(cls, wrong))


@pytest.mark.parametrize("operation", [0, 99, -1, True, 1.0, "1", None, [], {}, [[]], b"\1"])
def test_unknown_operation_is_answerable(operation: Any) -> None:
    with pytest.raises(BadMessage, match="unknown operation") as caught:
        codec.decode_request(msgpack.packb([operation, 9]))
    assert caught.value.details["correlation"] == 9


@pytest.mark.parametrize("correlation", [-1, True, 1.0, "1", None, [], {}, b"\1"])
def test_bad_correlation_is_refused(correlation: Any) -> None:
    with pytest.raises(BadMessage, match="correlation") as caught:
        codec.decode_request(msgpack.packb([1, correlation]))
    assert "correlation" not in caught.value.details
    with pytest.raises(BadMessage, match="correlation"):
        codec.decode_reply(msgpack.packb([correlation, 0]), {})


@pytest.mark.parametrize("failed", [2, -1, True, False, 0.0, 1.0, "0", None, [], {}])
def test_reply_that_neither_succeeded_nor_failed_is_refused(failed: Any) -> None:
    with pytest.raises(BadMessage, match="0 or 1"):
        codec.decode_reply(msgpack.packb([7, failed]), {7: Alloc})


@pytest.mark.parametrize("value", [None, True, 5, 1.5, "text", b"bytes", {}, {"a": 1}, [], [1]])
def test_what_is_no_message_is_refused(value: Any) -> None:
    frame = msgpack.packb(value)
    with pytest.raises(BadMessage):
        codec.decode_request(frame)
    with pytest.raises(BadMessage):
        codec.decode_reply(frame, {1: Ping})
    with pytest.raises(BadMessage):
        codec.decode_datagram(frame)


@pytest.mark.parametrize("kind", [0, 5, True, 1.0, None, "1", [], [[]]])
def test_unknown_datagram_is_refused(kind: Any) -> None:
    with pytest.raises(BadMessage, match="unknown kind of datagram"):
        codec.decode_datagram(msgpack.packb([kind, 1, 2, 3]))


def test_reply_to_nobody_has_no_body() -> None:
    frame = codec.encode_reply(5, Allocated(0, 1, 0, 0, b""))
    assert codec.decode_reply(frame, {6: Alloc}) == (5, None)


def test_unknown_error_code_is_kept() -> None:
    body = codec.decode_reply(msgpack.packb([1, 1, "over_quota", "no", {"a": 1}]), {1: Alloc}).body
    assert isinstance(body, KvdError)
    assert not isinstance(body, RequestError)
    assert (body.code, body.message, body.details) == ("over_quota", "no", {"a": 1})


# --- what the encoder refuses, and what it makes fit


def test_request_that_cannot_be_encoded_is_a_typed_error() -> None:
    for wrong in (1 << 64, -(1 << 63) - 1, "\ud800", object(), 1j):
        with pytest.raises(BadMessage, match="Alloc cannot be encoded"):
            codec.encode_request(1, Alloc(wrong, "", b"", 0, 0, 0))
        with pytest.raises(BadMessage, match="Hello cannot be encoded"):
            codec.encode_datagram(Hello(1, wrong, 0))


def test_request_that_the_socket_would_drop_is_a_typed_error() -> None:
    tokens = b"\0" * codec.MAX_MESSAGE_BYTES
    with pytest.raises(BadMessage, match="Alloc is too long"):
        codec.encode_request(1, Alloc(1, "", tokens, 0, 0, 0))


def test_report_that_is_too_long_is_an_error_and_not_a_dropped_frame() -> None:
    report = {"sequences": [{"request": "x" * 200}] * 100_000}
    with pytest.raises(InternalError, match="Reported is too long"):
        codec.encode_reply(1, Reported(report))


HOSTILE_DETAILS: dict[str, Any] = {
    "huge": 1 << 5000,
    "too negative": -(1 << 64),
    "surrogate": "\udcff\ud800",
    "long": "x" * 100_000,
    "n" * 1000: 1,
    "list": [[[]]],
    "bytes": b"\0" * 100,
    "object": object(),
    "nan": float("nan"),
    "fine": (1 << 64) - 1,
    "text": "text",
    "yes": True,
    "nothing": None,
}


def test_errors_can_always_be_told() -> None:
    error = StaleHandle("\udcff" * 10_000)
    error.details = dict(HOSTILE_DETAILS)
    frame = codec.encode_error(3, error)
    told = codec.decode_reply(frame, {3: Alloc}).body
    assert type(told) is StaleHandle
    assert len(told.message) == MAX_ERROR_TEXT
    details = told.details
    assert details.pop("nan") != details
    assert details["huge"] == "int of 5001 bits"
    assert details["long"] == "x" * 200
    assert details["n" * 40] == 1
    assert details["list"] == "list of length 1"
    assert (details["fine"], details["text"], details["yes"], details["nothing"]) == (
        (1 << 64) - 1,
        "text",
        True,
        None,
    )


def test_refusals_can_always_be_told_in_one_datagram() -> None:
    wide = "\N{GRINNING FACE}"
    details = {f"{index:03}{wide * 500}": wide * 500 for index in range(100)}
    datagram = codec.encode_datagram(Refused("no_space", wide * 9000, details))
    assert len(datagram) <= codec.MAX_DATAGRAM_BYTES
    refused = codec.decode_datagram(datagram)
    assert refused.code == "no_space"
    assert len(refused.details) == 32


@given(value=ANYTHING | st.integers() | st.just(1 << 100_000) | st.just(b"x" * 10**6))
def test_evidence_is_short(value: Any) -> None:
    assert len(show(value)) < 60


def test_evidence_of_the_deepest_value_is_short() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert show(value) == "list of length 1"


def test_threads_do_not_mix_messages_up() -> None:
    """They share one packer, which must not give way within a message."""
    layers = list(Geometry.from_wire([["f16", 2, "f16", 2]] * MAX_LAYERS).layers)

    def encode(seed: int) -> set[bytes]:
        fingerprint = bytes([seed]) * 32
        message = RegisterModel("m", fingerprint, "array", 1, layers)
        return {codec.encode_request(seed, message) for _ in range(300)}

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(encode, range(8)))
    finally:
        sys.setswitchinterval(before)
    for seed, frames in enumerate(results):
        (frame,) = frames
        assert codec.decode_request(frame).message.fingerprint == bytes([seed]) * 32


def test_a_message_that_cannot_be_packed_leaves_nothing_for_the_next() -> None:
    expected = codec.encode_request(1, Ping())
    with pytest.raises(BadMessage):
        codec.encode_request(1, Alloc(5, "request", b"tokens", 0, 0, 1 << 64))
    assert codec.encode_request(1, Ping()) == expected
