"""kvctl as a command: what it prints, for people and for programs, and how it ends."""

import dataclasses
import errno
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import kvd_client
from kvd_client.kvctl.tables import Column, Look, Part, bar, count, duration, percent, size, table
from tests.client.blocks import BLOCK_TOKENS, MODEL, PAYLOAD_BYTES, STRIDE, eventually, store
from tests.support import Daemon, running_daemon, start_daemon

PROMPT = list(range(24))
COMMAND = [sys.executable, "-m", "kvd_client.kvctl"]
READING = ("status", "seqs", "clients", "models", "pins", "ping", "verify")


def kvctl(daemon: Daemon, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--runtime-dir", str(daemon.runtime_dir), *arguments],
        capture_output=True, text=True, timeout=30, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests here, which only read."""
    directory = tmp_path_factory.mktemp("kvctl") / "run"
    running = start_daemon("--max-memory", "64MiB", runtime_dir=directory)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def worker(daemon: Daemon) -> Iterator[kvd_client.Client]:
    """A client that has stored five blocks, and leases three of them."""
    with (
        kvd_client.connect(daemon.runtime_dir, name="worker", staging_bytes=1 << 20) as client,
        client.open_context(MODEL, n_seq_max=2) as context,
    ):
        store(context, PROMPT)
        store(context, range(1000, 1016))
        with context.alloc(PROMPT, request="chat 7"), context.alloc([5]):
            yield client


# --- for programs


def leaves(report: Any, path: str = "") -> dict[str, Any]:
    """Every value of a report, by its place."""
    if isinstance(report, dict):
        items = [(f"{path}.{name}", value) for name, value in report.items()]
    elif isinstance(report, list):
        items = [(f"{path}[{index}]", value) for index, value in enumerate(report)]
    else:
        return {path: report}
    return {place: leaf for name, value in items for place, leaf in leaves(value, name).items()}


def test_status_is_the_map_of_the_client(daemon: Daemon, worker: kvd_client.Client) -> None:
    printed = leaves(json.loads(kvctl(daemon, "status", "--json").stdout))
    asked = leaves(worker.status())
    assert list(printed) == list(asked)
    # All but what goes on by itself, and what kvctl itself makes of it.
    differ = {place for place in asked if printed[place] != asked[place]}
    moving = ("uptime_seconds", "clients", "requests", "sessions_opened", ".sessions", "rss_bytes")
    assert {place for place in differ if not place.endswith(moving)} == set()


def test_status_equals_the_formulas_to_the_byte(daemon: Daemon, worker: kvd_client.Client) -> None:
    assert worker
    status = json.loads(kvctl(daemon, "--json", "status").stdout)
    accounting = status["accounting"]
    (model,) = status["models"]
    row_bytes = sum(layer[1] + layer[3] for layer in MODEL.layers)
    assert model["bytes_per_token"] == row_bytes
    assert model["payload_bytes"] == row_bytes * BLOCK_TOKENS == PAYLOAD_BYTES
    assert model["stride_bytes"] == STRIDE
    blocks = model["blocks"]
    assert blocks == {
        "active": 3, "cached": 2, "filling": 0, "free": 0, "pinned": 0, "total": 5,
    }  # fmt: skip
    assert accounting["budget_bytes"] == 64 << 20
    assert accounting["active_bytes"] == 3 * STRIDE
    assert accounting["cached_bytes"] == 2 * STRIDE
    assert accounting["padding_bytes"] == 5 * (STRIDE - PAYLOAD_BYTES)
    assert accounting["staging_bytes"] == (1 << 20) + 4096
    parts = ("unassigned", "directory", "staging", "free", "filling", "active", "cached", "pinned")
    assert accounting["budget_bytes"] == sum(accounting[f"{part}_bytes"] for part in parts)
    assert accounting["os_bytes"] == accounting["budget_bytes"] - accounting["unassigned_bytes"]
    assert accounting["drift_bytes"] == 0
    assert status["sequences"] == {"max": 100, "in_use": 2, "free": 98, "waiting": 0}


def test_every_reading_command_speaks_json(daemon: Daemon, worker: kvd_client.Client) -> None:
    reports = {name: json.loads(kvctl(daemon, name, "--json").stdout) for name in READING}
    assert [row["request"] for row in reports["seqs"]["sequences"]] == ["chat 7", ""]
    assert [row["client"] for row in reports["clients"]["clients"]] == ["worker", "kvctl"]
    assert [row["name"] for row in reports["models"]["models"]] == ["tiny"]
    assert reports["ping"]["pid"] == daemon.process.pid
    assert reports["ping"]["round_trip_us"] > 0
    assert reports["verify"] == {**worker.verify(), "terms": reports["verify"]["terms"]}
    assert reports["verify"]["ok"] is True


# --- for people


def test_status_at_a_glance(daemon: Daemon, worker: kvd_client.Client) -> None:
    assert worker
    done = kvctl(daemon, "status")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    assert f"instance {daemon.instance}" in text
    assert re.search(r"memory +64\.0 MiB", text)
    assert re.search(r"active +12\.0 KiB +< 0\.1 %", text)
    assert re.search(r"staging +1\.0 MiB +1\.6 %", text)
    assert re.search(r"unassigned +6\d\.\d MiB +9\d\.\d %", text)
    assert re.search(r"hit rate +36\.9 % of 65 tokens", text)
    assert re.search(r"sequences +2 of 100 in use, 0 waiting", text)
    assert re.search(r"tiny +128 B +8 tok +3 +2 +0 +0 +20\.0 KiB", text)
    assert "as accounted, to the byte" in text


def test_stopped_clients_are_seen_at_a_glance(tmp_path: Path) -> None:
    """By people, in both commands; and again when they go on."""
    with running_daemon(runtime_dir=tmp_path / "run") as daemon:
        program = (
            "import kvd_client, signal, sys\n"
            "client = kvd_client.connect(sys.argv[1], name='sleeper', staging_bytes=0)\n"
            "print('ready', flush=True)\n"
            "signal.pause()\n"
        )
        command = [sys.executable, "-c", program, str(daemon.runtime_dir)]
        sleeper = subprocess.Popen(command, stdout=subprocess.PIPE)
        note = f"process {sleeper.pid} is stopped"
        try:
            assert sleeper.stdout is not None
            sleeper.stdout.readline()
            assert note not in kvctl(daemon, "clients").stdout
            assert "stopped" not in kvctl(daemon, "status").stdout
            sleeper.send_signal(signal.SIGSTOP)
            eventually(lambda: psutil.Process(sleeper.pid).status() == psutil.STATUS_STOPPED)
            assert note in kvctl(daemon, "clients").stdout
            assert "clients    2, 1 stopped: see kvctl clients" in kvctl(daemon, "status").stdout
            sleeper.send_signal(signal.SIGCONT)
            eventually(lambda: note not in kvctl(daemon, "clients").stdout)
        finally:
            sleeper.kill()
            sleeper.communicate()


@pytest.mark.parametrize("command", READING)
def test_piped_output_is_plain_and_fits_80_columns(
    daemon: Daemon, worker: kvd_client.Client, command: str
) -> None:
    long_name = "a very long name of a client, with \x1b[31m escapes and 漢字 in it" * 2
    with (
        kvd_client.connect(daemon.runtime_dir, name=long_name, staging_bytes=0) as client,
        client.open_context(MODEL) as context,
        context.alloc([], request="r" * 150),
    ):
        done = kvctl(daemon, command)
        ascii_only = kvctl(daemon, command, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, ascii_only.returncode) == (0, 0)
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert max(map(len, ascii_only.stdout.splitlines())) <= 80
    assert worker


def on_a_terminal(daemon: Daemon, columns: int, *arguments: str, **environ: str) -> str:
    """What a command prints on a terminal that is so wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [*COMMAND, "--runtime-dir", str(daemon.runtime_dir), *arguments],
        stdout=theirs, stdin=theirs, stderr=theirs,
        env={**environment, "TERM": "xterm", **environ},
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError as error:
        if error.errno != errno.EIO:  # that is how a terminal ends
            raise
    os.close(ours)
    assert process.wait(30) == 0
    return said.decode()


def test_a_terminal_gets_colours_unless_it_does_not_want_them(
    daemon: Daemon, worker: kvd_client.Client
) -> None:
    assert worker
    assert "\x1b[32mPROCESSING\x1b[0m" in on_a_terminal(daemon, 80, "seqs")
    for environ in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in on_a_terminal(daemon, 80, "seqs", **environ)
    assert "\x1b" in on_a_terminal(daemon, 80, "seqs", NO_COLOR="")


def test_a_wide_terminal_shows_whole_names(daemon: Daemon) -> None:
    request = "a request with a long name " * 3
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client,
        client.open_context(MODEL) as context,
        context.alloc([], request=request),
    ):
        assert request.strip() in on_a_terminal(daemon, 200, "seqs")
        assert request.strip() not in on_a_terminal(daemon, 80, "seqs")


