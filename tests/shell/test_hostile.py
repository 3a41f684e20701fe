"""Whatever a client sends, it is answered with the right error, and nobody else notices.

Covers requests, frames, payloads, datagrams, and clients that flood, do not read, or pretend to be
another one. Clients that die: test_death.py. No memory: test_full.py.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack
from typing import Any

import msgpack
import pytest
import zmq

from kvd.sessions import MAX_GREETING
from kvd_proto import PROTOCOL_VERSION, codec, errors
from kvd_proto.errors import KvdError
from kvd_proto.messages import (
    COMPLETED,
    FAILED,
    MAX_TOKENS,
    OPERATIONS,
    Append,
    Appended,
    CloseContext,
    Evict,
    Evicted,
    Explain,
    Flush,
    Forget,
    Get,
    Hello,
    KeepAlive,
    ListClients,
    OpenContext,
    Pin,
    Ping,
    Pong,
    Refused,
    RegisterModel,
    Release,
    SegmentShared,
    Unpin,
    Welcome,
)
from tests.shell.conftest import BYSTANDERS_TOKENS, Bystander
from tests.shell.raw import (
    BLOCK_TOKENS,
    FINGERPRINT,
    FORMAT,
    LAYERS,
    SECONDS,
    STRIDE,
    Raw,
    expected_blocks,
    has_ended,
    lifeline,
    make_alloc,
    make_append,
    many_tokens,
    raw_client,
    until,
)
from tests.support import Daemon, running_daemon

pytestmark = pytest.mark.usefixtures("nothing_is_lost")

STAGING = 1 << 18
PROMPT = many_tokens(1000, 2 * BLOCK_TOKENS + 3)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Raw]:
    with raw_client(daemon, staging_bytes=STAGING) as made:
        made.call(Evict("", 0))  # what the test before has stored
        yield made


# --- requests that make no sense in the state that things are in


class Scene:
    """A client with an open sequence that has appended nothing, and a released one."""

    def __init__(self, client: Raw, bystander: Bystander) -> None:
        self.client = client
        self.model = client.register()
        self.context = client.call(OpenContext(self.model, 4, [])).context
        self.sequence = client.alloc(self.context, PROMPT)
        self.released = client.alloc(self.context, PROMPT)
        client.release(self.context, self.released)
        self.foreign = bystander.context
        self.foreign_sequence = bystander.sequence

    def append(self, **changes: Any) -> Append:
        """A good append of PROMPT, but for the changes."""
        staged = self.client.stage(PROMPT)
        return make_append(self.context, self.sequence, 0, PROMPT, staged)._replace(**changes)

    def reserved_append(self, tokens: bytes) -> Append:
        sequence = self.client.alloc(self.context, PROMPT, reserve=BLOCK_TOKENS)
        staged = self.client.stage(tokens)
        return make_append(self.context, sequence, 0, tokens, staged)

    def model_message(self, **changes: Any) -> RegisterModel:
        good = RegisterModel("model", FINGERPRINT, FORMAT.name, BLOCK_TOKENS, LAYERS)
        return good._replace(**changes)


def offsets(*numbers: int) -> bytes:
    return pack(f"<{len(numbers)}Q", *numbers)


LAST = STAGING + 4096
"""The length of the staging, its header page included."""
BAD_REQUESTS: dict[str, tuple[type[KvdError], Callable[[Scene], Any]]] = {
    # handles
    "alloc in no context": (errors.UnknownContext, lambda s: make_alloc(77, PROMPT)),
    "alloc in another's context": (errors.ForeignHandle, lambda s: make_alloc(s.foreign, PROMPT)),
    "close another's context": (errors.ForeignHandle, lambda s: CloseContext(s.foreign)),
    "close no context": (errors.UnknownContext, lambda s: CloseContext((1 << 64) - 1)),
    "get of another's sequence": (
        errors.ForeignHandle,
        lambda s: Get(s.foreign, s.foreign_sequence.seq_id, s.foreign_sequence.generation, 0),
    ),
    "release of another's sequence": (
        errors.ForeignHandle,
        lambda s: Release(
            s.foreign, s.foreign_sequence.seq_id, s.foreign_sequence.generation, COMPLETED
        ),
    ),
    "append to another's sequence": (
        errors.ForeignHandle,
        lambda s: s.append(context=s.foreign),
    ),
    "release of an id that was never used": (
        errors.StaleHandle,
        lambda s: Release(s.context, 3, 1, FAILED),
    ),
    "double release": (
        errors.StaleHandle,
        lambda s: Release(s.context, s.released.seq_id, s.released.generation, COMPLETED),
    ),
    "get of a released sequence": (
        errors.StaleHandle,
        lambda s: Get(s.context, s.released.seq_id, s.released.generation, 0),
    ),
    "append to a released sequence": (
        errors.StaleHandle,
        lambda s: s.append(seq_id=s.released.seq_id, generation=s.released.generation),
    ),
    "a generation to come": (
        errors.StaleHandle,
        lambda s: Get(s.context, s.sequence.seq_id, s.sequence.generation + 2, 0),
    ),
    "the largest generation": (
        errors.StaleHandle,
        lambda s: Get(s.context, s.sequence.seq_id, (1 << 64) - 1, 0),
    ),
    # positions and sizes
    "append that leaves a gap": (errors.BadPosition, lambda s: s.append(start=BLOCK_TOKENS)),
    "append from far away": (errors.BadPosition, lambda s: s.append(start=(1 << 32) - 1)),
    "append beyond the reservation": (
        errors.ReservationExceeded,
        lambda s: s.reserved_append(many_tokens(0, BLOCK_TOKENS + 1)),
    ),
    "append of nothing": (errors.BadMessage, lambda s: s.append(tokens=b"", staged=b"")),
    "an offset too few": (errors.BadMessage, lambda s: s.append(staged=offsets(4096, 8192))),
    "an offset too many": (errors.BadMessage, lambda s: s.append(staged=offsets(*[4096] * 4))),
    "too many tokens": (
        errors.BadMessage,
        lambda s: make_alloc(s.context, bytes(4 * (MAX_TOKENS + 1))),
    ),
    "half a token": (errors.BadMessage, lambda s: make_alloc(s.context, PROMPT + b"\0\0")),
    "reservation of more than the budget": (
        errors.BudgetTooSmall,
        lambda s: make_alloc(s.context, PROMPT, reserve=MAX_TOKENS),
    ),
    "flush of a commit to come": (errors.BadMessage, lambda s: Flush(1)),
    # staging
    "staged in the header": (errors.BadStaging, lambda s: s.append(staged=offsets(0, 4096, 8192))),
    "staged beyond the end": (
        errors.BadStaging,
        lambda s: s.append(staged=offsets(4096, 8192, LAST)),
    ),
    "staged across the end": (
        errors.BadStaging,
        lambda s: s.append(staged=offsets(LAST - FORMAT.max_bytes // 8 * 8 + 8, 4096, 8192)),
    ),
    "staged at the end of the world": (
        errors.BadStaging,
        lambda s: s.append(staged=offsets(4096, 8192, (1 << 64) - 8)),
    ),
    "staged at an odd place": (
        errors.BadStaging,
        lambda s: s.append(staged=offsets(4096, 8192, 12289)),
    ),
    # models and contexts
    "other geometry": (
        errors.GeometryMismatch,
        lambda s: s.model_message(layers=[["f16", 64, "q8_0", 34], ["f16", 128, "q8_0", 34]]),
    ),
    "a layer too few": (errors.GeometryMismatch, lambda s: s.model_message(layers=LAYERS[:1])),
    "unknown format": (errors.BadMessage, lambda s: s.model_message(payload_format="llama")),
    "unknown type": (
        errors.BadMessage,
        lambda s: s.model_message(fingerprint=bytes(32), layers=[["q9_9", 64, "f16", 64]]),
    ),
    "half a quantised row": (
        errors.BadMessage,
        lambda s: s.model_message(fingerprint=bytes(32), layers=[["q8_0", 33, "f16", 64]]),
    ),
    "no layers": (errors.BadMessage, lambda s: s.model_message(layers=[])),
    "too many layers": (errors.BadMessage, lambda s: s.model_message(layers=LAYERS * 257)),
    "rows of no bytes": (
        errors.BadMessage,
        lambda s: s.model_message(layers=[["f16", 0, "f16", 0]]),
    ),
    "a row of negative bytes": (
        errors.BadMessage,
        lambda s: s.model_message(layers=[["f16", -64, "f16", 64]]),
    ),
    "a row of too many bytes": (
        errors.BadMessage,
        lambda s: s.model_message(layers=[["f16", 1 << 60, "f16", 64]]),
    ),
    "a layer that is none": (errors.BadMessage, lambda s: s.model_message(layers=[[1, 2, 3, 4]])),
    "a short fingerprint": (errors.BadMessage, lambda s: s.model_message(fingerprint=bytes(31))),
    "blocks of no tokens": (errors.BadMessage, lambda s: s.model_message(block_tokens=0)),
    "blocks of too many tokens": (errors.BadMessage, lambda s: s.model_message(block_tokens=1025)),
    "a model that does not fit": (
        errors.ModelTooLarge,
        lambda s: s.model_message(fingerprint=bytes(32), layers=[["f16", 1 << 21, "f16", 1 << 21]]),
    ),
    "the largest model of all": (
        errors.ModelTooLarge,
        lambda s: s.model_message(
            fingerprint=bytes(32),
            block_tokens=1024,
            layers=[["f16", 1 << 24, "f16", 1 << 24]] * 512,
        ),
    ),
    "context of no model": (errors.UnknownModel, lambda s: OpenContext(s.model + 1, 4, [])),
    "too many ids": (errors.BadMessage, lambda s: OpenContext(s.model, 9, [])),
    "an id twice": (errors.BadMessage, lambda s: OpenContext(s.model, 4, [1, 1])),
    "an id that is not the context's": (errors.BadMessage, lambda s: OpenContext(s.model, 4, [4])),
    "a negative id": (errors.BadMessage, lambda s: OpenContext(s.model, 4, [-1])),
    # fields
    "negative wait": (errors.BadMessage, lambda s: make_alloc(s.context, PROMPT, wait_ms=-1)),
    "endless wait": (
        errors.BadMessage,
        lambda s: make_alloc(s.context, PROMPT, wait_ms=(1 << 64) - 1),
    ),
    "a long name": (errors.BadMessage, lambda s: make_alloc(s.context, PROMPT, request="x" * 201)),
    "an outcome that is none": (
        errors.BadMessage,
        lambda s: Release(s.context, s.sequence.seq_id, s.sequence.generation, 2),
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(client: Raw, bystander: Bystander, name: str):
    kind, make = BAD_REQUESTS[name]
    scene = Scene(client, bystander)
    message = make(scene)
    before = client.status()
    body = client.ask(message)
    assert type(body) is kind, body
    after = client.status()
    assert after["accounting"] == before["accounting"]
    assert after["sequences"] == before["sequences"]
    # The sequence is as it was: it takes the good append at once.
    good = client.call(scene.append())
    assert client.call(Flush(good.commit)).failures == []
    assert client.read(scene.context, scene.sequence)[:2] == expected_blocks(2)


def test_append_without_staging(daemon: Daemon):
    with raw_client(daemon, staging_bytes=0) as client:
        client.call(Evict("", 0))
        context = client.open()
        sequence = client.alloc(context, PROMPT)
        message = make_append(context, sequence, 0, PROMPT, offsets(4096, 8192, 12288))
        assert type(client.ask(message)) is errors.BadStaging


def test_another_fingerprint_finds_nothing(client: Raw, bystander: Bystander):
    context = client.open(fingerprint=bytes(32))
    assert client.alloc(context, BYSTANDERS_TOKENS).matched_tokens == 0


def test_evicting_what_others_lease_does_nothing(client: Raw, bystander: Bystander):
    client.call(Evict("", 0))
    assert client.call(Evict("", 0)) == Evicted(0, 0)
    assert client.call(Evict("no such model", 0)) == Evicted(0, 0)
    bystander.check()


def test_more_sequences_than_there_may_be(client: Raw):
    context = client.open(n_seq_max=2)
    held = [client.alloc(context, PROMPT) for _ in range(2)]
    assert type(client.ask(make_alloc(context, PROMPT))) is errors.NoSequenceFree
    assert type(client.ask(make_alloc(context, PROMPT, wait_ms=20))) is errors.NoSequenceFree
    contexts = [client.call(OpenContext(1, 8, [])).context for _ in range(2)]
    for number in range(13):  # 16 are allowed, of which 2 are ours, and 1 the bystander's
        client.alloc(contexts[number // 8], PROMPT)
    assert type(client.ask(make_alloc(contexts[1], PROMPT))) is errors.SequenceLimit
    busy = OpenContext(1, 8, [0])
    assert type(client.ask(busy)) is errors.SequenceLimit
    client.release(context, held[0])
    client.alloc(contexts[1], PROMPT)


def test_timed_out_sequence_takes_no_more(client: Raw):
    context = client.open()
    sequence = client.alloc(context, PROMPT, idle_ms=1)
    staged = client.stage(PROMPT)
    until(lambda: client.status()["counters"]["sequences_timed_out"])
    message = make_append(context, sequence, 0, PROMPT, staged)
    assert type(client.ask(message)) is errors.SequenceEnded
    client.release(context, sequence)


# --- payloads

FIELDS = {  # offset of each field of a block of 8 tokens, and a wrong value
    "magic": (0, pack("<I", 0xAF143CD9)),
    "source": (4, pack("<i", 1)),
    "n_stream": (8, pack("<I", 2)),
    "n_cells": (12, pack("<I", 7)),
    "first position": (16, pack("<i", -1)),
    "last position": (16 + 7 * 12, pack("<i", 8)),
    "n_seq_id": (20, pack("<I", 2)),
    "seq id": (24, pack("<i", 5)),
    "v_trans": (16 + 8 * 12, pack("<I", 1)),
    "n_layer": (20 + 8 * 12, pack("<I", 1)),
    "type of K": (24 + 8 * 12, pack("<i", 0)),
    "row of K": (28 + 8 * 12, pack("<Q", 1 << 63)),
    "row of V": (24 + 8 * 12 + 2 * 12 + 8 * (64 + 128) + 4, pack("<Q", 35)),
}


@pytest.mark.parametrize("field", FIELDS)
def test_payload_with_a_wrong_field(client: Raw, field: str):
    context = client.open()
    sequence = client.alloc(context, PROMPT)
    staged = client.stage(PROMPT)
    before = client.status()["accounting"]
    offset, wrong = FIELDS[field]
    at = 4096 + offset
    good = client.staging[at : at + len(wrong)]
    assert good != wrong
    client.staging[at : at + len(wrong)] = wrong
    message = make_append(context, sequence, 0, PROMPT, staged)
    body = client.ask(message)
    assert type(body) is errors.BadPayload, body
    assert client.status()["accounting"] == before
    client.staging[at : at + len(wrong)] = good
    client.call(Flush(client.call(message).commit))


def test_payload_of_other_positions(client: Raw):
    context = client.open()
    sequence = client.alloc(context, PROMPT)
    staged = client.stage(PROMPT, start=BLOCK_TOKENS)
    body = client.ask(make_append(context, sequence, 0, PROMPT, staged))
    assert type(body) is errors.BadPayload
    assert "position 8" in body.message


def test_payload_of_another_number_of_tokens(client: Raw):
    context = client.open()
    sequence = client.alloc(context, PROMPT)
    staged = client.stage(PROMPT)
    # A full block where the last one has 3 tokens, and the other way round.
    swapped = staged[16:24] + staged[8:16] + staged[0:8]
    body = client.ask(make_append(context, sequence, 0, PROMPT, swapped))
    assert type(body) is errors.BadPayload


LATE_COPIES = """
import kvd.copier, sys, time
from kvd.cli import main
real = kvd.copier._copy
def late(item):
    time.sleep(0.3)
    return real(item)
