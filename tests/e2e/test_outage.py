"""The daemon is killed, or hangs, in the middle of each integration's work, and stays away for
KVD_OUTAGE_SECONDS (2): every request is answered to its end, each at most 50 ms later than without
a cache, and the next daemon is found.

Everything has the timeout that it has by itself. What "later" is: added_time.py.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import NamedTuple

import numpy as np
import pytest

from kvd_client.integrations.llama import share
from kvd_client.integrations.llama.batching.worker import BatchingWorker
from tests.e2e.added_time import Call, Meter, added, calls_in
from tests.e2e.example_servers import ExampleServer, example_server
from tests.e2e.llamas import open_llama, settled
from tests.e2e.servers import Server, running_server
from tests.llama import tiny_models
from tests.support import start_daemon

SECONDS = float(os.environ.get("KVD_OUTAGE_SECONDS", "2"))
LATER = 0.05
"""Seconds: what is promised."""
MIDDLE = 5
"""So many tokens of an answer have come when the daemon goes."""
N_TOKENS = 24
PATIENCE = 60.0
LOOK = 0.002

pytestmark = [pytest.mark.model, pytest.mark.timeout(240 + 4 * SECONDS)]

TRIES = 4
"""Outages at the most, to find one in which the machine does not stand still."""
MATCHED = re.compile(r"matched (\d+) of \d+ tokens")
HIT = 96
"""Tokens of a prompt that are cached if anything is: three blocks."""

DOCUMENTS = [f"{letter} " + f"the old lighthouse {letter} of the harbour " * 4 for letter in "xy"]
"""About 130 tokens each: two of them in turn, so that what a context still has is of the other."""


class Answer(NamedTuple):
    """A request, in seconds of CLOCK_MONOTONIC; whether all of its answer came, and how many tokens
    of its prompt came from the cache."""

    begun: float
    ended: float
    is_whole: bool
    matched: int


class Asked(NamedTuple):
    """What one request of an integration gave: how many tokens, and how many were cached."""

    tokens: int
    matched: int


Ask = Callable[[int, Callable[[], None]], Asked]
"""Sends request number n, and calls the function for each token that comes."""


class Asker:
    """Asks one question after another, in a thread of its own."""

    def __init__(self, ask: Ask) -> None:
        self.answers: list[Answer] = []
        self._ask = ask
        self._action: Callable[[], None] | None = None
        self._stop = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            for number in itertools.count():
                if self._stop:
                    return
                counted = itertools.count(1)
                begun = time.monotonic()
                asked = self._ask(number, lambda counted=counted: self._token(next(counted)))
                ended = time.monotonic()
                self.answers.append(Answer(begun, ended, asked.tokens == N_TOKENS, asked.matched))
        except BaseException as error:
            self.error = error

    def _token(self, number: int) -> None:
        action = self._action
        if action is not None and number == MIDDLE:
            self._action = None
            action()

    def in_the_middle(self, action: Callable[[], None]) -> None:
        """Let the thread do this when a request is in the middle of its answer."""
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        self._action = act
        self.until(done.is_set)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.error is not None:
                raise self.error
            assert time.monotonic() < deadline, f"it did not come true; {self.answers[-3:]}"
            time.sleep(0.002)

    def since(self, moment: float) -> list[Answer]:
        """The answers of requests that began after `moment`."""
        return [answer for answer in list(self.answers) if answer.begun > moment]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop = True
        self._thread.join(PATIENCE)
        if self.error is not None:
            raise self.error


class Stall(NamedTuple):
    """A time in which a thread of ours that had nothing to wait for did not run: `seconds` of it.
    In seconds of CLOCK_MONOTONIC."""

    begun: float
    ended: float
    seconds: float


@contextlib.contextmanager
def stalls_of_the_machine() -> Iterator[list[Stall]]:
    """What a thread beside us sees of them. It sleeps for a moment, again and again: what is more
    than that the machine has been busy with others."""
    stalls: list[Stall] = []
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            begun = time.monotonic()
            time.sleep(LOOK)
            ended = time.monotonic()
            if ended - begun > 2 * LOOK:
                stalls.append(Stall(begun, ended, ended - begun - LOOK))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield stalls
    finally:
        end.set()
        thread.join()


class Worker(NamedTuple):
    """How to ask a process; some ask it at once. And how to learn what kvd's calls in it took."""

    ask: Ask
    calls: Callable[[], list[Call]]


Open = Callable[[Path, Path], contextlib.AbstractContextManager[list[Worker]]]
"""Called with a directory for files, and the daemon's runtime directory."""


