"""A stream of hostile messages from a seed, against a real daemon, and what must hold after it.

Covers requests of every operation with legal, mutated and illegal fields, handles that are live,
ended or another's, frames and datagrams of any bytes. The same seed makes the same stream, but for
the daemon's answers, on which handles depend. A small run: test_wire_fuzz.py; a long one:
tests/soak/test_wire_fuzz.py.
"""

import contextlib
import os
import random
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from struct import pack
from typing import Any

import msgpack
import zmq

from kvd_proto import PROTOCOL_VERSION, codec
from kvd_proto.checks import Check
from kvd_proto.errors import BY_CODE, SequenceLimit
from kvd_proto.keys import arena_fingerprint
from kvd_proto.messages import (
    OPERATIONS,
    Alloc,
    Append,
    CloseContext,
    Config,
    Events,
    Evict,
    Explain,
    Flush,
    Forget,
    Get,
    Hello,
    KeepAlive,
    ListClients,
    ListPins,
    ListSequences,
    OpenContext,
    Pin,
    RegisterModel,
    Release,
    Reload,
    Status,
    Unpin,
    Verify,
)
from tests.proto.shapes import example, fields_of, illegal, largest
from tests.shell.conftest import BYSTANDERS_TOKENS, Bystander
from tests.shell.raw import (
    BLOCK_TOKENS,
    FINGERPRINT,
    LAYERS,
    SECONDS,
    Raw,
    expected_blocks,
    lifeline,
    many_tokens,
    until,
)
from tests.support import Daemon