kvd.copier._copy = late
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture
def slow_daemon(tmp_path: Path) -> Iterator[Daemon]:
    """It takes a while between accepting an append and copying it."""
    prefix = (sys.executable, "-c", LATE_COPIES)
    with running_daemon(
        "--max-memory", "16MiB", runtime_dir=tmp_path / "rt", prefix=prefix
    ) as running:
        yield running


def test_staging_that_changes_after_it_was_checked(slow_daemon: Daemon):
    new = many_tokens(0, 2 * BLOCK_TOKENS)
    with raw_client(slow_daemon) as client:
        context = client.open()
        sequence = client.alloc(context, new)
        appended = client.append(context, sequence, new)
        client.staging[4096 + STRIDE : 4096 + STRIDE + 4] = b"evil"
        (failure,) = client.call(Flush(appended.commit)).failures
        assert failure[:2] == [appended.commit, "bad_payload"]
        # The first block was good; the second never was.
        assert client.read(context, sequence) == expected_blocks(1)
        assert client.alloc(context, new).matched_tokens == BLOCK_TOKENS
        assert client.status()["accounting"]["filling_bytes"] == 0

        # If it is another good block that passed the check in the arena, that is what it is.
        other = client.alloc(context, many_tokens(100, BLOCK_TOKENS))
        appended = client.append(context, other, many_tokens(100, BLOCK_TOKENS), fill=1)
        client.stage(many_tokens(100, BLOCK_TOKENS), fill=2)
        assert client.call(Flush(appended.commit)).failures == []
        assert client.read(context, other) == expected_blocks(1, fill=2)
        assert client.verify()["ok"]