# --- evict and verify


def test_evict(tmp_path: Path) -> None:
    own = start_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run")
    try:
        none = kvctl(own, "evict", "--model", "tiny", "--all", "--yes")
        assert none.returncode == 1
        assert "no model is called 'tiny'; there is none" in none.stderr
        with (
            kvd_client.connect(own.runtime_dir, staging_bytes=1 << 20) as client,
            client.open_context(MODEL) as context,
        ):
            store(context, range(80))
            one = kvctl(own, "evict", "--blocks", "1")
            assert one.stdout == "1 block evicted, 4.0 KiB given back to the system\n"
            wrong = kvctl(own, "evict", "--model", "large", "--all", "--yes")
            assert wrong.returncode == 1
            assert "there are: tiny" in wrong.stderr
            few = kvctl(own, "evict", "--model", "tiny", "--blocks", "3", "--json")
            assert json.loads(few.stdout) == {"blocks": 3, "freed_bytes": 3 * STRIDE}
            rest = kvctl(own, "evict", "--all", "--yes")
            assert (rest.returncode, rest.stdout.split()[0]) == (0, "6")
            assert client.status()["models"][0]["blocks"]["total"] == 0
    finally:
        own.stop()


def test_pins(tmp_path: Path) -> None:
    """From a file and from a pipe; with a name, and with the beginning of a fingerprint."""
    own = start_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run")
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps([*range(16), 7]))
    try:
        none = kvctl(own, "pin", "--model", "tiny", str(prompt))
        assert none.returncode == 1
        assert "no model is called 'tiny'; there is none" in none.stderr
        with (
            kvd_client.connect(own.runtime_dir, staging_bytes=1 << 20) as client,
            client.open_context(MODEL) as context,
        ):
            store(context, range(24))
            done = kvctl(own, "pin", "--model", "tiny", str(prompt))
            assert done.stdout == "16 of 17 tokens are cached, and pinned until it is unpinned\n"
            hour = ("--owner", "ops", "--for", "3600")
            short = MODEL.arena_fingerprint.hex()[:8]
            done = kvctl(own, "pin", "--model", short, *hour, "--json", input="[0,1,2,3,4,5,6,7]")
            assert json.loads(done.stdout) == {"tokens": 8, "asked": 8, "owner": "ops"}
            done = kvctl(own, "pin", "--model", "tiny", input="[99]")
            assert (done.returncode, done.stdout.split(":")[0]) == (1, "nothing of it is cached")
            listed = kvctl(own, "pins").stdout
            assert re.search(r"kvctl +default +tiny +16 +2 +-", listed)
            assert re.search(r"ops +default +tiny +8 +1 +59 min", listed)
            assert re.search(r"tiny .* 2 +1 +0 +0 +12\.0 KiB", kvctl(own, "models").stdout)
            assert kvctl(own, "evict", "--all", "--yes").stdout.startswith("1 block evicted")
            wrong = kvctl(own, "unpin", "--model", "large")
            assert (wrong.returncode, "there are: tiny" in wrong.stderr) == (1, True)
            ended = kvctl(own, "unpin", "--owner", "ops", "--json")
            assert json.loads(ended.stdout) == {"pins": 1}
            assert kvctl(own, "unpin").stdout == "1 pin of 'kvctl' ended\n"
            assert kvctl(own, "pins").stdout == "nothing is pinned\n"
            for owner in ("a", "b"):
                kvctl(own, "pin", "--model", "tiny", "--owner", owner, input="[0, 1]", check=True)
            asked = kvctl(own, "unpin", "--all")
            assert (asked.returncode, asked.stdout) == (2, "")
            assert "this would end 2 pins of 'a', 'b': do it with --yes" in asked.stderr
            assert len(json.loads(kvctl(own, "pins", "--json").stdout)["pins"]) == 2
            done = kvctl(own, "unpin", "--all", "--yes")
            assert done.stdout == "2 pins of 2 owners ended\n"
            assert kvctl(own, "unpin", "--all").stdout == "0 pins of 0 owners ended\n"
    finally:
        own.stop()


