"""Bytes to messages and back. Pure: no sockets. The one place where input from outside is checked.

    request   [operation, correlation, field, ...]
    reply     [correlation, 0, field, ...]  or  [correlation, 1, code, message, details]
    datagram  [kind, field, ...]

Whatever the bytes, decoding returns a checked message or raises BadMessage, nothing else, and takes
memory in proportion to the bytes. Encoding a message checks only that it can be encoded: its fields
are the other side's to check. Any thread may call anything here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args, get_type_hints

import msgpack

from kvd_proto.checks import Check, show
from kvd_proto.errors import BadMessage, Detail, InternalError, KvdError, from_wire
from kvd_proto.geometry import MAX_LAYERS
from kvd_proto.messages import (
    DATAGRAMS,
    MAX_DETAIL_NAME,
    MAX_DETAIL_TEXT,
    MAX_DETAILS,
    MAX_ERROR_TEXT,
    MAX_TOKENS,
    OPERATIONS,
    ErrorReply,
    Message,
    Refused,
)

MAX_MESSAGE_BYTES = 16 << 20
"""Above the largest legal message: an append of MAX_TOKENS tokens in blocks of one token."""
MAX_DATAGRAM_BYTES = 64 << 10
"""Above the largest datagram: a refusal with all the evidence that an error can have."""

_MAX_CORRELATION = (1 << 64) - 1
_COUNT_FROM = 64 << 10
_MAX_ITEMS = 8 * MAX_LAYERS
"""A request of _COUNT_FROM bytes is large because of its tokens: so many items in its arrays are
more than enough. Without a limit 16 MiB of empty arrays would take 1 GiB."""

_STRICT: dict[str, Any] = {"raw": False, "strict_map_key": True, "max_ext_len": 0}
# Byte strings take what they take on the wire, so their limit is the check's: its error says which
# field it was. Containers cost 56 bytes and more for one, so no message gets more than it may have.
_REQUEST_LIMITS: dict[str, Any] = {
    **_STRICT,
    "max_str_len": 64 << 10,
    "max_bin_len": MAX_MESSAGE_BYTES,
    "max_array_len": MAX_LAYERS,
    "max_map_len": 0,
}
_REPLY_LIMITS: dict[str, Any] = {
    **_STRICT,
    "max_str_len": 64 << 10,
    "max_bin_len": 4 * MAX_TOKENS,
    "max_array_len": MAX_MESSAGE_BYTES // 64,  # a row of a report has more than 64 bytes
    "max_map_len": 256,
}
_DATAGRAM_LIMITS: dict[str, Any] = {
    **_STRICT,
    "max_str_len": 4 * MAX_ERROR_TEXT,
    "max_bin_len": 16,
    "max_array_len": 8,
    "max_map_len": MAX_DETAILS,
}

# msgpack's own exceptions are ValueErrors but for these.
_DECODE_FAULTS = (ValueError, TypeError, msgpack.exceptions.UnpackException)
_ENCODE_FAULTS = (ValueError, TypeError, OverflowError)


class Request(NamedTuple):
    """A decoded request: what it asks, and the number its answer must carry."""

    correlation: int
    message: Any


class Reply(NamedTuple):
    """A decoded reply: `body` is the reply's message, or the error that was answered."""

    correlation: int
    body: Any


class _Shape(NamedTuple):
    """How to read one message class. `checks` are the fields' names and bound checks."""

    code: int
    cls: type[Any]
    checks: tuple[tuple[str, Callable[[str, Any], None]], ...]


def _shape(code: int, cls: type[Any]) -> _Shape:
    hints = get_type_hints(cls, include_extras=True)
    checks = []
    for field in cls._fields:
        found = [extra for extra in get_args(hints[field]) if isinstance(extra, Check)]
        checks.append((f"{cls.__name__}.{field}", found[0].__call__))
    return _Shape(code, cls, tuple(checks))


