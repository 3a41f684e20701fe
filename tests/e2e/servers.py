"""Processes of `llama_cpp.server` for tests, with our launcher or without."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bench.serving import Server, listening, module_command

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def running_server(
    module: str,
    *flags: str,
    directory: Path,
    environ: dict[str, str] | None = None,
    measured: Path | None = None,
) -> Iterator[Server]:
    """`python -m MODULE --host 127.0.0.1 --port 0 FLAGS`, once it listens. `measured` is the file
    of added_time.py."""
    command, environ = module_command(module, *flags), dict(environ or {})
    if measured is not None:
        measure(command, environ, measured)
    with listening(Server(command, directory, environ)) as server:
        yield server


def measure(command: list[str], environ: dict[str, str], file: Path) -> None:
    """Let a command `python -m LAUNCHER ...` measure itself into the file of added_time.py."""
    command[2:2] = ["tests.e2e.added_time", str(file)]
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
