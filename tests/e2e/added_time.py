"""What kvd adds to a request: the time that is spent in its calls on the request's way.

Each integration steps into another's program at a few places, `_CALLS`, and all that kvd costs a
request is spent there: without a cache none of them is. So there is nothing to compare with, and
what llama.cpp or a server takes meanwhile does not matter. The time that a thread was ready to run
and the machine had something else to do is left out: the kernel counts it for each thread.

    python -m tests.e2e.added_time FILE MODULE ...      `main` of a launcher, measured into FILE

In FILE each call is a line: when it began and ended, in seconds of CLOCK_MONOTONIC, which is the
same for all processes, and what it took.
"""

import functools
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

from kvd_client.integrations import llama_example_server
from kvd_client.integrations.llama.attached.sharing import LlamaShare
from kvd_client.integrations.llama.batching.stepper import Stepper
from kvd_client.integrations.llama.sequence_cache import SequenceCache

_CALLS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (LlamaShare, ("_begin", "_store", "_finish")),
    (SequenceCache, ("lookup", "load", "save", "settle")),
    (Stepper, ("_start_some", "_close_sequence", "_store_some")),
)
_SCRIPTS_CALLS = ("make_room_for_match", "save_sequence_state_bytes", "save_completion")
"""Of the scheduler of llama-cpp-python's example server: what it does for the cache alone."""


class Call(NamedTuple):
    """One call: from `begun` to `ended` (CLOCK_MONOTONIC), and the seconds that it took of it."""

    begun: float
    ended: float
    seconds: float
    name: str


class Meter:
    """Measures the calls of kvd in this process, as long as it is open."""

    def __init__(self, note: Callable[[Call], None]) -> None:
        self._note = note
        self._mine = threading.local()
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for owner, names in _CALLS:
            self._replace(owner, names)
        load = llama_example_server.put_cache_into

        def put_cache_into(script: Any, *arguments: Any, **named: Any) -> None:
            load(script, *arguments, **named)
            open_model = script.Model.__init__

            def opened(model: Any, **options: Any) -> None:
                open_model(model, **options)  # only then is the script's scheduler replaced
                self._replace(script.CompletionScheduler, _SCRIPTS_CALLS)

            script.Model.__init__ = opened

        self._before.append((llama_example_server, "put_cache_into", load))
        llama_example_server.put_cache_into = put_cache_into
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, before in reversed(self._before):
            setattr(owner, name, before)

    def _replace(self, owner: type, names: Iterable[str]) -> None:
        for name in names:
            before = getattr(owner, name)
            self._before.append((owner, name, before))
            setattr(owner, name, self._measured(before))

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def measured(*arguments: Any, **named: Any) -> Any:
            mine = self._mine
            if getattr(mine, "is_inside", False):
                return function(*arguments, **named)
            mine.is_inside = True
            waited = self._waited()
            begun = time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                ended = time.monotonic()
                mine.is_inside = False
                seconds = ended - begun - (self._waited() - waited)
                self._note(Call(begun, ended, seconds, function.__name__))

        return measured

    def _waited(self) -> float:
        """Seconds that this thread was ready, and did not run: see schedstat in proc(5)."""
        mine = self._mine
        if not hasattr(mine, "schedstat"):
            mine.schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        return int(os.pread(mine.schedstat, 100, 0).split()[1]) / 1e9


def calls_in(file: Path) -> list[Call]:
    """What a process has noted so far."""
    rows = (line.split() for line in file.read_text().splitlines())
    return [Call(float(row[0]), float(row[1]), float(row[2]), row[3]) for row in rows]


def added(calls: Iterable[Call], begun: float, ended: float) -> float:
    """Seconds that kvd has added to a request: all calls that touch its time are on its way, also
    those for others, since one thread does the work."""
    return sum(call.seconds for call in calls if call.begun < ended and call.ended > begun)


def main() -> None:
    file, module, *arguments = sys.argv[1:]
    with open(file, "a", buffering=1) as sink:

        def note(call: Call) -> None:
            sink.write(f"{call.begun:.6f} {call.ended:.6f} {call.seconds:.6f} {call.name}\n")

        with Meter(note):
            importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    main()
