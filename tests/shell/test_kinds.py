"""What the value of a setting can be: each kind reads what it allows, and refuses all else with
words that say what it allows."""

from typing import Any

import pytest

from kvd.kinds import (
    Choice,
    Count,
    Duration,
    Kind,
    Secret,
    Size,
    Switch,
    Unusable,
    nearest,
    read_table,
    show_duration,
    show_size,
)
from tests.support import parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [(5, 5), ("5", 5), ("5B", 5), ("3 KiB", 3072), ("2mib", 2 << 20), ("1TiB", 1 << 40)],
)
def test_sizes(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1.5GiB", "-1", "4GB", "4 GiB more", True, None, 1.0])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match=r"it is a size from 0 to .* KiB, MiB, GiB or TiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (5, 5.0),
        (0.5, 0.5),
        ("5", 5.0),
        ("250ms", 0.25),
        ("30s", 30.0),
        ("5min", 300.0),
        ("2 h", 7200.0),
        ("1d", 86400.0),
        ("1.5h", 5400.0),
        (0, 0.0),
    ],
)
def test_times(text: str | float, seconds: float) -> None:
    assert Duration(0, 1e6).read(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "-1", -1, "5 minutes", "5m", True, None, float("nan"), "12d", [], "1e3"]
)
def test_what_is_no_time(text: Any) -> None:
    with pytest.raises(ValueError, match=r"it is a time from 0 to 10d: .* with ms, s, min, h or d"):
        Duration(0, 864000).read(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0"),
        (5, "5B"),
        (1536, "1536B"),
        (3072, "3KiB"),
        (1536 << 20, "1536MiB"),
        (1 << 40, "1TiB"),
    ],
)
def test_a_size_is_shown_as_it_can_be_written(n_bytes: int, text: str) -> None:
    assert show_size(n_bytes) == text
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"),
        (0.25, "0.25s"),
        (30, "30s"),
        (90, "90s"),
        (5400, "90min"),
        (7200, "2h"),
        (86400, "1d"),
    ],
)
def test_a_time_is_shown_as_it_can_be_written(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text
    assert Duration(0, 1e6).read(text) == seconds


@pytest.mark.parametrize(
    ("kind", "value", "allowed"),
    [
        (Count(1, 5), 6, "a whole number from 1 to 5"),
        (Count(1, 5), "9" * 5000, "a whole number from 1 to 5"),
        (Count(1, 5), True, "a whole number from 1 to 5"),
        (Count(1, 5), 2.0, "a whole number from 1 to 5"),
        (Switch(), "perhaps", "true or false"),
        (Switch(), 2, "true or false"),
        (Choice(("a", "b")), "c", "one of a, b"),
        (Choice(("a", "b")), ["a"], "one of a, b"),
    ],
)
def test_what_else_is_refused(kind: Kind, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^it is {allowed}$"):
        kind.read(value)


@pytest.mark.parametrize("value", [True, "true", "YES", "1", 1, " yes "])
def test_what_is_true(value: Any) -> None:
    assert Switch().read(value) is True


def test_a_table_tells_all_that_is_wrong_and_no_secret() -> None:
    kinds = {"salt": Secret(16, 20), "quota": Size(1, 100), "name": Choice(("a",))}
    with pytest.raises(Unusable) as refused:
        read_table("models.x", {"salt": "short", "quota": 101, "nmae": "a"}, kinds)
    assert refused.value.errors == (
        "models.x.salt: it is text of 16 to 20 bytes, which nobody can guess",
        "models.x.quota = 101: it is a size from 1B to 100B: a number of bytes, KiB, MiB, GiB or "
        "TiB",
        "models.x.nmae: there is no setting 'nmae'; did you mean name?",
    )
    assert read_table("models.x", {"quota": "5B"}, kinds) == {"quota": 5}


def test_the_nearest_name() -> None:
    assert nearest("max-memory", ["max_memory", "max_models"]) == "max_memory"
    assert nearest("colour", ["max_memory", "max_models"]) == ""