# -- the integrations ------------------------------------------------------------------------------


def prompt(number: int) -> str:
    """A document that was asked about before, and a question that was not."""
    return f"{DOCUMENTS[number % 2]} question {time.monotonic_ns()}"


def as_tokens(number: int) -> list[int]:
    """The same for models without a vocabulary."""
    return [1 + ord(letter) % (tiny_models.N_VOCAB - 1) for letter in prompt(number)]


@contextlib.contextmanager
def shared_llama(directory: Path, runtime_dir: Path) -> Iterator[list[Worker]]:
    calls: list[Call] = []
    path = settled(tiny_models.write_llama(directory / "llama.gguf"))
    with Meter(calls.append), contextlib.closing(open_llama(path)) as llama:
        handle = share(llama, runtime_dir=runtime_dir)

        def ask(number: int, on_token: Callable[[], None]) -> Asked:
            n_tokens = 0
            for _ in llama.generate(as_tokens(number), temp=0.0):
                n_tokens += 1
                on_token()
                if n_tokens == N_TOKENS:
                    break
            return Asked(n_tokens, handle.matched_tokens)

        yield [Worker(ask, lambda: list(calls))]


def stream(url: str, number: int, on_token: Callable[[], None]) -> int:
    """The number of tokens that a server of OpenAI's kind answers with."""
    body = {"prompt": prompt(number), "max_tokens": N_TOKENS, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    letters, ended = 0, ""
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            (choice,) = json.loads(line[6:])["choices"]
            for _ in choice["text"]:  # a letter is a token
                letters += 1
                on_token()
            ended = choice["finish_reason"] or ended
    assert ended == "length"
    return letters


@contextlib.contextmanager
def two_servers(directory: Path, runtime_dir: Path) -> Iterator[list[Worker]]:
    """Of llama_cpp.server."""
    model = settled(tiny_models.write_letters(directory / "letters.gguf"))
    flags = ("--model", str(model), "--n_ctx", "512", "--n_threads", "1", "--verbose", "false")
    files = [directory / f"calls-{number}" for number in range(2)]
    workers: list[Worker] = []
    with contextlib.ExitStack() as servers:
        for file in files:
            server = servers.enter_context(
                running_server(
                    "kvd_client.integrations.llama_cpp_server",
                    *(*flags, "--kvd-runtime-dir", str(runtime_dir)),
                    directory=directory,
                    measured=file,
                )
            )

            def ask(
                number: int,
                on_token: Callable[[], None],
                server: Server = server,
            ) -> Asked:
                before = len(server.wait_for(MATCHED, 0))
                n_tokens = stream(server.url, number, on_token)
                found = server.wait_for(MATCHED, before + 1)[-1]
                return Asked(n_tokens, int(found[1]))

            workers.append(Worker(ask, functools.partial(calls_in, file)))
        yield workers


@contextlib.contextmanager
def two_example_servers(directory: Path, runtime_dir: Path) -> Iterator[list[Worker]]:
    model = settled(tiny_models.write_letters(directory / "letters.gguf"))
    files = [directory / f"calls-{number}" for number in range(2)]
    workers: list[Worker] = []
    with contextlib.ExitStack() as servers:
        for file in files:
            # One sequence, so that what it has is of the other document.
            server = servers.enter_context(
                example_server(
                    directory,
                    model,
                    runtime_dir,
                    measured=file,
                    timeout=None,
                    n_ctx=512,
                    n_seq_max=1,
                )
            )

            def ask(
                number: int, on_token: Callable[[], None], server: ExampleServer = server
            ) -> Asked:
                name = "batch_server:sequence_cache_tokens_loaded_total"
                before = server.metrics()[name]
                n_tokens = stream(server.url, number, on_token)
                return Asked(n_tokens, int(server.metrics()[name] - before))

            workers.append(Worker(ask, functools.partial(calls_in, file)))
        yield workers


@contextlib.contextmanager
def batching_worker(directory: Path, runtime_dir: Path) -> Iterator[list[Worker]]:
    """Four requests at once in one worker."""
    calls: list[Call] = []
    path = tiny_models.write_llama(directory / "llama.gguf")
    options = {"n_ctx": 2048, "n_batch": 64, "n_threads": 1, "n_seq_max": 4}
    with Meter(calls.append), BatchingWorker(path, runtime_dir=runtime_dir, **options) as worker:
        worker.start()

        def ask(number: int, on_token: Callable[[], None]) -> Asked:
            request = worker.submit(np.array(as_tokens(number)), N_TOKENS)
            for _ in request:
                on_token()
            return Asked(len(request.result().tokens), request.matched_tokens)

        yield [Worker(ask, lambda: list(calls))] * 4


INTEGRATIONS = {
    "share": shared_llama,
    "llama_cpp.server": two_servers,
    "example server": two_example_servers,
    "batching": batching_worker,
}


# -- the outages -----------------------------------------------------------------------------------


@contextlib.contextmanager
def at_work(workers: list[Worker]) -> Iterator[list[Asker]]:
    """Askers, once each has been answered from the cache."""
    askers = [Asker(worker.ask) for worker in workers]
    for asker in askers:
        asker.start()
    try:
        until_hit(askers)
        yield askers
        until_hit(askers)
    finally:
        for asker in askers:
            asker.stop()


def until_hit(askers: list[Asker]) -> None:
    """Wait until each has been answered from the cache from now on."""
    now = time.monotonic()
    for asker in askers:
        asker.until(lambda asker=asker: any(each.matched >= HIT for each in asker.since(now)))


def until_away_long_enough(askers: list[Asker]) -> None:
    now = time.monotonic()
    for asker in askers:
        asker.until(lambda: time.monotonic() > now + SECONDS)
        asker.until(lambda asker=asker: len(asker.since(now)) >= 3)


class Latest(NamedTuple):
    """Of the requests that had to do with an outage, the one to which kvd added most: how much, and
    how long the machine stood still meanwhile; and how much to any that was answered before the
    daemon was back. All in seconds."""

    added: float
    stalled: float
    added_alone: float
    requests: int


def latest(
    workers: list[Worker], askers: list[Asker], stalls: list[Stall], gone: float, back: float
) -> Latest:
    """Find it among those that had not been answered when the daemon was `gone`."""
    found = []
    for worker, asker in zip(workers, askers, strict=True):
        calls = worker.calls()
        for answer in asker.answers:
            assert answer.is_whole
            if answer.ended > gone:
                found.append((added(calls, answer.begun, answer.ended), answer))
    assert any(answer.begun < gone for _, answer in found), "none was in the middle"
    seconds, answer = max(found)
    stalled = sum(
        each.seconds for each in stalls if each.begun < answer.ended and each.ended > answer.begun
    )
    alone = max(seconds for seconds, answer in found if answer.ended < back)
    return Latest(seconds, stalled, alone, len(found))


class Host:
    """The daemon of a machine, which goes, in one of two ways, and comes back."""

    def __init__(self, runtime_dir: Path, how: str) -> None:
        self._daemon = start_daemon(runtime_dir=runtime_dir)
        self._is_killed = how == "killed"

    def go(self) -> None:
        if self._is_killed:
            self._daemon.kill()
        else:
            self._daemon.process.send_signal(SIGSTOP)

    def come_back(self) -> None:
        before = self._daemon
        if self._is_killed:
            self._daemon = start_daemon(runtime_dir=before.runtime_dir, instance=before.instance)
        else:
            before.process.send_signal(SIGCONT)

    def stop(self) -> None:
        self._daemon.stop()


@pytest.mark.parametrize("how", ["killed", "hung"])
@pytest.mark.parametrize("name", INTEGRATIONS)
def test_the_daemon_goes_in_the_middle_and_comes_back(
    name: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime_dir = tmp_path / "run"
    host = Host(runtime_dir, how)
    try:
        with INTEGRATIONS[name](tmp_path, runtime_dir) as workers:
            for _ in range(TRIES):
                found = outage(workers, host)
                with capsys.disabled():
                    print(
                        f"\n{name}, daemon {how} for {SECONDS:g} s: {found.requests} requests, "
                        f"each at most {1000 * found.added:.1f} ms later, in which the machine "
                        f"stood still for {1000 * found.stalled:.1f} ms; "
                        f"{1000 * found.added_alone:.1f} ms before the daemon was back"
                    )
                assert found.added - found.stalled <= LATER
                if found.added <= LATER:
                    break
    finally:
        host.stop()


def outage(workers: list[Worker], host: Host) -> Latest:
    """In the middle of a request the daemon goes, and comes back when each worker has answered
    some without it, and SECONDS have gone by; in the end each finds something cached."""
    with stalls_of_the_machine() as stalls, at_work(workers) as askers:
        askers[0].in_the_middle(host.go)
        gone = time.monotonic()
        until_away_long_enough(askers)
        back = time.monotonic()
        host.come_back()
    return latest(workers, askers, stalls, gone, back)
