"""The checks a message field can ask for, as annotations. Each raises BadMessage with the evidence.

A check takes the field's full name and the value that MessagePack gave, and returns nothing. They
are strict: True is not an integer, a list is not a table, and every size has a limit.
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
                f"{field} is an integer from {self.low} to {self.high}", got=_show(value)
            )


@dataclass(frozen=True, slots=True)
class Flag(Check):
    """A boolean."""

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not bool:
            raise BadMessage(f"{field} is true or false", got=_show(value))


@dataclass(frozen=True, slots=True)
class Text(Check):
    """A string of low .. high characters."""

    low: int
    high: int

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not str or not self.low <= len(value) <= self.high:
            raise BadMessage(
                f"{field} is text of {self.low} to {self.high} letters", got=_show(value)
            )


@dataclass(frozen=True, slots=True)
class Blob(Check):
    """Exactly `size` bytes."""

    size: int

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not bytes or len(value) != self.size:
            raise BadMessage(f"{field} is {self.size} bytes", got=_show(value))


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
            raise BadMessage(f"{field} is {wanted}", got=_show(value))


@dataclass(frozen=True, slots=True)
class Items(Check):
    """A list of low .. high items, each passing `each` if that is given."""

    low: int
    high: int
    each: Check | None = None

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not list or not self.low <= len(value) <= self.high:
            raise BadMessage(
                f"{field} is a list of {self.low} to {self.high} items", got=_show(value)
            )
        if self.each is not None:
            for item in value:
                self.each(field, item)


@dataclass(frozen=True, slots=True)
class Table(Check):
    """A map with strings as keys."""

    def __call__(self, field: str, value: Any) -> None:
        if type(value) is not dict or any(type(key) is not str for key in value):
            raise BadMessage(f"{field} is a map with names as keys", got=_show(value))


def _show(value: Any) -> str:
    """A short picture of a value that may be huge."""
    if isinstance(value, bytes | str | list | dict | tuple):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]}"
