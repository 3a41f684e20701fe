"""Any process may die at any moment: what it held is given back, and nothing half done is seen."""

import contextlib
import faulthandler
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvd.stopped import is_stopped
from kvd_proto import errors
from kvd_proto.messages import Allocated, Evict, ListClients
from tests.shell import raw
from tests.shell.conftest import Bystander
from tests.shell.raw import (
    BLOCK_TOKENS,
    Raw,
    expected_blocks,
    has_ended,
    make_alloc,
    many_tokens,
    raw_client,
    until,
)
from tests.support import Daemon, start_daemon

pytestmark = pytest.mark.usefixtures("nothing_is_lost")

CYCLES = 20
PROMPT = many_tokens(700_000, 4 * BLOCK_TOKENS)


@contextlib.contextmanager
def client_process(function: Any, daemon: Daemon, *arguments: Any) -> Iterator[Any]:
    """Run `function(pipe, daemon, ...)` in a new process; yields it, with the pipe as `pipe`."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process: Any = fork.Process(target=function, args=(theirs, daemon, *arguments))
    process.start()
    theirs.close()
    process.pipe = ours
    try:
        yield process
    finally:
        process.kill()
        process.join()
        ours.close()


def hold_everything(pipe: Connection, daemon: Daemon) -> None:
    """Leases, a reservation, a full pool with somebody waiting, and a staging."""
    client = Raw(daemon, name="victim")
    context = client.open(n_seq_max=3)
    client.store(context, PROMPT, fill=3)
    client.alloc(context, PROMPT)
    client.alloc(context, PROMPT, reserve=5 * BLOCK_TOKENS)
    client.post(make_alloc(context, PROMPT, wait_ms=60_000))
    pipe.send(client.status()["sequences"])
    signal.pause()


def fork_and_hold(pipe: Connection, daemon: Daemon) -> None:
    """The same, with a child that keeps every descriptor open; tells the child's pid."""
    client = Raw(daemon, name="parent")
    client.store(client.open(), PROMPT, fill=3)
    child = os.fork()
    if child == 0:
        signal.pause()
    pipe.send(child)
    signal.pause()


def append_for_ever(pipe: Connection, daemon: Daemon, seed: int) -> None:
    """Store prompt after prompt; each block's payload says which prompt it is of."""
    client = Raw(daemon, name="writer")
    context = client.open()
    pipe.send("ready")
    for number in range(1_000_000):
        fill = (seed + number) % 251
        sequence = client.store(context, prompt_of(fill), fill=fill)
        client.release(context, sequence)


def prompt_of(fill: int) -> bytes:
    return many_tokens(800_000 + 1000 * fill, 6 * BLOCK_TOKENS)


def test_killed_client_gives_everything_back(daemon: Daemon, bystander: Bystander) -> None:
    before = bystander.client.status()
    with client_process(hold_everything, daemon) as victim:
        assert victim.pipe.recv() == {**before["sequences"], "in_use": 4, "free": 12, "waiting": 1}
        assert bystander.client.status()["accounting"]["filling_bytes"] == 5 * raw.STRIDE
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda: bystander.client.status()["clients"] == 1)
    # What it had committed stays, and is everybody's.
    client, context = bystander.client, bystander.context
    found = client.alloc(context, PROMPT)
    assert found.matched_tokens == 4 * BLOCK_TOKENS
    assert client.read(context, found) == expected_blocks(4, fill=3)
    client.release(context, found)


