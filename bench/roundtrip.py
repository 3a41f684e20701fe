"""One alloc with a prefix match, and one peek, beside a bare echo of messages of the same bytes.

The echo is the least that pyzmq and msgpack can do: a ROUTER in a process of its own that unpacks
the request and packs a reply of the same form as the daemon's, and a DEALER that does the same on
its side. Both servers are asked in turn, request by request, so that noise meets both alike.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable

import msgpack
import numpy as np
import zmq

import kvd_client
from bench.daemon import running_daemon
from bench.report import Row, row
from kvd_client import Model, PromptKeys
from kvd_proto import codec
from kvd_proto.messages import Alloc, Allocated, Message, Release

BLOCK_TOKENS = 32
LAYERS = (("f16", 512, "f16", 512),)


def measure(n_requests: int) -> list[Row]:
    """Rows for one block and for 32 blocks: microseconds of a whole round trip."""
    rows: list[Row] = []
    with running_daemon("256MiB") as runtime_dir, tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/echo.sock"
        echo = multiprocessing.get_context("spawn").Process(target=_serve_echo, args=(address,))
        echo.start()
        try:
            with kvd_client.connect(runtime_dir, name="bench") as client:
                rows += _measure(client, address, 1, n_requests)
                rows += _measure(client, address, 32, n_requests)
        finally:
            echo.terminate()
            echo.join()
    return rows


def _measure(client: kvd_client.Client, address: str, n_blocks: int, n_requests: int) -> list[Row]:
    model = Model("bench", os.urandom(32), "array", LAYERS, BLOCK_TOKENS)
    tokens = np.arange(n_blocks * BLOCK_TOKENS, dtype=np.uint32)
    bare = zmq.Context.instance().socket(zmq.DEALER)
    bare.connect(address)
    with client.open_context(model, n_seq_max=1) as context:
        with context.alloc(tokens) as sequence:
            payload = bytes(model.format().max_bytes)
            client.flush(sequence.append(tokens, [payload] * n_blocks))
        session = client.session
        assert session is not None
        message = Alloc(context.number, "bench", tokens.tobytes(), 0, 0, 0)
        reply = _ask(session.dealer, message, Allocated)
        _release(session.dealer, context.number, reply)
        likeness = msgpack.packb([7, 0, *reply])
        prompt = PromptKeys(tokens)
        if context.peek(prompt) != len(tokens):
            raise RuntimeError("the blocks that were stored are not in the index")
        echoes: list[float] = []
        peeks: list[float] = []
        computed: list[float] = []
        allocs: list[float] = []
        wholes: list[float] = []
        for _ in range(n_requests):
            echoes.append(_timed(lambda: _ask_echo(bare, message, likeness)))
            started = time.perf_counter()
            reply = _ask(session.dealer, message, Allocated)
            allocs.append((time.perf_counter() - started) * 1e6)
            _release(session.dealer, context.number, reply)
            started = time.perf_counter()
            sequence = context.alloc(tokens, request="bench")
            wholes.append((time.perf_counter() - started) * 1e6)
            sequence.release()
            peeks.append(_timed(lambda: context.peek(prompt)))
            computed.append(_timed(lambda: context.peek(tokens)))
    bare.close(linger=0)
    floor = "a bare echo of the same bytes"
    label = f"{n_blocks} block{'s' if n_blocks > 1 else ''}"
    above = [alloc - echo for alloc, echo in zip(allocs, echoes, strict=True)]
    return [
        row(f"alloc, {label} matched: the daemon's round trip", allocs, "us", echoes, floor),
        row(f"alloc, {label} matched: above the echo", above, "us", echoes, floor),
        row(f"alloc, {label} matched: as Python calls it", wholes, "us", echoes, floor),
        row(f"peek, {label} cached: with known keys", peeks, "us", echoes, floor),
        row(f"peek, {label} cached: with their computation", computed, "us", echoes, floor),
    ]


def _ask(dealer: zmq.Socket[bytes], message: Message, reply_type: type) -> Allocated:
    """What a client must do at the least: pack, send, receive, unpack."""
    dealer.send(codec.encode_request(7, message))
    return reply_type._make(msgpack.unpackb(receive(dealer))[2:])


def _ask_echo(dealer: zmq.Socket[bytes], message: Message, likeness: bytes) -> object:
    dealer.send(msgpack.packb([5, 7, *message, likeness]))
    return msgpack.unpackb(dealer.recv())


def _release(dealer: zmq.Socket[bytes], context: int, reply: Allocated) -> None:
    dealer.send(codec.encode_request(8, Release(context, reply.seq_id, reply.generation, 0)))
    receive(dealer)


def receive(dealer: "zmq.Socket[bytes]") -> bytes:
    """The next reply. The client's socket has a short receive timeout, which is no end here."""
    while True:
        try:
            return dealer.recv()
        except zmq.Again:
            continue


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6


def _serve_echo(address: str) -> None:
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(address)
    while True:
        identity, frame = router.recv_multipart()
        *_, likeness = msgpack.unpackb(frame)
        router.send_multipart([identity, msgpack.packb(msgpack.unpackb(likeness))])
