"""A daemon for the length of a measurement."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

_NUMBERS = count()
"""Two daemons at once are two instances."""


@contextmanager
def running_daemon(max_memory: str) -> Iterator[str]:
    """Run `kvd serve` and yield its runtime directory."""
    with tempfile.TemporaryDirectory(prefix="kvd-bench-") as directory:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            address = os.path.join(directory, "ready")
            ready.bind(address)
            ready.settimeout(60)
            command = [sys.executable, "-m", "kvd", "serve", "--runtime-dir", directory]
            command += ["--no-keep-on-stop"]
            command += [
                "--instance",
                f"bench-{os.getpid()}-{next(_NUMBERS)}",
                "--max-memory",
                max_memory,
            ]
            # A client that commits a GiB at once stages it at once.
            command += ["--max-staging", max_memory, "--max-context", "0", "--log-level", "warning"]
            process = subprocess.Popen(command, env={**os.environ, "NOTIFY_SOCKET": address})
            while b"READY=1" not in ready.recv(4096):
                pass
        try:
            yield directory
        finally:
            process.terminate()
            process.wait()
