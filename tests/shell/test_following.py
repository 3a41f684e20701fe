"""Events from a real daemon: who is told what, when, and what a slow reader loses."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvd.core.cache import Cache, Limits
from kvd.core.events import Connected
from kvd.core.journal import KEPT
from kvd.core.machine import Core
from kvd.following import FOLLOWED_SECONDS, Followers
from kvd.requests import Incoming
from kvd_proto import PROTOCOL_VERSION, codec
from kvd_proto.errors import BadMessage, UnknownSession
from kvd_proto.happenings import FIELDS
from kvd_proto.messages import MAX_EVENTS, Events, Hello, Reported
from tests.core.driver import Driver
from tests.proto.protocol_doc import Section, report_keys, sections
from tests.shell.raw import (
    BLOCK_TOKENS,
    Raw,
    has_ended,
    lifeline,
    many_tokens,
    raw_client,
    until,
)
from tests.support import Daemon, running_daemon

FROM_NOW_ON = (1 << 64) - 1


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("following")
    flags = ("--max-memory", "64MiB", "--log-level", "info")
    with running_daemon(*flags, runtime_dir=directory / "rt") as running:
        yield running


@pytest.fixture
def follower(daemon: Daemon) -> Iterator[Raw]:
    with raw_client(daemon, staging_bytes=0, name="follower") as client:
        yield client


@pytest.fixture
def worker(daemon: Daemon) -> Iterator[Raw]:
    with raw_client(daemon, name="worker") as client:
        yield client


def follow(since: int = FROM_NOW_ON, wait_ms: int = 0, *kinds: str, **other: Any) -> Events:
    most, model = other.get("most", MAX_EVENTS), other.get("model", "")
    return Events(since, wait_ms, most, list(kinds), model)


def test_an_answer_waits_for_something_to_happen(follower: Raw, worker: Raw) -> None:
    now = follower.call(follow()).report
    assert (now["events"], now["lost"]) == ([], 0)
    follower.post(follow(now["next"], 20_000))
    assert not follower.dealer.poll(150), "nothing has happened"
    before = time.time()
    context = worker.open()
    (made,) = follower.receive().body.report["events"]
    assert (made["kind"], made["tenant"], made["model"]) == ("model", "default", "model")
    assert (made["client"], made["pid"], made["block_tokens"]) == ("worker", os.getpid(), 8)
    assert before - 1 < made["time"] < time.time() + 1
    worker.release(context, worker.store(context, many_tokens(0, BLOCK_TOKENS)))
    worker.release(context, worker.store(context, many_tokens(0, 2 * BLOCK_TOKENS)))
    told = follower.call(follow(made["number"] + 1, 20_000)).report
    kinds = [event["kind"] for event in told["events"]]
    assert kinds == ["alloc", "seal", "release", "alloc", "hit", "seal", "release"]
    assert told["events"][4]["hit_tokens"] == BLOCK_TOKENS
    numbers = [event["number"] for event in told["events"]]
    assert numbers == list(range(numbers[0], numbers[0] + 7))
    assert told["next"] == numbers[-1] + 1


def test_no_answer_comes_later_than_asked(follower: Raw) -> None:
    started = time.monotonic()
    report = follower.call(follow(FROM_NOW_ON, 300)).report
    assert time.monotonic() - started > 0.29
    assert (report["events"], report["lost"]) == ([], 0)


def test_a_second_request_has_the_first_one_answered(follower: Raw) -> None:
    """So a client that has given up waiting need not be waited for."""
    first = follower.post(follow(FROM_NOW_ON, 60_000))
    second = follower.post(follow(FROM_NOW_ON, 50))
    assert [follower.receive().correlation for _ in range(2)] == [first, second]


def test_some_kinds_of_one_model(follower: Raw, worker: Raw) -> None:
    since = follower.call(follow()).report["next"]
    context = worker.open(name="mine", fingerprint=b"m" * 32)
    worker.release(context, worker.store(context, many_tokens(0, BLOCK_TOKENS)))
    other = worker.open(name="other", fingerprint=b"o" * 32)
    worker.release(other, worker.store(other, many_tokens(0, BLOCK_TOKENS)))

    def ask(*kinds: str, **how: Any) -> list[tuple[str, str]]:
        events = follower.call(follow(since, 0, *kinds, **how)).report["events"]
        return [(event["kind"], event["model"]) for event in events]

    assert ask("seal", "model") == [
        ("model", "mine"), ("seal", "mine"), ("model", "other"), ("seal", "other"),
    ]  # fmt: skip
    assert ask("seal", model="other") == [("seal", "other")]
    assert ask(model="other")[0] == ("model", "other")
    assert ask(most=1) == [("model", "mine")]


def test_a_slow_reader_is_told_how_much_it_has_lost(follower: Raw, worker: Raw) -> None:
    start = since = follower.call(follow()).report["next"]
    context = worker.open()
    for _ in range(0, KEPT + 1000, 2):  # two events each
        worker.release(context, worker.alloc(context, b""))
    numbers, lost, n_answers = [], 0, 0
    end = follower.call(follow()).report["next"]
    while since < end:
        report = follower.call(follow(since)).report
        numbers += [event["number"] for event in report["events"]]
        assert len(report["events"]) <= MAX_EVENTS
        lost += report["lost"]
        since = report["next"]
        n_answers += 1
    assert lost >= 1000
    assert len(numbers) == len(set(numbers)) >= KEPT
    assert len(numbers) + lost == since - start
    assert n_answers > KEPT // MAX_EVENTS


def test_frequent_events_are_noted_while_somebody_follows() -> None:
    replies: list[Any] = []
    core = Core(Limits(1 << 20))
    core.handle(Connected(b"s", "client", 1, 1000, "t", 0), 0.0)
    cache: Cache = core.cache
    followers = Followers(cache, lambda *reply: replies.append(reply))
    assert not cache.budget.journal.is_followed
    started = time.monotonic()
    followers.ask(Incoming(b"s", 1, follow(FROM_NOW_ON, 1000)))
    assert cache.budget.journal.is_followed
    assert replies == []
    due = followers.look(started)
    assert started < due < started + 0.2
    followers.look(started + 1.1)
    assert replies == [(b"s", 1, Reported({"events": [], "next": 1, "lost": 0}))]
    later = followers.look(time.monotonic())
    assert FOLLOWED_SECONDS < later - started < FOLLOWED_SECONDS + 2
    assert cache.budget.journal.is_followed
    followers.look(later)
    assert not cache.budget.journal.is_followed


def test_only_who_has_a_session_is_told(daemon: Daemon, follower: Raw) -> None:
    stranger = follower.connect(b"")
    try:
        stranger.send(codec.encode_request(1, follow()))
        assert stranger.poll(20_000)
        reply = codec.decode_reply(stranger.recv(), {1: Events})
        assert isinstance(reply.body, UnknownSession)
    finally:
        stranger.close()


def test_a_kind_that_does_not_exist_is_refused_with_those_that_do(follower: Raw) -> None:
    refused = follower.ask(follow(0, 0, "seal", "fire"))
    assert isinstance(refused, BadMessage)
    assert refused.details["kind"] == "fire"
    assert "session-gone" in str(refused.details["kinds"])


def test_why_a_session_has_gone(daemon: Daemon, follower: Raw) -> None:
    since = follower.call(follow()).report["next"]
    with raw_client(daemon, name="polite"):
        pass
    program = (
        "import kvd_client, signal, sys\n"
        "client = kvd_client.connect(sys.argv[1], name='victim', staging_bytes=0)\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", program, str(daemon.runtime_dir)], stdout=subprocess.PIPE
    )
    assert victim.stdout is not None
    victim.stdout.readline()
    victim.send_signal(signal.SIGKILL)
    victim.communicate()

    def gone() -> list[dict[str, Any]]:
        events = follower.call(follow(since, 0, "session-gone")).report["events"]
        return events if len(events) == 2 else []

    polite, killed = until(gone)
    assert (polite["client"], polite["reason"]) == ("polite", "closed")
    assert (killed["client"], killed["reason"]) == ("victim", "died")


def test_who_got_no_session_and_why(daemon: Daemon, follower: Raw) -> None:
    """Also those who never were a client: of no tenant, or with a hello that makes no sense."""
    since = follower.call(follow()).report["next"]
    with lifeline(daemon) as sock:
        sock.send(codec.encode_datagram(Hello(PROTOCOL_VERSION + 1, "of tomorrow", 0)))
        assert has_ended(sock)
    with lifeline(daemon) as sock:
        sock.send(b"hello?")
        assert has_ended(sock)
    refused = follower.call(follow(since, 20_000, "session-refused")).report["events"]
    assert [(event["client"], event["code"], event["tenant"]) for event in refused] == [
        ("of tomorrow", "unsupported_version", ""), ("", "bad_message", ""),
    ]  # fmt: skip
    assert {(event["pid"], event["uid"]) for event in refused} == {(os.getpid(), os.geteuid())}


def test_followers_that_die_leave_nothing(daemon: Daemon, follower: Raw) -> None:
    with raw_client(daemon, staging_bytes=0) as dying:
        dying.post(follow(FROM_NOW_ON, 60_000))
        until(lambda: follower.status()["clients"] == 2)
    until(lambda: follower.status()["clients"] == 1)
    assert follower.call(follow(0)).report["events"]


def test_the_events_are_in_the_log_when_its_level_is_debug(tmp_path: Path) -> None:
    """And every line of it has one form."""
    flags = ("--max-memory", "64MiB", "--log-level", "debug")
    with (
        running_daemon(*flags, runtime_dir=tmp_path / "rt") as daemon,
        raw_client(daemon, name="worker one") as worker,
    ):
        context = worker.open()
        worker.release(context, worker.store(context, many_tokens(0, BLOCK_TOKENS)))
        lines = until(
            lambda: [line for line in daemon.log.read_text().splitlines() if "release" in line]
        )
        log = daemon.log.read_text()
    (release,) = lines
    assert re.search(
        r"debug release tenant=default model=model client=\"worker one\" pid=\d+ context=\d+ "
        r"seq_id=0 generation=1 tokens=8 outcome=completed$",
        release,
    )
    value = r'(?:[^\s"=\\]+|"(?:[^"\\]|\\.)*")'
    form = rf"[\d-]+T[\d:.]+Z (?:debug|info|warning|error) [a-z][a-z -]*(?: [a-z_]+={value})*"
    assert [line for line in log.splitlines() if not re.fullmatch(form, line)] == []
    for kind in ("session-opened", "model", "alloc", "seal"):
        assert re.search(rf"debug {kind} tenant=default ", log)


# --- the paper


def test_the_protocol_tells_of_every_kind_and_its_keys(follower: Raw) -> None:
    section = sections()["Report of events"]
    table = Section("kinds", 3, section.text.partition("what its kind has:")[2]).rows()
    told = {row.name: tuple(re.findall(r"`([a-z_]+)`", row.cells[1])) for row in table}
    assert told == {kind.value: fields for kind, fields in FIELDS.items()}
    report = follower.call(follow(0)).report
    assert report["events"]
    for event in report["events"]:
        common = {key.removeprefix("events[].") for key in report_keys("events")}
        assert set(event) == common - {"next", "lost"} | set(told[event["kind"]])


def test_an_event_has_the_same_time_whenever_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes between a look at one clock and a look at the other; unless the time of day is
    set."""
    clock, offsets = time.time, [0.0]
    monkeypatch.setattr("kvd.following.time.time", lambda: clock() + offsets[-1])
    driver = Driver()
    driver.connect("s")
    found: list[Any] = []
    followers = Followers(driver.cache, lambda _, __, body: found.append(body.report["events"][0]))
    for offset in (0.0, 0.02, -0.05, 60.0):
        offsets.append(offset)
        followers.ask(Incoming(b"s", 1, Events(0, 0, 10, [], "")))
    times = [event["time"] for event in found]
    assert times[0] == times[1] == times[2]
    assert times[3] - times[0] == pytest.approx(60, abs=0.2)
