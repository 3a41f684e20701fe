"""What one client's load costs another: its alloc and its store, beside the same in quiet.

Covers what takes the daemon longest: a commit of a GiB, reports over a large arena, evicting it,
large stagings, long prompts, a death that gives much back. The load is a process of its own. The
victim's quiet and loud phases alternate in one run, so that other noise meets both alike.

An alloc waits for the loop only. A store (an append of one block, and its flush) also waits for the
copier's thread twice, to give memory and to copy, so it tells how fairly that one is shared.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import kvd_client
from bench.daemon import running_daemon
from bench.report import Row, tail_row
from kvd_client import Client, Context, Model, Sequence
from kvd_client.session import Commit
from kvd_client.staging import Staged
from kvd_proto.messages import MAX_APPEND_BLOCKS

READY, DONE = "ready", "done"
GIB = 1 << 30
MIB = 1 << 20
BUDGET = "5GiB"
TOKENS = 32
WIDE = (("f16", 384, "f16", 384),) * 30
"""SmolLM2-135M: 720 KiB for a block of 32 tokens."""
NARROW = (("f16", 64, "f16", 64),)
"""One page for a block of 32 tokens: as many blocks to the byte as can be."""


@dataclass
class Phase:
    """What the victim has seen, in microseconds."""

    allocs: list[float] = field(default_factory=list)
    stores: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Stall:
    """One load and its victim."""

    load: str
    quiet: Phase
    loud: Phase

    @property
    def alloc_ratio(self) -> float:
        """p99 of the victim's alloc under load, in quiet ones."""
        return p99(self.loud.allocs) / p99(self.quiet.allocs)


def p99(values: list[float]) -> float:
    return float(np.percentile(values, 99))


def measure(gib: float) -> list[Row]:
    """Rows for every load; `gib` is how large they are."""
    rows = []
    with running_daemon(BUDGET) as runtime_dir:
        for name in LOADS:
            found = stall(runtime_dir, name, gib)
            for what in ("allocs", "stores"):
                loud, quiet = getattr(found.loud, what), getattr(found.quiet, what)
                if len(loud) > 1:  # a load may be over before one store is
                    label = f"p99 of another's {what[:-1]} while {name}"
                    rows.append(tail_row(label, loud, "us", quiet, "the same in quiet"))
    return rows


