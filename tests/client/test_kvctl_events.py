"""kvctl events: what it prints, what a follower sees of a daemon's end, and what it loses."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

import pytest

import kvd_client
from kvd_client.kvctl.events import line
from kvd_client.kvctl.tables import Look
from kvd_proto.happenings import FIELDS, Kind
from tests.client.blocks import BLOCK_TOKENS, MODEL, eventually, store
from tests.support import Daemon, start_daemon

COMMAND = [sys.executable, "-m", "kvd_client.kvctl", "--runtime-dir"]
PROMPT = list(range(2 * BLOCK_TOKENS))
SECONDS = 30


def events(daemon: Daemon, *arguments: str) -> str:
    command = [*COMMAND, str(daemon.runtime_dir), "events", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Follower:
    """A running `kvctl events --follow`: its lines as they come."""

    def __init__(self, daemon: Daemon, *arguments: str) -> None:
        command = [*COMMAND, str(daemon.runtime_dir), "events", "--follow", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: Queue[str] = Queue()
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=_pass_on, args=each)
            for each in (
                (self.process.stdout, self._lines.put),
                (self.process.stderr, self.errors.append),
            )
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()

    def line(self) -> str:
        return self._lines.get(timeout=SECONDS).rstrip("\n")

    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.line())
        return event

    def until(self, kind: str) -> dict[str, Any]:
        while (event := self.event()).get("kind") != kind:
            pass
        return event

    def says_nothing(self) -> bool:
        try:
            self._lines.get(timeout=0.3)
        except Empty:
            return True
        return False


@contextmanager
def following(daemon: Daemon, *arguments: str) -> Iterator[Follower]:
    """Once it is there: what happens from then on is its."""
    follower = Follower(daemon, *arguments)
    try:
        with kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client:
            eventually(
                lambda: any(
                    row["client"] == "kvctl" and row["idle_seconds"] < row["connected_seconds"]
                    for row in client.clients()
                ),
                SECONDS,
            )
        yield follower
    finally:
        follower.end()


def _pass_on(stream: IO[str], take: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            take(line)


def test_what_is_kept(own_daemon: Daemon) -> None:
    with kvd_client.connect(own_daemon.runtime_dir, name="worker") as client:
        client.events()  # from now on alloc and its like are noted, too
        with client.open_context(MODEL) as context:
            store(context, PROMPT)
            store(context, PROMPT)
        text = events(own_daemon)
        for kind, words in (
            ("session-opened", r"worker\[\d+\], user \d+, staging 16\.0 MiB"),
            ("model", r"tiny registered by worker\[\d+\]: blocks of 8 tokens, 4\.0 KiB"),
            ("alloc", r"tiny seq 0 of worker\[\d+\]: 0 of 16 cached"),
            ("seal", r"tiny tokens 8\.\.15 from worker\[\d+\], slot \d"),
            ("hit", r"tiny seq \d of worker\[\d+\]: 16 tokens, 2 blocks"),
            ("release", r"tiny seq \d of worker\[\d+\]: completed, 16 tokens"),
        ):
            assert re.search(rf"^\d\d:\d\d:\d\d\.\d{{3}}  {kind} +{words}$", text, re.MULTILINE)
        report = json.loads(events(own_daemon, "--json", "--kind", "seal", "--kind", "hit"))
        assert [event["kind"] for event in report["events"]] == ["seal", "seal", "hit"]
        assert report["lost"] == 0
        assert events(own_daemon, "--kind", "seal", "--last", "1").count("\n") == 1
        assert "nothing has happened" in events(own_daemon, "--model", "none")


def test_a_follower_sees_what_happens_as_it_happens(own_daemon: Daemon) -> None:
    with following(own_daemon, "--json", "--kind", "seal", "--model", "tiny") as follower:
        with (
            kvd_client.connect(own_daemon.runtime_dir, name="worker") as client,
            client.open_context(MODEL) as context,
        ):
            store(context, PROMPT)
            seen = [follower.event() for _ in range(2)]
            assert [event["start"] for event in seen] == [0, BLOCK_TOKENS]
            assert {event["kind"] for event in seen} == {"seal"}
        assert follower.says_nothing()


def test_a_follower_may_begin_with_the_last_ones(own_daemon: Daemon) -> None:
    kvd_client.connect(own_daemon.runtime_dir, name="before").close()
    with following(own_daemon, "--last", "3", "--kind", "session-gone") as follower:
        assert "before[" in follower.line()
        kvd_client.connect(own_daemon.runtime_dir, name="after").close()
        while "after[" not in follower.line():
            pass


def test_a_follower_outlives_the_daemon(tmp_path: Path) -> None:
    first = start_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run")
    second = None
    try:
        with following(first, "--json") as follower:
            with (
                kvd_client.connect(first.runtime_dir) as client,
                client.open_context(MODEL) as context,
            ):
                store(context, PROMPT)
            follower.until("release")
            first.kill()
            eventually(lambda: any("no daemon, waiting" in line for line in follower.errors))
            second = start_daemon(
                "--max-memory", "64MiB", runtime_dir=tmp_path / "run", instance=first.instance
            )
            adopted = follower.until("adopted")
            assert (adopted["number"], adopted["blocks"]) == (0, 2)
            follower.until("session-opened")
            assert follower.errors[-1] == "kvctl: the daemon is back\n"
            assert len(follower.errors) == 2
            follower.process.send_signal(signal.SIGINT)
            assert follower.process.wait(SECONDS) == 130
    finally:
        first.stop()
        if second is not None:
            second.stop()


def test_a_follower_that_is_slow_is_told_what_it_has_lost(own_daemon: Daemon) -> None:
    with (
        following(own_daemon, "--json", "--kind", "alloc") as follower,
        kvd_client.connect(own_daemon.runtime_dir) as client,
        client.open_context(MODEL) as context,
    ):
        context.alloc([]).release()
        follower.until("alloc")
        follower.process.send_signal(signal.SIGSTOP)
        for _ in range(3000):  # each is two events, and 4,096 are kept
            context.alloc([]).release()
        follower.process.send_signal(signal.SIGCONT)
        lost = 0
        while not lost:
            lost = follower.event().get("lost", 0)
        assert 1000 < lost < 3000
        context.alloc([], request="the last one").release()
        while follower.event().get("request") != "the last one":
            pass


def test_a_reader_that_has_seen_enough_is_no_error(own_daemon: Daemon) -> None:
    pipe = subprocess.Popen(
        f"{' '.join(COMMAND)} {own_daemon.runtime_dir} events --follow | head -n 1",
        shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def has_ended() -> bool:
        kvd_client.connect(own_daemon.runtime_dir, staging_bytes=0).close()
        return pipe.poll() is not None

    eventually(has_ended, SECONDS)
    out, error = pipe.communicate()
    assert (out.count("\n"), error) == (1, "")


def test_a_kind_that_does_not_exist_is_bad_usage(own_daemon: Daemon) -> None:
    command = [*COMMAND, str(own_daemon.runtime_dir), "events", "--kind", "fire"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'session-gone'" in done.stderr


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_its_words(kind: Kind) -> None:
    """And nothing in a name steers the terminal."""
    values = {
        name: 7 if name in ("seq_id", "pid", "tokens", "blocks", "start", "slot", "uid") else "\x1b"
        for name in FIELDS[kind]
    }
    numbers = {
        "hit_tokens": 5, "staging_bytes": 1 << 20, "stride_bytes": 4096, "block_tokens": 8,
        "pins": 1, "idle_seconds": 2.0, "connected_seconds": 2.0, "ttl_seconds": None,
    }  # fmt: skip
    values |= {name: value for name, value in numbers.items() if name in values}
    event = {"number": 1, "time": 0.5, "kind": kind.value, "tenant": "t", "model": "m", **values}
    text = line(event, Look())
    assert text.isprintable()
    assert "m (t) " in text
    assert "number=" not in text
    assert "number=1" in line({**event, "kind": "of tomorrow"}, Look())
