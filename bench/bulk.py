"""Store and fetch of payloads, through kvd and through its peers, beside plain memcpy.

A store lasts until others can see the payload; a fetch, until it is in a private, touched buffer.
Everything is warm: a round of each goes before the measured ones, and a fetch and its floor each
follow upon another of the same bytes. All keep payloads in memory alone. Each is asked in turn in
each round, behind a floor of its own.

Payloads of 1 MiB and more are 1 MiB blocks of 32 tokens for kvd, chunks of 256 tokens and at most
8 MiB for LMCache, values of at most 256 MiB for Redis and items of at most 16 MiB for memcached.
A fetch of 64 KiB is a full get of one block, which LMCache does in five calls.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import psutil

import kvd_client
from bench.daemon import running_daemon
from bench.peers.kvd import Kvd
from bench.peers.lmcache import LMCache
from bench.peers.memcached import Memcached
from bench.peers.peer import Bytes, LeftOut, Peer
from bench.peers.redis import Redis
from bench.report import Row, paired_row, row
from kvd_client.arrays import ArrayContext, ArrayLayer, ArrayModel

SIZES = tuple(
    kilobytes << 10 for kilobytes in (64, 1 << 10, 16 << 10, 23 << 10, 64 << 10, 256 << 10)
)
LARGE = 2 << 30
PEERS = (Redis, Memcached, LMCache)
MEMCPY = "plain memcpy of the same bytes"
VIEWS, VIEWS_US = 32, 50.0
MEMORY = 14
"""So many times a payload's length is what it takes of memory with all peers."""
_SLOW_SIZE = 64 << 20
"""From here on there are half as many rounds."""

WHY = {
    (
        "store",
        "LMCache",
    ): "A worker of LMCache writes into the shared pool itself, and is believed: "
    "one copy. kvd's daemon alone writes what others read: it copies from the worker's staging and "
    "sums the copy, so a worker that is killed, or means ill, leaves no torn block.",
    ("fetch", "LMCache"): "Both are one copy out of shared memory.",
}
"""What a peer that is faster does otherwise."""
WHY_SMALL = {
    "store": "A store is four requests to a daemon in Python, one of which is answered when the "
    "copy is checked and summed; in a payload this small they take longer than two copies through "
    "a socket.",
    "fetch": "A fetch is two requests to a daemon in Python, for the lease and to give it back; in "
    "a payload this small they take longer than two copies through a socket.",
}
"""What it has less of, otherwise."""
GET = "a full get: lookup, lease, read one block of 64 KiB, release"


class Found(NamedTuple):
    rows: list[Row]
    remarks: list[str]
    """Who was left out, and where a peer is faster."""


def measure(n_rounds: int, sizes: Sequence[int] = SIZES) -> Found:
    """Rows in milliseconds, and of views in microseconds."""
    remarks: list[str] = []
    rows: list[Row] = []
    available = psutil.virtual_memory().available
    if too_large := [size for size in sizes if MEMORY * size > available]:
        remarks.append(f"{', '.join(map(label, too_large))} left out: too little memory for all.")
        sizes = [size for size in sizes if size not in too_large]
    with ExitStack() as opened:
        peers = _started(max(sizes), opened, remarks)
        for size in sizes:
            rounds = n_rounds if size < _SLOW_SIZE else -(-n_rounds // 2)
            rows += _measure(size, max(2, rounds), peers)
    remarks += [_remark(each) for each in rows if _is_slower(each)]
    return Found([*rows, views(20 * n_rounds)], remarks)


def label(size: int) -> str:
    """64 KiB, 23 MiB, 2 GiB."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size >> shift} {unit}"
    return f"{size} B"


def views(n_repeats: int) -> Row:
    """Views of leased blocks, in one layer, as an engine of arrays asks for them: its first look,
    for which the arrays are made."""
    layers = [ArrayLayer(8, 64, 64)] * 16
    model = ArrayModel("bench", "bench", layers, "float16")
    tokens = np.arange(VIEWS * model.block_tokens, dtype=np.uint32)
    taken: list[float] = []
    with (
        running_daemon("256MiB") as directory,
        kvd_client.connect(directory) as client,
        ArrayContext(client, model) as context,
    ):
        with context.alloc(tokens) as sequence:
            k = v = np.ones((tokens.size, 8, 64), np.float16)
            sequence.append(tokens, [k] * len(layers), [v] * len(layers))
            sequence.flush()
        for _ in range(n_repeats):
            with context.alloc(tokens) as sequence:
                started = time.perf_counter()
                shown = sequence.views(0)
                taken.append((time.perf_counter() - started) * 1e6)
                if len(shown) != VIEWS:
                    raise SystemExit(f"{len(shown)} blocks are leased, not {VIEWS}")
                del shown
    return row(f"views of {VIEWS} leased blocks", taken, "us", [VIEWS_US], "what is promised")


def _started(largest: int, opened: ExitStack, remarks: list[str]) -> list[Peer]:
    """kvd, and each peer that runs here."""
    peers: list[Peer] = []
    for peer in (Kvd(), *(kind() for kind in PEERS)):
        opened.callback(peer.stop)
        try:
            peer.start(largest)
        except LeftOut as why:
            remarks.append(f"{peer.name} was left out: {why}.")
            print(f"  {remarks[-1]}", flush=True)
            continue
        peers.append(peer)
    return peers


def _measure(size: int, n_rounds: int, peers: list[Peer]) -> list[Row]:
    payload = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    source, into = payload.copy(), np.ones(size, np.uint8)
    floors: dict[tuple[str, str], list[float]] = defaultdict(list)
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(-1, n_rounds):
        payload[:8] = np.frombuffer(np.int64(number).tobytes(), np.uint8)
        for peer in peers:
            floor = {"store": _copy(into, source)}
            value = {"store": peer.store(f"key-{number % 2}", payload)}
            floor["fetch"] = _copy(into, source)
            into[:] = 0
            peer.fetch(f"key-{number % 2}", into)
            value["fetch"] = peer.fetch(f"key-{number % 2}", into)
            _check(peer, into, payload)
            if number >= 0:
                for what in value:
                    floors[what, peer.name].append(floor[what] * 1e3)
                    values[what, peer.name].append(value[what] * 1e3)
    rows: list[Row] = []
    kvd, *others = [peer.name for peer in peers]
    for what in ("store", "fetch"):
        name = f"{what} of {label(size)}, {kvd}"
        if (what, size) == ("fetch", SIZES[0]):
            name = f"{GET}, {kvd}"
        rows.append(paired_row(name, values[what, kvd], "ms", floors[what, kvd], MEMCPY))
        rows += [
            paired_row(name, values[what, kvd], "ms", values[what, other], other, peer=other)
            for other in others
        ]
    return rows


def _copy(into: Bytes, source: Bytes) -> float:
    """Seconds of a copy between buffers, the second time: the first one warms them."""
    np.copyto(into, source)
    started = time.perf_counter()
    np.copyto(into, source)
    return time.perf_counter() - started


def _check(peer: Peer, into: Bytes, payload: Bytes) -> None:
    if not np.array_equal(into, payload):
        raise SystemExit(f"{peer.name} has given other bytes than were stored")


def _is_slower(found: Row) -> bool:
    return bool(found.peer) and found.ratio > 1 and "KiB" not in found.name


def _remark(found: Row) -> str:
    what = found.name.split()[0]
    why = WHY.get((what, found.peer.split()[0]), WHY_SMALL[what])
    said = f"{found.peer} is faster at {found.name.rpartition(',')[0]}: kvd takes {found.ratio:.2f}"
    return f"{said} times as long. {why}".strip()
