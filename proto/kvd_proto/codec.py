"""Bytes to messages and back. Pure: no sockets. The one place where input from outside is checked.

    request   [operation, correlation, field, ...]
    reply     [correlation, 0, field, ...]  or  [correlation, 1, code, message, details]
    datagram  [kind, field, ...]

Whatever the bytes, decoding returns a checked message or raises BadMessage, nothing else.
"""

from typing import Any, NamedTuple, get_args, get_type_hints

import msgpack

from kvd_proto.checks import Check
from kvd_proto.errors import BadMessage, Detail, KvdError, from_wire
from kvd_proto.messages import DATAGRAMS, MAX_TOKENS, OPERATIONS, Message

MAX_MESSAGE_BYTES = 16 << 20
"""Above the largest legal message: an append of MAX_TOKENS tokens in blocks of one token."""

_LIMITS: dict[str, Any] = {
    "raw": False,
    "strict_map_key": True,
    "max_str_len": 1 << 16,
    "max_bin_len": 8 * MAX_TOKENS,
    "max_array_len": 1 << 20,
    "max_map_len": 1 << 16,
    "max_ext_len": 0,
}

# msgpack's own exceptions are ValueErrors but for these; RecursionError cannot arise (StackError
# does).
_DECODE_FAULTS = (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError)


class Request(NamedTuple):
    """A decoded request: what it asks, and the number its answer must carry."""

    correlation: int
    message: Any


class Reply(NamedTuple):
    """A decoded reply: `body` is the reply's message, or the error that was answered."""

    correlation: int
    body: Any


class _Shape(NamedTuple):
    """How to read one message class."""

    code: int
    cls: type[Any]
    checks: tuple[tuple[str, Check], ...]


def _shape(code: int, cls: type[Any]) -> _Shape:
    hints = get_type_hints(cls, include_extras=True)
    checks = []
    for field in cls._fields:
        found = [extra for extra in get_args(hints[field]) if isinstance(extra, Check)]
        checks.append((f"{cls.__name__}.{field}", found[0]))
    return _Shape(code, cls, tuple(checks))


_REQUESTS = {op.code: _shape(op.code, op.request) for op in OPERATIONS}
_REPLIES = {op.request: _shape(op.code, op.reply) for op in OPERATIONS}
_DATAGRAMS = {code: _shape(code, cls) for code, cls in DATAGRAMS}
_CODE_OF = {shape.cls: shape.code for shape in (*_REQUESTS.values(), *_DATAGRAMS.values())}
_MAX_CORRELATION = (1 << 64) - 1

_packer = msgpack.Packer(use_bin_type=True, autoreset=True)


def encode_request(correlation: int, message: Message) -> bytes:
    """The one frame of a request."""
    return _pack([_CODE_OF[type(message)], correlation, *message])


def encode_reply(correlation: int, message: Message) -> bytes:
    """The one frame of a successful reply."""
    return _pack([correlation, 0, *message])


def encode_error(correlation: int, error: KvdError) -> bytes:
    """The one frame of an error reply."""
    return _pack([correlation, 1, error.code, error.message, error.details])


def encode_datagram(message: Message) -> bytes:
    """A datagram of the lifeline."""
    return _pack([_CODE_OF[type(message)], *message])


def decode_request(frame: bytes) -> Request:
    """Check and build a request. Raises BadMessage, with the correlation as a detail if it was
    there."""
    fields = _unpack(frame)
    if len(fields) < 2:
        raise BadMessage("a request is [operation, correlation, fields...]", length=len(fields))
    code, correlation = fields[0], fields[1]
    if type(correlation) is not int or not 0 <= correlation <= _MAX_CORRELATION:
        raise BadMessage("a correlation is an unsigned 64-bit integer")
    shape = _REQUESTS.get(code) if type(code) is int else None
    if shape is None:
        raise BadMessage("unknown operation", correlation=correlation, operation=str(code)[:40])
    try:
        return Request(correlation, _build(shape, fields, 2))
    except BadMessage as error:
        error.details["correlation"] = correlation
        raise


def decode_reply(frame: bytes, request_of: dict[int, type[Any]]) -> Reply:
    """Check and build a reply; `request_of` tells what each open correlation asked.

    A reply to an unknown correlation has the body None: its caller gave up waiting.
    """
    fields = _unpack(frame)
    if len(fields) < 2:
        raise BadMessage("a reply is [correlation, 0 or 1, fields...]", length=len(fields))
    correlation, failed = fields[0], fields[1]
    request = request_of.get(correlation) if type(correlation) is int else None
    if request is None:
        return Reply(correlation if type(correlation) is int else 0, None)
    if failed == 1:
        return Reply(correlation, _build_error(fields[2:]))
    return Reply(correlation, _build(_REPLIES[request], fields, 2))


def decode_datagram(frame: bytes) -> Any:
    """Check and build a datagram of the lifeline."""
    fields = _unpack(frame)
    code = fields[0] if fields else None
    shape = _DATAGRAMS.get(code) if type(code) is int else None
    if shape is None:
        raise BadMessage("unknown kind of datagram", kind=str(code)[:40])
    return _build(shape, fields, 1)


def _pack(fields: list[Any]) -> bytes:
    packed: bytes = _packer.pack(fields)
    return packed


def _unpack(frame: bytes) -> list[Any]:
    if len(frame) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"a message has at most {MAX_MESSAGE_BYTES} bytes", got=len(frame))
    try:
        fields = msgpack.unpackb(frame, **_LIMITS)
    except _DECODE_FAULTS as error:
        raise BadMessage(f"not a MessagePack message: {type(error).__name__}") from None
    if type(fields) is not list:
        raise BadMessage("a message is an array", got=type(fields).__name__)
    return fields


def _build(shape: _Shape, fields: list[Any], first: int) -> Any:
    if len(fields) - first != len(shape.checks):
        raise BadMessage(
            f"{shape.cls.__name__} has {len(shape.checks)} fields", got=len(fields) - first
        )
    values = fields[first:]
    for (field, check), value in zip(shape.checks, values, strict=True):
        check(field, value)
    return shape.cls._make(values)


def _build_error(fields: list[Any]) -> KvdError:
    if (
        len(fields) != 3
        or type(fields[0]) is not str
        or type(fields[1]) is not str
        or type(fields[2]) is not dict
    ):
        raise BadMessage("an error reply is [correlation, 1, code, message, details]")
    details: dict[str, Detail] = fields[2]
    return from_wire(fields[0], fields[1], details)
