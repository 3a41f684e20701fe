"""kvctl top on a real terminal: what it shows at which size, its keys, what it does when the daemon
goes, and that the terminal is what it was, however it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import kvd_client
from tests.client.blocks import BLOCK_TOKENS, MODEL, eventually, store
from tests.client.terminal import ENTERED, LEFT, SECONDS, Terminal
from tests.support import Daemon, start_daemon

COMMAND = [sys.executable, "-m", "kvd_client.kvctl"]
SIZES = [(80, 24), (40, 10), (200, 60), (20, 5)]


@contextmanager
def terminal(daemon: Daemon, columns: int = 80, lines: int = 24) -> Iterator[Terminal]:
    command = [*COMMAND, "--runtime-dir", str(daemon.runtime_dir), "top", "--interval", "0.5"]
    opened = Terminal(command, columns, lines)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    running = start_daemon(
        "--max-memory", "64MiB", runtime_dir=tmp_path_factory.mktemp("top") / "run"
    )
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def worker(daemon: Daemon) -> Iterator[kvd_client.Context]:
    """Leases 3 of 5 blocks with one of two sequences."""
    with (
        kvd_client.connect(daemon.runtime_dir, name="worker", staging_bytes=1 << 20) as client,
        client.open_context(MODEL, n_seq_max=8) as context,
    ):
        store(context, range(3 * BLOCK_TOKENS))
        store(context, range(1000, 1016))
        with context.alloc(range(3 * BLOCK_TOKENS), request="chat 7"), context.alloc([5]):
            yield context


# --- what is to be seen


@pytest.mark.parametrize(("columns", "lines"), SIZES)
def test_it_fits_the_terminal(
    daemon: Daemon, worker: kvd_client.Context, columns: int, lines: int
) -> None:
    """Whatever its size: the first line says who, the last the keys, and nothing has scrolled."""
    assert worker
    with terminal(daemon, columns, lines) as screen:
        shown = screen.until(lambda text: "kvd 0." in text and "q quit" in text)
        assert shown[0].startswith("kvd 0.1.0,")
        assert shown[-1].startswith("q quit  p pause")
        assert len(shown) == lines
        assert sum("kvd 0.1.0" in line for line in shown) == 1
        if lines >= 10:
            assert any(line.startswith("[") and line.endswith("]") for line in shown)
            assert any("hit rate" in line for line in shown)


def test_80_columns(daemon: Daemon, worker: kvd_client.Context) -> None:
    """What an operator looks for, with the numbers of this very cache."""
    assert worker
    with terminal(daemon) as screen:
        shown = "\n".join(screen.shows("chat 7"))
    assert re.search(r"^kvd 0\.1\.0, instance \S+, up [\d.]+ s, answers in [\d.]+ ms$", shown, re.M)
    assert re.search(r"^memory 64\.0 MiB: . active 12\.0 KiB . cached 8\.0 KiB", shown, re.M)
    assert re.search(r"^hit rate -? ?.*, 36\.9 % since the start$", shown, re.M)
    assert re.search(r"sequences 2 of 100, 0 waiting; clients 2$", shown, re.M)
    assert re.search(r"^tiny +20\.0 KiB +3 +2 +0 +0 +128 B$", shown, re.M)
    assert re.search(r"^worker +\d+ +12\.0 KiB +2 +.*12\.0 KiB +1\.0 MiB +default$", shown, re.M)
    assert re.search(r"^worker 2 +24 +PROCESSING .* 3 +tiny +chat 7$", shown, re.M)


def test_rates_are_of_what_happens_now(daemon: Daemon, worker: kvd_client.Context) -> None:
    with terminal(daemon) as screen:
        screen.shows("allocs/s 0;")

        def works(text: str) -> bool:
            worker.alloc(range(BLOCK_TOKENS)).release()
            found = re.search(r"hit rate (\S+) %? ?now", text)
            return bool(re.search(r"allocs/s [1-9]", text) and found and found[1] == "100.0")

        screen.until(works)
        assert re.search(r"tokens/s [1-9][\d,]* asked, [1-9][\d,]* hit", "\n".join(screen.lines))


def test_more_rows_than_there_is_room_for(daemon: Daemon, worker: kvd_client.Context) -> None:
    opened = [worker.alloc([each]) for each in range(6)]
    try:
        with terminal(daemon, 80, 18) as screen:
            assert screen.shows(r"^and \d more$")[-1].startswith("q quit")
            screen.resize(100, 40)
            shown = screen.until(lambda text: text.count("PROCESSING") == 8)
            assert not any(line.startswith("and ") for line in shown)
    finally:
        for each in opened:
            each.release()


# --- keys


def test_keys(daemon: Daemon, worker: kvd_client.Context) -> None:
    with terminal(daemon) as screen:
        screen.shows("chat 7")

        def order() -> list[str]:
            return [line.split()[0] for line in screen.lines if "default" in line]

        with kvd_client.connect(daemon.runtime_dir, name="a reader", staging_bytes=0):
            screen.shows("a reader")
            assert order()[0] == "worker"
            screen.type("n")
            screen.until(lambda _: order()[0] == "a")
            screen.type("m")
            screen.until(lambda _: order()[0] == "worker")
            screen.type("h")
            screen.shows("sort by idle time")
            screen.type("\x1b[Ah")  # an arrow is no key
            screen.until(lambda text: "sort by" not in text and "chat 7" in text)
            screen.type("p")
            screen.shows("^PAUSED")
        opened = worker.alloc([], request="while it was paused")
        screen.type("p")
        screen.until(lambda text: "while it was paused" in text and "a reader" not in text)
        opened.release()
        screen.type("q")
        assert screen.process.wait(SECONDS) == 0
        assert screen.is_restored()


# --- the daemon goes, and comes


def test_it_outlives_the_daemon(tmp_path: Path) -> None:
    first = start_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run")
    second = None
    try:
        with terminal(first) as screen:
            screen.shows("^kvd 0")
            first.kill()
            assert screen.shows("^no daemon: waiting, as of .* ago$")[1].startswith("no daemon")
            second = start_daemon(
                "--max-memory", "32MiB", runtime_dir=tmp_path / "run", instance=first.instance
            )
            screen.shows("^memory 32")
            assert "waiting," not in "\n".join(screen.lines)
            screen.type("q")
            assert screen.process.wait(SECONDS) == 0
    finally:
        first.stop()
        if second is not None:
            second.stop()


def test_a_daemon_that_hangs_holds_up_no_key(own_daemon: Daemon) -> None:
    with terminal(own_daemon) as screen:
        screen.shows("^kvd 0")
        own_daemon.process.send_signal(signal.SIGSTOP)
        screen.shows("^no daemon: waiting")
        screen.type("h")
        screen.shows("sort by idle time")
        screen.type("q")
        eventually(screen.is_restored, SECONDS)
        assert screen.process.wait(SECONDS) == 0


def test_without_a_daemon_at_first_it_is_an_error(tmp_path: Path) -> None:
    screen = Terminal([*COMMAND, "--runtime-dir", str(tmp_path), "top"])
    try:
        assert screen.process.wait(SECONDS) == 3
        assert "no daemon listens" in " ".join(screen.lines)
        assert ENTERED not in screen.said
    finally:
        screen.close()


# --- the terminal is put back


@pytest.mark.parametrize(
    ("how", "code"),
    [("\x03", 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)],
)
def test_the_terminal_is_put_back(daemon: Daemon, how: str | signal.Signals, code: int) -> None:
    with terminal(daemon) as screen:
        screen.shows("^kvd 0")
        assert ENTERED in screen.said
        if isinstance(how, str):
            screen.type(how)
        else:
            screen.process.send_signal(how)
        assert screen.process.wait(SECONDS) == code
        assert screen.is_restored()


def test_the_terminal_is_put_back_after_a_fault() -> None:
    program = (
        "from kvd_client.kvctl.screen import Screen\n"
        "with Screen() as screen:\n"
        "    screen.draw(['here'])\n"
        "    1 / 0\n"
    )
    screen = Terminal([sys.executable, "-c", program])
    try:
        assert screen.process.wait(SECONDS) == 1
        assert any("ZeroDivisionError" in line for line in screen.lines)
        entered, _, after = screen.said.partition(ENTERED)
        assert after.index(LEFT) < after.index(b"ZeroDivisionError"), entered
        screen.said = screen.said[: screen.said.rindex(LEFT) + len(LEFT)]
        assert screen.is_restored()
    finally:
        screen.close()


def test_ctrl_z_puts_it_back_until_it_goes_on(daemon: Daemon) -> None:
    with terminal(daemon) as screen:
        screen.shows("^kvd 0")
        screen.type("\x1a")
        eventually(
            lambda: psutil.Process(screen.process.pid).status() == psutil.STATUS_STOPPED, SECONDS
        )
        assert screen.is_restored()
        screen.process.send_signal(signal.SIGCONT)
        eventually(lambda: screen.lines and screen.said.count(ENTERED) == 2, SECONDS)
        screen.type("q")
        assert screen.process.wait(SECONDS) == 0


# --- without a terminal


def once(daemon: Daemon, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--runtime-dir", str(daemon.runtime_dir), "top", *arguments],
        capture_output=True, text=True, timeout=SECONDS, env={**os.environ, **environ},
    )  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 200])
def test_once(daemon: Daemon, worker: kvd_client.Context, width: int) -> None:
    assert worker
    done = once(daemon, "--once", "--interval", "0.5", COLUMNS=str(width))
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= width
    assert "\x1b" not in done.stdout
    assert re.search(r"^worker 2 +24 +PROCESSING", done.stdout, re.MULTILINE)


def test_once_for_programs(daemon: Daemon, worker: kvd_client.Context) -> None:
    assert worker
    report = json.loads(once(daemon, "--once", "--json", "--interval", "0.5").stdout)
    assert report["status"]["sequences"]["in_use"] == 2
    assert [row["request"] for row in report["sequences"]] == ["chat 7", ""]
    assert report["rates"]["seconds"] > 0.4
    assert report["rates"]["queried_tokens"] == 0
    assert report["rates"]["requests"] >= 0
    assert report["round_trip_us"] > 0


def test_what_is_no_terminal_is_told_so(daemon: Daemon) -> None:
    for arguments, why in (([], "--once prints one picture"), (["--json"], "--once --json")):
        done = once(daemon, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert why in done.stderr
