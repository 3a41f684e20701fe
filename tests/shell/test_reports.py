"""Status and verify: every number against what the test itself counts, every planted fault
found."""

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd_proto import layout
from kvd_proto.messages import Evict, Status, Verify
from tests.shell import raw
from tests.shell.raw import BLOCK_TOKENS, STRIDE, Raw, many_tokens, raw_client
from tests.support import Daemon, running_daemon

N_BLOCKS = 5
TOKENS = many_tokens(0, N_BLOCKS * BLOCK_TOKENS - 3)
BUDGET = 8 << 20
STAGING = 1 << 18


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    flags = ("--max-memory", "8MiB")
    with running_daemon(*flags, runtime_dir=tmp_path / "rt") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Raw]:
    """With a model, a context, and a sequence of five blocks, the last one open."""
    with raw_client(daemon, staging_bytes=STAGING) as opened:
        opened.contexts = [opened.open()]
        opened.sequence = opened.store(opened.contexts[0], TOKENS)
        yield opened


def directory_of(daemon: Daemon) -> Path:
    (name,) = (name for name in daemon.segments() if ".dir-" in name)
    return Path("/dev/shm") / name


def arena_of(daemon: Daemon) -> Path:
    (name,) = (name for name in daemon.segments() if ".arena-" in name)
    return Path("/dev/shm") / name


def test_status_equals_the_formulas_and_the_system(daemon: Daemon, client: Raw) -> None:
    status = client.status()
    accounting = status["accounting"]
    per_token = 64 + 34 + 128 + 68
    payload = 16 + 12 * BLOCK_TOKENS + 8 + 24 * 2 + BLOCK_TOKENS * per_token
    directory = 64 * 1024  # the first growth
    staging = STAGING + 4096
    assert accounting == {
        "budget_bytes": BUDGET,
        "unassigned_bytes": BUDGET - N_BLOCKS * STRIDE - directory - staging,
        "free_bytes": 0,
        "filling_bytes": 0,
        "active_bytes": N_BLOCKS * STRIDE,
        "cached_bytes": 0,
        "pinned_bytes": 0,
        "padding_bytes": N_BLOCKS * (STRIDE - payload),
        "directory_bytes": directory,
        "staging_bytes": staging,
        "os_bytes": N_BLOCKS * STRIDE + directory + staging,
        "drift_bytes": 0,
    }
    assert arena_of(daemon).stat().st_blocks * 512 == N_BLOCKS * STRIDE
    assert directory_of(daemon).stat().st_blocks * 512 == directory
    assert os.fstat(client.staging_fd).st_blocks * 512 == staging
    (model,) = status["models"]
    assert (model["payload_bytes"], model["stride_bytes"]) == (payload, STRIDE)
    assert model["blocks"]["active"] == model["blocks"]["total"] == N_BLOCKS
    # What is evicted goes back to the system.
    client.release(client.contexts[0], client.sequence)
    assert client.call(Evict("", 2)) == (2, 2 * STRIDE)
    after = client.status()["accounting"]
    assert after["cached_bytes"] == 3 * STRIDE
    assert after["unassigned_bytes"] == accounting["unassigned_bytes"] + 2 * STRIDE
    assert arena_of(daemon).stat().st_blocks * 512 == 3 * STRIDE


def test_verify_names_and_undoes_a_foreign_fill(daemon: Daemon, client: Raw) -> None:
    assert client.verify()["ok"]
    hole = 700
    assert client.arena[STRIDE * hole] == 0  # the read alone fills it
    assert client.status()["accounting"]["drift_bytes"] == 4096
    report = client.verify()
    assert not report["ok"]
    assert f"4096 bytes of slot {hole}" in "".join(report["differences"])
    assert client.verify()["ok"], "it is undone"
    assert client.status()["accounting"]["drift_bytes"] == 0


