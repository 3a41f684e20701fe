"""Worker processes that do random real work with the daemon and check every byte they read.

    python -m tests.soak.workers ADDRESS        a nursery: forks a worker for each line of its input

A worker opens a connection to ADDRESS first, tells who it is, and goes on until it is killed, is
told to stop, or that connection ends. What it finds wrong it tells, and ends.

    worker ──► ("hello", number, pid), ("ready",), ("child", pid),
               ("settled", operations, rows compared), ("failed", traceback)
    test   ──► "settle": re-read everything, release all but what it keeps, say so, and wait
               "go", "stop"
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import kvd_client
from kvd_client.arrays import ArrayContext
from kvd_client.errors import BadPosition, ReservationExceeded, ResourceError
from tests.soak.content import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    MODEL,
    N_LAYERS,
    block_rows,
    blocks,
    prompt,
    rows,
)

N_SEQ_MAX = 4
STAGING = 256 * 1024


@dataclass(frozen=True)
class Spec:
    """What one worker is to do."""

    number: int
    seed: int
    runtime_dir: str
    arrays: bool = False
    """Whether it uses the array interface."""
    bystander: bool = False
    """Whether it keeps a sequence of its own from its beginning to its end."""
    fork_after: float | None = None
    """Seconds of work, after which it forks a child that does nothing but hold what it inherits."""


@dataclass(eq=False)
class Held:
    """An open sequence, and the prompt that is its content as far as it goes."""

    sequence: Any
    tokens: list[int]
    appends: list[Any] = field(default_factory=list)
    """Those that were sent: one that was only posted may have been refused since."""


class BlockWorker:
    """Works with blocks, through `Context` and `Sequence`."""

    def __init__(self, client: kvd_client.Client, chance: random.Random) -> None:
        self.client = client
        self.chance = chance
        self.rows_checked = 0
        self.held: list[Held] = []
        self.kept: list[Held] = []
        """Never released, and never appended to again."""
        self._buffer = np.empty(BLOCK_BYTES, np.uint8)
        self.context = client.open_context(MODEL.model, N_SEQ_MAX)

    def step(self) -> None:
        """One random operation. What finds no room is part of life; anything else is an error."""
        chance = self.chance
        kinds = [self.open, self.store, self.store, self.read, self.let_go, self.flush, self.rare]
        with suppress(ResourceError):
            chance.choice(kinds)()

    def keep(self) -> None:
        """Store a prompt, and hold it for good."""
        tokens = prompt(self.chance)
        sequence = self.context.alloc(tokens, wait=20)
        rest = tokens[sequence.full_tokens :]
        sequence.append(rest, blocks(tokens, sequence.full_tokens))
        self.kept.append(Held(sequence, tokens))

    def settle(self) -> None:
        """Read everything once more; then hold only what is kept."""
        assert self.client.flush().failures == []
        for held in self.kept + self.held:
            self.check(held)
        while self.held:
            self.held.pop().sequence.release()

    def open(self) -> None:
        chance = self.chance
        tokens = prompt(chance)
        sequence = self.context.alloc(
            tokens,
            reserve_tokens=chance.choice((0, 0, 0, 3 * BLOCK_TOKENS)),
            wait=chance.choice((0.0, 0.0, 0.005)),
            idle_timeout=chance.choice((0.0, 60.0)),
        )
        held = Held(sequence, tokens)
        self.held.append(held)
        self.compare(held, sequence.matched_tokens)

    def store(self) -> None:
        if not self.held:
            return
        chance, held = self.chance, self.chance.choice(self.held)
        sequence, start = held.sequence, held.sequence.full_tokens
        if start + BLOCK_TOKENS > len(held.tokens):
            held.tokens = held.tokens + prompt(chance)
        end = chance.randrange(start + 1, min(len(held.tokens), start + 6 * BLOCK_TOKENS) + 1)
        known = held.tokens[:end]
        append = chance.choice((sequence.append, sequence.post_append))
        try:
            held.appends.append(append(known[start:], blocks(known, start), start=start))
        except ReservationExceeded:
            self.drop(held)
        except BadPosition:
            refused = [type(commit.error) for commit in held.appends if commit.error]
            allowed = (ResourceError, ReservationExceeded)
            assert any(issubclass(error, allowed) for error in refused), refused
            self.drop(held)

    def read(self) -> None:
        if self.kept or self.held:
            self.check(self.chance.choice(self.kept + self.held))

    def let_go(self) -> None:
        if self.held:
            self.drop(self.chance.choice(self.held))

    def flush(self) -> None:
        assert self.client.flush().failures == []

    def rare(self) -> None:
        what = self.chance.random()
        if what < 0.1:
            self.client.evict(blocks=self.chance.randrange(1, 20))
        elif what < 0.15 and not self.kept:
            self.held.clear()
            self.context.close()
            self.context = self.client.open_context(MODEL.model, N_SEQ_MAX)

    def drop(self, held: Held) -> None:
        self.held.remove(held)
        held.sequence.release(failed=self.chance.random() < 0.2)

    def check(self, held: Held) -> None:
        """What the sequence has in the arena now."""
        self.compare(held, held.sequence.refresh())

    def compare(self, held: Held, n_tokens: int) -> None:
        """The first `n_tokens` rows of a sequence's blocks with what they must be."""
        if not n_tokens:
            return
        expected = rows(held.tokens[:n_tokens])
        for index, start in enumerate(range(0, n_tokens, BLOCK_TOKENS)):
            held.sequence.read_into(index, self._buffer)
            wanted = expected[:, :, start : start + BLOCK_TOKENS]
            found = block_rows(self._buffer)[:, :, : wanted.shape[2]]
            assert np.array_equal(found, wanted), f"wrong bytes in block {index} of {held.tokens}"
        self.rows_checked += n_tokens


