"""No memory: a full /dev/shm and a full budget are typed answers, and room that comes is used.

The daemon runs in a mount namespace with a small /dev/shm of its own, which takes root.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvd_proto import errors
from kvd_proto.keys import arena_fingerprint
from kvd_proto.messages import Evict, Flush, Pin, Pinned, RegisterModel
from tests.shell import raw
from tests.shell.raw import BLOCK_TOKENS, STRIDE, Raw, make_append, many_tokens, raw_client
from tests.support import Daemon, running_daemon

SMALL_SHM = """mount -t tmpfs -o size=2m,mode=1777 tmpfs /dev/shm && exec "$0" "$@\""""
PREFIX = ("unshare", "--mount", "sh", "-c", SMALL_SHM)
STAGING = 4 << 20
MANY = 255
"""Blocks of a commit: 1 MiB, so two of them do not fit /dev/shm."""


def may_mount() -> bool:
    probe = ["unshare", "--mount", "true"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(
    not may_mount(), reason="a /dev/shm of its own takes root and mount namespaces: NOT TESTED HERE"
)


@pytest.fixture
def cramped(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose budget is far larger than its /dev/shm."""
    flags = ("--max-memory", "64MiB")
    with running_daemon(*flags, runtime_dir=tmp_path / "rt", prefix=PREFIX) as daemon:
        yield daemon


def commit(client: Raw, context: int, first_token: int, n_blocks: int = MANY) -> Any:
    """Append so many new blocks in a sequence of their own, and release it; the answer."""
    tokens = many_tokens(first_token, n_blocks * BLOCK_TOKENS)
    sequence = client.alloc(context, tokens)
    staged = client.stage(tokens)
    body = client.ask(make_append(context, sequence, 0, tokens, staged))
    if not isinstance(body, errors.KvdError):
        client.call(Flush(body.commit))
    client.release(context, sequence)
    return body


@needs_mount
def test_full_shm_is_an_answer_and_room_that_comes_is_used(cramped: Daemon) -> None:
    with raw_client(cramped, staging_bytes=STAGING) as client:
        context = client.open()
        assert commit(client, context, 0).stored == MANY
        before = client.status()["accounting"]
        refused = commit(client, context, 10_000)
        assert type(refused) is errors.NoSpace
        after = client.status()["accounting"]
        # The directory may have grown for slots that were not to be had; nothing else has changed.
        for name in ("cached_bytes", "free_bytes", "filling_bytes", "active_bytes"):
            assert after[name] == before[name], name
        assert client.verify()["differences"] == []
        found = client.alloc(context, many_tokens(0, MANY * BLOCK_TOKENS))
        assert found.matched_tokens == MANY * BLOCK_TOKENS
        client.release(context, found)
        assert client.call(Evict("", 0)).blocks == MANY
        assert commit(client, context, 10_000).stored == MANY
        assert client.verify()["ok"]


@needs_mount
def test_model_whose_directory_finds_no_memory_is_refused(cramped: Daemon) -> None:
    with raw_client(cramped, staging_bytes=STAGING) as client:
        context = client.open()
        n_blocks, token = MANY, 10_000
        assert commit(client, context, 0).stored == MANY
        for step in (20, 1):  # until not a page is left
            while not isinstance(commit(client, context, token, step), errors.NoSpace):
                n_blocks, token = n_blocks + step, token + 1000
        message = RegisterModel("another", bytes(32), "llama-state", BLOCK_TOKENS, raw.LAYERS)
        refusals = [client.ask(message) for _ in range(2)]
        assert [type(refusal) for refusal in refusals] == [errors.NoSpace] * 2
        assert client.verify()["differences"] == []
        assert client.call(Evict("", 0)).blocks == n_blocks
        assert client.call(message).stride_bytes == STRIDE


@needs_mount
def test_pin_whose_directory_finds_no_memory_is_refused(cramped: Daemon) -> None:
    """And made when there is room again; what was set aside for it is in the accounts once."""
    fingerprint = arena_fingerprint(raw.FINGERPRINT, "llama-state", BLOCK_TOKENS)
    pin = Pin(fingerprint, many_tokens(0, BLOCK_TOKENS), "owner", 0)
    with raw_client(cramped, staging_bytes=STAGING) as client:
        context = client.open()
        token = 10_000
        assert commit(client, context, 0).stored == MANY
        for step in (20, 1):  # until not a page is left
            while not isinstance(commit(client, context, token, step), errors.NoSpace):
                token += 1000
        assert [type(client.ask(pin)) for _ in range(2)] == [errors.NoSpace] * 2
        assert client.verify()["differences"] == []
        assert client.call(Evict("", 20)).blocks == 20
        # Twenty of the oldest are gone, and the first block of the oldest chain is not.
        assert client.call(pin) == Pinned(BLOCK_TOKENS)
        assert client.verify()["differences"] == []


def test_full_budget_names_why_and_recovers(tmp_path: Path) -> None:
    flags = ("--max-memory", "5MiB")
    environ = {"KVD_MAX_RESERVED": "1TiB"}
    with (
        running_daemon(*flags, runtime_dir=tmp_path / "rt", environ=environ) as daemon,
        raw_client(daemon, staging_bytes=STAGING) as client,
    ):
        context = client.open()
        prompts = [many_tokens(at, MANY * BLOCK_TOKENS) for at in (100_000, 200_000, 0)]
        *_, held = [client.store(context, tokens) for tokens in prompts]
        # Every block is leased: another commit finds no room, whatever is evicted.
        refused = commit(client, context, 10_000)
        assert type(refused) is errors.AllLeased
        assert refused.details["blocks"] == MANY
        never = client.ask(raw.make_alloc(context, b"", reserve=4000 * BLOCK_TOKENS))
        assert type(never) is errors.BudgetTooSmall
        client.release(context, held)
        assert commit(client, context, 10_000).stored == MANY
        counters = client.status()["counters"]
        assert counters["evicted_blocks"] > 0
        assert client.verify()["ok"]