def test_another_copy_takes_over_when_the_first_turns_bad(slow_daemon: Daemon):
    new = many_tokens(0, BLOCK_TOKENS)
    with raw_client(slow_daemon) as evil, raw_client(slow_daemon) as good:
        evils, goods = evil.open(), good.open()
        first = evil.append(evils, evil.alloc(evils, new), new, fill=1)
        sequence = good.alloc(goods, new)
        second = good.append(goods, sequence, new, fill=2)
        assert (first.stored, second.joined) == (1, 1)
        evil.staging[4096:4100] = b"evil"
        assert good.call(Flush(second.commit)).failures == []
        assert good.read(goods, sequence) == expected_blocks(1, fill=2)
        (failure,) = evil.call(Flush(first.commit)).failures
        assert failure[:2] == [first.commit, "bad_payload"]
        assert good.verify()["ok"]


def test_staging_that_never_stops_changing(client: Raw):
    """What is stored at last has passed the checks, whatever the client does meanwhile."""
    context = client.open()
    stop = threading.Event()

    def scribble() -> None:
        view = memoryview(client.staging)[4096 : 4096 + FORMAT.max_bytes]
        good, number = bytes(view), 0
        while not stop.is_set():
            number += 1
            view[0] ^= 1  # the magic
            view[16] ^= 2  # a position
            view[200] = number & 255  # a row: anything is good
            view[0:24] = good[0:24]
        view.release()

    stored = 0
    client.stage(many_tokens(0, BLOCK_TOKENS))
    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for first in range(0, 1600, BLOCK_TOKENS):
            new = many_tokens(10_000 + first, BLOCK_TOKENS)
            sequence = client.alloc(context, new)
            body = client.ask(make_append(context, sequence, 0, new, offsets(4096)))
            if isinstance(body, Appended):
                failures = client.call(Flush(body.commit)).failures
                assert all(failure[1] == "bad_payload" for failure in failures)
            else:
                assert type(body) is errors.BadPayload
            for block in client.read(context, sequence):
                FORMAT.validate(memoryview(block), 0, BLOCK_TOKENS)
                stored += 1
            client.release(context, sequence)
    finally:
        stop.set()
        thread.join()
    assert stored


