"""No descriptors: whoever comes is refused, who is there goes on, and it ends by itself."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvd_proto import errors
from kvd_proto.messages import RegisterModel
from tests.shell import raw
from tests.shell.raw import BLOCK_TOKENS, Raw, many_tokens, raw_client, until
from tests.support import Daemon, running_daemon

ALLOWED = 180
REFUSED = (errors.NoSpace, AssertionError, ConnectionError)
"""Without a descriptor for its staging, or hung up at once, for want of one for its lifeline."""
TOKENS = many_tokens(0, 4 * BLOCK_TOKENS)


@pytest.fixture
def poor(tmp_path: Path) -> Iterator[Daemon]:
    prefix = ("prlimit", f"--nofile={ALLOWED}:{ALLOWED}")
    flags = ("--max-memory", "64MiB")
    environ = {"KVD_MAX_SESSION_MODELS": "64"}
    with running_daemon(
        *flags, runtime_dir=tmp_path / "rt", prefix=prefix, environ=environ
    ) as daemon:
        yield daemon


def n_open(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def connect_until_refused(daemon: Daemon, opened: ExitStack) -> list[Raw]:
    """Sessions until there are no descriptors for one; the refusals are what they should be."""
    clients: list[Raw] = []
    while len(clients) < ALLOWED:
        try:
            client = opened.enter_context(raw_client(daemon, staging_bytes=4096))
        except REFUSED:
            return clients
        client.status()
        clients.append(client)
    raise AssertionError("there are descriptors for everybody")


def test_sessions_end_where_descriptors_do_and_come_again(poor: Daemon) -> None:
    with raw_client(poor) as bystander:
        context = bystander.open()
        held = bystander.store(context, TOKENS)
        before, allowed = n_open(poor), []
        for _ in range(3):
            with ExitStack() as opened:
                clients = connect_until_refused(poor, opened)
                assert n_open(poor) < ALLOWED
                allowed.append(len(clients))
                # Whoever is there is served, and knows nothing of it.
                for _ in range(20):
                    with pytest.raises(REFUSED):
                        Raw(poor)
                assert bystander.read(context, held) == raw.expected_blocks(4)
                assert all(client.status()["clients"] > 1 for client in clients)
                assert bystander.verify()["ok"]
            until(lambda: bystander.status()["clients"] == 1)
            until(lambda: n_open(poor) == before)
        assert allowed[0] > 5
        assert allowed == allowed[:1] * 3, "descriptors leak"
        more = many_tokens(1000, 4 * BLOCK_TOKENS)
        bystander.release(context, bystander.store(context, more))


def test_models_are_refused_when_there_are_no_descriptors_for_them(poor: Daemon) -> None:
    with raw_client(poor) as client, raw_client(poor, staging_bytes=4096) as other:
        context = client.open()
        held = client.store(context, TOKENS)
        other.status()
        n_models = 0
        while True:
            message = RegisterModel(
                "m", n_models.to_bytes(32, "big"), "llama-state", BLOCK_TOKENS, raw.LAYERS
            )
            answer = other.ask(message)
            if isinstance(answer, errors.KvdError):
                break
            n_models += 1
        assert type(answer) is errors.NoSpace
        assert answer.details == {"limit": ALLOWED}
        assert n_models > 3
        assert type(other.ask(message)) is errors.NoSpace
        assert len(client.status()["models"]) == 1 + n_models
        assert client.read(context, held) == raw.expected_blocks(4)
        assert client.verify()["ok"]
        # Those that are there are found all the same.
        known = message._replace(fingerprint=bytes(32))
        assert not isinstance(other.ask(known), errors.KvdError)


def test_lifelines_that_say_nothing_leave_descriptors_for_others(poor: Daemon) -> None:
    with raw_client(poor) as client, ExitStack() as opened:
        context = client.open()
        for _ in range(3 * ALLOWED):
            sock = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.connect(str(poor.runtime_dir / "lifeline.sock"))
        assert client.status()["clients"] == 1
        assert n_open(poor) < ALLOWED
        client.release(context, client.store(context, TOKENS))
        assert client.verify()["ok"]
        opened.close()
        until(lambda: connects(poor))


def connects(daemon: Daemon) -> bool:
    try:
        with raw_client(daemon) as client:
            return client.status()["clients"] == 2
    except REFUSED:
        return False


def test_the_limit_is_raised_as_far_as_it_goes(tmp_path: Path) -> None:
    prefix = ("prlimit", "--nofile=256:3000")
    with running_daemon(runtime_dir=tmp_path / "rt", prefix=prefix) as daemon:
        limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
        assert line.split()[3:5] == ["3000", "3000"]


def test_what_is_said_to_be_needed_for_each_session_and_model(poor: Daemon) -> None:
    """The numbers of kvd.descriptors."""
    with raw_client(poor, staging_bytes=0) as client:
        client.status()
        before = n_open(poor)
        with raw_client(poor) as other:
            other.status()
            assert n_open(poor) - before == 5
        until(lambda: n_open(poor) == before)
        client.register()
        assert n_open(poor) - before == 6
