"""From one configuration to another while the daemon runs: what changes, what would need a restart.

Pure. Who asks for it, and how it is carried out: reloading.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from kvd.configuration import BadSetting, Configuration, Row, rows
from kvd.settings import ABOUT, disagreements
from kvd.tenants import TenantTable

CHANGED, UNCHANGED, NEEDS_RESTART = "changed", "unchanged", "needs_restart"


class Change(NamedTuple):
    """One setting, before and after, in words. `reason`: why it needs a restart."""

    name: str
    outcome: str
    before: str
    after: str
    reason: str


class Plan(NamedTuple):
    """The configuration that can be in effect at once, and what becomes of each setting."""

    configuration: Configuration
    changes: list[Change]


def plan(running: Configuration, found: Configuration) -> Plan:
    """What becomes of the running configuration if `found` is to be in effect. Raises BadSetting if
    what can change does not go together with what needs a restart."""
    kept = {name: getattr(running.settings, name) for name, about in ABOUT.items() if about.restart}
    tenants = running.settings.tenants
    kept["tenants"] = _with_quotas(tenants, found.settings.tenants)
    origins = {**found.origins}
    for name in kept:
        origins.pop(name, None)
        if name in running.origins:
            origins[name] = running.origins[name]
    settings = replace(found.settings, **kept)
    if wrong := disagreements(settings):
        raise BadSetting(
            [f"beside what only a restart changes: {each.text}: restart it" for each in wrong]
        )
    before = {row.name: row for row in rows(running)}
    after = {row.name: row for row in rows(found)}
    changes = [_change(name, before, after) for name in {**before, **after}]
    salted = _other_salts(tenants, found.settings.tenants)
    changes = [
        each._replace(outcome=NEEDS_RESTART, reason=ABOUT["tenants"].restart)
        if each.name in salted
        else each
        for each in changes
    ]
    return Plan(Configuration(settings, origins, found.warnings), changes)


def _change(name: str, before: Mapping[str, Row], after: Mapping[str, Row]) -> Change:
    was, now = before.get(name), after.get(name)
    if was is None or now is None:  # a table that is new, or gone
        (there,) = [each for each in (was, now) if each is not None]
        texts = (was.text if was else "none", now.text if now else "none")
        reason = there.restart or ABOUT[name.partition(".")[0]].restart
        return Change(name, NEEDS_RESTART, *texts, reason)
    if was.value == now.value:
        return Change(name, UNCHANGED, was.text, now.text, "")
    outcome = NEEDS_RESTART if now.restart else CHANGED
    return Change(name, outcome, was.text, now.text, now.restart)


def _with_quotas(
    running: tuple[TenantTable, ...], found: tuple[TenantTable, ...]
) -> tuple[TenantTable, ...]:
    """The tenants that are there, with the quotas that are wanted for them."""
    quotas = {each.rule.name: each.rule.quota for each in found}
    return tuple(
        replace(each, rule=replace(each.rule, quota=quotas.get(each.rule.name, each.rule.quota)))
        for each in running
    )


def _other_salts(running: tuple[TenantTable, ...], found: tuple[TenantTable, ...]) -> set[str]:
    """The names of the salts that are others now, which nobody sees."""
    salts = {each.rule.name: each.rule.salt for each in running}
    return {
        f"tenants.{each.rule.name}.salt"
        for each in found
        if each.rule.name in salts and salts[each.rule.name] != each.rule.salt
    }
