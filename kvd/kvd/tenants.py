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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvd.core.tenants import TenantRule
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
_SALT_LENGTHS = (16, 128)
_GROUPS_SHOWN = 16


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


def read_tables(value: Any, parse_size: Callable[[Any], int]) -> tuple[TenantTable, ...]:
    """The tables of all tenants, checked against each other. Raises ValueError, whose text names
    the tenant and never holds a salt."""
    if not isinstance(value, dict):
        raise ValueError("tenants are tables of the configuration file: [tenants.NAME]")
    if len(value) > MAX_TENANTS:
        raise ValueError(f"there may be {MAX_TENANTS} tenants, not {len(value)}")
    tables = tuple(_read_table(name, table, parse_size) for name, table in value.items())
    for kind in ("uids", "gids"):
        owner: dict[int, str] = {}
        for table in tables:
            for number in getattr(table, kind):
                other = owner.setdefault(number, table.rule.name)
                if other != table.rule.name:
                    raise ValueError(
                        f"{kind[:-1]} {number} is in two tenants, {other} and {table.rule.name}"
                    )
    return tables


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


def _read_table(name: str, table: Any, parse_size: Callable[[Any], int]) -> TenantTable:
    try:
        if _NAME.fullmatch(name) is None:
            raise ValueError("a tenant's name is 1 to 32 of a-z, 0-9 and '-'")
        if not isinstance(table, dict):
            raise ValueError("a tenant is a table")
        unknown = sorted(table.keys() - {"uids", "gids", "salt", "quota"})
        if unknown:
            raise ValueError(f"there is no {unknown[0]!r}; known: uids, gids, salt, quota")
        uids, gids = (_read_ids(kind, table.get(kind, [])) for kind in ("uids", "gids"))
        if not uids and not gids and name != DEFAULT:
            raise ValueError("it lists neither uids nor gids, so nobody would be of it")
        quota = parse_size(table["quota"]) if "quota" in table else None
        return TenantTable(TenantRule(name, _read_salt(table), quota), uids, gids)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read_ids(kind: str, value: Any) -> frozenset[int]:
    if not isinstance(value, list) or any(type(each) is not int for each in value):
        raise ValueError(f"{kind} is a list of numbers")
    for number in value:
        if not 0 <= number <= _LAST_ID:
            raise ValueError(f"{kind} are from 0 to {_LAST_ID}, not {number}")
        if number == _OVERFLOW_ID:
            raise ValueError(f"{_OVERFLOW_ID} stands for everybody whom the kernel cannot name")
    return frozenset(value)


def _read_salt(table: dict[str, Any]) -> bytes:
    if "salt" not in table:
        return b""
    salt, (least, most) = table["salt"], _SALT_LENGTHS
    encoded = salt.encode() if isinstance(salt, str) else b""
    if not least <= len(encoded) <= most:
        raise ValueError(f"a salt is text of {least} to {most} bytes, which nobody can guess")
    return encoded
