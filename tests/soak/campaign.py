"""Kills workers at random moments of random work, and looks after each kill what is left of them.

Bystanders work on beside them, all the time, and check every byte they read. After each kill
  - how long it took until the daemon had given back all that the victim held, from outside;
  - the bystanders settle: what they hold is read again and compared, and all the accounts must be
    what they were before the first kill, to the byte;
  - `verify` recounts everything.
"""

import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from kvd_proto.messages import ListClients, ListSequences
from tests.shell.raw import Raw, raw_client, until
from tests.soak.workers import Spec
from tests.support import Daemon, running_daemon

SECONDS = 60.0
"""Nothing here takes a hundredth of it."""
DAEMON = ("--max-memory", "6MiB", "--max-sequences", "11", "--n-seq-max", "4")
"""Room for a third of the blocks that the prompts have, and ids that run out: so there is eviction,
and waiting."""


@dataclass
class Worker:
    """A worker process and our end of its connection."""

    pid: int
    orders: Connection

    def hear(self, wanted: str) -> tuple[Any, ...]:
        """The next message, which must be of this kind."""
        assert self.orders.poll(SECONDS), f"worker {self.pid} says nothing, not even {wanted!r}"
        message: tuple[Any, ...] = self.orders.recv()
        assert message[0] == wanted, message[-1]
        return message[1:]

    def tell(self, order: str) -> None:
        self.check()
        self.orders.send(order)

    def check(self) -> None:
        """It tells what it finds wrong, and says nothing else unless it is asked."""
        assert not self.orders.poll(), f"worker {self.pid}: {self.orders.recv()[-1]}"


class Nursery:
    """Where workers are forked, so that none takes the time that its imports take."""

    def __init__(self, directory: Path) -> None:
        self._listener = Listener(str(directory / "orders"), "AF_UNIX", backlog=64)
        command = [sys.executable, "-m", "tests.soak.workers", str(directory / "orders")]
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environ)
        self._born = 0

    def bear(self, daemon: Daemon, seed: int, **options: Any) -> Worker:
        """A new worker, which may not have connected to the daemon yet."""
        self._born += 1
        spec = Spec(self._born, seed, str(daemon.runtime_dir), **options)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(spec)).encode() + b"\n")
        self._process.stdin.flush()
        worker = Worker(0, self._listener.accept())
        number, worker.pid = worker.hear("hello")
        assert number == self._born
        return worker

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(SECONDS) == 0
        self._listener.close()


@dataclass
class Outcome:
    """What was measured, in seconds. How long the kernel takes from SIGKILL to the process's end is
    its affair, and that of the machine's load: so it is told apart."""

    seconds: list[float] = field(default_factory=list)
    """From the kill until the daemon had given everything back."""
    forked_seconds: list[float] = field(default_factory=list)
    """The same, of those with a surviving child."""
    dead_seconds: list[float] = field(default_factory=list)
    """From the end of the process until the daemon had given everything back."""
    early: int = 0
    """Kills before the worker had a session, perhaps: there was nothing to measure."""
    counters: dict[str, int] = field(default_factory=dict)
    rows_checked: int = 0
    steps: int = 0

    def __str__(self) -> str:
        def line(name: str, seconds: list[float]) -> str:
            if len(seconds) < 2:
                return f"{name}: {len(seconds)}"
            cuts = statistics.quantiles(seconds, n=100, method="inclusive")
            p50, p99, most = 1000 * cuts[49], 1000 * cuts[98], 1000 * max(seconds)
            return f"{name}: {len(seconds)}, p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {most:.2f} ms"

        load = " ".join(f"{average:.1f}" for average in os.getloadavg())
        wanted = ("requests", "stored_blocks", "joined_blocks", "evicted_blocks")
        return "\n".join(
            (
                f"load averages of the machine: {load}, {os.cpu_count()} processors",
                line("kills", self.seconds + self.forked_seconds),
                line("  of them with a surviving child", self.forked_seconds),
                line("  from the end of the process, not from the kill", self.dead_seconds),
                f"  and {self.early} before the worker was ready",
                f"bystanders: {self.steps} operations, {self.rows_checked} rows compared",
                "daemon: " + ", ".join(f"{self.counters[name]} {name}" for name in wanted),
            )
        )


@contextmanager
def nursery(directory: Path) -> Iterator[Nursery]:
    opened = Nursery(directory)
    try:
        yield opened
    finally:
        opened.close()


