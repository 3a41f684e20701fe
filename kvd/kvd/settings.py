"""The daemon's settings: what there is, what each may be, and which go together.

Covers names, kinds, defaults, meanings, and whether a setting can be changed while the daemon runs.
Where the values come from: configuration.py. Tenants are tables of their own: tenants.py.

A new table of the file ([NAME.*]) is a setting here whose kind reads it, as `tenants` is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from kvd.core.shares import ModelRule
from kvd.instance import check_instance
from kvd.kinds import Choice, Count, Duration, Group, Kind, Size, Switch, Text
from kvd.metrics import listening
from kvd.model_rules import ModelTables
from kvd.tenants import TenantTable, TenantTables
from kvd.warming import WarmList, WarmLists
from kvd_proto.layout import MAX_PINS
from kvd_proto.messages import MAX_SEQ_IDS, MAX_TOKENS
from kvd_proto.paths import DEFAULT_INSTANCE

LEVELS = ("debug", "info", "warning", "error")
MOST_MEMORY = (1 << 44) - (1 << 30)
"""Slots are numbered with 32 bits, and none is smaller than a page."""
_LONGEST = 366 * 86400.0


_AT_START = "what is promised is set aside at the start"


@dataclass(frozen=True, slots=True)
class About:
    """What is known of a setting beside its value."""

    kind: Kind
    meaning: str
    restart: str
    """Why it needs a restart; empty: it can be changed while the daemon runs."""


def _setting(default: Any, kind: Kind, meaning: str, restart: str = "") -> Any:
    return field(default=default, metadata={"about": About(kind, meaning, restart)})


@dataclass(frozen=True, slots=True)
class Settings:
    """What one daemon runs with. Bytes, seconds and counts."""

    instance: str = _setting(
        DEFAULT_INSTANCE,
        Text("1 to 32 of a-z, 0-9 and '-'", check_instance),
        "name of this daemon",
        "sockets and shared memory are named after it",
    )
    runtime_dir: str = _setting(
        "",
        Text("a directory, or empty for the instance's own"),
        "directory of its sockets",
        "clients find the sockets where they were made",
    )
    """Empty: the default of the instance, see kvd.instance."""
    socket_group: int | None = _setting(
        None,
        Group(),
        "whose members may connect; empty: only the daemon's own user, and root",
        "the sockets were opened to the group when they were made",
    )
    """The gid; None: only the daemon's own user, and root."""
    max_memory: int = _setting(4096 << 20, Size(1 << 20, MOST_MEMORY), "the budget")
    max_sequences: int = _setting(100, Count(1, 1 << 20), "open sequences, over all clients")
    max_sessions: int = _setting(256, Count(1, 1 << 16), "clients that are connected at once")
    n_seq_max: int = _setting(8, Count(1, MAX_SEQ_IDS), "sequence ids that a context may have")
    max_context: int = _setting(
        4096,
        Count(0, MAX_TOKENS),
        "the longest sequence that is meant to fit, in tokens: a model of which n_seq_max do not "
        "fit the budget is warned of; 0: none is",
    )
    log_level: str = _setting("info", Choice(LEVELS), "the least that is logged")
    linger_seconds: float = _setting(
        0.0, Duration(0, _LONGEST), "stop after so long without a client; 0: never"
    )
    """For private daemons."""
    keep_on_stop: bool = _setting(
        True, Switch(), "keep the cache in shared memory for the next start"
    )
    metrics: str = _setting(
        "",
        Text(f"empty, {listening.ALLOWED}", listening.parse),
        "where metrics, the status page and /healthz are served: unix, or an address of this "
        "machine; empty: nowhere",
        "who asks must find it where it was",
    )
    tenants: tuple[TenantTable, ...] = _setting(
        (),
        TenantTables(),
        "who is of which tenant",
        "who has connected is of the tenant that was found then",
    )
    """Empty: everybody who can connect is of one tenant."""
    warm: tuple[WarmList, ...] = _setting(
        (),
        WarmLists(),
        "prompts to compute, store and pin at a cold start",
        "they are computed at a start",
    )
    models: tuple[ModelRule, ...] = _setting(
        (), ModelTables(), "what models have at least, and at most", _AT_START
    )
    max_models: int = _setting(64, Count(1, 1 << 12), "models of one tenant")
    max_pins: int = _setting(1000, Count(0, MAX_PINS), "pins of one tenant")
    # What one session may have, so that none can take everything from others.
    max_staging: int = _setting(
        256 << 20,
        Size(1 << 12, 1 << 40),
        "memory for one client's commits; at most a quarter of its tenant's quota",
    )
    max_session_models: int = _setting(16, Count(1, 1 << 12), "models of one client")
    max_session_sequences: int = _setting(
        0, Count(0, 1 << 20), "open sequences of one client; 0: three quarters of max_sequences"
    )
    """0: three quarters of max_sequences, and n_seq_max at least."""
    max_contexts: int = _setting(64, Count(1, 1 << 16), "open contexts of one client")
    max_waiting: int = _setting(256, Count(0, 1 << 16), "allocs of one client that wait")
    max_commits: int = _setting(
        4096, Count(1, 1 << 20), "commits of one client that are not finished"
    )
    max_reserved: int = _setting(
        0,
        Size(0, 1 << 44),
        "room that one client sets aside for appends to come; 0: half of max_memory",
    )

    @property
    def session_sequences(self) -> int:
        """`max_session_sequences` as it is in effect."""
        return self.max_session_sequences or max(self.n_seq_max, self.max_sequences * 3 // 4)

    @property
    def session_reserved(self) -> int:
        """`max_reserved` as it is in effect."""
        return self.max_reserved or self.max_memory // 2

    def effective(self, name: str) -> Any:
        """The value that is in effect where a setting says: what follows from another."""
        follows = {
            "max_session_sequences": self.session_sequences,
            "max_reserved": self.session_reserved,
        }
        return follows.get(name, getattr(self, name))


ABOUT: Mapping[str, About] = {each.name: each.metadata["about"] for each in fields(Settings)}
"""By the setting's name, in the order of the example file."""


class Disagreement(NamedTuple):
    """Settings that do not go together, by name, and what is wrong with that."""

    names: tuple[str, ...]
    text: str


def disagreements(settings: Settings) -> list[Disagreement]:
    """What is wrong with settings that are right by themselves."""
    found = []
    for name, most in (
        ("max_sequences", settings.max_sequences),
        ("max_session_sequences", settings.session_sequences),
    ):
        if most < settings.n_seq_max:
            text = (
                f"{name} ({most}) is less than n_seq_max ({settings.n_seq_max}): no context could "
                "ever use all of its ids"
            )
            found.append(Disagreement((name, "n_seq_max"), text))
            break  # the second follows from the first
    show = ABOUT["max_memory"].kind.show
    for table in settings.tenants:
        quota = table.rule.quota
        if quota is not None and quota > settings.max_memory:
            text = (
                f"tenants.{table.rule.name}.quota = {show(quota)}: it is at most max_memory "
                f"({show(settings.max_memory)})"
            )
            found.append(Disagreement(("tenants", "max_memory"), text))
    return found + _minima_that_do_not_fit(settings)


def _minima_that_do_not_fit(settings: Settings) -> list[Disagreement]:
    """A minimum is for certain, so all of them fit the budget, and each its quota or cap."""
    show = ABOUT["max_memory"].kind.show
    found = []
    limits = [
        ("tenants", each.rule.name, "quota", each.rule.minimum, each.rule.quota)
        for each in settings.tenants
    ]
    limits += [("models", each.name, "cap", each.minimum, each.cap) for each in settings.models]
    for table, name, limit, minimum, most in limits:
        if most is not None and minimum > most:
            text = (
                f"{table}.{name}.minimum = {show(minimum)}: it is at most its {limit} "
                f"({show(most)})"
            )
            found.append(Disagreement((table,), text))
    total = sum(minimum for _, _, _, minimum, _ in limits)
    if total > settings.max_memory:
        text = (
            f"the minima of tenants and models are {show(total)} together: they are at most "
            f"max_memory ({show(settings.max_memory)})"
        )
        found.append(Disagreement(("tenants", "models", "max_memory"), text))
    return found
