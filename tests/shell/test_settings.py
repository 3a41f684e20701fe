"""Settings, and where they come from: defaults, file, environment, flags, in this order of
strength; anything odd is refused, and all of it at once."""

import re
from pathlib import Path

import pytest

from kvd.configuration import BadSetting, Configuration, Origin, load, rows
from kvd.core.shares import ModelRule
from kvd.settings import ABOUT, Settings


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kvd.toml"
    path.write_text(text)
    return path


def test_the_stronger_source_wins(tmp_path: Path) -> None:
    path = file(tmp_path, 'max_memory = "1GiB"\nmax_sequences = 50\nn_seq_max = 4\n')
    environ = {"KVD_MAX_MEMORY": "2GiB", "KVD_MAX_SEQUENCES": "60", "KVD_UNKNOWN": "x"}
    got = load(path, {"max_memory": "3GiB", "instance": None}, environ).settings
    assert got == Settings(max_memory=3 << 30, max_sequences=60, n_seq_max=4)


def test_without_anything_there_are_the_defaults() -> None:
    assert load(None, {}, {}) == Configuration(Settings(), {})
    assert (Settings().max_memory, Settings().max_sequences, Settings().n_seq_max) == (
        4096 << 20,
        100,
        8,
    )


@pytest.mark.parametrize(
    ("group", "gid"), [("root", 0), ("0", 0), (7, 7), ("65534", 65534), ("", None)]
)
def test_a_group_is_a_name_or_a_number(group: str | int, gid: int | None) -> None:
    assert load(None, {"socket_group": group}, {}).settings.socket_group == gid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max_memroy = 1",
            r"max_memroy: there is no setting 'max_memroy'; did you mean max_mem",
        ),
        (
            "max_memory = 1048575",
            "max_memory = 1048575: it is a size from 1MiB to 16383GiB",
        ),
        ('max_memory = "much"', "max_memory = 'much': it is a size"),
        ("max_memory = true", "max_memory = True"),
        ("max_sequences = 0", "max_sequences = 0: it is a whole number from 1 to 1048576"),
        ("max_sequences = 2.5", "it is a whole number"),
        ("n_seq_max = 256", "it is a whole number from 1 to 255"),
        ("n_seq_max = 101", r"max_sequences \(100\) is less than n_seq_max \(101\)"),
        ("log_level = 'loud'", "it is one of debug, info, warning, error"),
        ("instance = 'a/b'", "instance = 'a/b'"),
        ("instance = 7", "instance = 7: it is 1 to 32 of a-z"),
        ("linger_seconds = -1", "it is a time from 0 to 366d: a number of seconds, or one"),
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
    assert "kvd.toml: " in str(refused.value)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="No such file"):
        load(tmp_path / "none.toml", {}, {})


def test_the_source_of_a_bad_value_is_named() -> None:
    with pytest.raises(BadSetting, match=r"KVD_MAX_SESSIONS: max_sessions = 'many': it is a"):
        load(None, {}, {"KVD_MAX_SESSIONS": "many"})
    with pytest.raises(BadSetting, match=r"^--max-sessions: max_sessions = 0: it is a"):
        load(None, {"max_sessions": 0}, {})


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "max_memroy = 1\nlog_level = 'loud'\n[tenants.a]\nuids = 1\nquotta = 5\nsalt = 'x'\n",
    )
    with pytest.raises(BadSetting) as refused:
        load(path, {"n_seq_max": "9999"}, {"KVD_KEEP_ON_STOP": "perhaps"})
    beginnings = (
        f"{path}: max_memroy: there is no setting",
        f"{path}: log_level = 'loud': it is one of",
        f"{path}: tenants.a.uids = 1: it is a list",
        f"{path}: tenants.a.quotta: there is no setting 'quotta'; did you mean quota?",
        f"{path}: tenants.a.salt: it is text of 16",
        "KVD_KEEP_ON_STOP: keep_on_stop = 'perhaps': it is true or false",
        "--n-seq-max: n_seq_max = '9999': it is a whole number from 1 to 255",
    )
    assert len(refused.value.errors) == len(beginnings)
    for error, beginning in zip(refused.value.errors, beginnings, strict=True):
        assert error.startswith(beginning)