ON_THE_WIRE = frozenset(BY_CODE) - {"internal", "unavailable", "deadline_exceeded"}
"""What a request may be answered; `internal` would be a fault of ours."""
N_CLIENTS = 4
PINNABLE = arena_fingerprint(FINGERPRINT, "llama-state", BLOCK_TOKENS)
IN_FLIGHT = 200
"""Far below the 1,000 replies after which a client is let go for not reading."""
CODE_OF = {op.request: op.code for op in OPERATIONS}
RARE = {
    Verify: 0.01, Status: 0.1, ListClients: 0.2, ListSequences: 0.2, ListPins: 0.2, Evict: 0.2,
    Config: 0.2, Reload: 0.05,
}  # fmt: skip
"""How often one is sent when it is drawn: those that walk over everything."""
NUMBERS = (0, 1, 2, 7, 8, 31, 255, 256, 4095, 4096, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
HEADS = (b"\x80", b"\x91", b"\x9f", b"\xc0", b"\xc1", b"\xc4\xff", b"\xc6\xff\xff\xff\xff",
         b"\xc7\x01\x05", b"\xcf" + b"\xff" * 8, b"\xd6\xff\0\0\0\0", b"\xd9\xff",
         b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 600)  # fmt: skip


@cache
def wrong(check: Check) -> list[Any]:
    """What the check must refuse, but for what has megabytes."""
    return [value for value in illegal(check) if len(msgpack.packb(value)) < 10_000]


@dataclass
class Tally:
    """What a run has seen."""

    sent: int = 0
    datagrams: int = 0
    sessions: int = 0
    answers: Counter[str] = field(default_factory=Counter)


class Evil:
    """One hostile session. `handles` are (context, seq_id, generation), live ones and ended
    ones."""

    def __init__(self, daemon: Daemon, rng: random.Random) -> None:
        self.raw = Raw(daemon, staging_bytes=1 << 16, name="evil")
        self.rng = rng
        self.in_flight = 0
        self.contexts: list[int] = []
        self.handles: list[tuple[int, int, int]] = []
        self.asked: dict[int, Any] = {}
        self.next = 0
        self.prompt = many_tokens(rng.randrange(4) * 1000, 4 * BLOCK_TOKENS)
        self.staged = self.raw.stage(self.prompt)
        self.raw.register()

    def send(self, frames: list[bytes]) -> None:
        self.raw.dealer.send_multipart(frames)
        self.in_flight += 1

    def receive(self, tally: Tally, *, all_of_them: bool) -> None:
        """Take answers in, and check that each is one of the family."""
        if all_of_them:  # one that follows, perhaps for a minute, is answered before the next one
            self.send([codec.encode_request(0, Events(0, 0, 1, [], ""))])
        while self.in_flight and (self.raw.dealer.poll(SECONDS * 1000) if all_of_them else True):
            try:
                frames = self.raw.dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                assert not all_of_them, f"{self.in_flight} requests have no answer"
                return
            assert len(frames) == 1
            self.in_flight -= 1
            reply = msgpack.unpackb(frames[0], strict_map_key=False)
            message = self.asked.pop(reply[0], None)
            if reply[1] == 1:
                assert reply[2] in ON_THE_WIRE, (reply, message)
                tally.answers[reply[2]] += 1
                continue
            tally.answers["success"] += 1
            # A flipped bit may have made another operation of it, with another reply.
            if isinstance(message, OpenContext) and len(reply) == 4:
                self.contexts.append(reply[2])
            elif isinstance(message, Alloc) and len(reply) == 7:
                self.handles.append((message.context, reply[2], reply[3]))
        assert not (all_of_them and self.in_flight), f"{self.in_flight} requests have no answer"

    # --- what it sends

    def message(self, foreign: list[tuple[int, int, int]]) -> Any:
        """A request that makes sense, or nearly."""
        rng = self.rng
        kind = rng.choice(OPERATIONS).request
        while rng.random() > RARE.get(kind, 1.0):
            kind = rng.choice(OPERATIONS).request
        handles = foreign if rng.random() < 0.1 and foreign else self.handles[-20:]
        handle = rng.choice(handles) if handles else (1, 0, 1)
        context = rng.choice(self.contexts[-3:]) if self.contexts else handle[0]
        cut = 4 * rng.randrange(len(self.prompt) // 4 + 1)
        match kind.__name__:
            case "RegisterModel":
                number = rng.choice((0, 0, 0, 1, 2))
                fingerprint = bytes([number] * 32) if number else FINGERPRINT
                traits = rng.choice(((), [["a", "b"]], [["a", "x" * 200]] * 64))
                return RegisterModel(
                    "model", fingerprint, "llama-state", BLOCK_TOKENS, LAYERS, traits
                )
            case "OpenContext":
                return OpenContext(rng.choice((1, 1, 1, 2, 77)), rng.randrange(1, 9), [])
            case "CloseContext":
                # Few: each closes sequences that are worth attacking.
                return CloseContext(context if rng.random() < 0.3 else handle[0] ^ 1)
            case "Alloc":
                reserve = rng.choice((0, 0, 0, 8, 100, 1 << 20))
                wait, idle = rng.choice((0, 0, 3)), rng.choice((0, 0, 5))
                use, store = rng.choice((1, 1, 1, 0)), rng.choice((1, 1, 1, 0))
                return Alloc(context, "evil", self.prompt[:cut], reserve, wait, idle, use, store)
            case "Append":
                count = -(-cut // (4 * BLOCK_TOKENS))
                staged = self.staged[: 8 * count]
                if rng.random() < 0.2:
                    staged = pack(f"<{count}Q", *[rng.choice(NUMBERS) for _ in range(count)])
                return Append(*handle, rng.choice((0, 0, 0, 8, 16)), self.prompt[:cut], staged)
            case "Get":
                return Get(*handle, rng.choice((0, 1, 1 << 31)))
            case "KeepAlive":
                seq_ids, generations = (
                    ([handle[1]], [handle[2]]) if rng.random() < 0.5 else ([], [])
                )
                return KeepAlive(handle[0], seq_ids, generations)
            case "Release":
                return Release(*handle, rng.randrange(2))
            case "Flush":
                return Flush(rng.choice((0, 1, 2, 1 << 40)))
            case "Pin":
                model = PINNABLE if rng.random() < 0.9 else FINGERPRINT
                owner, ttl = rng.choice(("a", "b")), rng.choice((0, 1, 50))
                return Pin(model, self.prompt[:cut], owner, ttl)
            case "Unpin":
                return Unpin(rng.choice(("a", "b", "none")), rng.choice(("", "model", "none")))
            case "Events":
                since, kinds = rng.choice((0, 0, 5, 1 << 40)), rng.choice(([], ["hit"], ["none"]))
                return Events(since, rng.choice((0, 0, 3)), rng.randrange(1, 500), kinds, "")
            case "Evict":
                tenant = rng.choice(("", "", "default", "none"))
                return Evict(rng.choice(("", "model", "none")), rng.randrange(3), tenant)
            case "Explain":
                model, tenant = rng.choice((PINNABLE, FINGERPRINT)), rng.choice(("", "none"))
                return Explain(model, self.prompt[:cut], tenant, rng.choice(([], [["a", "c"]])))
            case "Forget":
                return Forget(PINNABLE, self.prompt[: cut or 4], rng.choice(("", "", "none")))
            case _:
                return kind()

    def frames(self, foreign: list[tuple[int, int, int]]) -> list[bytes]:
        rng = self.rng
        message = self.message(foreign)
        self.next += 1
        correlation = self.next
        self.asked[correlation] = message
        if len(self.asked) > 4 * IN_FLIGHT:
            del self.asked[next(iter(self.asked))]
        how = rng.random()
        if how < 0.5:
            return [codec.encode_request(correlation, message)]
        if how < 0.8:
            # One field of another type, or beyond its range, or at its very end.
            fields = list(message)
            checks = [each.check for each in fields_of(type(message))]
            if fields:
                at = rng.randrange(len(fields))
                kind = rng.random()
                if kind < 0.5:
                    fields[at] = rng.choice(wrong(checks[at]))
                elif kind < 0.7:
                    fields[at] = example(checks[at])
                elif kind < 0.701:
                    fields[at] = rng.choice([largest(checks[at]), illegal(checks[at])[-1]])
                else:
                    fields[at] = rng.choice(NUMBERS)
            if rng.random() < 0.1:
                correlation = rng.choice((0, -1, 1 << 63, "7", None, True, 1.0))
            if rng.random() < 0.1:
                fields.append(rng.choice((0, b"", None)))
            return [msgpack.packb([CODE_OF[type(message)], correlation, *fields])]
        if how < 0.95:
            return [self.spoil(codec.encode_request(correlation, message))]
        if how < 0.98:
            frame = codec.encode_request(correlation, message)
            return rng.choice(([b"", frame], [frame, b""], [frame, frame], [b""], [b""] * 30))
        return [rng.randbytes(rng.choice((1, 10, 100, 5000)))]

    def spoil(self, frame: bytes) -> bytes:
        rng, spoilt = self.rng, bytearray(frame)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(spoilt) + 1)
            kind = rng.randrange(5)
            if kind == 0 and at < len(spoilt):
                spoilt[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del spoilt[at:]
            elif kind == 2:
                spoilt[at:at] = rng.choice(HEADS)
            elif kind == 3:
                spoilt[at : at + 4] = rng.choice(HEADS)
            else:
                spoilt[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        return bytes(spoilt)

    def scribble(self) -> None:
        """Write anywhere into the staging, while it may be copied; or set it right again."""
        if self.rng.random() < 0.5:
            at = self.rng.randrange(4096, len(self.raw.staging) - 8)
            self.raw.staging[at : at + 8] = self.rng.randbytes(8)
        else:
            self.raw.stage(self.prompt)

    def close(self) -> None:
        self.raw.close()


def fuzz_lifeline(daemon: Daemon, rng: random.Random) -> None:
    """A connection that says something else than hello, or hangs up in the middle of it."""
    staging_bytes = rng.choice((0, 0, 4096, 1 << 41))
    hello = codec.encode_datagram(Hello(PROTOCOL_VERSION, "fuzz", staging_bytes))
    with lifeline(daemon) as sock, contextlib.suppress(OSError):
        match rng.randrange(6):
            case 0:
                sock.send(rng.randbytes(rng.randrange(1, 5000)))
            case 1:
                spoilt = bytearray(hello)
                spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
                sock.send(bytes(spoilt))
            case 2:
                sock.send(hello)
                sock.send(hello)
            case 3:
                sock.send(b"")
            case 4:
                socket.send_fds(sock, [hello], [sock.fileno()])
            case _:
                sock.send(hello[: rng.randrange(len(hello))] or b"\x90")


def check(bystander: Bystander) -> None:
    """Its K/V is what it was to the bit, and is found again, unless others have all sequences."""
    client = bystander.client
    assert client.read(bystander.context, bystander.sequence) == expected_blocks(4, fill=7)
    with contextlib.suppress(SequenceLimit):
        again = client.alloc(bystander.context, BYSTANDERS_TOKENS)
        assert again.matched_tokens == 4 * BLOCK_TOKENS
        client.release(bystander.context, again)


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def rss(daemon: Daemon) -> int:
    with open(f"/proc/{daemon.process.pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def run(daemon: Daemon, bystander: Bystander, n_messages: int, seed: int) -> Tally:
    """Send so many messages, and check on the way and at the end that nobody was hurt."""
    rng = random.Random(seed)
    tally = Tally()
    # What a daemon takes once: arenas of the models that are made, buffers, caches.
    _round(daemon, bystander, rng, Tally(), 2000)
    until(lambda: bystander.client.status()["clients"] == 1)
    arena = _cost_of_an_arena(daemon, bystander)
    before = descriptors(daemon) - arena * n_arenas(bystander), rss(daemon)
    began = time.monotonic()
    while tally.sent < n_messages:
        _round(daemon, bystander, rng, tally, min(20_000, n_messages - tally.sent))
        assert daemon.process.poll() is None, daemon.log.read_text()[-4000:]
        until(lambda: bystander.client.status()["clients"] == 1)
        report = bystander.client.verify()
        assert report["ok"], (seed, report["differences"])
    seconds = time.monotonic() - began
    # A fingerprint with a flipped bit is another model, and arenas stay.
    until(lambda: descriptors(daemon) - arena * n_arenas(bystander) == before[0])
    grown = rss(daemon) - before[1]
    log = daemon.log.read_text()
    assert "recount disagrees" not in log
    assert "Traceback" not in log, log[log.index("Traceback") :][:4000]
    print(
        f"seed {seed}: {tally.sent} messages and {tally.datagrams} lifelines in {seconds:.0f} s, "
        f"RSS {grown / 2**20:+.1f} MiB, {n_arenas(bystander)} arenas, "
        f"{dict(tally.answers.most_common())}"
    )
    assert grown < 32 << 20, grown
    return tally


def n_arenas(bystander: Bystander) -> int:
    return len(bystander.client.status()["models"])


def _cost_of_an_arena(daemon: Daemon, bystander: Bystander) -> int:
    """The descriptors that the daemon has for each."""
    before = descriptors(daemon), n_arenas(bystander)
    fingerprint = os.urandom(32)
    message = RegisterModel("cost", fingerprint, "llama-state", BLOCK_TOKENS, LAYERS)
    bystander.client.call(message)
    for fd in bystander.client.receive_datagram()[1]:
        os.close(fd)
    assert n_arenas(bystander) == before[1] + 1
    return descriptors(daemon) - before[0]


def _round(
    daemon: Daemon, bystander: Bystander, rng: random.Random, tally: Tally, n_messages: int
) -> None:
    evils = [Evil(daemon, rng) for _ in range(N_CLIENTS)]
    tally.sessions += N_CLIENTS
    theirs = bystander.sequence
    target = (bystander.context, theirs.seq_id, theirs.generation)
    try:
        for number in range(n_messages):
            evil = rng.choice(evils)
            if evil.in_flight >= IN_FLIGHT:
                evil.receive(tally, all_of_them=True)
            foreign = [target, *rng.choice(evils).handles[-5:]]
            evil.send(evil.frames(foreign))
            tally.sent += 1
            if number % 50 == 0:
                evil.scribble()
                evil.receive(tally, all_of_them=False)
            if number % 100 == 0:
                fuzz_lifeline(daemon, rng)
                tally.datagrams += 1
            if number % 500 == 0:
                check(bystander)
            if number % 5000 == 4999:
                # A death in the middle of everything; its answers are nobody's.
                at = rng.randrange(N_CLIENTS)
                evils[at].close()
                evils[at] = Evil(daemon, rng)
                tally.sessions += 1
        for evil in evils:
            evil.receive(tally, all_of_them=True)
        check(bystander)
    finally:
        for evil in evils:
            evil.close()
