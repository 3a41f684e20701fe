"""What kvctl top shows: reports of the daemon, taken again and again, and rates over the last
seconds from them.
"""

import argparse
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from kvd_client.client import Client
from kvd_client.errors import KvdError
from kvd_client.kvctl.command import connect

WINDOW_SECONDS = 10.0
"""Rates are of so long."""
PATIENCE_SECONDS = 2.0
"""For one report: then the daemon hangs, as far as a live picture of it is concerned."""

_RATES = {
    "requests": "requests",
    "refused": "errors",
    "allocs": "sequences_opened",
    "queried_tokens": "queried_tokens",
    "hit_tokens": "hit_tokens",
    "stored_blocks": "stored_blocks",
    "evicted_blocks": "evicted_blocks",
}
"""Each a second, and the counter of the status that it is of."""


class Sample(NamedTuple):
    """The daemon at one moment. `taken` by the monotonic clock, `when` by the wall's."""

    status: dict[str, Any]
    clients: list[dict[str, Any]]
    sequences: list[dict[str, Any]]
    round_trip: float
    taken: float
    when: float


class Rates(NamedTuple):
    """`per_second` of what the daemon counts, over the last `seconds`; none if these are 0."""

    seconds: float
    per_second: dict[str, float]


def take(client: Client) -> Sample:
    """Ask for everything once."""
    started = time.perf_counter()
    client.ping()
    round_trip = time.perf_counter() - started
    sequences = client.sequences()
    clients = client.clients()
    status = client.status()
    return Sample(status, clients, sequences, round_trip, time.monotonic(), time.time())


class History:
    """The samples of the last seconds, of one daemon."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample) -> None:
        """A sample of another daemon than the last one begins anew."""
        if self._samples:
            last = self._samples[-1]
            if sample.status["uptime_seconds"] < last.status["uptime_seconds"]:
                self._samples.clear()
        self._samples.append(sample)
        while sample.taken - self._samples[0].taken > WINDOW_SECONDS and len(self._samples) > 2:
            self._samples.popleft()

    @property
    def rates(self) -> Rates:
        """Between the oldest and the newest."""
        if len(self._samples) < 2:
            return Rates(0.0, dict.fromkeys(_RATES, 0.0))
        first, last = self._samples[0], self._samples[-1]
        seconds = last.taken - first.taken
        before, after = first.status["counters"], last.status["counters"]
        per_second = {
            name: (after[counter] - before[counter]) / seconds for name, counter in _RATES.items()
        }
        return Rates(seconds, per_second)


class Now(NamedTuple):
    """The last sample there is, with the rates until then; `error`: why there is no daemon now."""

    sample: Sample | None
    rates: Rates
    error: str = ""


class Sampler:
    """Takes samples in a thread of its own, so that a daemon that hangs holds up no key. After each
    change of `now` it calls `changed`. Who holds it may change the `interval`."""

    def __init__(self, options: argparse.Namespace, changed: Callable[[], None]) -> None:
        self.now = Now(None, History().rates)
        self._options = argparse.Namespace(**vars(options))
        self._options.timeout = min(options.timeout, PATIENCE_SECONDS)
        self.interval: float = options.interval
        self._changed = changed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kvctl-top", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended: at the latest when it has waited for an answer."""
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        history = History()
        while not self._stopping.is_set():
            try:
                with connect(self._options) as client:
                    while not self._stopping.is_set():
                        sample = take(client)
                        history.add(sample)
                        self.now = Now(sample, history.rates)
                        self._changed()
                        self._stopping.wait(self.interval)
            except KvdError as error:
                self.now = self.now._replace(error=str(error))
                self._changed()
                self._stopping.wait(min(1.0, self.interval))
