"""A daemon that was killed or stopped, and the next one: warm where it is right, cold where not,
and never a wrong byte. Real processes; the killed daemon's memory is damaged by hand where a crash
would damage it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvd.adoption import boot_id
from kvd.arena import Segment
from kvd.directory import Directory
from kvd_proto import layout
from kvd_proto.errors import AllLeased, UnknownContext
from kvd_proto.keys import arena_fingerprint
from kvd_proto.messages import Evict, Flush, Get, ListPins, Pin, Unpin, Unpinned
from tests.shell.raw import (
    BLOCK_TOKENS,
    FINGERPRINT,
    STRIDE,
    Raw,
    expected_blocks,
    has_ended,
    make_append,
    many_tokens,
    raw_client,
    until,
)
from tests.support import Daemon, parse_size, running_daemon, start_daemon

PROMPT = many_tokens(1, 4 * BLOCK_TOKENS)
OTHER = many_tokens(1, 2 * BLOCK_TOKENS) + many_tokens(500, BLOCK_TOKENS + 3)
"""Shares two blocks with PROMPT; ends in an open tail."""


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that stored PROMPT and OTHER and was killed with SIGKILL."""
    daemon = start_daemon(runtime_dir=tmp_path / "rt")
    with raw_client(daemon) as client:
        context = client.open()
        for prompt in (PROMPT, OTHER):
            client.release(context, client.store(context, prompt))
        daemon.kill()
        assert has_ended(client.lifeline)
    yield daemon
    for name in daemon.segments():
        os.unlink(f"/dev/shm/{name}")


@contextlib.contextmanager
def next_daemon(killed: Daemon, *flags: str) -> Iterator[Daemon]:
    with running_daemon(*flags, runtime_dir=killed.runtime_dir, instance=killed.instance) as daemon:
        yield daemon


def segment(daemon: Daemon, kind: str) -> str:
    """The name of the daemon's only segment of a kind."""
    (name,) = [name for name in daemon.segments() if f".{kind}-" in name]
    return name


@contextlib.contextmanager
def opened(name: str) -> Iterator[Segment]:
    found = Segment.adopt(name)
    try:
        yield found
    finally:
        found.close(unlink=False)


def matched(client: Raw, context: int, prompt: bytes) -> int:
    sequence = client.alloc(context, prompt)
    client.release(context, sequence)
    return sequence.matched_tokens


def assert_warm(client: Raw) -> int:
    """Everything is there, bit for bit, and the accounts are right; returns an open context."""
    context = client.open()
    sequence = client.alloc(context, PROMPT)
    assert sequence.matched_tokens == len(PROMPT) // 4
    assert client.read(context, sequence) == expected_blocks(4)
    other = client.alloc(context, OTHER)
    assert other.matched_tokens == len(OTHER) // 4
    assert client.read(context, other)[:3] == expected_blocks(3)
    assert client.verify()["differences"] == []
    return context


def log_of(daemon: Daemon) -> str:
    return daemon.log.read_text()


# --- warm


def test_the_next_daemon_after_a_kill_is_warm(killed: Daemon) -> None:
    with next_daemon(killed) as daemon, raw_client(daemon) as client:
        assert_warm(client)
        status = client.status()
        assert status["counters"]["adopted_blocks"] == 6
        assert status["counters"]["damaged_blocks"] == 0
        until(lambda: "warm start model=model" in log_of(daemon))


def test_a_stop_keeps_the_cache_for_the_next_start(tmp_path: Path) -> None:
    first = start_daemon("--keep-on-stop", runtime_dir=tmp_path / "rt")
    with raw_client(first) as client:
        context = client.open()
        for prompt in (PROMPT, OTHER):
            client.store(context, prompt)
        assert first.stop() == 0
    until(lambda: "kept for the next start" in log_of(first))
    assert f'remove_with="kvd purge --instance {first.instance}"' in log_of(first)
    with next_daemon(first) as second, raw_client(second) as client:
        assert_warm(client)
    assert not second.segments(), "told not to keep them, it removed them"


def test_a_restart_after_a_restart_is_warm(killed: Daemon) -> None:
    for _ in range(3):
        daemon = start_daemon(runtime_dir=killed.runtime_dir, instance=killed.instance)
        with raw_client(daemon) as client:
            assert_warm(client)
        daemon.kill()
    with next_daemon(killed) as daemon:
        until(lambda: "life=5" in log_of(daemon))