class ArrayWorker:
    """Works with arrays, through `ArrayContext`."""

    def __init__(self, client: kvd_client.Client, chance: random.Random) -> None:
        self.client = client
        self.chance = chance
        self.rows_checked = 0
        self.held: list[Held] = []
        self.kept: list[Held] = []
        """Never released, and never appended to again."""
        self.context = ArrayContext(client, MODEL, N_SEQ_MAX)

    def step(self) -> None:
        kinds = [self.open, self.store, self.store, self.read, self.let_go, self.flush]
        with suppress(ResourceError):
            self.chance.choice(kinds)()

    def keep(self) -> None:
        tokens = prompt(self.chance)
        held = Held(self.context.alloc(tokens, wait=20), tokens)
        held.tokens = tokens[: held.sequence.matched_tokens]
        self.extend(held, tokens[len(held.tokens) :])
        held.sequence.flush()
        self.kept.append(held)

    def settle(self) -> None:
        self.flush()
        for held in self.kept + self.held:
            self.check(held)
        while self.held:
            self.held.pop().sequence.release(store=False)

    def open(self) -> None:
        tokens = prompt(self.chance)
        sequence = self.context.alloc(tokens, wait=self.chance.choice((0.0, 0.005)))
        held = Held(sequence, tokens[: sequence.matched_tokens])
        self.held.append(held)
        self.check(held)
        self.extend(held, tokens[sequence.matched_tokens :])

    def store(self) -> None:
        if self.held:
            self.extend(self.chance.choice(self.held), prompt(self.chance)[-20:])

    def read(self) -> None:
        if self.kept or self.held:
            self.check(self.chance.choice(self.kept + self.held))

    def let_go(self) -> None:
        if self.held:
            held = self.held.pop(self.chance.randrange(len(self.held)))
            held.sequence.release(store=self.chance.random() < 0.8)

    def flush(self) -> None:
        assert self.client.flush().failures == []

    def extend(self, held: Held, tokens: list[int]) -> None:
        if tokens:
            longer = held.tokens + tokens
            new = rows(longer, len(held.tokens))[:, :, :, None, :]
            held.sequence.append(tokens, list(new[:, 0]), list(new[:, 1]))
            held.tokens = longer

    def check(self, held: Held) -> None:
        expected = rows(held.tokens)
        for layer in range(N_LAYERS):
            k, v = held.sequence.gather(layer)
            assert np.array_equal(k[:, 0], expected[layer, 0]), f"wrong K of {held.tokens}"
            assert np.array_equal(v[:, 0], expected[layer, 1]), f"wrong V of {held.tokens}"
        self.rows_checked += len(held.tokens)


def work(spec: Spec, orders: Connection) -> None:
    """One worker's life."""
    chance = random.Random(spec.seed)
    client = kvd_client.connect(spec.runtime_dir, name="worker", staging_bytes=STAGING, timeout=20)
    worker = (ArrayWorker if spec.arrays else BlockWorker)(client, chance)
    if spec.bystander:
        worker.keep()
    orders.send(("ready",))
    fork_at = None if spec.fork_after is None else time.monotonic() + spec.fork_after
    steps = 0
    while True:
        worker.step()
        steps += 1
        if fork_at is not None and time.monotonic() >= fork_at:
            fork_at = None
            child = os.fork()
            if child == 0:
                hold(orders)
            orders.send(("child", child))
        if orders.poll():
            order = orders.recv()
            if order == "settle":
                worker.settle()
                orders.send(("settled", steps, worker.rows_checked))
                order = orders.recv()
            if order == "stop":
                return


def hold(orders: Connection) -> None:
    """Live on, with every descriptor of the parent, until the test has gone or says so."""
    try:
        while True:
            orders.recv()
    except EOFError:
        os._exit(0)


def be(spec: Spec, address: str) -> None:
    """The whole of a forked worker process; does not return."""
    code = 1
    try:
        with connection.Client(address, "AF_UNIX") as orders:
            orders.send(("hello", spec.number, os.getpid()))
            try:
                work(spec, orders)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                pass  # the test has ended
            except BaseException:
                orders.send(("failed", traceback.format_exc()))
                raise
        code = 0
    finally:
        os._exit(code)


def main(address: str) -> None:
    """Fork a worker for each line of standard input, a Spec as JSON; its end ends us."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        if os.fork() == 0:
            sys.stdin = None  # type: ignore[assignment]
            be(Spec(**json.loads(line)), address)


if __name__ == "__main__":
    main(sys.argv[1])
