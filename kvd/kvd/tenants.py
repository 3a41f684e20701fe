"""Who is of which tenant: the tables [tenants.*] of the configuration, and a client's credentials.

Covers reading and checking the tables, and finding a client's tenant by its uid and groups, as the
kernel knew them when it connected. What a tenant may take and holds: kvd.core.tenants.

Without tables everybody who can connect is of the tenant "default", and may see and evict
everything. With tables:

    a uid that is listed            the tenant that lists it
    the daemon's own user, root     "default", unless it is listed; and the administrator, always
    groups of exactly one tenant    that tenant
    anybody else                    refused: NoTenant
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from kvd.core.tenants import TenantRule
from kvd.kinds import Ids, Kind, Secret, Size, Unusable, read_table
from kvd_proto.errors import NoTenant

DEFAULT = "default"
MAX_TENANTS = 256
"""An eviction for want of budget looks at each."""
STAGING_SHARE = 4
"""One staging takes at most this part of its tenant's quota: some room must be left for K/V."""
_NAME = re.compile(r"[a-z0-9-]{1,32}")
_LAST_ID = (1 << 32) - 2  # (uid_t) -1 is none
_OVERFLOW_ID = 65534
"""What the kernel says where it cannot say: a user of another user namespace."""
_GROUPS_SHOWN = 16
KINDS: Mapping[str, Kind] = {
    "uids": Ids(_LAST_ID, _OVERFLOW_ID),
    "gids": Ids(_LAST_ID, _OVERFLOW_ID),
    "quota": Size(1 << 20, 1 << 44),
    "minimum": Size(0, 1 << 44),
    "salt": Secret(16, 128),
}
"""What a table of a tenant may say."""


@dataclass(frozen=True, slots=True)
class TenantTable:
    """One [tenants.NAME] of the configuration."""

    rule: TenantRule
    uids: frozenset[int]
    gids: frozenset[int]


class Membership(NamedTuple):
    """What a client is: its tenant, whether it may see and evict what is others', and how long its
    staging may be, in bytes without the header."""

    tenant: str
    administrator: bool
    max_staging: int


@dataclass(frozen=True, slots=True)
class TenantTables(Kind):
    """The tables of all tenants, checked against each other."""

    metavar: ClassVar[str] = "TABLES"
    is_table: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return "tables of the configuration file: [tenants.NAME]"

    def read(self, value: Any) -> tuple[TenantTable, ...]:
        """Raises Unusable with all that is wrong, and never a salt."""
        if not isinstance(value, dict):
            raise Unusable([f"tenants: it is {self.allowed}"])
        errors: list[str] = []
        if len(value) > MAX_TENANTS:
            errors.append(f"tenants: there may be {MAX_TENANTS}, not {len(value)}")
        tables: list[TenantTable] = []
        for name, table in value.items():
            try:
                tables.append(_read_table(name, table))
            except Unusable as error:
                errors += error.errors
        for kind in ("uids", "gids"):
            owner: dict[int, str] = {}
            for each in tables:
                for number in sorted(getattr(each, kind)):
                    other = owner.setdefault(number, each.rule.name)
                    if other != each.rule.name:
                        errors.append(
                            f"tenants: {kind[:-1]} {number} is in two tenants, {other} and "
                            f"{each.rule.name}: it is in one of them"
                        )
        if errors:
            raise Unusable(errors)
        return tuple(tables)

    def show(self, value: Any) -> str:
        return ", ".join(table.rule.name for table in value) or "none"

    def plain(self, value: Any) -> list[str]:
        return [table.rule.name for table in value]


class Tenants:
    """Finds the tenant of whoever connects."""

    def __init__(
        self,
        tables: Iterable[TenantTable],
        max_memory: int,
        max_staging: int,
        own_uid: int | None = None,
    ) -> None:
        """`max_memory` is the quota of those that have none; `own_uid` the daemon's own user."""
        self._tables = tuple(tables)
        self._administrators = frozenset((0, os.geteuid() if own_uid is None else own_uid))
        self._by_uid = {uid: table.rule.name for table in self._tables for uid in table.uids}
        quotas = {table.rule.name: table.rule.quota or max_memory for table in self._tables}
        self._max_staging = {
            name: min(max_staging, quota // STAGING_SHARE)
            for name, quota in {DEFAULT: max_memory, **quotas}.items()
        }

    @property
    def names(self) -> frozenset[str]:
        """Of all that somebody can be of."""
        return frozenset(self._max_staging)

    @property
    def rules(self) -> tuple[TenantRule, ...]:
        """What the core must know."""
        return tuple(table.rule for table in self._tables)

    def find(self, uid: int, groups: Callable[[], frozenset[int]]) -> Membership:
        """What the client of this user is. `groups` tells all of its groups; it is asked only if
        they matter. Raises NoTenant."""
        administrator = not self._tables or uid in self._administrators
        name = self._by_uid.get(uid)
        if name is None:
            name = DEFAULT if administrator else self._by_groups(uid, groups())
        return Membership(name, administrator, self._max_staging[name])

    def _by_groups(self, uid: int, groups: frozenset[int]) -> str:
        found = [table.rule.name for table in self._tables if table.gids & groups]
        if len(found) == 1:
            return found[0]
        shown = ",".join(str(gid) for gid in sorted(groups)[:_GROUPS_SHOWN])
        if found:
            raise NoTenant(
                "your groups are of several tenants: list your uid in the one you belong to, in "
                "the daemon's configuration, and restart it",
                uid=uid,
                gids=shown,
            )
        raise NoTenant(
            "you are of none of the daemon's tenants: list your uid or one of your groups in a "
            "[tenants.NAME] of its configuration, and restart it",
            uid=uid,
            gids=shown,
        )


def _read_table(name: str, table: Any) -> TenantTable:
    where = f"tenants.{name}"
    if _NAME.fullmatch(name) is None:
        raise Unusable([f"{where}: a tenant's name is 1 to 32 of a-z, 0-9 and '-'"])
    values = read_table(where, table, KINDS)
    uids, gids = (values.get(kind, frozenset()) for kind in ("uids", "gids"))
    if not uids and not gids and name != DEFAULT:
        raise Unusable([f"{where}: it lists neither uids nor gids, so nobody would be of it"])
    rule = TenantRule(name, values.get("salt", b""), values.get("quota"), values.get("minimum", 0))
    return TenantTable(rule, uids, gids)
