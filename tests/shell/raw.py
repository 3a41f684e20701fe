"""A client of the bare protocol, for what the client library would never do. It checks nothing."""

import contextlib
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from struct import pack, unpack
from typing import Any, TypeVar

import zmq

from kvd_proto import PROTOCOL_VERSION, codec
from kvd_proto.errors import KvdError, from_wire
from kvd_proto.geometry import Geometry
from kvd_proto.messages import (
    COMPLETED,
    Alloc,
    Allocated,
    Append,
    Appended,
    Flush,
    Get,
    Hello,
    OpenContext,
    Refused,
    RegisterModel,
    Release,
    SegmentShared,
    Status,
    Verify,
    Welcome,
)
from kvd_proto.payload import make_format
from tests.proto.blocks import llama_block
from tests.support import Daemon

T = TypeVar("T")
SECONDS = 20.0
"""Nothing here takes a tenth of it."""
BLOCK_TOKENS = 8
LAYERS = [["f16", 64, "q8_0", 34], ["f16", 128, "q8_0", 68]]
GEOMETRY = Geometry.from_wire(LAYERS)
FORMAT = make_format("llama-state", GEOMETRY, BLOCK_TOKENS)
STRIDE = 4096
FINGERPRINT = bytes(range(32))


def until(look: Callable[[], T], seconds: float = SECONDS) -> T:
    """What `look` returns as soon as that is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)
    return found


class Raw:
    """One session: `lifeline`, `dealer`, `staging` (writable), and `arena` (read-only)."""

    def __init__(
        self, daemon: Daemon, staging_bytes: int = 1 << 18, name: str = "raw", keep_unread: int = 0
    ) -> None:
        """Say hello. Raises the error that the daemon refuses with. `keep_unread` is how many
        replies are taken from the kernel before they are read (0: any number)."""
        self._requests = f"ipc://{daemon.runtime_dir}/requests.sock"
        self.dealer: Any = None
        self.lifeline = lifeline(daemon)
        self.context = zmq.Context()
        self._correlation = 0
        self._asked: dict[int, type[Any]] = {}
        try:
            self.send_datagram(Hello(PROTOCOL_VERSION, name, staging_bytes))
            welcome, fds = self.receive_datagram()
            if isinstance(welcome, Refused):
                raise from_wire(welcome.code, welcome.message, welcome.details)
            assert isinstance(welcome, Welcome)
            self.session = welcome.session
            self.staging_fd = fds[0] if fds else -1
            self.staging = mmap.mmap(fds[0], welcome.staging_bytes) if fds else None
            self.dealer = self.connect(self.session, keep_unread)
        except BaseException:
            self.close()
            raise

    def connect(self, routing_id: bytes, keep_unread: int = 0) -> Any:
        """Another DEALER, with this routing id (empty: none)."""
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVHWM, keep_unread)
        dealer.setsockopt(zmq.SNDHWM, 10_000)
        if routing_id:
            dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        dealer.connect(self._requests)
        return dealer

    def send_datagram(self, message: Any) -> None:
        self.lifeline.send(codec.encode_datagram(message))

    def receive_datagram(self) -> tuple[Any, list[int]]:
        """A datagram and its descriptors; None at the lifeline's end."""
        datagram, fds, _, _ = socket.recv_fds(self.lifeline, 1 << 16, 4)
        return (codec.decode_datagram(datagram) if datagram else None), fds

    def post(self, message: Any) -> int:
        """Send a request and do not wait; returns its correlation."""
        self._correlation += 1
        self._asked[self._correlation] = type(message)
        self.dealer.send(codec.encode_request(self._correlation, message))
        return self._correlation

    def receive(self, seconds: float = SECONDS) -> codec.Reply:
        """The next reply, whatever it answers. Fails if none comes."""
        assert self.dealer.poll(seconds * 1000), "no reply"
        return codec.decode_reply(self.dealer.recv(), self._asked)

    def ask(self, message: Any, seconds: float = SECONDS) -> Any:
        """What a request is answered, error or not. Nothing else may be on its way."""
        correlation = self.post(message)
        reply = self.receive(seconds)
        assert reply.correlation == correlation
        return reply.body

    def call(self, message: Any) -> Any:
        """The reply to a request; raises the error that it is answered with."""
        body = self.ask(message)
        if isinstance(body, KvdError):
            raise body
        return body

    # --- what most tests need

    def register(self, name: str = "model", fingerprint: bytes = FINGERPRINT) -> int:
        """Register the model of this module; its arena is mapped as `arena`."""
        model = self.call(
            RegisterModel(name, fingerprint, "llama-state", BLOCK_TOKENS, LAYERS)
        ).model
        shared, fds = self.receive_datagram()
        assert isinstance(shared, SegmentShared)
        self.arena_fd, self.index_fd = fds
        self.arena = mmap.mmap(fds[0], shared.size, prot=mmap.PROT_READ)
        return model

    def open(self, n_seq_max: int = 4, **options: Any) -> int:
        """Register the model and open a context."""
        return self.call(OpenContext(self.register(**options), n_seq_max, [])).context

    def alloc(self, context: int, tokens: bytes, **fields: Any) -> Allocated:
        return self.call(make_alloc(context, tokens, **fields))

    def stage(self, tokens: bytes, start: int = 0, fill: int = 1, at: int = 4096) -> bytes:
        """Write valid blocks for `tokens` from position `start` on to `at`; their offsets."""
        offsets = []
        for first in range(0, len(tokens) // 4, BLOCK_TOKENS):
            count = min(BLOCK_TOKENS, len(tokens) // 4 - first)
            block = llama_block(GEOMETRY, start + first, count, fill)
            self.staging[at : at + len(block)] = bytes(block)
            offsets.append(at)
            at += STRIDE
        return pack(f"<{len(offsets)}Q", *offsets)

    def store(self, context: int, tokens: bytes, fill: int = 1) -> Allocated:
        """A sequence of these tokens, stored and sealed, and open. What matched is not stored."""
        sequence = self.alloc(context, tokens)
        start = sequence.matched_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        rest = tokens[4 * start :]
        if rest:
            staged = self.stage(rest, start, fill)
            appended = self.call(make_append(context, sequence, start, rest, staged))
            flushed = self.call(Flush(appended.commit))
            assert flushed.failures == []
        return sequence

    def append(self, context: int, sequence: Allocated, tokens: bytes, fill: int = 1) -> Appended:
        """Stage and append from position 0."""
        staged = self.stage(tokens, 0, fill)
        return self.call(make_append(context, sequence, 0, tokens, staged))

    def release(self, context: int, sequence: Allocated) -> None:
        self.call(Release(context, sequence.seq_id, sequence.generation, COMPLETED))

    def read(self, context: int, sequence: Allocated) -> list[bytes]:
        """The payloads of the sequence's sealed blocks, copied."""
        blocks = self.call(Get(context, sequence.seq_id, sequence.generation, 0))
        slots = unpack(f"<{len(blocks.slots) // 4}I", blocks.slots)
        sizes = [FORMAT.max_bytes] * len(slots)
        if slots:
            sizes[-1] = FORMAT.size(blocks.last_block_tokens)
        return [
            self.arena[STRIDE * slot : STRIDE * slot + size]
            for slot, size in zip(slots, sizes, strict=True)
        ]

    def status(self) -> dict[str, Any]:
        return self.call(Status()).report

    def verify(self) -> dict[str, Any]:
        return self.call(Verify()).report

    def close(self) -> None:
        if self.dealer is not None:
            self.dealer.close()
        self.context.destroy(linger=0)
        self.lifeline.close()
        for name in ("staging", "arena"):
            mapping = self.__dict__.pop(name, None)
            if mapping is not None:
                mapping.close()
        for name in ("staging_fd", "arena_fd", "index_fd"):
            fd = self.__dict__.pop(name, -1)
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def raw_client(daemon: Daemon, **options: Any) -> Iterator[Raw]:
    client = Raw(daemon, **options)
    try:
        yield client
    finally:
        client.close()


def lifeline(daemon: Daemon) -> socket.socket:
    """A connected lifeline that has not said hello."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Blocking: with a timeout it would be an error that the daemon's backlog is full.
        sock.connect(str(daemon.runtime_dir / "lifeline.sock"))
        sock.settimeout(SECONDS)
    except BaseException:
        sock.close()
        raise
    return sock


def has_ended(sock: socket.socket, seconds: float = SECONDS) -> bool:
    """Whether the other side closes a lifeline in time; drops what it says before."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    deadline = time.monotonic() + seconds
    while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        try:
            if not sock.recv(1 << 16):
                return True
        except ConnectionResetError:
            return True
    return False


def tokens(*numbers: int) -> bytes:
    return pack(f"<{len(numbers)}I", *numbers)


def many_tokens(first: int, count: int) -> bytes:
    return tokens(*range(first, first + count))


def make_alloc(
    context: int,
    prompt: bytes,
    *,
    reserve: int = 0,
    wait_ms: int = 0,
    idle_ms: int = 0,
    request: str = "",
) -> Alloc:
    return Alloc(context, request, prompt, reserve, wait_ms, idle_ms)


def make_append(context: int, sequence: Allocated, start: int, new: bytes, staged: bytes) -> Append:
    return Append(context, sequence.seq_id, sequence.generation, start, new, staged)


def expected_blocks(count: int, fill: int = 1, start: int = 0) -> list[bytes]:
    """What `store` stored for `count` full blocks."""
    positions = range(start, start + count * BLOCK_TOKENS, BLOCK_TOKENS)
    return [bytes(llama_block(GEOMETRY, at, BLOCK_TOKENS, fill)) for at in positions]
