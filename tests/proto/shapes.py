"""What the protocol's annotations say, for tests: legal values, illegal values, and their wording.

Covers every kind of check of kvd_proto.checks; a new kind without a case here fails the tests. Also
frames with any fields, legal or not. The tests: test_codec.py, test_codec_fuzz.py,
test_protocol_doc.py.
"""

import re
import struct
from typing import Any, NamedTuple, get_args, get_type_hints

import msgpack
from hypothesis import strategies as st

from kvd_proto import codec
from kvd_proto.checks import Ascii, Blob, Check, Evidence, Int, Items, Packed, Row, Table, Text
from kvd_proto.messages import DATAGRAMS, OPERATIONS, REPLY_OF, ErrorReply, Ping

CODE_OF = {op.request: op.code for op in OPERATIONS}
KIND_OF = {cls: kind for kind, cls in DATAGRAMS}
REQUEST_OF = {reply: request for request, reply in REPLY_OF.items()}

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False),
    st.text(max_size=20),
)
NAMES = st.text(max_size=20)
ANYTHING = st.recursive(
    PLAIN | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)


class Field(NamedTuple):
    """One field of a message: its place, its name and its check."""

    index: int
    name: str
    check: Check


def fields_of(cls: type[Any]) -> list[Field]:
    """The fields of a message class, in wire order."""
    hints = get_type_hints(cls, include_extras=True)
    fields = []
    for index, name in enumerate(cls._fields):
        (check,) = [extra for extra in get_args(hints[name]) if isinstance(extra, Check)]
        fields.append(Field(index, name, check))
    return fields


def wire_name(cls: type[Any]) -> str:
    """RegisterModel is called register_model in the documentation and in the golden vectors."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


def message_classes() -> list[type[Any]]:
    """Every class that has a shape on the wire, each once."""
    classes = [cls for op in OPERATIONS for cls in (op.request, op.reply)]
    classes += [cls for _, cls in DATAGRAMS]
    return list(dict.fromkeys([*classes, ErrorReply]))


def legal(check: Check) -> st.SearchStrategy[Any]:
    """Values that the check takes. Long ones stay short: the limits have tests of their own."""
    match check:
        case Int(low, high):
            return st.integers(low, high) | st.sampled_from([low, high])
        case Text(low, high):
            return st.text(min_size=low, max_size=min(high, 200))
        case Ascii(low, high):
            return st.text(st.characters(codec="ascii"), min_size=low, max_size=high)
        case Blob(size):
            return st.binary(min_size=size, max_size=size)
        case Packed(item, low, high):
            kind = {4: "I", 8: "Q"}[item]
            numbers = st.integers(0, (1 << 8 * item) - 1)
            lists = st.lists(numbers, min_size=low, max_size=min(high, 40))
            return lists.map(lambda found: struct.pack(f"<{len(found)}{kind}", *found))
        case Items(low, high, each):
            return st.lists(legal(each), min_size=low, max_size=min(high, 6))
        case Row(cells):
            return st.tuples(*map(legal, cells)).map(list)
        case Table():
            return st.dictionaries(NAMES, ANYTHING, max_size=5)
        case Evidence(high):
            return st.dictionaries(NAMES, PLAIN, max_size=min(high, 5))
    raise AssertionError(f"no strategy for {check!r}")


def legal_message(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Messages of this class that every check takes."""
    parts = st.tuples(*[legal(field.check) for field in fields_of(cls)])
    return parts.map(lambda values: cls(*values))


def example(check: Check) -> Any:
    """The smallest legal value."""
    match check:
        case Int(low):
            return low
        case Text(low) | Ascii(low):
            return "x" * low
        case Blob(size):
            return b"\0" * size
        case Packed(item, low):
            return b"\0" * item * low
        case Items(low, _, each):
            return [example(each)] * low
        case Row(cells):
            return [example(cell) for cell in cells]
        case Table() | Evidence():
            return {}
    raise AssertionError(f"no example for {check!r}")