def test_settings_that_do_not_go_together_name_where_both_come_from(tmp_path: Path) -> None:
    path = file(tmp_path, "max_sequences = 5\n")
    with pytest.raises(BadSetting, match=rf"^{path}, KVD_N_SEQ_MAX: max_sequences \(5\) is less"):
        load(path, {}, {"KVD_N_SEQ_MAX": "6"})


def test_a_variable_that_nobody_reads_is_warned_of_if_it_is_like_one() -> None:
    environ = {"KVD_MAX_MEMROY": "1GiB", "KVD_SOMETHING_ELSE": "1", "PATH": "/"}
    found = load(None, {}, environ)
    assert found.warnings == ("KVD_MAX_MEMROY is not read: did you mean KVD_MAX_MEMORY?",)


def test_a_limit_that_limits_nothing_is_warned_of() -> None:
    (warning,) = load(None, {"max_reserved": "5GiB"}, {}).warnings
    assert "max_reserved (5GiB) is more than max_memory (4GiB)" in warning


# --- what is in effect, and where it comes from


def test_each_value_says_where_it_comes_from(tmp_path: Path) -> None:
    path = file(tmp_path, "max_sequences = 50\nmax_memory = '1GiB'\n")
    found = load(path, {"log_level": "debug"}, {"KVD_MAX_MEMORY": "2GiB", "KVD_INSTANCE": ""})
    assert found.origins == {
        "max_sequences": Origin("file", str(path)),
        "max_memory": Origin("environment", "KVD_MAX_MEMORY"),
        "log_level": Origin("flag", "--log-level"),
    }
    by_name = {row.name: row for row in rows(found)}
    assert list(by_name) == list(ABOUT)
    memory = by_name["max_memory"]
    assert (memory.value, memory.text, memory.default_text) == (2 << 30, "2GiB", "4GiB")
    assert (memory.origin, memory.where, memory.restart) == ("environment", "KVD_MAX_MEMORY", "")
    # What follows from others is told as it is in effect.
    assert (by_name["max_reserved"].text, by_name["max_session_sequences"].value) == ("1GiB", 37)
    assert by_name["instance"].origin == "default"
    assert "named after it" in by_name["instance"].restart
    assert by_name["runtime_dir"].value


