"""What the value of a setting can be: sizes, times, counts, words, ids; read, and shown.

Covers values as TOML has them and as text, since a variable or a flag is always text. Nothing is
taken for something that it is not. Which settings there are: settings.py and tenants.py; where
their values come from: configuration.py.
"""

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kvd.group import group_id

_SIZES = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+)\s*([a-zA-Z]*)\s*")
_TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Unusable(Exception):
    """Values that cannot be used. Each of `errors` names its key, its value, and what may be."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(self.errors))


class Kind(ABC):
    """What one value can be. `allowed` says so in words that follow "it is"."""

    metavar: ClassVar[str]
    is_secret: ClassVar[bool] = False
    is_table: ClassVar[bool] = False

    @property
    @abstractmethod
    def allowed(self) -> str:
        raise NotImplementedError

    @abstractmethod
    def read(self, value: Any) -> Any:
        """The value in its own type. Raises ValueError."""
        raise NotImplementedError

    def show(self, value: Any) -> str:
        """For people, in a form that `read` takes, too."""
        return str(value)

    def plain(self, value: Any) -> Any:
        """For programs: a number, a text, a boolean, a list, or nothing."""
        return value

    def refuse(self) -> ValueError:
        """What to raise if it is something else."""
        return ValueError(f"it is {self.allowed}")


@dataclass(frozen=True, slots=True)
class Size(Kind):
    """Bytes, in low .. high."""

    metavar: ClassVar[str] = "SIZE"
    low: int
    high: int

    @property
    def allowed(self) -> str:
        return (
            f"a size from {show_size(self.low)} to {show_size(self.high)}: a number of bytes, KiB, "
            "MiB, GiB or TiB"
        )

    def read(self, value: Any) -> int:
        found = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if type(value) is int:
            n_bytes = value
        elif found is not None and found[2].lower() in _SIZES:
            n_bytes = int(found[1]) * _SIZES[found[2].lower()]
        else:
            raise self.refuse()
        if not self.low <= n_bytes <= self.high:
            raise self.refuse()
        return n_bytes

    def show(self, value: Any) -> str:
        return "none" if value is None else show_size(value)


@dataclass(frozen=True, slots=True)
class Duration(Kind):
    """Seconds, in low .. high."""

    metavar: ClassVar[str] = "TIME"
    low: float
    high: float

    @property
    def allowed(self) -> str:
        return (
            f"a time from {show_duration(self.low)} to {show_duration(self.high)}: a number of "
            "seconds, or one with ms, s, min, h or d"
        )

    def read(self, value: Any) -> float:
        found = _TIME.fullmatch(value) if isinstance(value, str) else None
        if type(value) in (int, float):
            seconds = value
        elif found is not None and found[2].lower() in _TIMES:
            seconds = float(found[1]) * _TIMES[found[2].lower()]
        else:
            raise self.refuse()
        if not self.low <= seconds <= self.high:  # not a number is not, either
            raise self.refuse()
        return float(seconds)

    def show(self, value: Any) -> str:
        return show_duration(value)


@dataclass(frozen=True, slots=True)
class Count(Kind):
    """A whole number in low .. high."""

    metavar: ClassVar[str] = "N"
    low: int
    high: int

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def read(self, value: Any) -> int:
        # The length first: beyond 4,300 digits the conversion is an error of its own.
        if isinstance(value, str) and len(value) <= 40 and value.strip().isdecimal():
            value = int(value)
        if type(value) is not int or not self.low <= value <= self.high:
            raise self.refuse()
        return value


@dataclass(frozen=True, slots=True)
class Switch(Kind):
    """True or false."""

    metavar: ClassVar[str] = ""

    @property
    def allowed(self) -> str:
        return "true or false"

    def read(self, value: Any) -> bool:
        found = value if type(value) is bool else _WORDS.get(str(value).strip().lower())
        if found is None:
            raise self.refuse()
        return found

    def show(self, value: Any) -> str:
        return "true" if value else "false"


@dataclass(frozen=True, slots=True)
class Choice(Kind):
    """One of some words."""

    metavar: ClassVar[str] = "WORD"
    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(self.words)}"

    def read(self, value: Any) -> str:
        if value not in self.words:
            raise self.refuse()
        return str(value)


@dataclass(frozen=True, slots=True)
class Text(Kind):
    """Any text, or such as `check` does not refuse with a ValueError."""

    metavar: ClassVar[str] = "TEXT"
    allowed_text: str = "text"
    check: Callable[[str], object] = lambda _: None

    @property
    def allowed(self) -> str:
        return self.allowed_text

    def read(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self.refuse()
        try:
            self.check(value)
        except ValueError:
            raise self.refuse() from None
        return value

    def show(self, value: Any) -> str:
        return str(value) or '""'


@dataclass(frozen=True, slots=True)
class Group(Kind):
    """A group of the system, as its gid; or none."""

    metavar: ClassVar[str] = "GROUP"

    @property
    def allowed(self) -> str:
        return "a group's name or number"

    def read(self, value: Any) -> int | None:
        return group_id(value)

    def show(self, value: Any) -> str:
        return '""' if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Ids(Kind):
    """A list of numbers of users or groups."""

    metavar: ClassVar[str] = "LIST"
    last: int
    nobody: int
    """What the kernel says where it cannot say who it is."""

    @property
    def allowed(self) -> str:
        return (
            f"a list of numbers from 0 to {self.last} without {self.nobody}, which stands for "
            "everybody whom the kernel cannot name"
        )

    def read(self, value: Any) -> frozenset[int]:
        if not isinstance(value, list) or any(type(each) is not int for each in value):
            raise self.refuse()
        if any(not 0 <= each <= self.last or each == self.nobody for each in value):
            raise self.refuse()
        return frozenset(value)

    def show(self, value: Any) -> str:
        return ",".join(str(each) for each in sorted(value)) or "none"

    def plain(self, value: Any) -> list[int]:
        return sorted(value)


@dataclass(frozen=True, slots=True)
class FileList(Kind):
    """A list of absolute paths, not checked further: they may come later."""

    metavar: ClassVar[str] = "LIST"

    @property
    def allowed(self) -> str:
        return "a list of absolute paths"

    def read(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.refuse()
        if not all(each.startswith("/") and "\0" not in each for each in value):
            raise self.refuse()
        return tuple(value)

    def show(self, value: Any) -> str:
        return ", ".join(value) or "none"

    def plain(self, value: Any) -> list[str]:
        return list(value)


@dataclass(frozen=True, slots=True)
class Secret(Kind):
    """Text of low .. high bytes that is never shown."""

    metavar: ClassVar[str] = "SECRET"
    is_secret: ClassVar[bool] = True
    low: int
    high: int

    @property
    def allowed(self) -> str:
        return f"text of {self.low} to {self.high} bytes, which nobody can guess"

    def read(self, value: Any) -> bytes:
        encoded = value.encode() if isinstance(value, str) else b""
        if not self.low <= len(encoded) <= self.high:
            raise self.refuse()
        return encoded

    def show(self, value: Any) -> str:
        return "(secret)" if value else "none"

    def plain(self, value: Any) -> str:
        return self.show(value)


def read_table(where: str, table: Any, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The values of a table of the file that is called `where`, in their own types. Raises Unusable
    with all that is wrong in it."""
    if not isinstance(table, dict):
        raise Unusable([f"{where}: it is a table: [{where}]"])
    values: dict[str, Any] = {}
    errors: list[str] = []
    for name, value in table.items():
        kind = kinds.get(name)
        if kind is None:
            errors.append(unknown(f"{where}.{name}", name, kinds))
            continue
        try:
            values[name] = kind.read(value)
        except ValueError as error:
            errors.append(complaint(f"{where}.{name}", value, error, kind))
    if errors:
        raise Unusable(errors)
    return values


