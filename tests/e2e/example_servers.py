"""Processes of llama-cpp-python's example server for tests, with kvd or as it is."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.serving import PATIENT, Server, example_command, listening
from tests.e2e.servers import measure

OPTIONS = {"n_ctx": 2048, "n_seq_max": 4, "threads": 1, "threads_batch": 1}


class ExampleServer(Server):
    """One process."""

    def decoded(self) -> int:
        """Prompt tokens that it has computed so far."""
        return int(self.metrics()["llamacpp:prompt_tokens_total"])


@contextlib.contextmanager
def example_server(
    directory: Path,
    model: Path,
    runtime_dir: Path | None,
    *,
    disk_cache: Path | None = None,
    measured: Path | None = None,
    timeout: float | None = PATIENT,
    flags: tuple[str, ...] = (),
    **model_options: Any,
) -> Iterator[ExampleServer]:
    """A process with kvd and our `flags`, or without `runtime_dir` the script as it is.

    `measured` is the file of added_time.py; `timeout` None is what kvd does by itself.
    """
    command = example_command(
        directory / f"server-{time.monotonic_ns()}.json",
        model,
        runtime_dir,
        disk_cache=disk_cache,
        timeout=timeout,
        flags=flags,
        **{**OPTIONS, **model_options},
    )
    environ: dict[str, str] = {}
    if measured is not None:
        measure(command, environ, measured)
    with listening(ExampleServer(command, directory, environ)) as server:
        yield server
