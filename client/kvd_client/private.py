"""A private daemon: started by a client that was asked to, when none runs there."""

import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from kvd_client.errors import Unavailable
from kvd_proto.paths import LIFELINE_SOCKET

LINGER_SECONDS = 10
"""How long it stays after its last client, so that a script that is run again finds it warm."""
_START_SECONDS = 20.0
_INSTANCE_BUSY = 3
"""`kvd serve` exits so when another daemon has the instance: that one is as good."""


_started: list[subprocess.Popen[bytes]] = []
"""Kept, so that Python does not complain that they still run when we let go of them."""


def start_private_daemon(path: Path, instance: str, max_memory: str) -> None:
    """Start a daemon at `path` unless one answers there, and wait until it is ready.

    Raises Unavailable with what it said if it does not start.
    """
    if _listens(path):
        return
    with (
        tempfile.TemporaryDirectory(prefix="kvd-start-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        tempfile.TemporaryFile() as said,
    ):
        # The daemon says READY as it would to systemd.
        address = os.path.join(directory, "ready")
        ready.bind(address)
        ready.settimeout(0.1)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvd", "serve", "--instance", instance),
                *("--runtime-dir", str(path), "--max-memory", max_memory),
                *("--linger-seconds", str(LINGER_SECONDS)),
            ],
            env={**os.environ, "NOTIFY_SOCKET": address},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        _started.append(process)
        waited = 0.0
        while waited < _START_SECONDS:
            with suppress(TimeoutError):
                if b"READY=1" in ready.recv(4096):
                    return
            waited += 0.1
            if process.poll() is not None:
                if process.returncode == _INSTANCE_BUSY and _listens(path):
                    return
                said.seek(0)
                raise Unavailable(
                    "the private daemon did not start: " + said.read().decode(errors="replace"),
                    exit_code=process.returncode,
                )
        process.kill()
        raise Unavailable("the private daemon was not ready in time", waited=_START_SECONDS)


def _listens(path: Path) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path / LIFELINE_SOCKET))
        except OSError:
            return False
    return True
