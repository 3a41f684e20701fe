"""Each limit of a session in a real daemon: set, reached, told, and no burden for others."""

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from operator import attrgetter

import pytest

from kvd.core.cache import Limits
from kvd.core.machine import Core
from kvd.reporter import MAX_WAITING, Reporter
from kvd.requests import Incoming
from kvd.server import limits_of
from kvd.settings import Settings
from kvd.store import Store
from kvd.tenants import Tenants
from kvd_proto import errors
from kvd_proto.errors import KvdError
from kvd_proto.messages import (
    Appended,
    Flush,
    ModelRegistered,
    OpenContext,
    RegisterModel,
    Reported,
    Status,
)
from tests.shell import raw
from tests.shell.raw import (
    BLOCK_TOKENS,
    STRIDE,
    Raw,
    make_alloc,
    make_append,
    many_tokens,
    raw_client,
    until,
)
from tests.support import Daemon, running_daemon

LIMITS = {
    "KVD_MAX_SEQUENCES": "16",
    "KVD_MAX_SESSION_SEQUENCES": "8",
    "KVD_MAX_WAITING": "3",
    "KVD_MAX_CONTEXTS": "3",
    "KVD_MAX_SESSION_MODELS": "2",
    "KVD_MAX_MODELS": "4",
    "KVD_MAX_RESERVED": "64KiB",
    "KVD_MAX_STAGING": "1MiB",
    "KVD_MAX_COMMITS": "5",
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("limits")
    flags = ("--max-memory", "16MiB")
    with running_daemon(*flags, runtime_dir=directory / "rt", environ=LIMITS) as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Raw]:
    """With a context of eight ids."""
    with raw_client(daemon, staging_bytes=64 << 20) as opened:
        opened.contexts = [opened.open(n_seq_max=8)]
        yield opened


def too_many_sequences(client: Raw) -> object:
    for _ in range(8):
        client.alloc(client.contexts[0], b"")
    other = client.call(OpenContext(1, 8, [])).context
    return client.ask(make_alloc(other, b""))


def too_many_waiting(client: Raw) -> object:
    for _ in range(8):
        client.alloc(client.contexts[0], b"")
    for _ in range(3):
        client.post(make_alloc(client.contexts[0], b"", wait_ms=60_000))
    return client.ask(make_alloc(client.contexts[0], b"", wait_ms=60_000))


def too_many_contexts(client: Raw) -> object:
    for _ in range(2):
        client.call(OpenContext(1, 1, []))
    return client.ask(OpenContext(1, 1, []))


def too_many_models(client: Raw) -> object:
    client.call(model(1))
    return client.ask(model(2))


def too_much_reserved(client: Raw) -> object:
    client.alloc(client.contexts[0], b"", reserve=10 * BLOCK_TOKENS)
    return client.ask(make_alloc(client.contexts[0], b"", reserve=7 * BLOCK_TOKENS))


def model(number: int) -> RegisterModel:
    fingerprint = bytes([number]) * 32
    return RegisterModel(f"m{number}", fingerprint, "llama-state", BLOCK_TOKENS, raw.LAYERS)


@pytest.mark.parametrize(
    ("reach", "kind", "setting"),
    [
        (too_many_sequences, errors.SequenceLimit, "max_session_sequences"),
        (too_many_waiting, errors.TooMany, "max_waiting"),
        (too_many_contexts, errors.TooMany, "max_contexts"),
        (too_many_models, errors.TooMany, "max_session_models"),
        (too_much_reserved, errors.TooMany, "max_reserved"),
    ],
)
def test_a_limit_is_told_and_concerns_nobody_else(
    daemon: Daemon,
    client: Raw,
    reach: Callable[[Raw], object],
    kind: type[KvdError],
    setting: str,
) -> None:
    refused = reach(client)
    assert type(refused) is kind
    assert setting in refused.details
    with raw_client(daemon) as other:
        context = other.open(n_seq_max=8)
        for _ in range(8):
            other.alloc(context, b"")
        assert other.verify()["ok"]


def test_models_of_a_tenant(daemon: Daemon) -> None:
    with ExitStack() as opened:
        holders = [opened.enter_context(raw_client(daemon)) for _ in range(2)]
        for first, holder in zip((11, 13), holders, strict=True):
            for index in range(2):
                assert isinstance(holder.ask(model(first + index)), ModelRegistered)
        other = opened.enter_context(raw_client(daemon))
        refused = other.ask(model(15))
        assert type(refused) is errors.TooMany
        assert refused.details == {"tenant": "default", "max_models": 4}
        holders[0].lifeline.shutdown(socket.SHUT_RDWR)
        until(lambda: isinstance(other.ask(model(15)), ModelRegistered))