def test_verify_finds_foreign_fills_wherever_there_is_a_hole(client: Raw) -> None:
    """In a slot that was punched, beside the last one that has memory, in a row, and at the end."""
    client.release(client.contexts[0], client.sequence)
    client.call(Evict("", 2))
    client.status()  # comes behind the punch
    filled = [N_BLOCKS - 1, N_BLOCKS, 600, 601, 602, len(client.arena) // STRIDE - 1]
    for slot in filled:
        assert client.arena[slot * STRIDE] == 0
    assert client.status()["accounting"]["drift_bytes"] == len(filled) * 4096
    differences = client.verify()["differences"]
    for slot, difference in zip(filled, differences, strict=True):
        assert f"4096 bytes of slot {slot} " in difference
    assert client.verify()["ok"], "all are undone"


@pytest.mark.parametrize("offset", [0, 16, 24, 40, 56, 64, 72])
def test_verify_finds_a_record_that_was_overwritten(
    daemon: Daemon, client: Raw, offset: int
) -> None:
    at = layout.record_offset(2, BLOCK_TOKENS) + offset
    with directory_of(daemon).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))
    report = client.verify()
    assert report["differences"] == ["model: slot 2 is sealed and has no record"]
    with directory_of(daemon).open("r+b") as file:
        file.seek(at)
        file.write(byte)
    assert client.verify()["ok"]


def test_verify_names_a_staging_with_holes(client: Raw) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    offset, length = ctypes.c_int64(8192), ctypes.c_int64(4096)
    assert libc.fallocate(client.staging_fd, 3, offset, length) == 0
    (difference,) = client.verify()["differences"]
    assert f"staging of session {client.session.hex()[:8]}" in difference
    assert f"the system has {STAGING}" in difference


def test_verify_names_memory_that_was_taken_from_a_slot(daemon: Daemon, client: Raw) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with arena_of(daemon).open("r+b") as file:
        offset, length = ctypes.c_int64(STRIDE), ctypes.c_int64(STRIDE)
        assert libc.fallocate(file.fileno(), 3, offset, length) == 0
    (difference,) = client.verify()["differences"]
    assert (
        difference
        == f"model: slots: {N_BLOCKS * STRIDE} bytes were given, the system has "
        + str((N_BLOCKS - 1) * STRIDE)
    )


def test_counters_tell_what_was_asked_and_found(client: Raw) -> None:
    before = client.status()["counters"]
    again = client.alloc(client.contexts[0], many_tokens(0, 2 * BLOCK_TOKENS + 5))
    assert type(client.ask(raw.make_alloc(1, TOKENS))).__name__ == "UnknownContext"
    after = client.status()["counters"]
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown == {
        "requests": 2,
        "errors": 1,
        "queried_tokens": 2 * BLOCK_TOKENS + 5,
        "hit_tokens": 2 * BLOCK_TOKENS + 5,
        "sequences_opened": 1,
    }
    client.release(client.contexts[0], again)


def test_a_recount_lets_others_in_between(daemon: Daemon, client: Raw) -> None:
    """Whatever is stored, leased and evicted meanwhile, it finds nothing wrong."""
    (context,) = client.contexts
    with raw_client(daemon, staging_bytes=0) as auditor:
        for number in range(1, 40):
            asked = auditor.post(Verify())
            prompt = many_tokens(number * 1000, 3 * BLOCK_TOKENS)
            client.release(context, client.store(context, prompt))
            client.release(context, client.alloc(context, TOKENS))
            client.call(Evict("", 2))
            reply = auditor.receive()
            assert (reply.correlation, reply.body.report["differences"]) == (asked, [])


def test_a_status_does_not_wait_for_a_recount(daemon: Daemon, client: Raw) -> None:
    (context,) = client.contexts
    for number in range(1, 40):  # many steps
        prompt = many_tokens(number * 1000, 30 * BLOCK_TOKENS)
        client.release(context, client.store(context, prompt))
    with raw_client(daemon, staging_bytes=0) as auditor:
        os.kill(daemon.process.pid, signal.SIGSTOP)  # so that it finds both when it goes on
        verify, status = auditor.post(Verify()), auditor.post(Status())
        os.kill(daemon.process.pid, signal.SIGCONT)
        assert [auditor.receive().correlation for _ in range(2)] == [status, verify]


def test_many_may_ask_for_a_recount_at_once(daemon: Daemon) -> None:
    with raw_client(daemon, staging_bytes=0) as auditor:
        asked = [auditor.post(Verify()) for _ in range(16)]
        replies = [auditor.receive() for _ in asked]
        assert sorted(each.correlation for each in replies) == asked
        assert all(each.body.report["ok"] for each in replies)
        assert auditor.verify()["ok"]
