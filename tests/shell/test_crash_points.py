"""The daemon dies at each point of commit, seal, pin, back, evict, punch, adoption and stop; the
next one finds all that was stored, bit for bit, all that was pinned, and accounts that agree to the
byte.

KVD_CRASH_AT says at which times of coming to a point it dies: "1" here, more in `make soak`.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvd.instance import purge
from kvd_proto import codec
from kvd_proto.keys import arena_fingerprint
from kvd_proto.messages import Evict, Flush, ListPins, Pin, Pinned, Unpin, Unpinned
from tests.shell.crashing_daemon import ADOPTION, ONCE, POINTS, STOP
from tests.shell.raw import (
    BLOCK_TOKENS,
    FINGERPRINT,
    SECONDS,
    Raw,
    expected_blocks,
    make_append,
    many_tokens,
    raw_client,
)
from tests.support import Daemon, is_listening, running_daemon, start_daemon

TIMES = [int(each) for each in os.environ.get("KVD_CRASH_AT", "1").split(",")]
BUDGET = "1MiB"
CHAIN = 3
"""Blocks of a chain; a chain's bytes are those of its number."""
PINNED = 3
"""Chains that stay pinned, each by an owner of its own."""
MODEL = arena_fingerprint(FINGERPRINT, "llama-state", BLOCK_TOKENS)


STARTED: "list[subprocess.Popen[bytes]]" = []
"""That are to die by themselves."""


class DiedError(Exception):
    """The daemon is dead, as it should be."""


class Patient(Raw):
    """Notices that the daemon has died."""

    process: "subprocess.Popen[bytes]"

    def receive(self, seconds: float = SECONDS) -> codec.Reply:
        while not self.dealer.poll(20):
            if self.process.poll() is not None:
                raise DiedError
        return codec.decode_reply(self.dealer.recv(), self._asked)


def chain(number: int) -> bytes:
    return many_tokens(number * 1000, CHAIN * BLOCK_TOKENS)


@dataclass
class Told:
    """The numbers of chains of which a daemon said that they are stored, and pinned; and of those
    that it was asked to pin or unpin when it died."""

    stored: list[int] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)

    def pin(self, client: Raw, number: int, ttl_ms: int) -> None:
        self.asked.add(number)
        message = Pin(MODEL, chain(number), f"chain-{number}", ttl_ms)
        assert client.call(message) == Pinned(CHAIN * BLOCK_TOKENS)
        self.pinned.add(number)
        self.asked.discard(number)

    def unpin(self, client: Raw, number: int) -> None:
        self.pinned.discard(number)
        self.asked.add(number)
        assert client.call(Unpin(f"chain-{number}", "")) == Unpinned(1)
        self.asked.discard(number)


def store_until_it_dies(daemon: Daemon) -> Told:
    """Store and pin chain after chain, evict and unpin now and then."""
    told = Told()
    try:
        client = Patient(daemon)
    except Exception:
        daemon.process.wait(SECONDS)  # it died in the handshake
        return told
    client.process = daemon.process
    try:
        context = client.open()
        for number in range(1, 200):
            sequence = client.alloc(context, chain(number))
            if not sequence.matched_tokens:
                staged = client.stage(chain(number), 0, fill=number)
                appended = client.call(make_append(context, sequence, 0, chain(number), staged))
                assert client.call(Flush(appended.commit)).failures == []
                told.stored.append(number)
            client.release(context, sequence)
            told.pin(client, number, 3_600_000)
            told.pin(client, number, 0)
            if number > PINNED:
                told.unpin(client, number - PINNED)
            if number % 20 == 0:
                client.call(Evict("", 5))
                client.call(Evict("", 0)) if number % 60 == 0 else None
    except (DiedError, AssertionError, ConnectionError, OSError):
        if daemon.process.poll() is None:
            daemon.process.wait(SECONDS)
    finally:
        client.close()
    return told


