"""A private daemon: started by a client that was asked to, when none runs there."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kvd_client.errors import Unavailable
from kvd_client.place import connect_lifeline

LINGER_SECONDS = 10
"""How long it stays after its last client, so that a script that is run again finds it warm."""
_START_SECONDS = 20.0
_INSTANCE_BUSY = 3
"""`kvd serve` exits so when another daemon has the instance: that one is as good."""
_LOOK_AGAIN = 0.02


def start_private_daemon(runtime_dirs: Sequence[Path], instance: str, max_memory: str) -> None:
    """Start a daemon unless one answers in one of `runtime_dirs`, and wait until it is ready.

    Several processes may do this at once: one daemon is started. Raises Unavailable with what it
    said if it does not start.
    """
    if _listens(runtime_dirs):
        return
    path = _place(runtime_dirs).absolute()
    deadline = time.monotonic() + _START_SECONDS
    with (
        tempfile.TemporaryDirectory(prefix="kvd-start-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        tempfile.TemporaryFile() as said,
    ):
        # The daemon says READY as it would to systemd.
        address = os.path.join(directory, "ready")
        ready.bind(address)
        ready.settimeout(_LOOK_AGAIN)
        process = subprocess.Popen(
            [
                # -P: whatever the working directory holds is not the daemon's code.
                *(sys.executable, "-P", "-m", "kvd", "serve", "--instance", instance),
                *("--runtime-dir", str(path), "--max-memory", max_memory),
                *("--linger-seconds", str(LINGER_SECONDS), "--log-level", "warning"),
                "--no-keep-on-stop",  # nobody may ever start it again
            ],
            env={**os.environ, "NOTIFY_SOCKET": address},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        # It outlives this call, and perhaps us; if it does not, somebody has to take its exit code.
        threading.Thread(target=process.wait, name="kvd-private", daemon=True).start()
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                if b"READY=1" in ready.recv(4096):
                    return
            if process.returncode is None:
                continue
            if process.returncode != _INSTANCE_BUSY:
                break
            # Somebody else starts one at this moment: its lock comes first, its socket later.
            if _listens(runtime_dirs):
                return
        if process.returncode is None:
            process.kill()
        said.seek(0)
        raise Unavailable(
            "the private daemon did not start: " + said.read().decode(errors="replace").strip(),
            exit_code=process.returncode,
            runtime_dir=str(path),
        )


def _place(runtime_dirs: Sequence[Path]) -> Path:
    """Where `kvd serve` would put itself: the first directory that is this user's, or whose parent
    is; in /run only if it is there already."""
    for path in runtime_dirs[:-1]:
        for place in (path, path.parent):
            with suppress(OSError):
                if place.stat().st_uid == os.geteuid() and place != Path("/run"):
                    return path
    return runtime_dirs[-1]


def _listens(runtime_dirs: Sequence[Path]) -> bool:
    """Whether somebody whom we may believe accepts connections in one of these directories."""
    for path in runtime_dirs:
        with suppress(OSError):
            connect_lifeline(path).close()
            return True
    return False