# --- frames

GOOD_PING = codec.encode_request(1, Ping())
BAD_FRAMES = {
    "nothing": b"",
    "garbage": b"\xc1\xff\x00garbage",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "random": bytes((i * 7919 + 13) & 255 for i in range(4096)),
    "no array": msgpack.packb({"operation": 1}),
    "nil": msgpack.packb(None),
    "empty array": msgpack.packb([]),
    "half an array": msgpack.packb([1, 7])[:-1],
    "array that promises more": b"\xdd\xff\xff\xff\xff",
    "string that promises more": b"\xdb\xff\xff\xff\xff",
    "something behind it": msgpack.packb([1, 7]) + b"\0",
    "an extension": msgpack.packb(msgpack.ExtType(1, b"x")),
    "deeply nested": b"\x91" * 5000 + b"\xc0",
    "many empty arrays": b"\xdc\xff\xff" + b"\x90" * 65535,
    "correlation of text": msgpack.packb([1, "7"]),
    "negative correlation": msgpack.packb([1, -7]),
    "correlation true": msgpack.packb([1, True]),
    "correlation of 2.0": msgpack.packb([1, 2.0]),
    "not UTF-8": b"\x92\x01\xa2\xff\xfe",
}


def raw_reply(client: Raw) -> tuple[int, int, str]:
    """Correlation, failed, and code of the next reply."""
    assert client.dealer.poll(SECONDS * 1000), "no reply"
    fields = msgpack.unpackb(client.dealer.recv())
    return fields[0], fields[1], fields[2]


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_frame_that_is_no_request(client: Raw, name: str):
    client.dealer.send(BAD_FRAMES[name])
    # The correlation is told if the frame begins as a request does: its sender may wait for it.
    known = 7 if name == "something behind it" else 0
    assert raw_reply(client) == (known, 1, "bad_message")
    assert isinstance(client.call(Ping()), Pong)


