"""Processes of `llama_cpp.server` for tests, with our launcher or without."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from bench.serving import Server, listening, module_command


@contextlib.contextmanager
def running_server(
    module: str, *flags: str, directory: Path, environ: dict[str, str] | None = None
) -> Iterator[Server]:
    """`python -m MODULE --host 127.0.0.1 --port 0 FLAGS`, once it listens."""
    with listening(Server(module_command(module, *flags), directory, environ)) as server:
        yield server