def test_models_of_one_name_are_told_apart_by_their_fingerprint(tmp_path: Path) -> None:
    own = start_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run")
    other = dataclasses.replace(MODEL, fingerprint=bytes([1]) * 32)
    try:
        with (
            kvd_client.connect(own.runtime_dir, staging_bytes=1 << 20) as client,
            client.open_context(MODEL),
            client.open_context(other) as context,
        ):
            store(context, range(8))
            done = kvctl(own, "pin", "--model", "tiny", input="[0, 1]")
            assert done.returncode == 1
            for model in (MODEL, other):
                assert model.arena_fingerprint.hex()[:16] in done.stderr
            name = other.arena_fingerprint.hex()[:16]
            assert kvctl(own, "pin", "--model", name, input="[0, 1]").returncode == 0
    finally:
        own.stop()


def test_verify_finds_a_difference_and_says_so_in_its_code(tmp_path: Path) -> None:
    """A stranger of the same user has touched the arena."""
    own = start_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run")
    try:
        with (
            kvd_client.connect(own.runtime_dir, staging_bytes=1 << 20) as client,
            client.open_context(MODEL) as context,
        ):
            store(context, PROMPT)
            clean = kvctl(own, "verify")
            assert (clean.returncode, clean.stdout.split(":")[0]) == (0, "ok")
            (arena,) = [name for name in own.segments() if ".arena" in name]

            def touch() -> None:
                with open(f"/dev/shm/{arena}", "r+b") as memory:
                    memory.seek(100 * STRIDE)
                    memory.write(b"x")

            touch()
            assert "off the accounts" in kvctl(own, "status").stdout
            found = kvctl(own, "verify")
            assert found.returncode == 1
            assert "1 difference" in found.stdout
            assert "slot 100" in found.stdout
            touch()  # verify has taken the memory away
            found = kvctl(own, "verify", "--json")
            assert found.returncode == 1
            assert json.loads(found.stdout)["ok"] is False
            with open(f"/dev/shm/{arena}", "r+b") as memory:  # of a block
                memory.seek(10)
                memory.write(b"x")
            assert kvctl(own, "verify").returncode == 0
            found = kvctl(own, "verify", "--checksums")
            assert found.returncode == 1
            assert "slot 0: the bytes of its" in found.stdout
    finally:
        own.stop()