def test_a_tenant_is_told_without_its_salt(tmp_path: Path) -> None:
    path = file(tmp_path, TENANTS)
    path.chmod(0o640)
    found = rows(load(path, {}, {}))
    assert SALT not in repr(found)
    told = {row.name: (row.value, row.text, row.origin) for row in found}
    assert told["tenants.team-a.salt"] == ("(secret)", "(secret)", "file")
    assert told["tenants.team-b.salt"] == ("none", "none", "default")
    assert told["tenants.team-a.quota"] == (1 << 30, "1GiB", "file")
    assert told["tenants.team-b.quota"] == (None, "none", "default")
    assert told["tenants.team-a.uids"] == ([1001, 1002], "1001,1002", "file")
    can_change = {row.name for row in found if not row.restart}
    assert {"tenants.team-a.quota", "max_memory", "log_level", "linger_seconds"} <= can_change
    assert not {"instance", "runtime_dir", "socket_group", "tenants.team-a.uids"} & can_change


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
    a, b = load(path, {}, {}).settings.tenants
    assert (a.rule.name, a.rule.salt, a.rule.quota) == ("team-a", SALT.encode(), 1 << 30)
    assert (a.uids, a.gids) == ({1001, 1002}, {2000})
    assert (b.rule.name, b.rule.salt, b.rule.quota) == ("team-b", b"", None)
    assert (b.uids, b.gids) == (frozenset(), {3000})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants = 1", "tenants: it is tables of the configuration file"),
        ("tenants.a = 1", r"tenants.a: it is a table: \[tenants.a\]"),
        ("[tenants.Team]\nuids = [1]", "Team: a tenant's name is"),
        ("[tenants.a_b]\nuids = [1]", "a_b: a tenant's name is"),
        (f"[tenants.{'a' * 33}]\nuids = [1]", "a tenant's name is 1 to 32"),
        ("[tenants.a]", "neither uids nor gids"),
        (
            "[tenants.a]\nuids = [1]\nuid = 2",
            "tenants.a.uid: there is no setting 'uid'; did",
        ),
        ("[tenants.a]\nuids = 1", "tenants.a.uids = 1: it is a list of numbers"),
        ("[tenants.a]\nuids = [true]", "it is a list of numbers"),
        ("[tenants.a]\ngids = ['wheel']", "it is a list of numbers"),
        ("[tenants.a]\nuids = [-1]", "it is a list of numbers from 0 to 4294967294"),
        ("[tenants.a]\nuids = [4294967295]", "it is a list of numbers from 0 to 4294967294"),
        ("[tenants.a]\nuids = [65534]", "without 65534, which stands for everybody"),
        ("[tenants.a]\ngids = [65534]", "without 65534, which stands for everybody"),
        ("[tenants.a]\nuids = [1]\n[tenants.b]\nuids = [2, 1]", "uid 1 is in two tenants, a and b"),
        ("[tenants.a]\ngids = [1]\n[tenants.b]\ngids = [1]", "gid 1 is in two tenants, a and b"),
        ("[tenants.a]\nuids = [1]\nquota = 'much'", "tenants.a.quota = 'much': it is a size"),
        (
            "[tenants.a]\nuids = [1]\nquota = 1000",
            r"tenants.a.quota = 1000: it is a size from",
        ),
        (
            "[tenants.a]\nuids = [1]\nquota = '5GiB'",
            r"tenants.a.quota = 5GiB: it is at most max",
        ),
        (
            "[tenants.a]\nuids = [1]\nsalt = 'short'",
            "tenants.a.salt: it is text of 16 to 128 bytes",
        ),
        ("max_session_sequences = 7", r"max_session_sequences \(7\) is less than n_seq_max"),
        ("max_staging = 4095", "it is a size from 4KiB"),
        ("max_commits = 0", "it is a whole number from 1"),
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
    assert len(load(path, {}, {}).settings.tenants) == 1


def test_tenants_come_from_the_file_alone() -> None:
    with pytest.raises(BadSetting, match="KVD_TENANTS: tenants: it is tables of the"):
        load(None, {}, {"KVD_TENANTS": "a"})


def test_limits_of_a_session_follow_from_those_of_the_daemon() -> None:
    defaults = Settings()
    assert (defaults.session_sequences, defaults.session_reserved) == (75, 2048 << 20)
    assert Settings(max_sequences=8).session_sequences == 8
    assert Settings(max_session_sequences=20).session_sequences == 20
    assert Settings(max_reserved=5).session_reserved == 5


README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_tables_of_the_readme_are_right_and_go_together(tmp_path: Path) -> None:
    path = file(tmp_path, "\n".join(re.findall(r"```toml\n(.*?)```", README, re.DOTALL)))
    path.chmod(0o600)
    settings = load(path, {}, {}).settings
    a, b = settings.tenants
    assert (a.rule.name, a.rule.quota, b.rule.name) == ("team-a", 2 << 30, "team-b")
    assert a.rule.minimum == 512 << 20
    assert settings.models == (ModelRule("my-model", 1 << 30, 3 << 30),)


def test_the_limits_of_the_readme_are_settings_with_these_defaults() -> None:
    table = dict(re.findall(r"^\| `(max_\w+)` \| ([^|]+) \|", README, re.MULTILINE))
    named = {name for name in Settings.__dataclass_fields__ if name.startswith("max_")}
    of_all = {"max_memory", "max_sequences", "max_sessions", "max_models", "max_context"}
    assert set(table) == named - of_all
    for name, default in table.items():
        number = default.removesuffix(" MiB")
        if number.isdecimal():
            scale = 1 << 20 if default.endswith("MiB") else 1
            assert getattr(Settings(), name) == int(number) * scale, name
        else:  # it follows from another
            assert getattr(Settings(), name) == 0, name
    assert "`max_models` (64)" in README
    assert Settings().max_models == 64


# --- warm lists

WARM = """
[warm.chat]
model = "/m.gguf"
files = ["/a.txt", "/b.json"]
type_k = "q8_0"
ttl = "2h"
lora = ["/l.gguf=0.5"]
"""