@pytest.mark.parametrize(
    "fields",
    [
        [0, 7],
        [15, 7],
        [-1, 7],
        [1 << 63, 7],
        ["ping", 7],
        [True, 7],
        [None, 7],
        [[1], 7],
        [1, 7, "more"],
        [5, 7, 1, "", b""],
    ],
)
def test_request_with_a_bad_beginning_or_length(client: Raw, fields: list[Any]):
    client.dealer.send(msgpack.packb(fields))
    assert raw_reply(client) == (7, 1, "bad_message")


@pytest.mark.parametrize(
    "frames",
    [
        [b"", GOOD_PING],  # what a REQ socket would send
        [GOOD_PING, b""],
        [GOOD_PING, GOOD_PING],
        [b""] * 2,
        [b"x"] * 1000,
    ],
    ids=["REQ", "one more", "two requests", "two empty ones", "a thousand"],
)
def test_message_of_many_frames(client: Raw, frames: list[bytes]):
    client.dealer.send_multipart(frames)
    client.dealer.send(GOOD_PING)
    assert raw_reply(client) == (0, 1, "bad_message")
    assert raw_reply(client)[:2] == (1, 0)


SAMPLES = {
    "RegisterModel": ["model", FINGERPRINT, "llama-state", BLOCK_TOKENS, LAYERS, [["a", "b"]]],
    "OpenContext": [1, 4, []],
    "CloseContext": [1],
    "Alloc": [1, "", PROMPT, 0, 0, 0, 1, 1],
    "Append": [1, 0, 1, 0, PROMPT, offsets(4096)],
    "Get": [1, 0, 1, 0],
    "Release": [1, 0, 1, 0],
    "Flush": [0],
    "Evict": ["", 1, ""],
    "Explain": [FINGERPRINT, PROMPT, "", [["a", "b"]]],
    "Forget": [FINGERPRINT, PROMPT, ""],
    "KeepAlive": [1, [0], [1]],
    "Pin": [FINGERPRINT, PROMPT, "owner", 0],
    "Unpin": ["owner", ""],
}
NEVER_RIGHT = [None, True, 1.5, float("nan"), {}, {"a": 1}, -1, -(1 << 63), msgpack.Timestamp(1)]
SOMETIMES_RIGHT = [0, (1 << 63), (1 << 64) - 1, "", "x" * 300, b"", bytes(100), [], [[]], [0] * 600]


@pytest.mark.parametrize("operation", [op for op in OPERATIONS if op.request.__name__ in SAMPLES])
def test_every_field_with_every_wrong_type(client: Raw, operation: Any):
    good = SAMPLES[operation.request.__name__]
    assert len(good) == len(operation.request._fields)
    correlation = 0
    for index in range(len(good)):
        for value in NEVER_RIGHT + SOMETIMES_RIGHT:
            correlation += 1
            fields = [*good[:index], value, *good[index + 1 :]]
            client.dealer.send(msgpack.packb([operation.code, correlation, *fields]))
            answered, failed, code = raw_reply(client)
            if isinstance(value, msgpack.Timestamp) and answered == 0:
                answered = correlation  # it cannot always be read past
            assert answered == correlation
            if value in SOMETIMES_RIGHT and value is not True:
                assert not failed or code != "internal"
            else:
                assert (failed, code) == (1, "bad_message"), value
    assert isinstance(client.ask(Ping()), Pong)


def test_frame_beyond_the_limit_ends_the_connection_and_nothing_else(client: Raw):
    context = client.open()
    client.dealer.send(bytes(codec.MAX_MESSAGE_BYTES + 1))
    # ZeroMQ connects again by itself, under the same routing id; what was sent between is lost.
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        client.post(Ping())
        if client.dealer.poll(200):
            break
    while client.dealer.poll(0):
        assert isinstance(client.receive().body, Pong)
    client.release(context, client.alloc(context, PROMPT))


def test_largest_request_that_is_allowed(client: Raw):
    context = client.open()
    prompt = many_tokens(0, MAX_TOKENS)
    client.release(context, client.alloc(context, prompt))
    sequence = client.alloc(context, b"")
    everything = offsets(*[4096] * MAX_TOKENS)
    message = Append(context, sequence.seq_id, sequence.generation, 0, prompt, everything)
    assert type(client.ask(message)) is errors.BadMessage