def kill_workers(directory: Path, *, kills: int, forked: int, seed: int) -> Outcome:
    """Kill so many workers, `forked` of them with a child that lives on. Raises AssertionError for
    whatever is not given back, is wrong, or is noticed by a bystander."""
    chance = random.Random(seed)
    outcome = Outcome()
    kinds = ["forked"] * forked + ["alone"] * (kills - forked)
    kinds += ["early"] * (kills // 10)
    chance.shuffle(kinds)
    with ExitStack() as opened:
        daemon = opened.enter_context(running_daemon(*DAEMON, runtime_dir=directory / "rt"))
        prober = opened.enter_context(raw_client(daemon, staging_bytes=0))
        forge = opened.enter_context(nursery(directory))
        bystanders = [
            forge.bear(daemon, chance.randrange(1 << 30), arrays=arrays, bystander=True)
            for arrays in (False, True)
        ]
        for bystander in bystanders:
            opened.callback(bystander.orders.close)
            bystander.hear("ready")
        baseline = settle(bystanders, prober, outcome)
        for kind in kinds:
            for bystander in bystanders:
                bystander.tell("go")
            kill_one(kind, chance, forge, daemon, prober, bystanders, baseline, outcome)
            found = settle(bystanders, prober, outcome)
            assert found == baseline, f"after a kill of kind {kind}, seed {seed}"
        outcome.counters = prober.status()["counters"]
        for bystander in bystanders:
            bystander.tell("stop")
        until(lambda: prober.status()["clients"] == 1)
    return outcome


def kill_one(
    kind: str,
    chance: random.Random,
    forge: Nursery,
    daemon: Daemon,
    prober: Raw,
    bystanders: list[Worker],
    baseline: dict[str, int],
    outcome: Outcome,
) -> None:
    """The life and death of one victim."""
    pause = chance.uniform(0.0, 0.04)
    victim = forge.bear(
        daemon,
        chance.randrange(1 << 30),
        arrays=chance.random() < 0.3,
        fork_after=chance.uniform(0.0, 0.02) if kind == "forked" else None,
    )
    if kind != "early":
        victim.hear("ready")
    child = victim.hear("child")[0] if kind == "forked" else None
    # The moment of the kill is the point of it, so this is no wait for anything.
    time.sleep(pause)
    if kind != "early":
        victim.check()
    pidfd = os.pidfd_open(victim.pid)
    try:
        started = time.monotonic()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], SECONDS)[0], "SIGKILL did not end it"
        died = time.monotonic()
    finally:
        os.close(pidfd)
    until(lambda: is_given_back(prober, victim.pid, bystanders, baseline))
    ended = time.monotonic()
    seconds = ended - started
    if kind != "early":
        outcome.dead_seconds.append(ended - died)
    if kind == "early":
        outcome.early += 1
    elif child is None:
        outcome.seconds.append(seconds)
    else:
        os.kill(child, 0)  # it lives
        outcome.forked_seconds.append(seconds)
    victim.orders.close()  # which ends the child


def is_given_back(
    prober: Raw, pid: int, bystanders: list[Worker], baseline: dict[str, int]
) -> bool:
    """Whether the daemon has ended the session of a process and has got back all it held."""
    for bystander in bystanders:
        bystander.check()
    if any(row["pid"] == pid for row in prober.call(ListClients()).report["clients"]):
        return False
    assert not any(row["pid"] == pid for row in prober.call(ListSequences()).report["sequences"]), (
        "a sequence outlives its session"
    )
    return accounts(prober)["staging_bytes"] == baseline["staging_bytes"]


def settle(bystanders: list[Worker], prober: Raw, outcome: Outcome) -> dict[str, int]:
    """Let the bystanders compare everything they hold, and come to rest; recount; the accounts."""
    outcome.steps = outcome.rows_checked = 0
    for bystander in bystanders:
        bystander.tell("settle")
    for bystander in bystanders:
        steps, rows_checked = bystander.hear("settled")
        outcome.steps += steps
        outcome.rows_checked += rows_checked
    report = prober.verify()
    assert report["ok"], report["differences"]
    return accounts(prober)


def accounts(prober: Raw) -> dict[str, int]:
    """What must be the same whenever all is at rest. (What is cached comes and goes.)"""
    status = prober.status()
    names = ("staging_bytes", "filling_bytes", "active_bytes", "drift_bytes")
    return {
        **{name: status["accounting"][name] for name in names},
        "clients": status["clients"],
        "sequences": status["sequences"]["in_use"],
        "waiting": status["sequences"]["waiting"],
    }