def test_a_model_that_nobody_uses_gives_way_and_its_memory_too(daemon: Daemon) -> None:
    """Also while a client that the daemon has let go has it mapped still. Who stores a block in
    each of many models locks nobody out."""
    others = set(daemon.segments())
    with raw_client(daemon) as before:
        context = before.open(fingerprint=bytes([31]) * 32)
        before.release(context, before.store(context, many_tokens(1, 40 * BLOCK_TOKENS)))
        names = set(daemon.segments()) - others
        assert os.fstat(before.arena_fd).st_blocks * 512 == 40 * STRIDE
        before.lifeline.shutdown(socket.SHUT_RDWR)
        for number in range(32, 38):
            with raw_client(daemon) as visitor:
                context = visitor.open(fingerprint=bytes([number]) * 32)
                sequence = visitor.store(context, many_tokens(number, BLOCK_TOKENS))
                visitor.release(context, sequence)
        assert len(names) == 3
        assert not names & set(daemon.segments())
        with raw_client(daemon) as client:
            assert client.verify()["differences"] == []
            assert len(client.status()["models"]) == 4
        assert os.fstat(before.arena_fd).st_blocks == os.fstat(before.index_fd).st_blocks == 0


def test_more_staging_than_one_may_have_is_not_granted(client: Raw) -> None:
    assert client.staging is not None
    assert len(client.staging) == (1 << 20) + 4096


def test_a_pipeline_of_more_commits_than_there_may_be_loses_none(client: Raw) -> None:
    """Each append is answered; what was taken is stored, and what was not can be sent again."""
    sequence = client.alloc(client.contexts[0], b"")
    tokens = many_tokens(700_000, 100 * BLOCK_TOKENS)
    done = 0
    while done < 100:
        for index in range(done, 100):
            block = tokens[4 * index * BLOCK_TOKENS :][: 4 * BLOCK_TOKENS]
            start = index * BLOCK_TOKENS
            staged = client.stage(block, start, at=4096 * (1 + index))
            client.post(make_append(client.contexts[0], sequence, start, block, staged))
        replies = [client.receive() for _ in range(done, 100)]  # in any order
        bodies = [reply.body for reply in sorted(replies, key=attrgetter("correlation"))]
        taken = [body for body in bodies if isinstance(body, Appended)]
        refused = {type(body) for body in bodies if isinstance(body, KvdError)}
        assert refused <= {errors.TooMany, errors.BadPosition}
        assert bodies[: len(taken)] == taken, "what comes after a refused one is refused as well"
        done += len(taken)
        assert client.call(Flush(taken[-1].commit)).failures == []
    assert len(client.read(client.contexts[0], sequence)) == 100


def test_every_limit_that_is_set_is_the_cores() -> None:
    changed = Settings(
        max_models=11,
        max_pins=18,
        max_session_models=12,
        max_contexts=13,
        max_session_sequences=14,
        max_waiting=15,
        max_commits=16,
        max_reserved=17,
    )
    found = limits_of(changed, Tenants((), 1 << 30, 1 << 20), 1, 1 << 33)
    assert found.arena_bytes == 1 << 33
    assert found.max_pins == 18
    assert (found.max_models, found.session_models, found.session_contexts) == (11, 12, 13)
    assert (found.session_sequences, found.session_waiting) == (14, 15)
    assert (found.session_commits, found.session_reserved) == (16, 17)


def test_reports_that_wait_are_bounded() -> None:
    """While the copier's thread is busy, 16 wait for each client."""
    core, busy, replies = Core(Limits(1 << 20)), threading.Event(), Counter()
    store = Store(lambda suffix: f"kvd-test-none.{suffix}", core.handle)
    try:
        store.ask(busy.wait, lambda *_: None)

        def reply(session: bytes, _: int, body: object) -> None:
            replies[session, type(body)] += 1

        reporter = Reporter(core.cache, store, "test", reply, has_tenants=False)
        for number in range(20):
            reporter.answer(Incoming(b"eager", number, Status()))
        reporter.answer(Incoming(b"modest", 0, Status()))
        assert replies == {(b"eager", errors.TooMany): 20 - MAX_WAITING}
        busy.set()

        def answered() -> bool:
            store.finish_jobs()
            return replies[b"eager", Reported] == MAX_WAITING and replies[b"modest", Reported] == 1

        until(answered)
        reporter.answer(Incoming(b"eager", 99, Status()))
        until(lambda: store.finish_jobs() or replies[b"eager", Reported] == MAX_WAITING + 1)
    finally:
        busy.set()
        store.close(keep_arenas=False)