# --- who asks


def test_routing_id_that_is_no_session(client: Raw):
    for routing_id in (b"", b"\x01" + bytes(15), b"x", b"y" * 255):
        client.dealer.close()
        client.dealer = client.connect(routing_id)
        assert isinstance(client.call(Ping()), Pong)
        assert client.status()["clients"] == 2
        for message in (
            make_alloc(1, PROMPT),
            OpenContext(1, 4, []),
            RegisterModel("m", FINGERPRINT, "llama-state", BLOCK_TOKENS, LAYERS),
            Append(1, 0, 1, 0, PROMPT, offsets(4096)),
            Release(1, 0, 1, 0),
            Flush(0),
            Evict("", 0),
            KeepAlive(1, [], []),
            Pin(FINGERPRINT, PROMPT, "owner", 0),
            Unpin("owner", ""),
            Explain(FINGERPRINT, PROMPT, "", []),
            Forget(FINGERPRINT, PROMPT, ""),
        ):
            assert type(client.ask(message)) is errors.UnknownSession


def test_session_that_has_ended(daemon: Daemon, client: Raw, bystander: Bystander):
    context = client.open()
    client.lifeline.close()
    until(lambda: bystander.client.status()["clients"] == 1)
    assert type(client.ask(make_alloc(context, PROMPT))) is errors.UnknownSession
    assert isinstance(client.ask(Ping()), Pong)


def test_second_socket_with_a_sessions_routing_id_is_not_heard(client: Raw, bystander: Bystander):
    """ROUTER_HANDOVER is 0: the first one stays. ZeroMQ takes each message of the impostor for
    another try at a routing id, so its first request becomes its name, and the rest is nobody's."""
    theirs = bystander.client.session
    impostor = client.connect(theirs)
    try:
        release = Release(
            bystander.context, bystander.sequence.seq_id, bystander.sequence.generation, COMPLETED
        )
        for correlation in range(1, 4):
            impostor.send(codec.encode_request(correlation, release))
        # Two requests later everything that it has sent so far was looked at.
        bystander.check()
        answers = []
        while impostor.poll(300):
            answers.append(msgpack.unpackb(impostor.recv()))
        assert all(answer[1:3] == [1, "unknown_session"] for answer in answers)
        # Neither has the bystander got an answer that is not its own.
        assert bystander.client.dealer.poll(0) == 0
    finally:
        impostor.close(linger=0)
    bystander.check()


# --- the lifeline


@pytest.mark.parametrize(
    "datagram",
    [
        b"\xc1garbage",
        b"x" * 4096,
        b"x" * 4097,
        b"x" * 100_000,
        msgpack.packb([]),
        msgpack.packb([9, 1]),
        msgpack.packb([True, 1, "x", 0]),
        msgpack.packb([1, 1, "name"]),
        msgpack.packb([1, 1, "", 0]),
        msgpack.packb([1, 1, "x" * 201, 0]),
        msgpack.packb([1, 1, 7, 0]),
        msgpack.packb([1, 1, "name", -1]),
        msgpack.packb([1, 1, "name", 1.0]),
        msgpack.packb([1, 1, "name", (1 << 40) + 1]),
        msgpack.packb([1, "1", "name", 0]),
        codec.encode_datagram(Welcome(1, bytes(16), bytes(16), "x", 0)),
        codec.encode_datagram(SegmentShared(1, 4096)),
        codec.encode_datagram(Refused("no_space", "you are", {})),
    ],
    ids=lambda datagram: datagram[:12].hex(),
)
def test_lifeline_with_something_else_than_hello(daemon: Daemon, datagram: bytes):
    with lifeline(daemon) as sock:
        sock.send(datagram)
        refused = codec.decode_datagram(sock.recv(1 << 16))
        assert isinstance(refused, Refused)
        assert refused.code == "bad_message"
        assert has_ended(sock)


def test_empty_datagram(daemon: Daemon):
    """It looks like the end of a connection, and is not."""
    with lifeline(daemon) as sock:
        sock.send(b"")
        refused = codec.decode_datagram(sock.recv(1 << 16))
        assert refused.code == "bad_message"


def test_hello_of_another_version(daemon: Daemon):
    with lifeline(daemon) as sock:
        sock.send(codec.encode_datagram(Hello(PROTOCOL_VERSION + 1, "newer", 0)))
        refused = codec.decode_datagram(sock.recv(1 << 16))
        assert refused.code == "unsupported_version"
        assert refused.details == {"daemon": PROTOCOL_VERSION, "client": PROTOCOL_VERSION + 1}
        assert has_ended(sock)


def test_hello_twice_ends_the_session(client: Raw):
    context = client.open()
    client.alloc(context, PROMPT)
    client.send_datagram(Hello(PROTOCOL_VERSION, "again", 0))
    refused, _ = client.receive_datagram()
    assert refused.code == "bad_message"
    assert has_ended(client.lifeline)
    assert type(client.ask(make_alloc(context, PROMPT))) is errors.UnknownSession