_REQUESTS = {op.code: _shape(op.code, op.request) for op in OPERATIONS}
_REPLIES = {op.request: _shape(op.code, op.reply) for op in OPERATIONS}
_DATAGRAMS = {code: _shape(code, cls) for code, cls in DATAGRAMS}
_ERROR = _shape(1, ErrorReply)
_CODE_OF = {shape.cls: shape.code for shape in (*_REQUESTS.values(), *_DATAGRAMS.values())}

# One for all threads: it has no hooks, so it runs no Python code half way through a message, and no
# other thread or finalizer can come in between. A packer for each message costs 0.2 us more.
_packer = msgpack.Packer()


def encode_request(correlation: int, message: Message) -> bytes:
    """The one frame of a request. Raises BadMessage if it cannot be encoded or is too long: the
    daemon would drop such a frame without a word."""
    name = type(message).__name__
    try:
        frame = _pack([_CODE_OF[type(message)], correlation, *message])
    except _ENCODE_FAULTS as error:
        raise BadMessage(f"{name} cannot be encoded: {error}") from None
    if len(frame) > MAX_MESSAGE_BYTES:
        raise BadMessage(
            f"{name} is too long: a message has at most {MAX_MESSAGE_BYTES} bytes", got=len(frame)
        )
    return frame


def encode_reply(correlation: int, message: Message) -> bytes:
    """The one frame of a successful reply. Raises InternalError for a report that is too long."""
    frame = _pack([correlation, 0, *message])
    if len(frame) > MAX_MESSAGE_BYTES:
        raise InternalError(
            f"{type(message).__name__} is too long: a message has at most {MAX_MESSAGE_BYTES} "
            "bytes",
            got=len(frame),
        )
    return frame


def encode_error(correlation: int, error: KvdError) -> bytes:
    """The one frame of an error reply. Never fails: what cannot be told is shortened."""
    return _pack([correlation, 1, *_tellable(error.code, error.message, error.details)])


def encode_datagram(message: Message) -> bytes:
    """A datagram of the lifeline. Raises BadMessage if it cannot be encoded."""
    fields = _tellable(*message) if isinstance(message, Refused) else message
    try:
        return _pack([_CODE_OF[type(message)], *fields])
    except _ENCODE_FAULTS as error:
        raise BadMessage(f"{type(message).__name__} cannot be encoded: {error}") from None


def decode_request(frame: bytes) -> Request:
    """Check and build a request. Raises BadMessage, with the correlation as a detail if it could be
    read."""
    try:
        fields = _unpack(frame, _REQUEST_LIMITS)
    except BadMessage as error:
        correlation = _peek_correlation(frame)
        if correlation is not None:
            error.details["correlation"] = correlation
        raise
    if len(fields) < 2:
        raise BadMessage("a request is [operation, correlation, fields...]", length=len(fields))
    code, correlation = fields[0], fields[1]
    if not _is_correlation(correlation):
        raise BadMessage("a correlation is an unsigned 64-bit integer", got=show(correlation))
    shape = _REQUESTS.get(code) if type(code) is int else None
    if shape is None:
        raise BadMessage("unknown operation", correlation=correlation, operation=show(code))
    try:
        return Request(correlation, _build(shape, fields, 2))
    except BadMessage as error:
        error.details["correlation"] = correlation
        raise


def decode_reply(frame: bytes, request_of: Mapping[int, type[Any]]) -> Reply:
    """Check and build a reply; `request_of` tells what each open correlation asked.

    A reply to an unknown correlation has the body None: its caller gave up waiting.
    """
    fields = _unpack(frame, _REPLY_LIMITS)
    if len(fields) < 2:
        raise BadMessage("a reply is [correlation, 0 or 1, fields...]", length=len(fields))
    correlation, failed = fields[0], fields[1]
    if not _is_correlation(correlation) or type(failed) is not int or failed not in (0, 1):
        raise BadMessage(
            "a reply begins with a correlation, and 0 or 1",
            correlation=show(correlation),
            failed=show(failed),
        )
    request = request_of.get(correlation)
    if request is None:
        return Reply(correlation, None)
    if failed:
        return Reply(correlation, from_wire(*_build(_ERROR, fields, 2)))
    return Reply(correlation, _build(_REPLIES[request], fields, 2))