# --- how it ends


def test_a_daemon_that_refuses_is_exit_code_1(tmp_path: Path) -> None:
    own = start_daemon("--max-memory", "64MiB", "--max-sessions", "1", runtime_dir=tmp_path / "run")
    try:
        with kvd_client.connect(own.runtime_dir, staging_bytes=0):
            done = kvctl(own, "ping")
        assert done.returncode == 1
        assert "too many clients" in done.stderr
    finally:
        own.stop()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["evict"],
        ["evict", "--all", "--blocks", "1"],
        ["evict", "--blocks", "0"],
        ["evict", "--blocks", "-1"],
        ["evict", "--blocks", "many"],
        ["pin"],
        ["pin", "--model", "tiny", "--for", "0"],
        ["pin", "--model", "tiny", "--for", "for ever"],
        ["unpin", "tiny"],
        ["ping", "--timeout", "0"],
        ["ping", "--timeout", "nan"],
        ["ping", "--no-such-option"],
    ],
)
def test_bad_usage_is_exit_code_2(daemon: Daemon, arguments: list[str]) -> None:
    done = kvctl(daemon, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: kvctl" in done.stderr


@pytest.mark.parametrize(
    "tokens", ["", "[]", "{}", "7", "[1.5]", "[true]", "[-1]", "[[1]]", '["1"]', f"[{1 << 32}]"]
)
def test_what_is_no_list_of_tokens_is_bad_usage(
    daemon: Daemon, worker: kvd_client.Client, tokens: str
) -> None:
    assert worker
    done = kvctl(daemon, "pin", "--model", "tiny", input=tokens)
    assert (done.returncode, done.stdout) == (2, "")
    assert "a file with a JSON list of token ids" in done.stderr


def test_a_file_of_tokens_that_cannot_be_read_is_bad_usage(
    daemon: Daemon, worker: kvd_client.Client
) -> None:
    assert worker
    for path in ("/nonexistent", "/dev/null", "/"):
        done = kvctl(daemon, "pin", "--model", "tiny", path)
        assert (done.returncode, done.stdout) == (2, "")
        assert path in done.stderr


def test_nothing_is_read_from_a_person_before_the_rest_is_right(daemon: Daemon) -> None:
    """Standard input that never ends."""
    theirs, ours = os.pipe()
    try:
        assert kvctl(daemon, "pin", stdin=theirs).returncode == 2
        assert kvctl(daemon, "pin", "--model", "tiny", "--for", "0", stdin=theirs).returncode == 2
        assert kvctl(daemon, "pin", "--model", "no such model", stdin=theirs).returncode == 1
    finally:
        os.close(theirs)
        os.close(ours)


def test_options_may_come_before_or_after_the_command(daemon: Daemon, tmp_path: Path) -> None:
    own = str(daemon.runtime_dir)
    for arguments in (
        ["--runtime-dir", own, "ping"],
        ["ping", "--runtime-dir", own],
        ["--runtime-dir", str(tmp_path), "ping", "--runtime-dir", own],
    ):
        assert subprocess.run([*COMMAND, *arguments], stdout=subprocess.DEVNULL).returncode == 0


def test_the_environment_says_where_the_daemon_is(daemon: Daemon, tmp_path: Path) -> None:
    environ = {**os.environ, "KVD_RUNTIME_DIR": str(daemon.runtime_dir)}
    assert subprocess.run([*COMMAND, "ping"], env=environ, capture_output=True).returncode == 0
    environ = {name: value for name, value in environ.items() if name != "KVD_RUNTIME_DIR"}
    environ |= {"XDG_RUNTIME_DIR": str(tmp_path), "KVD_INSTANCE": "elsewhere"}
    done = subprocess.run([*COMMAND, "ping"], env=environ, capture_output=True, text=True)
    assert done.returncode == 3
    assert f"{tmp_path}/kvd-elsewhere" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(daemon: Daemon) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "--runtime-dir", str(daemon.runtime_dir), "status", "--json"],
        stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_is_an_error(daemon: Daemon) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "--runtime-dir", str(daemon.runtime_dir), "status"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "kvctl: cannot write: No space left on device\n"


