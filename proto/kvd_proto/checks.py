"""The checks a message field can ask for, as annotations. Each raises BadMessage with the evidence.

A check takes the field's full name and the value that MessagePack gave, and returns nothing. They
are strict: True is not an integer, a list is not a table, and every size has a limit. The evidence
is short whatever the value was: nothing from outside is ever turned into text as a whole.
"""

from dataclasses import dataclass
from typing import Any

from kvd_proto.errors import BadMessage


class Check:
    """Base of the annotations that codec.py runs."""

    def __call__(self, field: str, value: Any) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Int(Check):
    """An integer in low .. high, both included."""

    low: int
    high: int

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not int or not self.low <= value <= self.high:
            raise BadMessage(
                f"{field} is an integer from {self.low} to {self.high}", got=show(value)
            )


@dataclass(frozen=True, slots=True)
class Text(Check):
    """A string of low .. high characters (Unicode code points)."""

    low: int
    high: int

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not str or not self.low <= len(value) <= self.high:
            raise BadMessage(
                f"{field} is text of {self.low} to {self.high} letters", got=show(value)
            )


@dataclass(frozen=True, slots=True)
class Ascii(Check):
    """A string of low .. high ASCII characters, so of as many bytes."""

    low: int
    high: int

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not str or not self.low <= len(value) <= self.high or not value.isascii():
            raise BadMessage(
                f"{field} is text of {self.low} to {self.high} ASCII letters", got=show(value)
            )


@dataclass(frozen=True, slots=True)
class Blob(Check):
    """Exactly `size` bytes."""

    size: int

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not bytes or len(value) != self.size:
            raise BadMessage(f"{field} is {self.size} bytes", got=show(value))


@dataclass(frozen=True, slots=True)
class Packed(Check):
    """low .. high little-endian integers of `item` bytes each, in one byte string."""

    item: int
    low: int
    high: int

    def __call__(self, field: str, value: Any) -> None:
        if (
            type(value) is not bytes
            or len(value) % self.item
            or not self.low <= len(value) // self.item <= self.high
        ):
            wanted = f"{self.low} to {self.high} packed integers of {self.item} bytes"
            raise BadMessage(f"{field} is {wanted}", got=show(value))


@dataclass(frozen=True, slots=True)
class Items(Check):
    """A list of low .. high items, each passing `each`."""

    low: int
    high: int
    each: Check

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not list or not self.low <= len(value) <= self.high:
            raise BadMessage(
                f"{field} is a list of {self.low} to {self.high} items", got=show(value)
            )
        for index, item in enumerate(value):
            self.each(f"{field}[{index}]", item)


@dataclass(frozen=True, slots=True)
class Row(Check):
    """A list with one item for each of `cells`."""

    cells: tuple[Check, ...]

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not list or len(value) != len(self.cells):
            raise BadMessage(f"{field} is a row of {len(self.cells)} items", got=show(value))
        for index, (cell, item) in enumerate(zip(self.cells, value, strict=True)):
            cell(f"{field}[{index}]", item)


@dataclass(frozen=True, slots=True)
class Table(Check):
    """A map with strings as keys, and anything as values."""

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not dict or any(type(key) is not str for key in value):
            raise BadMessage(f"{field} is a map with names as keys", got=show(value))


@dataclass(frozen=True, slots=True)
class Evidence(Check):
    """A map of at most `high` names to a number, text, boolean or nil each: an error's details."""

    high: int

    def __call__(self, field: str, value: Any) -> None:
        if (
            type(value) is not dict
            or len(value) > self.high
            or any(type(key) is not str for key in value)
            or any(type(item) not in _PLAIN for item in value.values())
        ):
            raise BadMessage(
                f"{field} is a map of up to {self.high} names to plain values", got=show(value)
            )


_PLAIN = (int, float, bool, str, type(None))


def show(value: Any) -> str:
    """A short picture of a value that may be huge, nested or hostile. Never fails."""
    kind = type(value).__name__
    if isinstance(value, bytes | str | list | dict | tuple):
        return f"{kind} of length {len(value)}"
    if value is None or isinstance(value, float | bool):
        return f"{kind} {value}"
    if isinstance(value, int):
        # Converting a huge integer is slow, and beyond 4,300 digits an error.
        bits = value.bit_length()
        return f"{kind} {value}" if bits <= 64 else f"{kind} of {bits} bits"
    return kind