def check(daemon: Daemon, told: Told, *, all_of_them: bool) -> None:
    stored = told.stored
    with raw_client(daemon) as client:
        context = client.open()
        found = 0
        for number in range(1, 200):
            sequence = client.alloc(context, chain(number))
            n_blocks = sequence.matched_tokens // BLOCK_TOKENS
            assert client.read(context, sequence) == expected_blocks(n_blocks, fill=number)
            found += n_blocks == CHAIN
            if number in told.pinned or (all_of_them and number in stored):
                assert n_blocks == CHAIN, f"chain {number} was stored, and is not there"
            client.release(context, sequence)
        assert found or not all_of_them or not stored
        rows = client.call(ListPins()).report["pins"]
        pinned = {int(row["owner"].removeprefix("chain-")) for row in rows}
        assert told.pinned <= pinned <= told.pinned | told.asked
        assert all(row["blocks"] == CHAIN for row in rows)
        assert client.verify()["differences"] == []
        counters = client.status()["counters"]
        assert counters["damaged_blocks"] == 0
        # And it goes on.
        sequence = client.store(context, many_tokens(900_000, CHAIN * BLOCK_TOKENS), fill=9)
        assert client.read(context, sequence) == expected_blocks(CHAIN, fill=9)
        assert client.verify()["differences"] == []


def crashing(point: str, nth: int, runtime_dir: Path, instance: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.shell.crashing_daemon", point, str(nth)]
    command += ["serve", "--instance", instance, "--runtime-dir", str(runtime_dir)]
    with (runtime_dir.parent / "crashing.log").open("ab") as log:
        STARTED.append(subprocess.Popen([*command, "--max-memory", BUDGET], stderr=log))
    return STARTED[-1]


@pytest.fixture
def instance() -> Iterator[str]:
    """A name of its own; whatever goes wrong, no process of that name is left."""
    name = f"test-crash-{uuid.uuid4().hex[:8]}"
    yield name
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()
    purge(name)


def start_crashing(point: str, nth: int, runtime_dir: Path, instance: str) -> Daemon:
    """A daemon that will die when it comes to a point; it has its sockets, or is dead already."""
    process = crashing(point, nth, runtime_dir, instance)
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and not is_listening(runtime_dir):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return Daemon(process, runtime_dir, instance, runtime_dir.parent / "crashing.log")


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        (point, nth)
        for point in POINTS
        for nth in TIMES
        if point not in ADOPTION + STOP and not (point in ONCE and nth > 1)
    ],
)
def test_it_dies_at_work(tmp_path: Path, instance: str, point: str, nth: int) -> None:
    runtime_dir = tmp_path / "rt"
    daemon = start_crashing(point, nth, runtime_dir, instance)
    told = store_until_it_dies(daemon)
    assert daemon.process.wait(SECONDS) == -signal.SIGKILL, "it never came to that point"
    may_evict = len(told.stored) > 10
    with running_daemon(
        "--max-memory", BUDGET, runtime_dir=runtime_dir, instance=instance
    ) as next_one:
        check(next_one, told, all_of_them=not may_evict)


@pytest.mark.parametrize("nth", TIMES[:1])
@pytest.mark.parametrize("point", ADOPTION)
def test_it_dies_while_it_adopts(tmp_path: Path, instance: str, point: str, nth: int) -> None:
    """Twice in a row."""
    runtime_dir = tmp_path / "rt"
    first = start_daemon("--max-memory", BUDGET, runtime_dir=runtime_dir, instance=instance)
    told = Told()
    with raw_client(first) as client:
        context = client.open()
        for number in range(1, 9):
            client.release(context, client.store(context, chain(number), fill=number))
            told.stored.append(number)
            told.pin(client, number, 0)
        first.kill()
    for _ in range(2):
        process = crashing(point, nth, runtime_dir, instance)
        assert process.wait(SECONDS) == -signal.SIGKILL, "it never came to that point"
    with running_daemon("--max-memory", BUDGET, runtime_dir=runtime_dir, instance=instance) as last:
        check(last, told, all_of_them=True)


@pytest.mark.parametrize("point", STOP)
def test_it_dies_while_it_stops(tmp_path: Path, instance: str, point: str) -> None:
    runtime_dir = tmp_path / "rt"
    daemon = start_crashing(point, 1, runtime_dir, instance)
    told = Told()
    with raw_client(daemon) as client:
        context = client.open()
        for number in range(1, 9):
            client.release(context, client.store(context, chain(number), fill=number))
            told.stored.append(number)
            told.pin(client, number, 0)
        daemon.process.terminate()
        assert daemon.process.wait(SECONDS) == -signal.SIGKILL, "it never came to that point"
    with running_daemon("--max-memory", BUDGET, runtime_dir=runtime_dir, instance=instance) as last:
        check(last, told, all_of_them=True)