def complaint(key: str, value: Any, error: Exception, kind: Kind) -> str:
    """What is wrong with the value of `key`; one that may be a secret is not told."""
    return f"{key}: {error}" if kind.is_secret else f"{key} = {_short(value)}: {error}"


def unknown(key: str, name: str, known: Iterable[str]) -> str:
    """That there is no `name`, and which one may have been meant."""
    near = nearest(name.lower(), known)
    hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
    return f"{key}: there is no setting {_short(name)}; {hint}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant; empty if there is none like it."""
    return next(iter(difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)), "")


def show_size(n_bytes: int) -> str:
    """In the largest unit of which it is a whole number: 4GiB, 1536MiB."""
    if not n_bytes:
        return "0"
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if n_bytes % _SIZES[unit.lower()] == 0:
            return f"{n_bytes // _SIZES[unit.lower()]}{unit}"
    return f"{n_bytes}B"


def show_duration(seconds: float) -> str:
    """In the largest unit of which it is a whole number: 30s, 5min, 90min; 0.25s."""
    if not seconds:
        return "0"
    for unit in ("d", "h", "min"):
        if math.fmod(seconds, _TIMES[unit]) == 0:
            return f"{seconds / _TIMES[unit]:.0f}{unit}"
    return f"{seconds:g}s"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
