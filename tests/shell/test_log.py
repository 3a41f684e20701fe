"""Log lines: one line an event, whatever its values are, and fields that can be split again."""

import json
import shlex
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from kvd import log
log.set_up(sys.argv[1])
log.debug("quiet")
log.info("client connected", pid=7, name=sys.argv[2])
try:
    1 / 0
except ZeroDivisionError as error:
    log.error("fault", error)
"""


def lines(level: str, name: str = "x", **environ: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, level, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    "name", ["plain", "two words", 'a="b"', "line\nbreak", "\x1b[31m", "", "ü"]
)
def test_a_value_is_one_field_of_one_line(name: str) -> None:
    connected, _ = lines("info", name, JOURNAL_STREAM="1:2")
    begin = "info client connected pid=7 name="
    assert connected.startswith(begin)
    assert connected.isprintable()
    shown = connected.removeprefix(begin)
    assert name == (json.loads(shown) if shown.startswith('"') else shown)


def test_levels_and_traces() -> None:
    assert [line.split()[0] for line in lines("debug", JOURNAL_STREAM="1:2")] == [
        "debug",
        "info",
        "error",
    ]
    (fault,) = lines("error", JOURNAL_STREAM="1:2")
    assert "ZeroDivisionError" in json.loads(fault.partition("trace=")[2])


def test_the_time_is_in_front_unless_the_journal_adds_it() -> None:
    stamped, _ = lines("info")
    time, level, *_ = shlex.split(stamped)
    assert level == "info"
    assert time.endswith("Z")
    assert len(time) == len("2026-01-01T00:00:00.000Z")
