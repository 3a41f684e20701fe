"""The daemon's settings: defaults, then a TOML file, then KVD_* variables, then flags; checked.

Sizes are bytes, or a number with a unit: "4096MiB", "4GiB". Unknown keys of the file are refused;
a variable that is set to nothing counts as not set.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvd.group import group_id
from kvd.instance import check_instance
from kvd_proto.messages import MAX_SEQ_IDS
from kvd_proto.paths import DEFAULT_INSTANCE

DEFAULT_FILE = Path("/etc/kvd/kvd.toml")
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+)\s*([a-zA-Z]*)\s*")
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_LEVELS = ("debug", "info", "warning", "error")
_RANGES = {
    # Slots are numbered with 32 bits, and none is smaller than a page.
    "max_memory": (1 << 20, (1 << 44) - (1 << 12)),
    "max_sequences": (1, 1 << 20),
    "max_sessions": (1, 1 << 16),
    "n_seq_max": (1, MAX_SEQ_IDS),
    "linger_seconds": (0, 1 << 30),
}


class BadSetting(Exception):
    """A setting that cannot be used. The message names it, its value, and where it came from."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What one daemon runs with. Bytes and counts."""

    instance: str = DEFAULT_INSTANCE
    runtime_dir: str = ""
    """Empty: the default of the instance, see kvd.instance."""
    socket_group: int | None = None
    """The gid whose members may connect; None: only the daemon's own user, and root."""
    max_memory: int = 4096 << 20
    max_sequences: int = 100
    max_sessions: int = 256
    n_seq_max: int = 8
    """The most sequence ids that a context may have."""
    log_level: str = "info"
    linger_seconds: int = 0
    """Above 0: stop when no client has been connected for so long (private daemons)."""
    keep_on_stop: bool = True
    """Whether arenas stay in shared memory when the daemon is told to stop, for the next start."""


def load(
    file: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> Settings:
    """Put the settings together. Raises BadSetting.

    `file` None means the default file if there is one. `flags` holds those that were given.
    """
    values: dict[str, Any] = {}
    for source, found in (
        (str(file or DEFAULT_FILE), _read_file(file)),
        ("environment", _read_environ(environ)),
        ("flag", {name: value for name, value in flags.items() if value is not None}),
    ):
        for name, value in found.items():
            values[name] = _convert(name, value, source)
    settings = Settings(**values)
    if settings.max_sequences < settings.n_seq_max:
        raise BadSetting(
            f"max_sequences ({settings.max_sequences}) is less than n_seq_max "
            f"({settings.n_seq_max}): no context could ever use all of its ids"
        )
    return settings


def parse_size(text: str | int) -> int:
    """Bytes from 1048576, "1048576", "1024KiB" or "4 GiB". Raises ValueError."""
    if type(text) is int:
        return text
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError("a size is a number of bytes, KiB, MiB, GiB or TiB")
    return int(found[1]) * _UNITS[found[2].lower()]


_NAMES = {field.name: field.type for field in fields(Settings)}


def _read_file(file: Path | None) -> dict[str, Any]:
    path = file or DEFAULT_FILE
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if file is None and isinstance(error, FileNotFoundError):
            return {}
        raise BadSetting(f"{path}: {error}") from error


def _read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    found = {name: environ.get(f"KVD_{name.upper()}") for name in _NAMES}
    return {name: value for name, value in found.items() if value}


def _convert(name: str, value: Any, source: str) -> Any:
    if name not in _NAMES:
        raise BadSetting(f"{source}: there is no setting {name!r}; known: {', '.join(_NAMES)}")
    try:
        converted = _read(name, value)
        _check(name, converted)
    except ValueError as error:
        raise BadSetting(f"{source}: {name} = {value!r}: {error}") from error
    return converted


def _read(name: str, value: Any) -> Any:
    """The value in its setting's type. Text is read as a number where one is wanted, since a
    variable is always text; nothing else is taken for something that it is not."""
    if name == "max_memory":
        return parse_size(value)
    if name == "socket_group":
        return group_id(value)
    if _NAMES[name] is int:
        if type(value) is int or (isinstance(value, str) and value.strip().isdecimal()):
            return int(value)
        raise ValueError("it is a whole number")
    if _NAMES[name] is bool:
        found = value if type(value) is bool else _WORDS.get(str(value).strip().lower())
        if found is None:
            raise ValueError("it is true or false")
        return found
    if not isinstance(value, str):
        raise ValueError("it is text")
    return value


def _check(name: str, value: Any) -> None:
    if name in _RANGES:
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise ValueError(f"it is from {low} to {high}")
    elif name == "log_level" and value not in _LEVELS:
        raise ValueError(f"it is one of {', '.join(_LEVELS)}")
    elif name == "instance":
        check_instance(value)