def test_hello_with_descriptors(daemon: Daemon):
    """They are refused by the kernel, or dropped; the hello itself is as good as any."""
    with lifeline(daemon) as sock, open(os.devnull) as null:
        hello = codec.encode_datagram(Hello(PROTOCOL_VERSION, "with a gift", 0))
        try:
            socket.send_fds(sock, [hello], [null.fileno()])
        except PermissionError:  # Linux 6.16: the daemon takes none
            sock.send(hello)
        assert isinstance(codec.decode_datagram(sock.recv(1 << 16)), Welcome)


@pytest.mark.parametrize("staging_bytes", [5 << 20, 16 << 20, 1 << 40])
def test_hello_that_wants_too_much_is_granted_a_quarter(daemon: Daemon, staging_bytes: int):
    with raw_client(daemon, staging_bytes=staging_bytes) as client:
        assert len(client.staging) == (4 << 20) + 4096


def test_hello_that_wants_what_others_use(daemon: Daemon, bystander: Bystander):
    before = bystander.client.status()["accounting"]["staging_bytes"]
    with contextlib.ExitStack() as others:
        for _ in range(3):
            others.enter_context(raw_client(daemon, staging_bytes=4 << 20))
        with pytest.raises(errors.AllLeased):
            others.enter_context(raw_client(daemon, staging_bytes=4 << 20))
    until(lambda: bystander.client.status()["accounting"]["staging_bytes"] == before)


def test_client_that_hangs_up_before_it_is_welcomed(daemon: Daemon, bystander: Bystander):
    opened = bystander.client.status()["counters"]["sessions_opened"]
    for _ in range(50):
        with lifeline(daemon) as sock:
            sock.send(codec.encode_datagram(Hello(PROTOCOL_VERSION, "hasty", 1 << 20)))
    found = until(
        lambda: (
            now
            if (now := bystander.client.status())["counters"]["sessions_opened"] == opened + 50
            and now["clients"] == 1
            else None
        )
    )
    assert found["accounting"]["drift_bytes"] == 0


def test_many_who_connect_and_say_nothing(daemon: Daemon, bystander: Bystander):
    silent = [lifeline(daemon) for _ in range(3 * MAX_GREETING)]
    try:
        with raw_client(daemon) as client:  # it comes in all the same
            assert isinstance(client.call(Ping()), Pong)
        assert has_ended(silent[0])
        bystander.check()
    finally:
        for sock in silent:
            sock.close()


SHORT_HANDSHAKE = """
import kvd.sessions, sys
from kvd.cli import main
kvd.sessions.HANDSHAKE_SECONDS = 0.3
sys.exit(main(sys.argv[4:]))
"""


def test_who_says_nothing_is_let_go(tmp_path: Path):
    prefix = (sys.executable, "-c", SHORT_HANDSHAKE)
    with (
        running_daemon(runtime_dir=tmp_path / "rt", prefix=prefix) as daemon,
        raw_client(daemon, staging_bytes=0) as client,
    ):
        began = time.monotonic()
        with lifeline(daemon) as sock:
            assert has_ended(sock)
        assert 0.29 < time.monotonic() - began < 3
        # Who has said hello may be silent as long as he likes.
        assert not has_ended(client.lifeline, seconds=0.5)
        assert isinstance(client.call(Ping()), Pong)


def test_more_sessions_than_there_may_be(tmp_path: Path):
    flags = ("--max-sessions", "2")
    with running_daemon(*flags, runtime_dir=tmp_path / "rt") as daemon:
        with raw_client(daemon, staging_bytes=0) as first, raw_client(daemon, staging_bytes=0):
            with pytest.raises(errors.TooManySessions):
                Raw(daemon, staging_bytes=0)
            assert first.status()["clients"] == 2
        with raw_client(daemon, staging_bytes=0) as third:
            until(lambda: third.status()["clients"] == 1)


# --- too much


FLOOD = """
import sys, zmq
from kvd_proto import codec
from kvd_proto.messages import Ping, Status
dealer = zmq.Context().socket(zmq.DEALER)
dealer.setsockopt(zmq.LINGER, 0)
dealer.connect(sys.argv[1])
frames = {
    "ping": codec.encode_request(1, Ping()),
    "garbage": b"\\xc1" * 200,
    "status": codec.encode_request(1, Status()),
}
frame, waiting = frames[sys.argv[2]], 0
print("begun", flush=True)
while True:
    while waiting < 500:
        dealer.send(frame)
        waiting += 1
    dealer.recv()
    waiting -= 1
"""


@pytest.mark.parametrize("kind", ["ping", "garbage", "status"])
def test_flood_of_one_client_leaves_room_for_another(
    daemon: Daemon, bystander: Bystander, kind: str
):
    address = f"ipc://{daemon.runtime_dir}/requests.sock"
    with subprocess.Popen(
        [sys.executable, "-c", FLOOD, address, kind], stdout=subprocess.PIPE
    ) as flood:
        try:
            assert flood.stdout is not None
            assert flood.stdout.readline() == b"begun\n"
            times = []
            for _ in range(100):
                began = time.perf_counter()
                bystander.check()  # four requests
                times.append((time.perf_counter() - began) / 4)
            # A new client gets in, too.
            with raw_client(daemon) as client:
                assert isinstance(client.call(Ping()), Pong)
        finally:
            flood.kill()
    times.sort()
    # Idle it is 0.1 ms; two busy processes share the machine with us here.
    assert times[50] < 0.02, times[50]
    assert times[-1] < 1, times[-1]


