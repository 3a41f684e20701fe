"""Where the settings come from: defaults, then a TOML file, then KVD_* variables, then flags.

Covers reading these sources, telling all that is wrong with them at once, and where each value in
effect comes from. What a setting may be: settings.py. What the machine has to say to it: advice.py.

A variable that is set to nothing counts as not set. Whatever is shown or said has no salt in it.
"""

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvd import model_rules, tenants, warming
from kvd.core.shares import ModelRule
from kvd.instance import default_runtime_dir
from kvd.kinds import Kind, Unusable, complaint, nearest, unknown
from kvd.settings import ABOUT, Settings, disagreements

DEFAULT_FILE = Path("/etc/kvd/kvd.toml")


class BadSetting(Exception):
    """Settings that cannot be used. Each of `errors` names where it comes from, the setting, its
    value, and what it may be."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


class Origin(NamedTuple):
    """`kind` is default, file, environment or flag; `where` the file, the variable, or the flag."""

    kind: str
    where: str

    def __str__(self) -> str:
        return self.where or self.kind


_DEFAULT = Origin("default", "")


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings in effect, and where those come from that are not the default."""

    settings: Settings
    origins: Mapping[str, Origin]
    warnings: tuple[str, ...] = ()
    """What is allowed, and probably not what was meant."""


class Row(NamedTuple):
    """A value in effect. `value` and `default` are for programs, `text` and `default_text` for
    people. `restart`: why it needs one to be changed; empty: it does not."""

    name: str
    value: Any
    text: str
    default: Any
    default_text: str
    origin: str
    where: str
    restart: str


def load(
    file: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> Configuration:
    """Put the settings together. Raises BadSetting with all that is wrong.

    `file` None means the default file if there is one. `flags` holds those that were given.
    """
    errors: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    path = file or DEFAULT_FILE
    for name, value in _read_file(path, file is None).items():
        _take(name, value, Origin("file", str(path)), values, origins, errors)
    for name in ABOUT:
        variable = variable_of(name)
        if environ.get(variable):
            origin = Origin("environment", variable)
            _take(name, environ[variable], origin, values, origins, errors)
    for name, value in flags.items():
        if value is not None:
            _take(name, value, Origin("flag", flag_of(name)), values, origins, errors)
    settings = Settings(**values)
    if not errors:
        for names, text in disagreements(settings):
            sources = dict.fromkeys(str(origins.get(name, _DEFAULT)) for name in names)
            errors.append(f"{', '.join(sources)}: {text}")
        errors += _find_readable_salts(path, settings)
    if errors:
        raise BadSetting(errors)
    return Configuration(settings, origins, tuple(_find_odd(settings, environ)))


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return f"KVD_{name.upper()}"


def flag_of(name: str) -> str:
    """The flag of `kvd serve` for a setting."""
    return f"--{name.replace('_', '-')}"


def rows(configuration: Configuration) -> list[Row]:
    """Every value in effect, in the order of the example file; a tenant and a model have one for
    each of what their table may say."""
    settings, found = configuration.settings, []
    for name, about in ABOUT.items():
        origin = configuration.origins.get(name, _DEFAULT)
        value, default = settings.effective(name), Settings().effective(name)
        if name == "runtime_dir":
            value = value or str(default_runtime_dir(settings.instance))
        found.append(_row(name, about.kind, value, default, origin, about.restart))
        if name == "tenants":
            for table in settings.tenants:
                found += _rows_of_tenant(table, origin, about.restart)
        elif name == "warm":
            for each in settings.warm:
                found += [
                    _row_of_list(each, key, part, origin, about.restart)
                    for key, part in each.values
                ]
        elif name == "models":
            for rule in settings.models:
                found += _rows_of_model(rule, origin, about.restart)
    return found


def _rows_of_tenant(table: tenants.TenantTable, origin: Origin, restart: str) -> list[Row]:
    found = []
    for name, value, default in (
        ("uids", table.uids, frozenset()),
        ("gids", table.gids, frozenset()),
        ("quota", table.rule.quota, None),
        ("minimum", table.rule.minimum, 0),
        ("salt", table.rule.salt, b""),
    ):
        where = origin if value != default else _DEFAULT
        reason = "" if name == "quota" else restart
        key = f"tenants.{table.rule.name}.{name}"
        found.append(_row(key, tenants.KINDS[name], value, default, where, reason))
    return found


def _row_of_list(of: warming.WarmList, name: str, value: Any, origin: Origin, restart: str) -> Row:
    kind = warming.KINDS[name]
    key = f"warm.{of.name}.{name}"
    return Row(key, kind.plain(value), kind.show(value), None, "none", *origin, restart)


def _rows_of_model(rule: ModelRule, origin: Origin, restart: str) -> list[Row]:
    return [
        _row(
            f"models.{rule.name}.{name}",
            model_rules.KINDS[name],
            value,
            default,
            origin if value != default else _DEFAULT,
            restart,
        )
        for name, value, default in (("minimum", rule.minimum, 0), ("cap", rule.cap, None))
    ]


def _row(name: str, kind: Kind, value: Any, default: Any, origin: Origin, restart: str) -> Row:
    return Row(
        name,
        kind.plain(value),
        kind.show(value),
        kind.plain(default),
        kind.show(default),
        *origin,
        restart,
    )


def _take(
    name: str,
    value: Any,
    origin: Origin,
    values: dict[str, Any],
    origins: dict[str, Origin],
    errors: list[str],
) -> None:
    """Read one value of a source, which is stronger than those before it."""
    if name not in ABOUT:
        errors.append(f"{origin}: {unknown(name, name, ABOUT)}")
        return
    kind = ABOUT[name].kind
    try:
        values[name] = kind.read(value)
    except Unusable as error:
        errors += [f"{origin}: {each}" for each in error.errors]
    except ValueError as error:
        errors.append(f"{origin}: {complaint(name, value, error, kind)}")
    else:
        origins[name] = origin


def _read_file(path: Path, may_be_absent: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if may_be_absent and isinstance(error, FileNotFoundError):
            return {}
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadSetting([f"{path}: {reason}"]) from error


def _find_readable_salts(path: Path, settings: Settings) -> list[str]:
    """A salt that everybody can read keeps nobody out."""
    if any(each.rule.salt for each in settings.tenants) and path.stat().st_mode & stat.S_IROTH:
        return [f"{path}: it holds salts, and everybody can read it: chmod o-r {path}"]
    return []


def _find_odd(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """What is allowed, and probably not what was meant."""
    found = []
    for variable in sorted(environ):
        name = variable.removeprefix("KVD_").lower()
        if variable.startswith("KVD_") and name not in ABOUT and (near := nearest(name, ABOUT)):
            found.append(f"{variable} is not read: did you mean {variable_of(near)}?")
    if settings.max_reserved > settings.max_memory:
        kind = ABOUT["max_memory"].kind
        found.append(
            f"max_reserved ({kind.show(settings.max_reserved)}) is more than max_memory "
            f"({kind.show(settings.max_memory)}): it limits nothing"
        )
    return found