def hold_and_leave(pipe: Connection, daemon: Daemon, how: str) -> None:
    """Hold something, and end without a word when told to."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # pytest's, which would tell of the crash that is wanted
    client = Raw(daemon, name="victim")
    context = client.open(n_seq_max=2)
    client.store(context, PROMPT, fill=3)
    client.alloc(context, PROMPT, reserve=5 * BLOCK_TOKENS)
    client.post(make_alloc(context, PROMPT, wait_ms=60_000))
    pipe.send("ready")
    pipe.recv()
    if how == "exit":
        os._exit(0)
    if how == "close":  # the process goes on
        client.lifeline.close()
        signal.pause()
    os.kill(os.getpid(), getattr(signal, how))


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGABRT", "SIGTERM", "exit", "close"])
def test_client_that_ends_in_any_way_gives_everything_back(
    daemon: Daemon, bystander: Bystander, how: str
) -> None:
    before = bystander.client.status()
    with client_process(hold_and_leave, daemon, how) as victim:
        victim.pipe.recv()
        held = bystander.client.status()
        assert held["sequences"]["in_use"] == before["sequences"]["in_use"] + 2
        assert held["accounting"]["filling_bytes"] == 5 * raw.STRIDE
        victim.pipe.send("go")
        until(lambda: bystander.client.status()["clients"] == 1)
        after = bystander.client.status()
        assert after["sequences"] == before["sequences"]
        assert after["accounting"]["filling_bytes"] == 0


def test_killed_client_whose_child_lives_gives_everything_back(
    daemon: Daemon, bystander: Bystander
) -> None:
    """The child keeps the lifeline open, so only the pidfd tells of the death."""
    with client_process(fork_and_hold, daemon) as victim:
        child = victim.pipe.recv()
        try:
            os.kill(victim.pid, signal.SIGKILL)
            until(lambda: bystander.client.status()["clients"] == 1)
            os.kill(child, 0)  # it lives
        finally:
            os.kill(child, signal.SIGKILL)


def hold_and_check(pipe: Connection, daemon: Daemon) -> None:
    """Lease blocks and have some that nobody leases; when asked, read the leased ones again."""
    client = Raw(daemon, name="sleeper")
    context = client.open()
    held = client.store(context, PROMPT, fill=3)
    blocks = client.read(context, held)
    client.release(context, client.store(context, prompt_of(1), fill=1))
    pipe.send("ready")
    while pipe.recv():
        more = client.store(context, prompt_of(2), fill=2)
        client.release(context, more)
        pipe.send(client.read(context, held) == blocks == expected_blocks(4, fill=3))


def row_of(client: Raw, pid: int) -> dict[str, Any]:
    """The client's row in kvctl clients."""
    (row,) = [row for row in client.call(ListClients()).report["clients"] if row["pid"] == pid]
    return row


def stop(pid: int) -> None:
    """Stop a process, and wait until it is."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def test_a_staging_is_given_back_whoever_has_it_open_still(daemon: Daemon) -> None:
    """A client that connects and hangs up again and again may keep the descriptors, but no memory
    of the daemon's: neither may a forked child that lives on."""
    with raw_client(daemon) as client:
        assert os.fstat(client.staging_fd).st_blocks > 0
        client.lifeline.shutdown(socket.SHUT_RDWR)
        until(lambda: os.fstat(client.staging_fd).st_blocks == 0)
        client.staging[:4] = b"mine"  # it is a client's own memory now


def test_stopped_client_is_flagged_and_not_robbed(daemon: Daemon, bystander: Bystander) -> None:
    with client_process(hold_and_check, daemon) as victim:
        victim.pipe.recv()
        client = bystander.client
        assert row_of(client, victim.pid)["stopped"] is False
        assert client.status()["stopped_clients"] == 0
        stop(victim.pid)
        row, held = row_of(client, victim.pid), client.status()
        assert row["stopped"] is True
        assert (row["sequences"], row["leased_blocks"]) == (1, 4)
        assert (held["clients"], held["stopped_clients"]) == (2, 1)
        noticed = f"client is stopped session={row['session']} pid={victim.pid}"
        until(lambda: noticed in daemon.log.read_text())
        # What nobody leases goes, down to the last block, and what it leases stays.
        client.call(Evict("", 0))
        pressed = client.ask(make_alloc(bystander.context, b"", reserve=1 << 20))
        assert type(pressed) in (errors.AllLeased, errors.BudgetTooSmall)
        squeeze(client, bystander.context)
        after = row_of(client, victim.pid)
        assert (after["sequences"], after["leased_blocks"]) == (1, 4)
        assert after["staging_bytes"] == row["staging_bytes"]
        assert after["idle_seconds"] > row["idle_seconds"]
        os.kill(victim.pid, signal.SIGCONT)
        victim.pipe.send(True)
        assert victim.pipe.recv() is True
        assert row_of(client, victim.pid)["stopped"] is False
        assert client.status()["stopped_clients"] == 0
        until(lambda: f"client goes on session={row['session']}" in daemon.log.read_text())
        assert daemon.log.read_text().count(noticed) == 1


