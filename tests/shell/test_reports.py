"""Status and verify: every number against what the test itself counts, every planted fault
found."""

import ctypes
import mmap
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd_proto import layout
from kvd_proto.geometry import round_up
from kvd_proto.index import ENTRY_BYTES, INDEX_HEADER_BYTES
from kvd_proto.messages import Evict, Pin, Status, Verify
from tests.shell import raw
from tests.shell.raw import BLOCK_TOKENS, STRIDE, Raw, many_tokens, raw_client
from tests.support import Daemon, running_daemon

N_BLOCKS = 5
TOKENS = many_tokens(0, N_BLOCKS * BLOCK_TOKENS - 3)
BUDGET = 8 << 20
STAGING = 1 << 18
NAME = "model"


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


def beginning_of_directory(daemon: Daemon) -> bytes:
    """The header, and all records that are used here; the whole is long, and sparse."""
    with directory_of(daemon).open("rb") as file:
        return file.read(64 * 1024)


def arena_of(daemon: Daemon) -> Path:
    (name,) = (name for name in daemon.segments() if ".arena-" in name)
    return Path("/dev/shm") / name


def index_of(daemon: Daemon) -> Path:
    (name,) = (name for name in daemon.segments() if ".index-" in name)
    return Path("/dev/shm") / name