def test_new_blocks_go_beside_adopted_ones_and_survive_too(killed: Daemon) -> None:
    longer = PROMPT + many_tokens(900, 3 * BLOCK_TOKENS)
    daemon = start_daemon(runtime_dir=killed.runtime_dir, instance=killed.instance)
    with raw_client(daemon) as client:
        context = client.open()
        client.store(context, longer)
        daemon.kill()
    with next_daemon(killed) as last, raw_client(last) as client:
        context = assert_warm(client)
        sequence = client.alloc(context, longer)
        assert sequence.matched_tokens == len(longer) // 4
        assert client.read(context, sequence) == expected_blocks(7)


def test_handles_of_before_are_refused_as_stale(killed: Daemon) -> None:
    with next_daemon(killed) as daemon, raw_client(daemon) as client:
        client.open()
        for context in range(1, 20):
            body = client.ask(Get(context, 0, 1, 0))
            assert isinstance(body, UnknownContext), body


def test_eviction_goes_on_in_the_order_of_last_use(tmp_path: Path) -> None:
    prompts = [many_tokens(100 * n, BLOCK_TOKENS) for n in range(1, 6)]
    first = start_daemon(runtime_dir=tmp_path / "rt")
    with raw_client(first) as client:
        context = client.open()
        for prompt in prompts:
            client.release(context, client.store(context, prompt))
        for index in (2, 0, 4, 1, 3):
            client.release(context, client.alloc(context, prompts[index]))
        first.kill()
    with next_daemon(first) as second, raw_client(second) as client:
        context = client.open()
        until(lambda: _evict(client, 3) == 3)
        found = [matched(client, context, prompt) > 0 for prompt in prompts]
    assert found == [False, True, False, True, False]


def _evict(client: Raw, n_blocks: int) -> int:
    """How many were dropped; none while a client of before may still read them."""
    return int(client.call(Evict("", n_blocks)).blocks)


# --- pins

MODEL = arena_fingerprint(FINGERPRINT, "llama-state", BLOCK_TOKENS)


def pin(client: Raw, prompt: bytes, owner: str = "owner", ttl_ms: int = 0) -> int:
    return int(client.call(Pin(MODEL, prompt, owner, ttl_ms)).tokens)


def pins(client: Raw) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = client.call(ListPins()).report["pins"]
    return rows


@pytest.fixture
def pinned(killed: Daemon) -> Daemon:
    """The killed daemon, after another one that has pinned OTHER for ever, and PROMPT for an
    hour."""
    daemon = start_daemon(runtime_dir=killed.runtime_dir, instance=killed.instance)
    with raw_client(daemon) as client:
        client.open()
        assert pin(client, PROMPT, "a", 3_600_000) == len(PROMPT) // 4
        assert pin(client, OTHER, "b") == len(OTHER) // 4
        daemon.kill()
    return killed