def decode_datagram(frame: bytes) -> Any:
    """Check and build a datagram of the lifeline."""
    if len(frame) > MAX_DATAGRAM_BYTES:
        raise BadMessage(f"a datagram has at most {MAX_DATAGRAM_BYTES} bytes", got=len(frame))
    fields = _unpack(frame, _DATAGRAM_LIMITS)
    code = fields[0] if fields else None
    shape = _DATAGRAMS.get(code) if type(code) is int else None
    if shape is None:
        raise BadMessage("unknown kind of datagram", kind=show(code))
    return _build(shape, fields, 1)


def _pack(fields: list[Any]) -> bytes:
    packed: bytes = _packer.pack(fields)
    return packed


def _unpack(frame: bytes, limits: dict[str, Any]) -> list[Any]:
    if len(frame) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"a message has at most {MAX_MESSAGE_BYTES} bytes", got=len(frame))
    try:
        if len(frame) >= _COUNT_FROM and limits is _REQUEST_LIMITS:
            fields = msgpack.unpackb(frame, list_hook=_ItemCount(), **limits)
        else:
            fields = msgpack.unpackb(frame, **limits)
    except _DECODE_FAULTS as error:
        raise BadMessage(
            "not a MessagePack message, or beyond its limits",
            reason=f"{type(error).__name__}: {error}"[:MAX_DETAIL_TEXT],
        ) from None
    if type(fields) is not list:
        raise BadMessage("a message is an array", got=show(fields))
    return fields


class _ItemCount:
    """Called with each array of a large request as soon as that is complete: stops too many."""

    def __init__(self) -> None:
        self.n_items = 0

    def __call__(self, items: list[Any]) -> list[Any]:
        self.n_items += 1 + len(items)
        if self.n_items > _MAX_ITEMS:
            raise ValueError(f"more than {_MAX_ITEMS} items in arrays")
        return items


def _peek_correlation(frame: bytes) -> int | None:
    """The correlation of a request that cannot be decoded as a whole, if its beginning can."""
    unpacker = msgpack.Unpacker(max_buffer_size=64, **_REQUEST_LIMITS)
    unpacker.feed(bytes(frame[:32]))  # a header of at most 5 bytes and two integers of 9
    try:
        unpacker.read_array_header()
        unpacker.unpack()
        correlation = unpacker.unpack()
    except _DECODE_FAULTS:
        return None
    return correlation if _is_correlation(correlation) else None


def _is_correlation(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_CORRELATION


def _build(shape: _Shape, fields: list[Any], first: int) -> Any:
    values = fields[first:]
    if len(values) != len(shape.checks):
        raise BadMessage(f"{shape.cls.__name__} has {len(shape.checks)} fields", got=len(values))
    for (field, check), value in zip(shape.checks, values, strict=False):
        check(field, value)
    return shape.cls(*values)


def _tellable(code: str, message: str, details: Mapping[str, Detail]) -> ErrorReply:
    """An error as any decoder takes it. What comes from elsewhere (a path, a count) may be longer
    than a message allows, not be Unicode, or have more than 64 bits."""
    told = {
        _plain_text(name, MAX_DETAIL_NAME): _plain(value)
        for name, value in list(details.items())[:MAX_DETAILS]
    }
    return ErrorReply(code, _plain_text(message, MAX_ERROR_TEXT), told)


def _plain(value: Any) -> Detail:
    if value is None or type(value) is bool or type(value) is float:
        return value
    if type(value) is int and -(1 << 63) <= value < 1 << 64:
        return value
    if isinstance(value, str):
        return _plain_text(value, MAX_DETAIL_TEXT)
    return show(value)


def _plain_text(text: str, most: int) -> str:
    return str(text)[:most].encode("utf-8", "replace").decode()