def test_status_equals_the_formulas_and_the_system(daemon: Daemon, client: Raw) -> None:
    status = client.status()
    accounting = status["accounting"]
    per_token = 64 + 34 + 128 + 68
    payload = 16 + 12 * BLOCK_TOKENS + 8 + 24 * 2 + BLOCK_TOKENS * per_token
    index = round_up(64 + 16 * ((48 * 1024) // layout.record_bytes(BLOCK_TOKENS)))
    directory = 64 * 1024 + index  # the first growth
    staging = STAGING + 4096
    assert accounting == {
        "budget_bytes": BUDGET,
        "unassigned_bytes": BUDGET - N_BLOCKS * STRIDE - directory - staging,
        "promised_bytes": 0,
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
    assert directory_of(daemon).stat().st_blocks * 512 == 64 * 1024
    assert index_of(daemon).stat().st_blocks * 512 == index
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
    assert report["terms"]["undone_bytes"] == 4096
    again = client.verify()
    assert (again["ok"], again["terms"]["undone_bytes"]) == (True, 0), "it is undone"
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


def test_verify_names_and_undoes_what_was_read_of_an_index_that_is_not_in_use(
    daemon: Daemon, client: Raw
) -> None:
    size = os.fstat(client.index_fd).st_size
    with mmap.mmap(client.index_fd, size, prot=mmap.PROT_READ) as index:
        assert index[size - 1] == index[3 * 4096] == 0  # the read alone fills it
    assert client.status()["accounting"]["drift_bytes"] == 2 * 4096
    report = client.verify()
    assert report["terms"]["undone_bytes"] == 2 * 4096
    assert all(f"{NAME}: 4096 bytes at" in each for each in report["differences"])
    assert all("of its index" in each for each in report["differences"])
    assert client.verify()["ok"]


def test_verify_finds_a_key_in_the_index_that_is_not_there(daemon: Daemon, client: Raw) -> None:
    at = INDEX_HEADER_BYTES + 2 * ENTRY_BYTES
    old = overwrite(index_of(daemon), at, b"other it")
    (difference,) = client.verify()["differences"]
    assert difference.startswith(f"{NAME}: slot 2: its index has the key 0x")
    overwrite(index_of(daemon), at, old)
    assert client.verify()["ok"]


def overwrite(path: Path, at: int, new: bytes) -> bytes:
    """Write into a segment as nobody but root and the daemon's own user could; what was there."""
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(len(new))
        file.seek(at)
        file.write(new)
    return old


def check_overwriting(daemon: Daemon, client: Raw, at: int, new: bytes, *says: str) -> None:
    """What is written there is named, and nothing else; and nothing more when it is put back."""
    path = directory_of(daemon)
    old = overwrite(path, at, new)
    assert old != new
    report = client.verify()
    assert len(report["differences"]) == len(says), report["differences"]
    for difference, said in zip(report["differences"], says, strict=True):
        assert said in difference
    overwrite(path, at, old)
    assert client.verify()["ok"]


@pytest.mark.parametrize("offset", [0, 16, 24, 40, 56, 64, 72])
def test_verify_finds_a_record_that_was_overwritten(
    daemon: Daemon, client: Raw, offset: int
) -> None:
    at = layout.record_offset(2, BLOCK_TOKENS) + offset
    (byte,) = beginning_of_directory(daemon)[at : at + 1]
    check_overwriting(daemon, client, at, bytes([byte ^ 0x10]), "slot 2: its record is torn")


def record_at(daemon: Daemon, slot: int) -> layout.Record:
    content = memoryview(beginning_of_directory(daemon))
    record = layout.read_record(content, slot, BLOCK_TOKENS)
    assert record is not None
    return record


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("start", 8, "start 8, and should have 16"),
        ("tokens", b"\1\0\0\0" * BLOCK_TOKENS, "tokens 0100"),
        ("key", bytes(16), "key 0000"),
        ("parent_key", bytes(16), "parent's key 0000"),
        ("generation", 77, "generation 77, and should have 3"),
        ("checksum", 4711, "checksum 4711, and should have"),
    ],
)
def test_verify_names_what_a_whole_record_says_wrongly(
    daemon: Daemon, client: Raw, field: str, value: object, says: str
) -> None:
    slot = 2
    content = bytearray(beginning_of_directory(daemon))
    record = record_at(daemon, slot)._replace(**{field: value})
    last_use = layout.read_last_use(memoryview(content), slot, BLOCK_TOKENS)
    layout.write_record(memoryview(content), slot, BLOCK_TOKENS, record, last_use)
    at = layout.record_offset(slot, BLOCK_TOKENS)
    new = bytes(content[at : at + layout.record_bytes(BLOCK_TOKENS)])
    check_overwriting(daemon, client, at, new, f"slot {slot}: its record has {says}")


def test_verify_names_a_last_use_that_is_not_the_cores(daemon: Daemon, client: Raw) -> None:
    at = layout.record_offset(2, BLOCK_TOKENS) + 8
    new = (99).to_bytes(8, "little")
    check_overwriting(daemon, client, at, new, "slot 2: its record has last use 99, and should")


def test_verify_names_a_record_that_is_missing_and_one_too_many(
    daemon: Daemon, client: Raw
) -> None:
    at = layout.record_offset(2, BLOCK_TOKENS)
    check_overwriting(daemon, client, at, bytes(8), "slot 2 is sealed and has no record")
    size = layout.record_bytes(BLOCK_TOKENS)
    copy = beginning_of_directory(daemon)[at : at + size]
    beyond = layout.record_offset(N_BLOCKS + 2, BLOCK_TOKENS)
    check_overwriting(daemon, client, beyond, copy, "slot 7 has a record and no block")
    check_overwriting(daemon, client, beyond, b"torn", "slot 7: its record is torn")


def test_verify_names_what_the_header_says_wrongly(daemon: Daemon, client: Raw) -> None:
    check_overwriting(daemon, client, 45, b"x", "the header of its directory is torn")
    content = bytearray(beginning_of_directory(daemon))
    header = layout.read_header(memoryview(content))
    assert header is not None
    layout.write_header(memoryview(content), header._replace(slots=header.slots - 1))
    new = bytes(content[: layout.DIRECTORY_HEADER_BYTES])
    registration = {**header.registration, "tenant": "thief"}
    layout.write_header(memoryview(content), header._replace(registration=registration))
    other = bytes(content[: layout.DIRECTORY_HEADER_BYTES])
    check_overwriting(daemon, client, 0, other, "has tenant thief, and should have default")
    check_overwriting(daemon, client, 0, new, f"has slots {header.slots - 1}, and should")
    at = layout.DIRECTORY_HEADER_BYTES - 8
    check_overwriting(
        daemon, client, at, (9).to_bytes(8, "little"), "has life 9, and should have 1"
    )


def test_verify_names_what_a_pin_says_wrongly(daemon: Daemon, client: Raw) -> None:
    fingerprint = bytes.fromhex(client.status()["models"][0]["fingerprint"])
    assert client.call(Pin(fingerprint, TOKENS, "keeper", 0)).tokens == len(TOKENS) // 4
    at = layout.pins_offset(len(client.arena) // STRIDE, BLOCK_TOKENS)
    place = f"{NAME}: place 0 of its pins"
    check_overwriting(daemon, client, at, bytes(8), f"{place} has none, and should have that of")
    check_overwriting(daemon, client, at, b"torn", f"{place} is torn")
    later = struct.pack("<d", 5.0)
    check_overwriting(daemon, client, at + 8, later, f"{place} has end 5.0, and should have 0.0")
    with directory_of(daemon).open("rb") as file:
        content = bytearray(os.pread(file.fileno(), layout.PIN_BYTES, at))
    pin = layout.read_pin(memoryview(content), 0)
    assert pin is not None
    layout.write_pin(memoryview(content), 0, pin._replace(owner="thief"))
    new = bytes(content)
    check_overwriting(daemon, client, at, new, f"{place} has owner thief, and should have keeper")
    layout.write_pin(memoryview(content), 0, pin._replace(key=bytes(16)))
    new = bytes(content)
    check_overwriting(daemon, client, at, new, f"{place} has key 0000")
    check_overwriting(
        daemon, client, at + layout.PIN_BYTES, new, "place 1 of its pins has a pin of 'keeper'"
    )


def test_checksums_find_a_byte_that_was_changed(daemon: Daemon, client: Raw) -> None:
    """Only if it is asked for them, and then every block's; the last one is open."""
    sealed = [record_at(daemon, slot) for slot in range(N_BLOCKS)]
    n_bytes = sum(raw.FORMAT.size(len(record.tokens) // 4) for record in sealed)
    report = client.call(Verify(1)).report
    assert (report["ok"], report["terms"]["compared_bytes"]) == (True, n_bytes)
    at = 3 * STRIDE + 1000
    old = overwrite(arena_of(daemon), at, b"\xff")
    assert client.verify()["ok"]
    report = client.call(Verify(1)).report
    (difference,) = report["differences"]
    assert difference.startswith(f"{NAME}: slot 3: the bytes of its 8 tokens from 24 on do not")
    overwrite(arena_of(daemon), at, old)
    assert client.call(Verify(1)).report["ok"]


def test_checksums_are_compared_beside_whatever_happens(daemon: Daemon, client: Raw) -> None:
    """A block that is evicted in between, and whose slot is another's then, is not missed."""
    (context,) = client.contexts
    with raw_client(daemon, staging_bytes=0) as auditor:
        for number in range(1, 40):
            asked = [auditor.post(Verify(1)), auditor.post(Verify())]
            prompt = many_tokens(number * 1000, 30 * BLOCK_TOKENS)
            client.release(context, client.store(context, prompt))
            client.call(Evict("", 28))
            replies = [auditor.receive() for _ in asked]
            assert [each.body.report["differences"] for each in replies] == [[], []]
            assert client.status()["accounting"]["drift_bytes"] == 0


def test_verify_names_and_undoes_what_was_filled_in_a_directory(
    daemon: Daemon, client: Raw
) -> None:
    pins = layout.pins_offset(BUDGET // STRIDE, BLOCK_TOKENS)
    for at in (64 << 10, pins + 3 * 4096):
        overwrite(directory_of(daemon), at + 100, b"x")
        assert client.status()["accounting"]["drift_bytes"] == 4096
        report = client.verify()
        (difference,) = report["differences"]
        assert difference.startswith(f"{NAME}: 4096 bytes at {at} of its directory had memory")
        assert report["terms"]["undone_bytes"] == 4096
        assert client.verify()["ok"]
        assert client.status()["accounting"]["drift_bytes"] == 0


def test_verify_names_memory_that_was_taken_from_a_directory(daemon: Daemon, client: Raw) -> None:
    """It cannot be given back: what was there is lost, and is named, too."""
    libc = ctypes.CDLL(None, use_errno=True)
    with directory_of(daemon).open("r+b") as file:
        offset, length = ctypes.c_int64(4 * 4096), ctypes.c_int64(4096)
        assert libc.fallocate(file.fileno(), 3, offset, length) == 0
    assert client.status()["accounting"]["drift_bytes"] == -4096
    differences = client.verify()["differences"]
    assert f"{NAME}: slot 0 is sealed and has no record" in differences


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
    report = client.verify()
    assert report["differences"] == [
        f"{NAME}: slots: {N_BLOCKS * STRIDE} bytes were given, the system has "
        f"{(N_BLOCKS - 1) * STRIDE}",
        f"{NAME}: memory was taken from 1 slots: 1",
    ]
    terms = report["terms"]
    assert (terms["active_bytes"], terms["os_arena_bytes"]) == (5 * STRIDE, 4 * STRIDE)


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
