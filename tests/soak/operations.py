"""Clients that do random operations under memory pressure, while the accounts are looked at.

    python -m tests.soak.operations ADDRESS SPEC        one client, a Spec as JSON

Four client processes share three models of different geometry in a daemon that has room for a third
of what they ask for. A client is told to do so many operations, does them, says so, and waits: then
everything is at rest, and the test looks itself at what the segments occupy. In between, at random
moments, the daemon is asked for its accounts and for a recount while all of them work.

    client ──► ("ready",), ("done", counts by operation), ("failed", traceback)
    test   ──► number of operations; 0: let go of everything, and end
"""

import json
import os
import random
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import shake_128
from multiprocessing import connection
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, NamedTuple

import kvd_client
from kvd_client.errors import BadPosition, ReservationExceeded, ResourceError, SequenceEnded
from kvd_proto.geometry import Geometry
from kvd_proto.messages import Evict, ListClients, Verify
from tests.proto.blocks import llama_block
from tests.shell.raw import Raw, raw_client
from tests.support import Daemon, running_daemon

N_CLIENTS = 4
DAEMON = ("--max-memory", "6MiB", "--max-sequences", "30", "--max-reserved", "1MiB")
"""Some 700 blocks fit; the prompts have about 2,200. Nor are there enough ids for all."""
CONFIG = """
[models.array]
minimum = "1MiB"
[models.wide]
minimum = "512KiB"
cap = "3MiB"
"""
STAGING = 256 * 1024
N_SEQ_MAX = 4
SECONDS = 300.0
"""Nothing here takes a tenth of it."""
MODELS = (
    kvd_client.Model("array", b"a" * 32, "array", (("u8", 256, "u8", 256),) * 2, 8),
    # A stride of three pages, a quarter of the last of which is padding; K and V differ.
    kvd_client.Model(
        "wide", b"w" * 32, "array", (("f16", 1024, "f16", 512), ("f16", 64, "f16", 192)), 6
    ),
    # Quantised, K and V differently; an open block is shorter than a full one.
    kvd_client.Model(
        "llama", b"l" * 32, "llama-state", (("f16", 64, "q8_0", 34), ("q4_0", 36, "q8_0", 68)), 16
    ),
)


def payload(model: int, prefix: tuple[int, ...]) -> bytes:
    """K/V of the last block of `prefix`, which follows from all of its tokens."""
    return _payload(model, prefix)


