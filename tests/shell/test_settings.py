"""Settings: defaults, file, environment, flags, in this order of strength; anything odd is
refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from kvd.settings import BadSetting, Settings, load, parse_size


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kvd.toml"
    path.write_text(text)
    return path


def test_the_stronger_source_wins(tmp_path: Path) -> None:
    path = file(tmp_path, 'max_memory = "1GiB"\nmax_sequences = 50\nn_seq_max = 4\n')
    environ = {"KVD_MAX_MEMORY": "2GiB", "KVD_MAX_SEQUENCES": "60", "KVD_UNKNOWN": "x"}
    got = load(path, {"max_memory": "3GiB", "instance": None}, environ)
    assert got == Settings(max_memory=3 << 30, max_sequences=60, n_seq_max=4)


def test_without_anything_there_are_the_defaults() -> None:
    assert load(None, {}, {}) == Settings()
    assert (Settings().max_memory, Settings().max_sequences, Settings().n_seq_max) == (
        4096 << 20,
        100,
        8,
    )


@pytest.mark.parametrize(
    ("group", "gid"), [("root", 0), ("0", 0), (7, 7), ("65534", 65534), ("", None)]
)
def test_a_group_is_a_name_or_a_number(group: str | int, gid: int | None) -> None:
    assert load(None, {"socket_group": group}, {}).socket_group == gid


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [(5, 5), ("5", 5), ("5B", 5), ("3 KiB", 3072), ("2mib", 2 << 20), ("1TiB", 1 << 40)],
)
def test_sizes(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1.5GiB", "-1", "4GB", "4 GiB more", True, None, 1.0])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="a size is"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_memroy = 1", "there is no setting 'max_memroy'; known: .*max_memory"),
        ("max_memory = 1048575", "max_memory = 1048575: it is from 1048576"),
        ('max_memory = "much"', "max_memory = 'much': a size is"),
        ("max_memory = true", "max_memory = True"),
        ("max_sequences = 0", "it is from 1"),
        ("max_sequences = 2.5", "it is a whole number"),
        ("n_seq_max = 256", "it is from 1 to 255"),
        ("n_seq_max = 101", r"max_sequences \(100\) is less than n_seq_max \(101\)"),
        ("log_level = 'loud'", "it is one of debug, info, warning, error"),
        ("instance = 'a/b'", "instance = 'a/b'"),
        ("instance = 7", "it is text"),
        ("linger_seconds = -1", "it is from 0"),
        ("socket_group = 'no-such-group'", "there is no group of this name"),
        ("socket_group = 4294967295", "there is no group with this number"),
        ("socket_group = -1", "there is no group with this number"),
        ("socket_group = true", "it is a group's name or number"),
        ("max_memory =", "Invalid value"),
    ],
)
def test_what_cannot_be_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadSetting, match=message) as refused:
        load(file(tmp_path, text), {}, {})
    assert "kvd.toml" in str(refused.value) or "max_sequences (100)" in str(refused.value)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="No such file"):
        load(tmp_path / "none.toml", {}, {})


def test_the_source_of_a_bad_value_is_named() -> None:
    with pytest.raises(BadSetting, match=r"environment: max_sessions = 'many'"):
        load(None, {}, {"KVD_MAX_SESSIONS": "many"})
    with pytest.raises(BadSetting, match=r"flag: max_sessions = 0"):
        load(None, {"max_sessions": 0}, {})


# --- tenants and limits of a session

SALT = "a salt that nobody can guess"
TENANTS = f"""
[tenants.team-a]
uids = [1001, 1002]
gids = [2000]
salt = "{SALT}"
quota = "1GiB"