def test_pins_survive_a_kill_and_their_time_goes_on(pinned: Daemon) -> None:
    with next_daemon(pinned) as daemon, raw_client(daemon) as client:
        context = client.open()
        a, b = sorted(pins(client), key=lambda row: str(row["owner"]))
        assert (a["owner"], a["tokens"], a["blocks"]) == ("a", len(PROMPT) // 4, 4)
        assert 3000 < a["expires_seconds"] < 3600
        assert (b["owner"], b["tokens"], b["expires_seconds"]) == ("b", len(OTHER) // 4, None)
        until(lambda: client.status()["models"][0]["blocks"]["pinned"] == 6)
        assert client.status()["accounting"]["pinned_bytes"] == 6 * STRIDE
        assert _evict(client, 0) == 0
        with raw_client(daemon) as other:
            assert_warm(other)
        assert client.call(Unpin("a", "")) == Unpinned(1)
        until(lambda: client.status()["models"][0]["blocks"]["active"] == 0)
        assert _evict(client, 0) == 2
        assert matched(client, context, PROMPT) == 2 * BLOCK_TOKENS
        assert matched(client, context, OTHER) == len(OTHER) // 4
        assert client.verify()["differences"] == []


def test_pins_survive_a_stop(tmp_path: Path) -> None:
    first = start_daemon("--keep-on-stop", runtime_dir=tmp_path / "rt")
    with raw_client(first) as client:
        context = client.open()
        client.release(context, client.store(context, PROMPT))
        pin(client, PROMPT)
        assert first.stop() == 0
    with next_daemon(first) as second, raw_client(second) as client:
        until(lambda: client.status()["models"][0]["blocks"]["pinned"] == 4)
        assert [row["owner"] for row in pins(client)] == ["owner"]


def test_a_pin_whose_time_has_come_meanwhile_is_not_taken(killed: Daemon) -> None:
    daemon = start_daemon(runtime_dir=killed.runtime_dir, instance=killed.instance)
    with raw_client(daemon) as client:
        client.open()
        before = time.monotonic()
        pin(client, PROMPT, ttl_ms=50)
        daemon.kill()
    until(lambda: time.monotonic() > before + 1)
    with next_daemon(killed) as last, raw_client(last) as client:
        assert pins(client) == []
        until(lambda: _evict(client, 0) == 6)
        assert client.verify()["differences"] == []


def test_the_pins_memory_is_in_the_accounts_to_the_byte(pinned: Daemon) -> None:
    daemon = start_daemon(runtime_dir=pinned.runtime_dir, instance=pinned.instance)
    with raw_client(daemon) as client:
        with opened(segment(daemon, "dir")) as directory:
            backed = directory.backed_bytes()
        assert backed == 64 * 1024 + 4096
        with opened(segment(daemon, "index")) as index:
            beside = index.backed_bytes()
        assert client.status()["accounting"]["directory_bytes"] == backed + beside
        for number in range(39):  # one more than the first page has room for
            assert pin(client, PROMPT, f"owner {number}")
        with opened(segment(daemon, "dir")) as directory:
            assert directory.backed_bytes() == backed + 4096
        assert client.status()["accounting"]["directory_bytes"] == backed + beside + 4096
        assert client.status()["accounting"]["drift_bytes"] == 0
        assert client.verify()["differences"] == []
        daemon.kill()
    # Only what the highest pin needs is taken over.
    third = start_daemon(runtime_dir=pinned.runtime_dir, instance=pinned.instance)
    with raw_client(third) as client:
        assert len(pins(client)) == 41
        for number in range(39):
            client.call(Unpin(f"owner {number}", ""))
        third.kill()
    with next_daemon(pinned) as last, raw_client(last) as client:
        assert client.status()["accounting"]["directory_bytes"] == backed + beside
        assert client.verify()["differences"] == []


def test_memory_for_pins_that_nobody_wrote_is_given_back(pinned: Daemon) -> None:
    """The daemon has died after it was given, and before it was touched."""
    with opened(segment(pinned, "index")) as index:
        beside = index.backed_bytes()
    with opened(segment(pinned, "dir")) as directory:
        before = directory.backed_bytes()
        start = layout.pins_offset(_slots(pinned), BLOCK_TOKENS)
        os.posix_fallocate(directory._fd, start + 4096, 8192)
        assert directory.backed_bytes() == before + 8192
    with next_daemon(pinned) as daemon, raw_client(daemon) as client:
        assert client.status()["accounting"]["directory_bytes"] == before + beside
        assert client.verify()["differences"] == []


def _slots(killed: Daemon) -> int:
    directory = Directory.adopt(segment(killed, "dir"))
    try:
        return directory.header.slots
    finally:
        directory.close(unlink=False)


@pytest.mark.parametrize("at", [0, 16, 32, 33, 103])
def test_a_torn_pin_is_none(pinned: Daemon, at: int) -> None:
    start = layout.pins_offset(_slots(pinned), BLOCK_TOKENS)
    with opened(segment(pinned, "dir")) as directory:
        directory.buffer[start + at] ^= 0x10
    with next_daemon(pinned) as daemon, raw_client(daemon) as client:
        assert [row["owner"] for row in pins(client)] == ["b"]
        until(lambda: _evict(client, 0) == 2)
        assert client.verify()["differences"] == []


def test_a_pin_goes_with_its_damaged_block(pinned: Daemon) -> None:
    damage_payload(pinned, slot_of(pinned, 2 * BLOCK_TOKENS, BLOCK_TOKENS))
    with next_daemon(pinned) as daemon, raw_client(daemon) as client:
        until(lambda: client.status()["counters"]["damaged_blocks"] == 1)
        assert len(pins(client)) == 1
        assert client.verify()["differences"] == []


def test_verify_finds_a_pin_that_was_overwritten(pinned: Daemon) -> None:
    with next_daemon(pinned) as daemon, raw_client(daemon) as client:
        until(lambda: len(pins(client)) == 2)
        start = layout.pins_offset(_slots(daemon), BLOCK_TOKENS)
        with opened(segment(daemon, "dir")) as directory:
            directory.buffer[start + 40] ^= 0x10
        report = client.verify()
        assert report["differences"] == ["model: place 0 of its pins is torn"]
        with opened(segment(daemon, "dir")) as directory:
            directory.buffer[start + 40] ^= 0x10
        assert client.verify()["ok"]


# --- damage


def damage_payload(killed: Daemon, slot: int) -> None:
    with opened(segment(killed, "arena")) as arena:
        arena.buffer[slot * STRIDE + 100] ^= 1


def slot_of(killed: Daemon, start: int, n_tokens: int) -> int:
    directory = Directory.adopt(segment(killed, "dir"))
    try:
        return next(
            slot
            for slot, record, _ in directory.entries()
            if (record.start, len(record.tokens) // 4) == (start, n_tokens)
        )
    finally:
        directory.close(unlink=False)


@pytest.mark.parametrize(
    ("block", "prompt_left", "other_left"),
    [(0, 0, 0), (1, BLOCK_TOKENS, BLOCK_TOKENS), (3, 3 * BLOCK_TOKENS, len(OTHER) // 4)],
)
def test_a_damaged_block_is_never_served_nor_is_what_follows_it(
    killed: Daemon, block: int, prompt_left: int, other_left: int
) -> None:
    damage_payload(killed, slot_of(killed, block * BLOCK_TOKENS, BLOCK_TOKENS))
    with next_daemon(killed) as daemon, raw_client(daemon) as client:
        context = client.open()
        assert matched(client, context, PROMPT) == prompt_left
        assert matched(client, context, OTHER) == other_left
        assert client.verify()["ok"]
        assert client.status()["counters"]["damaged_blocks"] == 1
        until(lambda: "damaged blocks" in log_of(daemon))
        # And it can be stored anew.
        client.store(context, PROMPT)
        assert matched(client, context, PROMPT) == len(PROMPT) // 4


def test_a_torn_record_goes_with_all_that_follows_it(killed: Daemon) -> None:
    slot = slot_of(killed, BLOCK_TOKENS, BLOCK_TOKENS)
    with opened(segment(killed, "dir")) as directory:
        directory.buffer[layout.record_offset(slot, BLOCK_TOKENS) + 30] ^= 0x80
    with next_daemon(killed) as daemon, raw_client(daemon) as client:
        context = client.open()
        assert matched(client, context, PROMPT) == matched(client, context, OTHER) == BLOCK_TOKENS
        assert client.status()["models"][0]["blocks"]["total"] == 1
        assert client.verify()["ok"]


def test_a_record_under_a_false_key_is_not_taken(killed: Daemon) -> None:
    """Its checksum is right, so this is no accident."""
    slot = slot_of(killed, 3 * BLOCK_TOKENS, BLOCK_TOKENS)
    with opened(segment(killed, "dir")) as directory:
        record = layout.read_record(directory.buffer, slot, BLOCK_TOKENS)
        assert record is not None
        forged = record._replace(tokens=many_tokens(7000, BLOCK_TOKENS))
        layout.write_record(directory.buffer, slot, BLOCK_TOKENS, forged, 1)
    with next_daemon(killed) as daemon, raw_client(daemon) as client:
        context = client.open()
        assert matched(client, context, PROMPT) == 3 * BLOCK_TOKENS
        forged_prompt = PROMPT[: 4 * 3 * BLOCK_TOKENS] + many_tokens(7000, BLOCK_TOKENS)
        assert matched(client, context, forged_prompt) == 3 * BLOCK_TOKENS
        assert client.verify()["ok"]


def test_memory_that_no_record_speaks_for_is_given_back(killed: Daemon) -> None:
    with opened(segment(killed, "arena")) as arena:
        arena.back(20 * STRIDE, 3 * STRIDE)
        os.posix_fallocate(arena._fd, 30 * STRIDE, STRIDE)  # given, and never written
        before = arena.backed_bytes()
    with next_daemon(killed) as daemon, raw_client(daemon) as client:
        assert_warm(client)
        with opened(segment(daemon, "arena")) as arena:
            assert arena.backed_bytes() == before - 4 * STRIDE == 6 * STRIDE


def test_a_slot_that_lost_memory_loses_its_record(killed: Daemon) -> None:
    slot = slot_of(killed, 3 * BLOCK_TOKENS, BLOCK_TOKENS)
    with opened(segment(killed, "arena")) as arena:
        arena.punch(slot * STRIDE, 4096)
    with next_daemon(killed) as daemon, raw_client(daemon) as client:
        assert matched(client, client.open(), PROMPT) == 3 * BLOCK_TOKENS
        assert client.verify()["ok"]


# --- cold


def spoil_magic(killed: Daemon) -> None:
    with opened(segment(killed, "dir")) as directory:
        directory.buffer[7] = 99


def spoil_boot(killed: Daemon) -> None:
    with opened(segment(killed, "dir")) as directory:
        header = layout.read_header(directory.buffer)
        assert header is not None
        header.registration["boot"] = bytes(16)
        layout.write_header(directory.buffer, header)
        assert boot_id() != bytes(16)


def spoil_registration(killed: Daemon) -> None:
    with opened(segment(killed, "dir")) as directory:
        header = layout.read_header(directory.buffer)
        assert header is not None
        header.registration["layers"] = [["f17", 1, "f16", 2]]
        layout.write_header(directory.buffer, header)


def remove_arena(killed: Daemon) -> None:
    os.unlink(f"/dev/shm/{segment(killed, 'arena')}")


def shorten_arena(killed: Daemon) -> None:
    os.truncate(f"/dev/shm/{segment(killed, 'arena')}", 8 * STRIDE)


def open_to_others(killed: Daemon) -> None:
    os.chmod(f"/dev/shm/{segment(killed, 'arena')}", 0o666)


def empty_directory(killed: Daemon) -> None:
    name = f"/dev/shm/{segment(killed, 'dir')}"
    size = os.stat(name).st_size
    os.truncate(name, 0)
    os.truncate(name, size)


def spoil_life(killed: Daemon) -> None:
    with opened(segment(killed, "dir")) as directory:
        layout.write_life(directory.buffer, (1 << 64) - 1)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_magic, spoil_boot, spoil_registration, spoil_life, remove_arena, shorten_arena,
        open_to_others, empty_directory,
    ],
)  # fmt: skip
def test_what_is_not_whole_is_a_cold_start_that_says_why(killed: Daemon, spoil: Any) -> None:
    spoil(killed)
    with next_daemon(killed) as daemon:
        until(lambda: "cold start" in log_of(daemon))
        until(lambda: "removed what cannot be used" in log_of(daemon))
        assert len(daemon.segments()) == 1  # the lock
        with raw_client(daemon) as client:
            context = client.open()
            assert matched(client, context, PROMPT) == 0
            client.store(context, PROMPT)
            assert client.verify()["ok"]


@pytest.mark.parametrize("spoil", [spoil_magic, spoil_life, remove_arena])
def test_it_costs_the_other_models_nothing(tmp_path: Path, spoil: Any) -> None:
    first = start_daemon(runtime_dir=tmp_path / "rt")
    with raw_client(first) as client:
        client.store(client.open(), PROMPT)
        spoilt = {name for name in first.segments() if not name.endswith(".lock")}
        with raw_client(first) as other:
            context = other.open(fingerprint=bytes(32))
            for prompt in (PROMPT, OTHER):
                other.store(context, prompt)
            first.kill()
    whole = [name for name in first.segments() if name not in spoilt]
    aside = {name: f"/dev/shm/aside-{name}" for name in whole}
    for name, place in aside.items():
        os.rename(f"/dev/shm/{name}", place)
    spoil(first)
    for name, place in aside.items():
        os.rename(place, f"/dev/shm/{name}")
    with next_daemon(first) as second, raw_client(second) as client:
        until(lambda: "cold start" in log_of(second))
        context = client.open()
        assert matched(client, context, PROMPT) == 0
        context = client.open(fingerprint=bytes(32))
        assert matched(client, context, PROMPT) == len(PROMPT) // 4
        assert client.verify()["ok"]


@pytest.mark.parametrize("budget", ["512MiB", "8MiB"])
def test_another_budget_is_a_warm_start_all_the_same(killed: Daemon, budget: str) -> None:
    with next_daemon(killed, "--max-memory", budget) as daemon, raw_client(daemon) as client:
        assert "cold start" not in log_of(daemon)
        assert matched(client, client.open(), PROMPT) == len(PROMPT) // 4
        report = client.verify()
        assert report["ok"], report["differences"]
        assert report["terms"]["budget_bytes"] == parse_size(budget)


def test_what_is_too_much_for_a_smaller_budget_is_evicted(killed: Daemon) -> None:
    """The oldest first, and the memory goes back to the system."""
    flags = ("--max-memory", "1MiB")
    with next_daemon(killed, *flags) as daemon, raw_client(daemon, staging_bytes=0) as client:
        until(lambda: client.status()["accounting"]["budget_bytes"] == 1 << 20)
        report = client.verify()
        assert report["ok"], report["differences"]
        assert client.status()["accounting"]["os_bytes"] <= 1 << 20


def test_a_segment_of_another_user_is_left_alone(killed: Daemon) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    name = f"/dev/shm/{segment(killed, 'arena')}"
    os.chown(name, 65534, 65534)
    daemon = start_daemon(runtime_dir=killed.runtime_dir, instance=killed.instance)
    with raw_client(daemon) as client:
        until(lambda: "cold start" in log_of(daemon))
        assert matched(client, client.open(), PROMPT) == 0
    daemon.stop()
    assert daemon.segments() == [name.removeprefix("/dev/shm/")]


# --- the index


def keys_in(client: Raw) -> set[int]:
    """What stands for blocks in the index that the client was handed."""
    content = os.pread(client.index_fd, 4096, 0)
    return {int.from_bytes(content[at : at + 8], "little") for at in range(64, 4096, 16)} - {0}


def test_the_index_is_made_anew_and_the_old_one_loses_its_memory(tmp_path: Path) -> None:
    first = start_daemon(runtime_dir=tmp_path / "rt")
    with raw_client(first) as old:
        context = old.open()
        for prompt in (PROMPT, OTHER):
            old.release(context, old.store(context, prompt))
        held = keys_in(old)
        assert len(held) == old.status()["models"][0]["blocks"]["cached"] > 4
        first.kill()
        damaged = slot_of(first, BLOCK_TOKENS, BLOCK_TOKENS)
        before = os.fstat(old.index_fd)
        assert keys_in(old) == held, "nobody was there to say that the daemon is dead"
        directory = Directory.adopt(segment(first, "dir"))
        directory.drop(damaged)  # what is below it goes too
        directory.close(unlink=False)
        with next_daemon(first) as second:
            assert os.fstat(old.index_fd).st_blocks == os.fstat(old.index_fd).st_nlink == 0
            with raw_client(second) as client:
                client.open()
                assert os.fstat(client.index_fd).st_ino != before.st_ino
                assert keys_in(client) < held
                blocks = client.status()["models"][0]["blocks"]
                assert len(keys_in(client)) == blocks["active"] + blocks["cached"] > 0
                assert client.status()["accounting"]["drift_bytes"] == 0
                assert client.verify()["ok"]


def test_a_daemon_that_stops_in_order_leaves_no_key_in_an_index(tmp_path: Path) -> None:
    daemon = start_daemon(runtime_dir=tmp_path / "rt")
    with raw_client(daemon) as client:
        context = client.open()
        client.release(context, client.store(context, PROMPT))
        assert keys_in(client)
        assert daemon.stop() == 0
        assert os.pread(client.index_fd, 4, 8) == bytes(4), "it has no buckets"


# --- readers of a former life


def test_what_a_client_of_before_may_still_read_is_not_given_to_anybody(tmp_path: Path) -> None:
    """It holds a mapping, and bytes of blocks that it had leased; it may be stopped for hours."""
    flags = ("--max-memory", "1MiB")
    first = start_daemon(*flags, runtime_dir=tmp_path / "rt")
    with raw_client(first) as old:
        old.store(old.open(), PROMPT)
        first.kill()
        with next_daemon(first, *flags) as second:
            with raw_client(second) as client:
                context = client.open()
                assert matched(client, context, PROMPT) == len(PROMPT) // 4, "it is served on"
                assert _evict(client, 0) == 0
                fill(client, context)
                assert client.verify()["ok"]
                assert matched(client, context, PROMPT) == len(PROMPT) // 4
                assert read_slots(old) == sorted(expected_blocks(4))
                old.close()
                until(lambda: client.status()["models"][0]["blocks"]["cached"] == 4)
                assert matched(client, context, PROMPT) == len(PROMPT) // 4
            with raw_client(second) as client:
                context = client.open()
                fill(client, context)
                assert matched(client, context, PROMPT) == 0, "now it was evicted"
                assert client.verify()["ok"]


def test_what_lost_its_record_stays_for_a_client_of_before_also_after_one_more_crash(
    tmp_path: Path,
) -> None:
    """The first block is found damaged, so all below it is dropped; but a client has leased it."""
    flags = ("--max-memory", "1MiB")
    first = start_daemon(*flags, runtime_dir=tmp_path / "rt")
    with raw_client(first) as old:
        old.store(old.open(), PROMPT)
        first.kill()
        damage_payload(first, slot_of(first, 0, BLOCK_TOKENS))
        leased = read_slots(old)
        second = start_daemon(*flags, runtime_dir=tmp_path / "rt", instance=first.instance)
        with raw_client(second) as client:
            assert matched(client, client.open(), PROMPT) == 0
            assert client.status()["models"][0]["blocks"]["filling"] == 4
            second.kill()
        with next_daemon(first, *flags) as third, raw_client(third) as client:
            fill(client, client.open())
            assert read_slots(old) == leased
            assert client.status()["recovery"]["read_from_before"] == 1
            assert client.verify()["differences"] == []
            old.close()
            until(lambda: client.status()["models"][0]["blocks"]["filling"] == 0)
            assert client.status()["recovery"]["read_from_before"] == 0
            assert client.verify()["differences"] == []


def fill(client: Raw, context: int) -> None:
    """Store a sequence that grows, and stays leased, until no more fits."""
    sequence = client.alloc(context, b"")
    with pytest.raises(AllLeased):  # noqa: PT012 - at some time
        for start in range(0, 1000 * BLOCK_TOKENS, BLOCK_TOKENS):
            new = many_tokens(10_000 + start, BLOCK_TOKENS)
            staged = client.stage(new, start, fill=9)
            appended = client.call(make_append(context, sequence, start, new, staged))
            assert client.call(Flush(appended.commit)).failures == []


def read_slots(old: Raw) -> list[bytes]:
    """What a client sees in the first four slots."""
    size = len(expected_blocks(1)[0])
    return sorted(old.arena[STRIDE * slot : STRIDE * slot + size] for slot in range(4))


def test_a_mapping_in_a_forked_child_counts_as_a_reader(tmp_path: Path) -> None:
    first = start_daemon(runtime_dir=tmp_path / "rt")
    with raw_client(first) as old:
        old.store(old.open(), PROMPT)
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        try:
            first.kill()
            old.close()
            with next_daemon(first) as second, raw_client(second) as client:
                assert _evict(client, 0) == 0
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                child = 0
                until(lambda: _evict(client, 0) == 4)
        finally:
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def test_the_name_of_the_model_is_registered_already(killed: Daemon) -> None:
    with next_daemon(killed) as daemon, raw_client(daemon) as client:
        status = client.status()
        assert [model["name"] for model in status["models"]] == ["model"]
        assert client.register(fingerprint=FINGERPRINT) == 1
        assert len(daemon.segments()) == 4


# --- purge


def purge(instance: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvd", "purge", "--instance", instance, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_purge_removes_what_a_dead_daemon_left_and_says_so(killed: Daemon) -> None:
    left = [name for name in killed.segments() if not name.endswith(".lock")]
    asked = purge(killed.instance)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert f"in {len(left)} files of /dev/shm: do it with --yes" in asked.stderr
    assert [name for name in killed.segments() if not name.endswith(".lock")] == left
    done = purge(killed.instance, "--yes")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"removed /dev/shm/{name}" for name in left]
    assert killed.segments() == []
    again = purge(killed.instance)
    assert (again.returncode, "left nothing" in again.stdout) == (0, True)


def test_purge_never_touches_a_living_daemon(killed: Daemon) -> None:
    with next_daemon(killed) as daemon, raw_client(daemon) as client:
        before = daemon.segments()
        done = purge(daemon.instance, "--yes")
        assert done.returncode == 3
        assert str(daemon.process.pid) in done.stderr
        assert daemon.segments() == before
        assert_warm(client)


def test_purge_refuses_what_is_no_instance() -> None:
    done = purge("../etc")
    assert done.returncode == 2
    assert "an instance's name" in done.stderr
