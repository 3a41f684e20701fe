"""kvd, asked through its Python client in the same way as the others.

A payload is the K/V of so many tokens, in blocks as an engine of arrays would cut them: 32 tokens
each, which are 1 MiB with 16 layers of 8 heads of 64 in f16. A payload of less than that is one
block of a smaller model. One client stores and another fetches, each with a mapping of its own. A
store is alloc, appends, flush and release; a fetch is alloc, which looks up and leases, a copy of
each block into the buffer, and release.

What is stored already costs no copy, so each store of a key is of other tokens. The budget is such
that it takes the memory of the oldest one: as warm as in a daemon that has run for a while.
Payloads of each length have a daemon of their own, so that this is so from the first measurement.
"""

import contextlib
import time
from itertools import count

import numpy as np

import kvd_client
from bench.daemon import running_daemon
from bench.peers.peer import Bytes
from kvd_client import Model

BLOCK_BYTES = 1 << 20
BLOCK_TOKENS = 32
LAYERS = 16
PIECE_BYTES = 16 << 20
"""Of one append. The daemon copies one piece while the client writes the next."""
STAGING_BYTES = 64 << 20
"""The client's default."""
_TIMEOUT = 60.0


class Kvd:
    name = "kvd"

    def start(self, largest: int) -> None:
        self._sides: dict[int, _Side] = {}

    def store(self, key: str, payload: Bytes) -> float:
        return self.side(payload.size).store(key, payload)

    def fetch(self, key: str, into: Bytes) -> float:
        return self.side(into.size).fetch(key, into)

    def side(self, size: int) -> "_Side":
        """The daemon and the clients for payloads of this length."""
        if size not in self._sides:
            self._sides[size] = _Side(size)
        return self._sides[size]

    def stop(self) -> None:
        for side in self._sides.values():
            side.close()
        self._sides.clear()


class _Side:
    """A daemon and two clients, warm."""

    def __init__(self, size: int) -> None:
        block_bytes = min(BLOCK_BYTES, size)
        row = block_bytes // BLOCK_TOKENS // LAYERS // 2
        self.n_blocks, rest = divmod(size, block_bytes)
        if rest or row < 1:
            raise ValueError(f"{size} bytes are not whole blocks of {block_bytes}")
        self._per_piece = max(1, PIECE_BYTES // block_bytes)
        self._numbers = count(1)
        self._tokens: dict[str, np.ndarray] = {}
        layers = (("f16", row, "f16", row),) * LAYERS
        model = Model("bench", b"bench".ljust(32, b"-"), "array", layers, BLOCK_TOKENS)
        staging_bytes = min(STAGING_BYTES, 4 * size + (1 << 20))
        room = 2 * size + 2 * staging_bytes
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            directory = opening.enter_context(running_daemon(str(room + staging_bytes)))
            clients = [
                opening.enter_context(
                    kvd_client.connect(
                        directory, name=name, timeout=_TIMEOUT, staging_bytes=staging
                    )
                )
                for name, staging in (("stores", staging_bytes), ("fetches", 0))
            ]
            self._writer, self._reader = clients
            self._stores, self._fetches = (
                opening.enter_context(client.open_context(model, n_seq_max=2)) for client in clients
            )
            payload, into = np.ones(size, np.uint8), np.ones(size, np.uint8)
            self._opened = opening.pop_all()
            for _ in range(room // size + 2):
                self.store("warm", payload)
                self.fetch("warm", into)

    def store(self, key: str, payload: Bytes) -> float:
        tokens = self._new_tokens(key)
        blocks = payload.reshape(self.n_blocks, -1)
        started = time.perf_counter()
        with self._stores.alloc(tokens.ravel(), request=key) as sequence:
            for at in range(0, self.n_blocks, self._per_piece):
                piece = slice(at, at + self._per_piece)
                commit = sequence.post_append(tokens[piece].ravel(), blocks[piece])
            self._writer.flush(commit)
        return time.perf_counter() - started

    def fetch(self, key: str, into: Bytes) -> float:
        tokens = self._tokens[key].ravel()
        blocks = into.reshape(self.n_blocks, -1)
        started = time.perf_counter()
        with self._fetches.alloc(tokens, request=key) as sequence:
            for index in range(sequence.n_blocks):
                sequence.read_into(index, blocks[index])
        taken = time.perf_counter() - started
        if sequence.matched_tokens != tokens.size:
            raise ValueError(f"{sequence.matched_tokens} of {tokens.size} tokens are cached")
        return taken

    def close(self) -> None:
        self._opened.close()

    def _new_tokens(self, key: str) -> np.ndarray:
        """[block][token]."""
        tokens = np.arange(self.n_blocks * BLOCK_TOKENS, dtype=np.uint32)
        tokens[0] = next(self._numbers) + (1 << 24)
        self._tokens[key] = tokens.reshape(self.n_blocks, BLOCK_TOKENS)
        return self._tokens[key]
