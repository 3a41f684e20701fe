"""How many requests a second the daemon answers, beside a bare echo of messages of the same bytes.

Sixteen clients, each of which has several requests on their way: prompts that are cached are
matched and leased, and released again. They are sockets of one process, which packs and unpacks no
more than it must, for there are two cores: what is measured is the loop on the other side.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import msgpack
import numpy as np
import zmq

import kvd_client
from bench.daemon import running_daemon
from bench.report import Row, row
from bench.roundtrip import BLOCK_TOKENS, LAYERS, receive
from kvd_client import Model
from kvd_proto import codec
from kvd_proto.messages import Alloc, Allocated, Release

CLIENTS = 16
DEPTH = 4
"""Requests of each client that are on their way."""
STAGING = 4 << 20

Socket = zmq.Socket[bytes]
Following = Callable[[int, int, list[Any]], bytes]
"""Of a client, one of its DEPTH turns, and the fields of its reply: the next request's frame."""


def measure(n_rounds: int, seconds: float = 0.5) -> list[Row]:
    """Rows for one block and for 32: requests a second, the median of rounds of `seconds`."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as opened:
        runtime_dir = opened.enter_context(running_daemon("256MiB"))
        address = f"ipc://{directory}/echo.sock"
        echo = multiprocessing.get_context("spawn").Process(target=_serve_echo, args=(address,))
        echo.start()
        opened.callback(echo.join)
        opened.callback(echo.terminate)
        return [_measure(runtime_dir, address, n_blocks, n_rounds, seconds) for n_blocks in (1, 32)]


def _measure(runtime_dir: str, address: str, n_blocks: int, n_rounds: int, seconds: float) -> Row:
    model = Model("bench", os.urandom(32), "array", LAYERS, BLOCK_TOKENS)
    tokens = np.arange(n_blocks * BLOCK_TOKENS, dtype=np.uint32)
    with ExitStack() as opened:
        contexts = []
        for number in range(CLIENTS):
            client = kvd_client.connect(runtime_dir, name=f"bench-{number}", staging_bytes=STAGING)
            opened.enter_context(client)
            contexts.append(opened.enter_context(client.open_context(model, n_seq_max=DEPTH)))
        with contexts[0].alloc(tokens) as sequence:
            payload = bytes(model.format().max_bytes)
            commit = sequence.append(tokens, [payload] * n_blocks)
            contexts[0].client.flush(commit)
        asking = [Alloc(each.number, "", tokens.tobytes(), 0, 0, 0) for each in contexts]
        frames = [
            [codec.encode_request(turn, message) for turn in range(DEPTH)] for message in asking
        ]
        ours = [each.client.session.dealer for each in contexts if each.client.session]

        def from_daemon(client: int, turn: int, reply: list[Any]) -> bytes:
            if len(reply) == 2:  # it was released
                return frames[client][turn]
            found = Allocated._make(reply[2:])
            release = Release(contexts[client].number, found.seq_id, found.generation, 0)
            return codec.encode_request(turn, release)

        bare = zmq.Context.instance()
        theirs = [opened.enter_context(bare.socket(zmq.DEALER)) for _ in contexts]
        for socket in theirs:
            socket.linger = 0
            socket.connect(address)
        # The echo answers with what it is sent: an alloc's answer, or a release's, by turns.
        likeness = _answer(ours[0], frames[0][0], from_daemon)
        release = from_daemon(0, 0, likeness)
        bodies = (
            [*msgpack.unpackb(frames[0][0])[2:], likeness[2:]],
            [
                *msgpack.unpackb(release)[2:],
                [],
            ],
        )
        echoed = [[msgpack.packb([5, turn, *body]) for body in bodies] for turn in range(DEPTH)]

        def from_echo(client: int, turn: int, reply: list[Any]) -> bytes:
            return echoed[turn][len(reply) > 2]

        rates: list[float] = []
        floors: list[float] = []
        for _ in range(n_rounds):
            floors.append(_rate(theirs, lambda _, turn: echoed[turn][0], from_echo, seconds))
            rates.append(_rate(ours, lambda c, turn: frames[c][turn], from_daemon, seconds))
    label = f"{n_blocks} block{'s' if n_blocks > 1 else ''}"
    name = f"alloc, {label} matched, and release: requests of {CLIENTS} clients at once"
    return row(name, rates, "/s", floors, "a bare echo of the same bytes")


def _answer(socket: Socket, frame: bytes, following: Following) -> list[Any]:
    """The fields of an alloc's answer, which is released again."""
    socket.send(frame)
    found: list[Any] = msgpack.unpackb(receive(socket))
    socket.send(following(0, 0, found))
    receive(socket)
    return found


def _rate(
    sockets: Sequence[Socket],
    first: Callable[[int, int], bytes],
    following: Following,
    seconds: float,
) -> float:
    """Answers a second. Each of the sockets has DEPTH requests on their way all the time; at the
    end what is open is released, and everything answered."""
    poller = zmq.Poller()
    client_of = {}
    for client, socket in enumerate(sockets):
        client_of[socket] = client
        poller.register(socket, zmq.POLLIN)
        for turn in range(DEPTH):
            socket.send(first(client, turn))
    n_answers, until = 0, None
    left = len(sockets) * DEPTH
    began = time.perf_counter()
    while left:
        is_over = time.perf_counter() - began >= seconds
        if is_over and until is None:
            until, counted = time.perf_counter(), n_answers
        for socket, _ in poller.poll():
            while True:
                try:
                    reply = msgpack.unpackb(socket.recv(zmq.NOBLOCK))
                except zmq.Again:
                    break
                n_answers += 1
                client = client_of[socket]
                if is_over and len(reply) == 2:
                    left -= 1
                else:
                    socket.send(following(client, reply[0], reply))
    assert until is not None
    return counted / (until - began)


def _serve_echo(address: str) -> None:
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(address)
    while True:
        identity, frame = router.recv_multipart()
        _, turn, *_, answer = msgpack.unpackb(frame)
        router.send_multipart([identity, msgpack.packb([turn, 0, *answer])])