@lru_cache(maxsize=8192)
def _payload(model: int, prefix: tuple[int, ...]) -> bytes:
    kind = MODELS[model]
    form = kind.format()
    if kind.payload_format == "llama-state":
        start = (len(prefix) - 1) // kind.block_tokens * kind.block_tokens
        layers = [list(layer) for layer in kind.layers]
        geometry = Geometry.from_wire(layers)
        fill = shake_128(repr(prefix).encode()).digest(1)[0]
        return bytes(llama_block(geometry, start, len(prefix) - start, fill))
    return shake_128(repr(prefix).encode()).digest(64) * (form.max_bytes // 64)


# --- a client


@dataclass(frozen=True)
class Spec:
    """What one client is to do."""

    number: int
    seed: int
    runtime_dir: str


@dataclass(eq=False)
class Held:
    """An open sequence, and the tokens that are its content as far as it goes."""

    model: int
    sequence: kvd_client.Sequence
    tokens: list[int]


class RandomClient:
    """Each step is one operation, chosen by the seed. What finds no room is part of life."""

    def __init__(self, client: kvd_client.Client, chance: random.Random) -> None:
        self.client = client
        self.chance = chance
        self.done: Counter[str] = Counter()
        self.held: list[Held] = []
        self.contexts = [client.open_context(model, N_SEQ_MAX) for model in MODELS]
        self._steps = [
            self.alloc, self.append, self.append, self.append, self.append, self.look,
            self.release, self.release, self.flush, self.rare,
        ]  # fmt: skip

    def step(self) -> None:
        step = self.chance.choice(self._steps)
        if not self.held and step not in (self.flush, self.rare):
            step = self.alloc
        try:
            step()
        except ResourceError as error:
            self.done[error.code] += 1
        else:
            self.done[step.__name__] += 1

    def prompt(self, model: int) -> list[int]:
        """One of some documents, or its beginning, and one of some continuations, cut anywhere."""
        chance, size = self.chance, MODELS[model].block_tokens
        document, branch = chance.randrange(6), chance.randrange(12)
        n_tokens = chance.choice((3, 5, 6)) * size
        return [
            *range(1000 * document, 1000 * document + n_tokens),
            *range(100_000 + 1000 * branch, 100_000 + 1000 * branch + chance.randrange(9 * size)),
        ]

    def alloc(self) -> None:
        chance = self.chance
        model = chance.randrange(len(MODELS))
        tokens = self.prompt(model)
        sequence = self.contexts[model].alloc(
            tokens,
            reserve_tokens=chance.choice((0, 0, 0, 3)) * MODELS[model].block_tokens,
            wait=chance.choice((0.0, 0.0, 0.003)),
            idle_timeout=chance.choice((0.0, 0.0, 0.5)),
        )
        self.held.append(Held(model, sequence, tokens))

    def append(self) -> None:
        chance, held = self.chance, self.chance.choice(self.held)
        sequence, size = held.sequence, MODELS[held.model].block_tokens
        start = sequence.full_tokens
        if start + size > len(held.tokens):
            held.tokens = held.tokens[:start] + self.prompt(held.model)
        end = chance.randrange(start + 1, min(len(held.tokens), start + 5 * size) + 1)
        known = tuple(held.tokens[:end])
        ends = range(start + size, end + size, size)
        blocks = [payload(held.model, known[: min(each, end)]) for each in ends]
        append = chance.choice((sequence.append, sequence.post_append))
        try:
            append(known[start:], blocks, start=start)
        except (ReservationExceeded, BadPosition, SequenceEnded):
            # It has reached its limit, an append that was only posted was refused, or it was idle.
            self.let_go(held)

    def look(self) -> None:
        """Read what the sequence has in the arena, and compare each block that is full."""
        held = self.chance.choice(self.held)
        n_tokens, size = held.sequence.refresh(), MODELS[held.model].block_tokens
        buffer = bytearray(MODELS[held.model].format().max_bytes)
        for index, end in enumerate(range(size, n_tokens + 1, size)):
            held.sequence.read_into(index, memoryview(buffer))
            assert buffer == payload(held.model, tuple(held.tokens[:end])), held.tokens[:end]
            self.done["blocks compared"] += 1

    def release(self) -> None:
        self.let_go(self.chance.choice(self.held))

    def let_go(self, held: Held) -> None:
        self.held.remove(held)
        held.sequence.release(failed=self.chance.random() < 0.2)

    def flush(self) -> None:
        self.client.flush()

    def rare(self) -> None:
        """What comes less often."""
        chance = self.chance
        model = chance.randrange(len(MODELS))
        match chance.randrange(8):
            case 0:
                self.client.evict(chance.choice(("", MODELS[model].name)), chance.randrange(1, 40))
            case 1 | 2:
                ttl = chance.choice((0.05, 0.5, 0.0))
                owner = chance.choice(("a", "b"))
                tokens = self.prompt(model)[: 3 * MODELS[model].block_tokens]
                self.client.pin(MODELS[model], tokens, owner=owner, ttl=ttl)
            case 3 | 4:
                self.client.unpin(chance.choice(("a", "b")), model="")
            case 5 | 6:
                self.contexts[model].keep_alive()
            case 7:
                self.held = [held for held in self.held if held.model != model]
                self.contexts[model].close()
                self.contexts[model] = self.client.open_context(MODELS[model], N_SEQ_MAX)

    def finish(self) -> None:
        """Let go of everything."""
        for context in self.contexts:
            context.close()
        self.client.unpin("a", model="")
        self.client.unpin("b", model="")
        self.client.flush()


def work(spec: Spec, orders: Connection) -> None:
    """One client's life."""
    chance = random.Random(spec.seed)
    name = f"client {spec.number}"
    with kvd_client.connect(
        spec.runtime_dir, name=name, staging_bytes=STAGING, timeout=60
    ) as client:
        worker = RandomClient(client, chance)
        orders.send(("ready",))
        while n_operations := orders.recv():
            for _ in range(n_operations):
                worker.step()
            with suppress(ResourceError):
                client.flush()
            orders.send(("done", worker.done))
        worker.finish()
        orders.send(("done", worker.done))


def main(address: str, spec: str) -> None:
    """The whole of a client process."""
    with connection.Client(address, "AF_UNIX") as orders:
        try:
            work(Spec(**json.loads(spec)), orders)
        except EOFError:
            pass  # the test has ended
        except BaseException:
            orders.send(("failed", traceback.format_exc()))
            raise


# --- the test's side


class Process(NamedTuple):
    """A client process, and our end of its connection."""

    process: subprocess.Popen[bytes]
    orders: Connection

    def hear(self, wanted: str) -> Any:
        """The next message, which must be of this kind: what it says."""
        assert self.orders.poll(SECONDS), f"client {self.process.pid} says nothing"
        kind, *told = self.orders.recv()
        assert kind == wanted, told[-1]
        return told[0] if told else None


@contextmanager
def clients(directory: Path, daemon: Daemon, seed: int) -> Iterator[list[Process]]:
    """The four, connected."""
    address = str(directory / "orders")
    with ExitStack() as opened:
        listener = opened.enter_context(Listener(address, "AF_UNIX", backlog=N_CLIENTS))
        started: list[Process] = []
        for number in range(N_CLIENTS):
            spec = Spec(number, seed * N_CLIENTS + number, str(daemon.runtime_dir))
            command = [sys.executable, "-m", "tests.soak.operations", address]
            process = subprocess.Popen([*command, json.dumps(asdict(spec))])
            opened.callback(process.wait, SECONDS)
            orders = opened.enter_context(listener.accept())  # ends before the wait for the process
            started.append(Process(process, orders))
        for each in started:
            each.hear("ready")
        yield started


@dataclass
class Outcome:
    """What was done and looked at."""

    operations: int = 0
    busy_checks: int = 0
    """Of the accounts, or a recount, while all clients worked."""
    checks: int = 0
    """At rest, with what the segments occupy."""
    done: Counter[str] = field(default_factory=Counter)
    counters: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        wanted = ("requests", "errors", "stored_blocks", "present_blocks", "evicted_blocks")
        return "\n".join(
            (
                f"{self.operations} operations, {self.busy_checks} checks while they went on and "
                f"{self.checks} at rest: drift 0 bytes",
                "clients: " + ", ".join(f"{n} {name}" for name, n in sorted(self.done.items())),
                "daemon: " + ", ".join(f"{self.counters[name]} {name}" for name in wanted),
            )
        )


def do_operations(directory: Path, *, operations: int, rounds: int, seed: int) -> Outcome:
    """Let four clients do so many operations, in rounds after which all is looked at. Raises
    AssertionError for a byte that is wrong, or is not accounted for."""
    chance = random.Random(seed)
    outcome = Outcome()
    with ExitStack() as opened:
        config = directory / "kvd.toml"
        config.write_text(CONFIG)
        flags = (*DAEMON, "--config", str(config))
        daemon = opened.enter_context(running_daemon(*flags, runtime_dir=directory / "rt"))
        auditor = opened.enter_context(raw_client(daemon, staging_bytes=0))
        workers = opened.enter_context(clients(directory, daemon, seed))
        each = max(1, operations // rounds // N_CLIENTS)
        for number in range(rounds):
            for worker in workers:
                worker.orders.send(each)
            look_while_they_work(auditor, workers, chance, outcome)
            told = [worker.hear("done") for worker in workers]
            outcome.operations += each * N_CLIENTS
            look_at_rest(daemon, auditor, checksums=number % 10 == 0)
            outcome.checks += 1
            outcome.done = sum(told, Counter())
        outcome.counters = auditor.status()["counters"]
        for worker in workers:
            worker.orders.send(0)
        for worker in workers:
            worker.hear("done")
        look_at_the_end(daemon, auditor)
    return outcome


def look_while_they_work(
    auditor: Raw, workers: list[Process], chance: random.Random, outcome: Outcome
) -> None:
    """At random moments, until all have said something."""
    waiting = [worker.orders for worker in workers]
    while waiting:
        said = connection.wait(waiting, timeout=chance.uniform(0.0, 0.3))
        waiting = [each for each in waiting if each not in said]
        if said:
            continue
        if chance.random() < 0.5:
            accounting = auditor.status()["accounting"]
            assert accounting["drift_bytes"] == 0, accounting
        else:
            report = auditor.call(Verify(chance.choice((0, 0, 1)))).report
            assert report["ok"], report["differences"]
        check_holders(auditor.call(ListClients()).report)
        outcome.busy_checks += 1


def check_holders(report: dict[str, Any]) -> None:
    """What clients and tenants hold adds up, at any moment."""
    rows, clients = report["tenants"], report["clients"]
    for row in rows:
        own = [each for each in clients if each["tenant"] == row["name"]]
        for part in ("alone", "reserved"):
            assert row[f"{part}_bytes"] >= sum(each[f"{part}_bytes"] for each in own)
        held = sum(
            row[f"{part}_bytes"]
            for part in (
                "staging", "directory", "free", "reserved", "filling", "filling_other", "alone",
                "together", "active_other", "pinned", "cached",
            )
        )  # fmt: skip
        assert row["held_bytes"] == held <= row["quota_bytes"]
        assert min(value for key, value in row.items() if key != "name") >= 0, row
    for client in clients:
        assert client["alone_blocks"] <= client["leased_blocks"]


def look_at_rest(daemon: Daemon, auditor: Raw, *, checksums: bool) -> None:
    """Nobody works: the accounts, the recount, and what the segments really occupy."""
    report = auditor.call(Verify(int(checksums))).report
    assert report["ok"], report["differences"]
    status = auditor.status()
    accounting = status["accounting"]
    assert accounting["drift_bytes"] == 0
    assert accounting["os_bytes"] == occupied(daemon)
    backed = accounting["budget_bytes"] - accounting["unassigned_bytes"]
    assert accounting["os_bytes"] == backed
    holders = auditor.call(ListClients()).report
    check_holders(holders)
    check_models(status)
    # A pin may end between the two reports.
    for uses in (("staging",), ("directory",), ("free",), ("pinned", "cached")):
        told = sum(row[f"{use}_bytes"] for row in holders["tenants"] for use in uses)
        assert told == sum(accounting[f"{use}_bytes"] for use in uses), uses


def check_models(status: dict[str, Any]) -> None:
    """Blocks, tokens and bytes of all models add up; minima are there, and caps are kept."""
    accounting, models = status["accounting"], status["models"]
    for state in ("free", "filling", "active", "cached", "pinned"):
        told = sum(model["bytes"][state] for model in models)
        assert told == accounting[f"{state}_bytes"], state
        for model in models:
            blocks = model["blocks"][state]
            assert model["bytes"][state] == blocks * model["stride_bytes"]
            assert 0 <= model["tokens"][state] <= blocks * model["block_tokens"]
            assert 0 <= model["payload"][state] <= blocks * model["payload_bytes"]
    assert sum(model["padding_bytes"] for model in models) == accounting["padding_bytes"]
    for model in models:
        inside = model["payload"]["total"] + model["padding_bytes"] + model["open_bytes"]
        assert model["bytes"]["total"] == model["bytes"]["free"] + inside
        assert model["cap_bytes"] is None or model["bytes"]["total"] <= model["cap_bytes"]
    assert accounting["promised_bytes"] <= accounting["unassigned_bytes"]


def occupied(daemon: Daemon) -> int:
    """What the daemon's segments and stagings have in memory, as the system tells this process."""
    segments = [name for name in daemon.segments() if not name.endswith(".lock")]
    found = [(Path("/dev/shm") / name).stat() for name in segments]
    for fd in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(fd).startswith("/memfd:kvd-staging"):
                found.append(fd.stat())
    # A mapping has a descriptor of its own.
    return 512 * sum({(each.st_dev, each.st_ino): each.st_blocks for each in found}.values())


def look_at_the_end(daemon: Daemon, auditor: Raw) -> None:
    """All have let go: nothing is held, and what is evicted goes back to the system."""
    auditor.call(Evict("", 0))
    accounting = auditor.status()["accounting"]
    for use in ("free", "filling", "active", "cached", "pinned"):
        assert accounting[f"{use}_bytes"] == 0, accounting
    assert accounting["os_bytes"] == occupied(daemon)
    for name in daemon.segments():
        if ".arena-" in name:
            assert (Path("/dev/shm") / name).stat().st_blocks == 0
    assert auditor.call(Verify(1)).report["ok"]


if __name__ == "__main__":
    main(*sys.argv[1:])