def test_warm_lists_are_read(tmp_path: Path) -> None:
    configuration = load(file(tmp_path, WARM), {}, {})
    (found,) = configuration.settings.warm
    assert (found.name, found.owner) == ("chat", "warm-chat")
    options = ["--owner", "warm-chat", "--lora", "/l.gguf=0.5", "--for", "7200.0"]
    assert found.arguments() == [
        *options, "--model", "/m.gguf", "--type-k", "q8_0", "--", "/a.txt", "/b.json",
    ]  # fmt: skip
    told = {row.name: (row.text, row.origin) for row in rows(configuration)}
    assert told["warm.chat.files"] == ("/a.txt, /b.json", "file")
    assert told["warm.chat.ttl"] == ("2h", "file")
    assert told["warm"] == ("chat", "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warm = 1", "warm: it is tables of the configuration file"),
        ("[warm.Chat]\nmodel = '/m'\nfiles = ['/a']", "warm.Chat: a list's name is"),
        ("[warm.a]\nfiles = ['/a']", "warm.a: it has no model"),
        ("[warm.a]\nmodel = '/m'", "warm.a: it has no files"),
        ("[warm.a]\nmodel = '/m'\nfiles = []", "warm.a: it has no files"),
        ("[warm.a]\nmodel = 'm'\nfiles = ['/a']", "warm.a.model = 'm': it is an absolute path"),
        ("[warm.a]\nmodel = '/m'\nfiles = ['a']", "it is a list of absolute paths"),
        ("[warm.a]\nmodel = '/m'\nfiles = '/a'", "it is a list of absolute paths"),
        ("[warm.a]\nmodel = '/m'\nfiles = ['/a']\ntype_k = '--x'", "it is a K/V type"),
        ("[warm.a]\nmodel = '/m'\nfiles = ['/a']\nn_ctx = 0", "it is a whole number from 1"),
        ("[warm.a]\nmodel = '/m'\nfile = ['/a']", "did you mean files?"),
    ],
)
def test_a_warm_list_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadSetting) as refused:
        load(file(tmp_path, text), {}, {})
    assert message in str(refused.value)


# --- minima and caps


SHARES = """
[tenants.team-a]
uids = [1001]
quota = "2GiB"
minimum = "1GiB"

[models."my.model/7B"]
minimum = "512MiB"
cap = "1GiB"

[models.other]
cap = "3GiB"
"""


def test_minima_and_caps_are_read_and_told(tmp_path: Path) -> None:
    found = load(file(tmp_path, SHARES), {}, {})
    (tenant,) = found.settings.tenants
    assert (tenant.rule.minimum, tenant.rule.quota) == (1 << 30, 2 << 30)
    assert found.settings.models == (
        ModelRule("my.model/7B", 512 << 20, 1 << 30),
        ModelRule("other", 0, 3 << 30),
    )
    told = {row.name: (row.text, row.origin) for row in rows(found)}
    assert told["tenants.team-a.minimum"] == ("1GiB", "file")
    assert told["models.my.model/7B.minimum"] == ("512MiB", "file")
    assert told["models.other.minimum"] == ("0", "default")
    assert told["models.other.cap"] == ("3GiB", "file")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ('minimum = "1GiB"', 'minimum = "3GiB"'),
            r"team-a.minimum = 3GiB: it is at most its quota",
        ),
        (('cap = "1GiB"', 'cap = "256MiB"'), r"7B.minimum = 512MiB: it is at most its cap"),
        (
            ('minimum = "512MiB"', "minimun = 1"),
            r"7B.minimun: there is no .*; did you mean minimum",
        ),
        (('cap = "3GiB"', "minimum = '3GiB'"), r"4608MiB together: they are at most max_memory"),
        (("[models.other]", '[models.""]'), r"a model's name has 1 to 200 letters, not ''"),
        (("[models.other]\n", "[models]\nother = 1\n[unused]\n"), r"models.other: it is a table"),
    ],
)
def test_minima_and_caps_that_cannot_be_are_refused(
    tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    text = SHARES.replace(*change)
    assert text != SHARES
    with pytest.raises(BadSetting, match=says):
        load(file(tmp_path, text), {}, {})