[tenants.team-b]
gids = [3000]
"""


def test_tenants_are_read(tmp_path: Path) -> None:
    path = file(tmp_path, TENANTS)
    path.chmod(0o640)
    a, b = load(path, {}, {}).tenants
    assert (a.rule.name, a.rule.salt, a.rule.quota) == ("team-a", SALT.encode(), 1 << 30)
    assert (a.uids, a.gids) == ({1001, 1002}, {2000})
    assert (b.rule.name, b.rule.salt, b.rule.quota) == ("team-b", b"", None)
    assert (b.uids, b.gids) == (frozenset(), {3000})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants = 1", "tenants are tables"),
        ("tenants.a = 1", "a: a tenant is a table"),
        ("[tenants.Team]\nuids = [1]", "Team: a tenant's name is"),
        ("[tenants.a_b]\nuids = [1]", "a_b: a tenant's name is"),
        (f"[tenants.{'a' * 33}]\nuids = [1]", "a tenant's name is 1 to 32"),
        ("[tenants.a]", "neither uids nor gids"),
        ("[tenants.a]\nuids = [1]\nuid = 2", "there is no 'uid'; known: uids, gids"),
        ("[tenants.a]\nuids = 1", "uids is a list of numbers"),
        ("[tenants.a]\nuids = [true]", "uids is a list of numbers"),
        ("[tenants.a]\ngids = ['wheel']", "gids is a list of numbers"),
        ("[tenants.a]\nuids = [-1]", "uids are from 0 to 4294967294"),
        ("[tenants.a]\nuids = [4294967295]", "uids are from 0 to 4294967294"),
        ("[tenants.a]\nuids = [65534]", "65534 stands for everybody"),
        ("[tenants.a]\ngids = [65534]", "65534 stands for everybody"),
        ("[tenants.a]\nuids = [1]\n[tenants.b]\nuids = [2, 1]", "uid 1 is in two tenants, a and b"),
        ("[tenants.a]\ngids = [1]\n[tenants.b]\ngids = [1]", "gid 1 is in two tenants, a and b"),
        ("[tenants.a]\nuids = [1]\nquota = 'much'", "a: a size is"),
        ("[tenants.a]\nuids = [1]\nquota = 1000", r"tenants.a: quota \(1000\) is from 1048576"),
        ("[tenants.a]\nuids = [1]\nquota = '5GiB'", r"to max_memory \(4294967296\)"),
        ("[tenants.a]\nuids = [1]\nsalt = 'short'", "a: a salt is text of 16 to 128 bytes"),
        ("max_session_sequences = 7", r"max_session_sequences \(7\) is less than n_seq_max"),
        ("max_staging = 4095", "it is from 4096"),
        ("max_commits = 0", "it is from 1"),
    ],
)
def test_tenants_and_limits_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        load(file(tmp_path, text), {}, {})


@pytest.mark.parametrize(
    "text",
    [
        f"[tenants.a]\nuids = [1]\nsalt = ['{SALT}']",
        f"[tenants.a]\nuids = [1]\nsalt = '{SALT * 5}'",
        f"[tenants.a]\nsalt = '{SALT}'",
        f"[tenants.a]\nuids = [1, 'x']\nsalt = '{SALT}'",
        f"[tenants.a]\nuids = [1]\nsalt = '{SALT}'\nquota = 1",
        f"[tenants.a]\nuids = [1]\nsalt = '{SALT}'",  # everybody may read the file
    ],
)
def test_a_salt_is_in_no_error_and_no_repr(tmp_path: Path, text: str) -> None:
    path = file(tmp_path, text)
    path.chmod(0o644)
    with pytest.raises(BadSetting) as refused:
        load(path, {}, {})
    assert SALT not in str(refused.value)
    path.write_text(TENANTS)
    path.chmod(0o640)
    assert SALT not in repr(load(path, {}, {}))


def test_a_salt_that_everybody_can_read_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path, TENANTS)
    path.chmod(0o644)
    with pytest.raises(BadSetting, match=r"holds salts.*chmod o-r"):
        load(path, {}, {})
    path.write_text("[tenants.a]\nuids = [1]\n")
    assert len(load(path, {}, {}).tenants) == 1


def test_tenants_come_from_the_file_alone() -> None:
    with pytest.raises(BadSetting, match="environment: tenants: tenants are tables"):
        load(None, {}, {"KVD_TENANTS": "a"})


def test_limits_of_a_session_follow_from_those_of_the_daemon() -> None:
    defaults = Settings()
    assert (defaults.session_sequences, defaults.session_reserved) == (75, 2048 << 20)
    assert Settings(max_sequences=8).session_sequences == 8
    assert Settings(max_session_sequences=20).session_sequences == 20
    assert Settings(max_reserved=5).session_reserved == 5


README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_tenants_of_the_readme_are_right(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    path = file(tmp_path, text)
    path.chmod(0o600)
    a, b = load(path, {}, {}).tenants
    assert (a.rule.name, a.rule.quota, b.rule.name) == ("team-a", 2 << 30, "team-b")


def test_the_limits_of_the_readme_are_settings_with_these_defaults() -> None:
    rows = dict(re.findall(r"^\| `(max_\w+)` \| ([^|]+) \|", README, re.MULTILINE))
    named = {name for name in Settings.__dataclass_fields__ if name.startswith("max_")}
    assert set(rows) == named - {"max_memory", "max_sequences", "max_sessions", "max_models"}
    for name, default in rows.items():
        number = default.removesuffix(" MiB")
        if number.isdecimal():
            scale = 1 << 20 if default.endswith("MiB") else 1
            assert getattr(Settings(), name) == int(number) * scale, name
        else:  # it follows from another
            assert getattr(Settings(), name) == 0, name
    assert "`max_models` (64)" in README
    assert Settings().max_models == 64