def test_stopped_client_that_is_killed_gives_everything_back(
    daemon: Daemon, bystander: Bystander
) -> None:
    with client_process(hold_everything, daemon) as victim:
        victim.pipe.recv()
        stop(victim.pid)
        assert bystander.client.status()["stopped_clients"] == 1
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda: bystander.client.status()["clients"] == 1)
        assert bystander.client.status()["stopped_clients"] == 0


def squeeze(client: Raw, context: int) -> None:
    """Take all the room that there is, for a moment: everything that nobody leases is evicted."""
    for n_blocks in range(4096, 0, -1):
        found = client.ask(make_alloc(context, b"", reserve=n_blocks * BLOCK_TOKENS))
        if isinstance(found, Allocated):
            assert client.status()["accounting"]["cached_bytes"] == 0
            client.release(context, found)
            return
    raise AssertionError("there was no room at all")


@pytest.mark.parametrize("name", ["plain", "two words", ") S 1 (", "\n) T (", "x" * 15])
def test_the_state_is_read_whatever_the_process_calls_itself(name: str) -> None:
    program = (
        "import signal; open('/proc/self/comm', 'w').write(" + repr(name) + "); "
        "print('ready', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert is_stopped(process.pid) is False
            stop(process.pid)
            assert is_stopped(process.pid) is True
        finally:
            process.kill()
    assert is_stopped(process.pid) is None


def test_clients_killed_while_they_store_leave_whole_blocks_only(
    daemon: Daemon, bystander: Bystander
) -> None:
    pause = random.Random(5)
    for cycle in range(CYCLES):
        with client_process(append_for_ever, daemon, 13 * cycle) as victim:
            victim.pipe.recv()
            # Somewhere in a store: after so many answers to somebody else.
            for _ in range(pause.randrange(1, 40)):
                bystander.check()
            os.kill(victim.pid, signal.SIGKILL)
            until(lambda: bystander.client.status()["clients"] == 1)
    client, context = bystander.client, bystander.context
    n_found = 0
    for fill in range(251):
        found = client.alloc(context, prompt_of(fill))
        n_blocks = found.matched_tokens // BLOCK_TOKENS
        assert client.read(context, found) == expected_blocks(n_blocks, fill=fill)
        n_found += n_blocks
        client.release(context, found)
    assert n_found > 0, "nothing was stored at all"


def test_sigterm_removes_every_trace_and_tells_the_clients(tmp_path: Path) -> None:
    daemon = start_daemon(runtime_dir=tmp_path / "rt")
    with raw_client(daemon) as client:
        client.store(client.open(), PROMPT)
        assert len(daemon.segments()) == 4  # the lock, an arena, its directory and its index
        assert daemon.stop() == 0
        assert has_ended(client.lifeline)
    assert daemon.segments() == []
    assert [path.name for path in daemon.runtime_dir.iterdir()] == []


def test_second_daemon_refuses_to_start_and_touches_nothing(
    daemon: Daemon, bystander: Bystander, tmp_path: Path
) -> None:
    segments = daemon.segments()
    for runtime_dir in (daemon.runtime_dir, tmp_path / "elsewhere"):
        command = [sys.executable, "-m", "kvd", "serve", "--instance", daemon.instance]
        command += ["--runtime-dir", str(runtime_dir)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert second.returncode == 3
        assert str(daemon.process.pid) in second.stderr
    assert daemon.segments() == segments
    bystander.check()
