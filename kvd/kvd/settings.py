"""The daemon's settings: defaults, then a TOML file, then KVD_* variables, then flags; checked.

Sizes are bytes, or a number with a unit: "4096MiB", "4GiB". Unknown keys of the file are refused;
a variable that is set to nothing counts as not set. Tenants are tables of the file: tenants.py.
"""

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvd.group import group_id
from kvd.instance import check_instance
from kvd.tenants import TenantTable, read_tables
from kvd_proto.layout import MAX_PINS
from kvd_proto.messages import MAX_SEQ_IDS
from kvd_proto.paths import DEFAULT_INSTANCE

DEFAULT_FILE = Path("/etc/kvd/kvd.toml")
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+)\s*([a-zA-Z]*)\s*")
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_SIZES = ("max_memory", "max_staging", "max_reserved")
_LEVELS = ("debug", "info", "warning", "error")
_RANGES = {
    # Slots are numbered with 32 bits, and none is smaller than a page.
    "max_memory": (1 << 20, (1 << 44) - (1 << 12)),
    "max_sequences": (1, 1 << 20),
    "max_sessions": (1, 1 << 16),
    "n_seq_max": (1, MAX_SEQ_IDS),
    "linger_seconds": (0, 1 << 30),
    "max_models": (1, 1 << 12),
    "max_pins": (0, MAX_PINS),
    "max_staging": (1 << 12, 1 << 40),
    "max_session_models": (1, 1 << 12),
    "max_session_sequences": (0, 1 << 20),
    "max_contexts": (1, 1 << 16),
    "max_waiting": (0, 1 << 16),
    "max_commits": (1, 1 << 20),
    "max_reserved": (0, 1 << 44),
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
    tenants: tuple[TenantTable, ...] = ()
    """Empty: everybody who can connect is of one tenant."""
    max_models: int = 64
    """That one tenant may have registered: a model's directory stays."""
    max_pins: int = 1000
    """That one tenant may have: what is pinned stays, too."""
    # What one session may have, so that none can take everything from others.
    max_staging: int = 256 << 20
    """Never more than a quarter of the tenant's quota, whatever is set here."""
    max_session_models: int = 16
    max_session_sequences: int = 0
    """0: three quarters of max_sequences, and n_seq_max at least."""
    max_contexts: int = 64
    max_waiting: int = 256
    """Allocs that wait for an id."""
    max_commits: int = 4096
    """That are not finished."""
    max_reserved: int = 0
    """Room set aside by allocs for appends to come; 0: half of max_memory."""

    @property
    def session_sequences(self) -> int:
        """`max_session_sequences` as it is in effect."""
        return self.max_session_sequences or max(self.n_seq_max, self.max_sequences * 3 // 4)

    @property
    def session_reserved(self) -> int:
        """`max_reserved` as it is in effect."""
        return self.max_reserved or self.max_memory // 2


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
    if settings.session_sequences < settings.n_seq_max:
        raise BadSetting(
            f"max_session_sequences ({settings.max_session_sequences}) is less than n_seq_max "
            f"({settings.n_seq_max}): no context could ever use all of its ids"
        )
    _check_secrecy(file or DEFAULT_FILE, settings.tenants)
    for table in settings.tenants:
        quota = table.rule.quota
        if quota is not None and not _RANGES["max_memory"][0] <= quota <= settings.max_memory:
            raise BadSetting(
                f"tenants.{table.rule.name}: quota ({quota}) is from {_RANGES['max_memory'][0]} to "
                f"max_memory ({settings.max_memory})"
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


def _check_secrecy(path: Path, tenants: tuple[TenantTable, ...]) -> None:
    """A salt that everybody can read keeps nobody out."""
    if any(table.rule.salt for table in tenants) and path.stat().st_mode & stat.S_IROTH:
        raise BadSetting(f"{path}: it holds salts, and everybody can read it: chmod o-r {path}")


def _read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    found = {name: environ.get(f"KVD_{name.upper()}") for name in _NAMES}
    return {name: value for name, value in found.items() if value}


def _convert(name: str, value: Any, source: str) -> Any:
    if name not in _NAMES:
        raise BadSetting(f"{source}: there is no setting {name!r}; known: {', '.join(_NAMES)}")
    if name == "tenants":  # never shown as it is: salts are secret
        try:
            return read_tables(value, parse_size)
        except ValueError as error:
            raise BadSetting(f"{source}: tenants: {error}") from None
    try:
        converted = _read(name, value)
        _check(name, converted)
    except ValueError as error:
        raise BadSetting(f"{source}: {name} = {value!r}: {error}") from error
    return converted


def _read(name: str, value: Any) -> Any:
    """The value in its setting's type. Text is read as a number where one is wanted, since a
    variable is always text; nothing else is taken for something that it is not."""
    if name in _SIZES:
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