def test_help_says_how_it_ends_and_how_to_call_it_for_certain(daemon: Daemon) -> None:
    text = kvctl(daemon, "--help").stdout
    assert re.search(r"0  done\n +1  .*\n +2  bad usage\n +3  no daemon answers", text)
    assert "kvcached" in text
    assert "python -m kvd_client.kvctl" in text
    for name in (*READING, "evict"):
        assert f"    {name} " in text
        assert kvctl(daemon, name, "--help").returncode == 0
    assert kvctl(daemon, "--version").stdout.startswith("kvctl 0.")


def test_the_command_is_installed() -> None:
    installed = Path(sys.executable).parent / "kvctl"
    done = subprocess.run([installed, "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("kvctl ")


# --- text


def test_sizes_and_times_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, (1 << 20) - 1, 5 << 30, 3 << 50)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "5.0 GiB", "3072.0 TiB",
    ]  # fmt: skip
    assert [duration(n) for n in (0, 9.96, 59, 60, 3600 * 3 + 720, 86400 * 5 + 3600 * 7)] == [
        "0.0 s", "10.0 s", "59 s", "1 min", "3 h 12 min", "5 d 7 h",
    ]  # fmt: skip
    assert [percent(1, 0), percent(0, 5), percent(1, 3), percent(1, 10**6), percent(5, 5)] == [
        "-", "0.0 %", "33.3 %", "< 0.1 %", "100.0 %",
    ]  # fmt: skip
    assert count(1234567) == "1,234,567"


def test_a_bar_is_exactly_as_long_as_it_should_and_shows_everything() -> None:
    look = Look()
    for sizes in ([1, 0, 10**12], [1, 1, 1], [5], [0, 0, 7], [10**9, 1, 1], [3] * 10):
        parts = [Part(n, character, "") for n, character in zip(sizes, "abcdefghij", strict=False)]
        text = bar(parts, 30, look)
        assert len(text) == 30
        assert set(text) == {part.character for part in parts if part.size}
    assert bar([], 5, look) == "     "


def test_a_table_cuts_what_is_elastic_and_nothing_else() -> None:
    columns = (Column("NAME", elastic=True), Column("N", right=True), Column("STATE"))
    rows = [("x" * 50, 1234567, "FINE"), ("短い", 1, "BAD")]
    text = table(columns, rows, Look(width=40))
    assert [len(line) for line in text.splitlines()] == [40, 39, 36]
    assert "1234567" in text
    assert "…" in text
    assert "~" in table(columns, rows, Look(width=40, unicode=False))
    assert "x" * 50 in table(columns, rows, Look(width=80))
    narrow = table(columns, rows, Look(width=5))
    assert "1234567" in narrow
    # Wide letters take two columns.
    lines = table(columns, rows, Look(width=80)).splitlines()
    assert lines[2].startswith("短い" + " " * (50 - 4 + 2))