def largest(check: Check) -> Any:
    """A legal value at the upper limit."""
    match check:
        case Int(_, high):
            return high
        case Text(_, high):
            return "\N{GRINNING FACE}" * high
        case Ascii(_, high):
            return "x" * high
        case Blob(size):
            return b"\xff" * size
        case Packed(item, _, high):
            return b"\xff" * item * high
        case Items(_, high, each):
            return [largest(each)] * high
        case Row(cells):
            return [largest(cell) for cell in cells]
        case Table():
            return {"key": 1}
        case Evidence(high):
            return {f"name {index}": "value" for index in range(high)}
    raise AssertionError(f"no example for {check!r}")


def illegal(check: Check) -> list[Any]:
    """Values that MessagePack can carry and the check must refuse."""
    everything = [None, True, False, 1, -1, 1.5, float("nan"), "text", b"bytes", [[]], {"a": []}]
    match check:
        case Int(low, high):
            beyond = [low - 1] + ([high + 1] if high + 1 < 1 << 64 else [])
            return _but(everything, int) + beyond + [-(1 << 63), float(low)]
        case Text(low, high):
            return _but(everything, str) + ["x" * (high + 1)] + ([""] if low else [])
        case Ascii(low, high):
            return [*_but(everything, str), "", "x" * (high + 1), "é" * low]
        case Blob(size):
            return [*_but(everything, bytes), b"", b"x" * (size - 1), b"x" * (size + 1)]
        case Packed(item, low, high):
            too_few = [b"x" * item * (low - 1)] if low else []
            too_many = [b"x" * item * (high + 1)]
            return [*_but(everything, bytes), b"x" * (item + 1), *too_few, *too_many]
        case Items(low, high, each):
            good = example(each)
            wrong = [*_but(everything, list), [good] * (high + 1)]
            if low:
                wrong.append([good] * (low - 1))
            return wrong + [[bad] for bad in illegal(each)]
        case Row(cells):
            good = [example(cell) for cell in cells]
            wrong = [*_but(everything, list), [], good[:-1], [*good, 0]]
            for index, cell in enumerate(cells):
                wrong += [[*good[:index], bad, *good[index + 1 :]] for bad in illegal(cell)]
            return wrong
        case Table():
            return [*_but(everything, dict), {b"key": 1}]
        case Evidence(high):
            too_many = {str(index): 0 for index in range(high + 1)}
            return [*everything, too_many, {b"key": 1}, {"a": {}}, {"a": b""}]
    raise AssertionError(f"nothing illegal is known for {check!r}")


def wording(check: Check) -> str:
    """How PROTOCOL.md writes the type of a field with this check."""
    match check:
        case Int(0, high) if high in (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF):
            return f"u{high.bit_length()}"
        case Int(low, 0xFFFFFFFFFFFFFFFF):
            return f"u64, from {low}"
        case Int(low, high):
            return f"int {low} .. {high}"
        case Text(low, high):
            return f"str {low} .. {high}"
        case Ascii(low, high):
            return f"str {low} .. {high} ASCII"
        case Blob(size):
            return f"bin {size}"
        case Packed(item, low, high):
            return f"bin of {low} .. {high} u{8 * item}"
        case Items(low, high, each):
            return f"array {low} .. {high} of ({wording(each)})"
        case Row(cells):
            return f"[{'; '.join(map(wording, cells))}]"
        case Table():
            return "map"
        case Evidence(high):
            return f"map 0 .. {high} of scalars"
    raise AssertionError(f"no words for {check!r}")


def _but(values: list[Any], kind: type[Any]) -> list[Any]:
    return [value for value in values if type(value) is not kind]


def pack(cls: type[Any], values: list[Any], correlation: int = 7) -> bytes:
    """A frame with these fields, whatever they are, written without the codec."""
    if cls is ErrorReply:
        return msgpack.packb([correlation, 1, *values])
    if cls in CODE_OF:
        return msgpack.packb([CODE_OF[cls], correlation, *values])
    if cls in KIND_OF:
        return msgpack.packb([KIND_OF[cls], *values])
    return msgpack.packb([correlation, 0, *values])


def decode(cls: type[Any], frame: bytes, correlation: int = 7) -> Any:
    """Decode a frame as what it should be: the message, or the error of an error reply."""
    if cls in CODE_OF:
        return codec.decode_request(frame).message
    if cls in KIND_OF:
        return codec.decode_datagram(frame)
    request = REQUEST_OF.get(cls, Ping)
    return codec.decode_reply(frame, {correlation: request}).body
