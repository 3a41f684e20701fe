"""From one configuration to another: what changes at once, what needs a restart, and that nothing
is lost of either."""

from pathlib import Path

import pytest

from kvd.changes import CHANGED, NEEDS_RESTART, UNCHANGED, Change, Plan, plan
from kvd.configuration import BadSetting, Configuration, Origin, load, rows
from kvd.settings import ABOUT

A = "[tenants.a]\nuids = [1]\nquota = '64MiB'\nsalt = 'a salt that nobody can guess'\n"
B = "[tenants.b]\ngids = [2]\n"


def configured(tmp_path: Path, text: str, **environ: str) -> Configuration:
    path = tmp_path / "kvd.toml"
    path.write_text(text)
    path.chmod(0o600)
    return load(path, {}, environ)


def changes_of(found: Plan) -> dict[str, Change]:
    return {each.name: each for each in found.changes if each.outcome != UNCHANGED}


def test_nothing_changes_if_nothing_is_other(tmp_path: Path) -> None:
    running = configured(tmp_path, f"max_memory = '1GiB'\n{A}")
    found = plan(running, configured(tmp_path, f"max_memory = 1073741824\n{A}"))
    assert found.configuration == running
    assert changes_of(found) == {}
    assert [each.name for each in found.changes] == [row.name for row in rows(running)]


def test_what_can_change_does_and_says_from_what_to_what(tmp_path: Path) -> None:
    running = configured(tmp_path, "max_memory = '1GiB'\nlinger_seconds = '1min'\n")
    wanted = configured(tmp_path, "max_memory = '2GiB'\nlog_level = 'debug'\n")
    found = plan(running, wanted)
    assert found.configuration == wanted
    assert changes_of(found) == {
        "max_memory": Change("max_memory", CHANGED, "1GiB", "2GiB", ""),
        "max_reserved": Change("max_reserved", CHANGED, "512MiB", "1GiB", ""),
        "log_level": Change("log_level", CHANGED, "info", "debug", ""),
        "linger_seconds": Change("linger_seconds", CHANGED, "1min", "0", ""),
    }


def test_what_cannot_stays_and_says_why(tmp_path: Path) -> None:
    running = configured(tmp_path, "instance = 'one'\nruntime_dir = '/x'\n")
    text = "instance = 'two'\nruntime_dir = '/y'\nsocket_group = 0\nmax_pins = 5\n"
    found = plan(running, configured(tmp_path, text))
    settings = found.configuration.settings
    assert (settings.instance, settings.runtime_dir, settings.socket_group) == ("one", "/x", None)
    assert settings.max_pins == 5
    assert found.configuration.origins.keys() == {"instance", "runtime_dir", "max_pins"}
    changes = changes_of(found)
    assert changes.pop("max_pins").outcome == CHANGED
    assert set(changes) == {"instance", "runtime_dir", "socket_group"}
    for name, change in changes.items():
        assert (change.outcome, change.reason) == (NEEDS_RESTART, ABOUT[name].restart)


def test_where_a_value_comes_from_may_change_alone(tmp_path: Path) -> None:
    running = configured(tmp_path, "max_pins = 5\n")
    found = plan(running, configured(tmp_path, "", KVD_MAX_PINS="5"))
    assert changes_of(found) == {}
    assert found.configuration.origins == {"max_pins": Origin("environment", "KVD_MAX_PINS")}


def test_a_quota_changes_and_nothing_else_of_a_tenant(tmp_path: Path) -> None:
    running = configured(tmp_path, A)
    wanted = A.replace("[1]", "[1, 3]").replace("64MiB", "32MiB")
    found = plan(running, configured(tmp_path, wanted))
    (table,) = found.configuration.settings.tenants
    assert (table.rule.quota, table.uids) == (32 << 20, {1})
    changes = changes_of(found)
    assert set(changes) == {"tenants.a.quota", "tenants.a.uids"}
    assert changes["tenants.a.quota"][1:4] == (CHANGED, "64MiB", "32MiB")
    assert changes["tenants.a.uids"][1:4] == (NEEDS_RESTART, "1", "1,3")


def test_a_quota_may_come_and_go(tmp_path: Path) -> None:
    running = configured(tmp_path, B)
    wanted = configured(tmp_path, f"{B}quota = '16MiB'\n")
    found = plan(running, wanted)
    assert found.configuration.settings == wanted.settings
    assert changes_of(found)["tenants.b.quota"][1:4] == (CHANGED, "none", "16MiB")
    back = plan(found.configuration, running)
    assert back.configuration.settings == running.settings


def test_another_salt_needs_a_restart_and_is_not_told(tmp_path: Path) -> None:
    running = configured(tmp_path, A)
    found = plan(running, configured(tmp_path, A.replace("guess", "know")))
    assert found.configuration.settings == running.settings
    (change,) = changes_of(found).values()
    assert change[:4] == ("tenants.a.salt", NEEDS_RESTART, "(secret)", "(secret)")
    assert "a salt" not in repr(found)


def test_a_budget_below_the_minima_that_stay_until_a_restart_is_refused(tmp_path: Path) -> None:
    minimum = '[models."m"]\nminimum = "1GiB"\n'
    running = configured(tmp_path, f"max_memory = '2GiB'\n{minimum}")
    wanted = configured(tmp_path, "max_memory = '512MiB'\n")
    with pytest.raises(BadSetting, match=r"restart changes: .*minim.*: restart it"):
        plan(running, wanted)
    found = plan(running, configured(tmp_path, "max_memory = '1GiB'\n"))
    assert found.configuration.settings.max_memory == 1 << 30
    assert changes_of(found)["models.m.minimum"].outcome == NEEDS_RESTART


def test_tenants_come_and_go_with_a_restart(tmp_path: Path) -> None:
    running = configured(tmp_path, A)
    found = plan(running, configured(tmp_path, B))
    assert found.configuration.settings.tenants == running.settings.tenants
    changes = changes_of(found)
    assert changes["tenants"][1:4] == (NEEDS_RESTART, "a", "b")
    names = {f"tenants.{each}" for each in "ab"}
    assert {name.rpartition(".")[0] for name in changes if name != "tenants"} == names
    assert {each.outcome for each in changes.values()} == {NEEDS_RESTART}
    assert all(each.reason for each in changes.values())