def test_client_that_does_not_read_its_replies_is_let_go(daemon: Daemon, bystander: Bystander):
    rss = bystander.client.status()["rss_bytes"]
    with raw_client(daemon, keep_unread=1) as client:
        client.alloc(client.open(), PROMPT)
        stop = time.monotonic() + SECONDS
        while not has_ended(client.lifeline, seconds=0):
            assert time.monotonic() < stop, "it may keep replies for ever"
            for _ in range(100):
                client.post(ListClients())
            bystander.check()
    until(lambda: bystander.client.status()["clients"] == 1)
    until(lambda: "does not read its replies" in daemon.log.read_text())
    assert bystander.client.status()["rss_bytes"] < rss + (32 << 20)


def test_client_that_does_not_read_its_lifeline(daemon: Daemon, bystander: Bystander):
    """The descriptors of a few models wait for it; nobody else waits."""
    with raw_client(daemon) as client:
        for number in range(16):
            message = RegisterModel(
                f"model {number}", bytes([number] * 32), "llama-state", BLOCK_TOKENS, LAYERS
            )
            client.call(message)
        bystander.check()
        for _ in range(16):
            shared, fds = client.receive_datagram()
            assert isinstance(shared, SegmentShared)
            for fd in fds:
                os.close(fd)


def test_one_session_floods_and_never_reads(daemon: Daemon, bystander: Bystander):
    """100,000 requests without a look at one reply: it is let go, and nobody else waits."""
    with raw_client(daemon) as client:
        frame = codec.encode_request(1, ListClients())
        client.dealer.setsockopt(zmq.SNDHWM, 0)
        for number in range(100_000):
            client.dealer.send(frame)
            if number % 2000 == 0:
                bystander.check()
        # Its own socket takes replies in for it, as many as it likes; then it is the daemon's turn.
        bystander.check()
    until(lambda: bystander.client.status()["clients"] == 1)


def test_coming_and_going_costs_nothing(daemon: Daemon, bystander: Bystander):
    """Thousands of times: half of them say hello, and some have a staging."""
    hello = [codec.encode_datagram(Hello(PROTOCOL_VERSION, "hasty", size)) for size in (0, 4096)]

    def come_and_go(times: int) -> None:
        for number in range(times):
            with lifeline(daemon) as sock:
                if number % 2:
                    sock.send(hello[number // 2 % 2])
                if number % 4 == 1:
                    assert isinstance(codec.decode_datagram(sock.recv(1 << 16)), Welcome)
        until(lambda: bystander.client.status()["clients"] == 1)

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))

    come_and_go(500)
    before, rss = descriptors(), bystander.client.status()["rss_bytes"]
    come_and_go(10_000)
    until(lambda: descriptors() <= before)
    assert bystander.client.status()["rss_bytes"] < rss + (8 << 20)
    bystander.check()


def test_staging_that_cannot_be_truncated_and_is_punched(client: Raw):
    """It is sealed. What is punched reads as zeros, which are no block."""
    for size in (0, 4096, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(client.staging_fd, size)
    context = client.open()
    sequence = client.alloc(context, PROMPT)
    staged = client.stage(PROMPT)
    # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    assert libc.fallocate(client.staging_fd, 3, 4096, STRIDE) == 0
    body = client.ask(make_append(context, sequence, 0, PROMPT, staged))
    assert type(body) is errors.BadPayload
    staged = client.stage(PROMPT)
    assert client.call(Flush(client.append(context, sequence, PROMPT).commit)).failures == []
    assert client.read(context, sequence)[:2] == expected_blocks(2)


def test_staging_rewritten_while_many_blocks_are_copied(client: Raw):
    """Whatever is sealed is a block of its positions, and has the checksum that it is given."""
    context = client.open()
    stop = threading.Event()
    count = 48
    prompt = many_tokens(50_000, count * BLOCK_TOKENS)
    staged = client.stage(prompt)
    good = client.staging[4096 : 4096 + count * STRIDE]

    def scribble() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            at = number * 7919 % (count * STRIDE)
            client.staging[4096 + at : 4096 + at + 4] = pack("<I", number)
            client.staging[4096 : 4096 + count * STRIDE] = good

    thread = threading.Thread(target=scribble)
    thread.start()
    sealed = 0
    try:
        for _ in range(60):
            sequence = client.alloc(context, b"")
            body = client.ask(make_append(context, sequence, 0, prompt, staged))
            if isinstance(body, Appended):
                failures = client.call(Flush(body.commit)).failures
                assert all(failure[1] == "bad_payload" for failure in failures)
            else:
                assert type(body) is errors.BadPayload
            for index, block in enumerate(client.read(context, sequence)):
                FORMAT.validate(memoryview(block), index * BLOCK_TOKENS, BLOCK_TOKENS)
                sealed += 1
            client.release(context, sequence)
            client.call(Evict("", 0))
    finally:
        stop.set()
        thread.join()
    assert sealed