def stall(runtime_dir: str, load: str, gib: float, seconds: float = 1.0) -> Stall:
    """Measure one load of LOADS: quiet for `seconds`, then under load until it has ended."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    quiet, loud = Phase(), Phase()
    process = spawn.Process(target=_load, args=(load, runtime_dir, gib, theirs))
    process.start()
    theirs.close()
    try:
        with Victim(runtime_dir) as victim:
            while _told(ours):
                victim.sample(Phase(), until=time.monotonic() + 0.2)  # warm
                victim.sample(quiet, until=time.monotonic() + seconds)
                ours.send("go")
                while not ours.poll(0):
                    victim.sample(loud, until=time.monotonic() + 0.01)
            # What a death gives back.
            victim.sample(loud if load in DEATHS else Phase(), until=time.monotonic() + 0.5)
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    if process.exitcode != (-signal.SIGKILL if load in DEATHS else 0):
        raise SystemExit(f"the load {load!r} failed")
    return Stall(load, quiet, loud)


def _told(connection: Connection) -> bool:
    """Wait until the load is ready for another round; False at its end."""
    with suppress(EOFError):
        while connection.recv() != READY:
            pass
        return True
    return False


class Victim:
    """A client with a prompt of 32 blocks that is cached, and small blocks to store."""

    def __init__(self, runtime_dir: str) -> None:
        with ExitStack() as opened:
            self.client = opened.enter_context(
                kvd_client.connect(runtime_dir, name="victim", staging_bytes=MIB, timeout=60)
            )
            model = Model("victim", os.urandom(32), "array", NARROW, TOKENS)
            self.context = opened.enter_context(self.client.open_context(model, n_seq_max=3))
            self.payload = bytes(model.format().max_bytes)
            self.prompt = np.arange(32 * TOKENS, dtype=np.uint32)
            self.keeper = opened.enter_context(self.context.alloc(self.prompt))
            self.client.flush(self.keeper.append(self.prompt, [self.payload] * 32))
            self.stored = 0
            self.storing: _Store | None = None
            self._opened = opened.pop_all()

    def sample(self, phase: Phase, until: float) -> None:
        """Alloc, and store beside it, until the time is over; once at the least."""
        pause = 0
        while True:
            began = time.perf_counter()
            sequence = self.context.alloc(self.prompt)
            ended = time.perf_counter()
            phase.allocs.append((ended - began) * 1e6)
            sequence.release()
            pause -= 1
            if self.storing is None and pause <= 0:
                self.storing = self._store()
            elif self.storing is not None and self._is_stored(self.storing):
                phase.stores.append((ended - self.storing.began) * 1e6)
                self.storing.sequence.release()
                self.storing, pause = None, 10
            if time.monotonic() >= until:
                return

    def _store(self) -> "_Store":
        """Begin to store a block; it is seen in the staging when it is visible to all."""
        tokens = np.full(TOKENS, 1_000_000 + self.stored, dtype=np.uint32)
        self.stored += 1
        sequence = self.context.alloc(tokens)
        began = time.perf_counter()
        return _Store(sequence, sequence.post_append(tokens, [self.payload]), began)

    @staticmethod
    def _is_stored(store: "_Store") -> bool:
        session, commit = store.commit.session, store.commit
        assert session.staging is not None
        return commit.answered and session.staging.completed >= commit.number

    def __enter__(self) -> "Victim":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


@dataclass
class _Store:
    sequence: Sequence
    commit: Commit
    began: float


# --- loads: each is a generator that yields READY before each round, and DONE after it


class Load:
    """The loading client."""

    def __init__(self, runtime_dir: str, gib: float) -> None:
        self.runtime_dir = runtime_dir
        self.n_bytes = int(gib * GIB)

    def connect(self, staging_bytes: int = 0) -> Client:
        return kvd_client.connect(
            self.runtime_dir, name="load", staging_bytes=staging_bytes, timeout=120
        )

    @contextmanager
    def storing(self, layers: tuple[Any, ...]) -> Iterator["Storing"]:
        with self.connect(self.n_bytes + (64 * MIB)) as client:
            model = Model("load", os.urandom(32), "array", layers, TOKENS)
            with client.open_context(model, n_seq_max=2) as context:
                yield Storing(client, context, self.n_bytes)


class Storing:
    """A client that has a GiB in its staging, to be committed. `n_blocks` blocks of one prompt."""

    def __init__(self, client: Client, context: Context, n_bytes: int) -> None:
        self.client = client
        self.context = context
        self.n_blocks = min(n_bytes // context.payload.max_bytes, (1 << 20) // TOKENS - 1)
        self.prompt = np.random.default_rng(3).integers(
            0, 1 << 30, self.n_blocks * TOKENS, dtype=np.uint32
        )

    def stage(self) -> "tuple[Sequence, list[Staged]]":
        """A sequence without blocks, and all of its blocks written: one Staged for each append."""
        sequence = self.context.alloc(self.prompt[:0])
        parts = []
        for first in range(0, self.n_blocks, MAX_APPEND_BLOCKS):
            count = min(MAX_APPEND_BLOCKS, self.n_blocks - first)
            staged = sequence.stage(count * TOKENS)
            for index in range(count):
                staged.block(index)[:] = b"\x01" * len(staged.block(index))
            parts.append(staged)
        return sequence, parts

    def commit(self, sequence: Sequence, parts: "list[Staged]") -> None:
        """Append all that is staged, without waiting in between; answered when this returns."""
        first = 0
        for staged in parts:
            count = len(staged.offsets) * TOKENS
            commit = sequence.post_append(self.prompt[first : first + count], staged)
            first += count
        while not commit.answered:
            self.client.ping()

    def store(self) -> Sequence:
        sequence, parts = self.stage()
        self.commit(sequence, parts)
        self.client.flush()
        return sequence


Steps = Iterator[str]


def _commits_wide(load: Load) -> Steps:
    yield from _commits(load, WIDE)


def _commits_narrow(load: Load) -> Steps:
    yield from _commits(load, NARROW)


def _commits(load: Load, layers: tuple[Any, ...]) -> Steps:
    with load.storing(layers) as storing:
        sequence, staged = storing.stage()
        yield READY
        storing.commit(sequence, staged)
        storing.client.flush()
        yield DONE
        sequence.release()
        storing.client.evict("load")


def _reports(load: Load) -> Steps:
    with load.storing(WIDE) as storing:
        storing.store()
        for _ in range(5):
            yield READY
            storing.client.status()
            storing.client.verify()
            yield DONE
        storing.client.evict("load")


def _allocs(load: Load) -> Steps:
    with load.storing(NARROW) as storing:
        storing.store().release()
        everything = np.resize(storing.prompt, 1_000_000)
        for _ in range(5):
            yield READY
            storing.context.alloc(everything).release()
            yield DONE
        storing.client.evict("load")


def _long_misses(load: Load) -> Steps:
    with load.storing(NARROW) as storing:
        everything = np.arange(1_000_000, dtype=np.uint32)
        for _ in range(5):
            yield READY
            for _ in range(5):
                storing.context.alloc(everything).release()
            yield DONE


def _evicts(load: Load) -> Steps:
    for layers in (WIDE, NARROW):
        with load.storing(layers) as storing:
            storing.store().release()
            yield READY
            storing.client.evict("load")
            yield DONE


def _reports_narrow(load: Load) -> Steps:
    with load.storing(NARROW) as storing:
        sequence = storing.store()
        for _ in range(5):
            yield READY
            storing.client.status()
            storing.client.verify()
            yield DONE
        sequence.release()
        storing.client.evict("load")


def _registers(load: Load) -> Steps:
    with load.connect() as client:
        layers = (("f16", 8, "f16", 8),) * 512
        for number in range(5):
            model = Model(f"large {number}", os.urandom(32), "llama-state", layers, 1024)
            yield READY
            client.open_context(model).close()
            yield DONE


def _stagings(load: Load) -> Steps:
    for _ in range(2):
        yield READY
        load.connect(load.n_bytes).close()
        yield DONE


def _dies_committing(load: Load) -> Steps:
    with load.storing(WIDE) as storing:
        sequence, staged = storing.stage()
        yield READY
        storing.commit(sequence, staged)
        os.kill(os.getpid(), signal.SIGKILL)


def _dies_holding(load: Load) -> Steps:
    """With as many sequences as one client may have, of 455 blocks each, and a staging."""
    with load.storing(NARROW) as storing:
        share = storing.n_blocks // 72 * TOKENS
        payload = bytes(storing.context.payload.max_bytes)
        contexts = [storing.client.open_context(storing.context.model) for _ in range(9)]
        for index in range(72):
            tokens = storing.prompt[index * share : (index + 1) * share]
            sequence = contexts[index // 8].alloc(tokens)
            step = MAX_APPEND_BLOCKS * TOKENS
            for first in range(0, share, step):
                part = tokens[first : first + step]
                sequence.append(part, [payload] * (len(part) // TOKENS))
        storing.client.flush()
        yield READY
        os.kill(os.getpid(), signal.SIGKILL)


LOADS: dict[str, Callable[[Load], Steps]] = {
    "1 GiB is committed": _commits_wide,
    "32,767 small blocks are committed": _commits_narrow,
    "1 GiB is reported on": _reports,
    "32,767 small blocks are reported on": _reports_narrow,
    "1,000,000 tokens are matched": _allocs,
    "1,000,000 tokens are not found": _long_misses,
    "1 GiB is evicted": _evicts,
    "models of 512 layers are registered": _registers,
    "a staging of 1 GiB comes and goes": _stagings,
    "a client dies that commits 1 GiB": _dies_committing,
    "a client dies that holds 72 sequences": _dies_holding,
}

DEATHS = frozenset(load for load in LOADS if load.startswith("a client dies"))


def _load(name: str, runtime_dir: str, gib: float, told: Connection) -> None:
    for word in LOADS[name](Load(runtime_dir, gib)):
        told.send(word)
        if word == READY:
            told.recv()
    told.close()
