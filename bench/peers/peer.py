"""What the benchmark asks of a peer, and where what `make bench-peers` has got lies."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".venv-bench"
"""Of peers.py in scripts/."""
DEBIAN = ENVIRONMENTS / "debian"
_START_SECONDS = 10.0


class LeftOut(Exception):
    """This peer cannot be run here. The message is a word or two for the report."""


class Peer(Protocol):
    """One program that holds payloads under keys.

    `name` has its version, once it is started. Payloads are flat arrays of bytes.
    """

    name: str

    def start(self, largest: int) -> None:
        """Run it, with room for three payloads of `largest` bytes. Raises LeftOut."""
        ...

    def store(self, key: str, payload: Bytes) -> float:
        """Store under a key that may be new or not; seconds until others can see it."""
        ...

    def fetch(self, key: str, into: Bytes) -> float:
        """Fetch into a private, touched buffer of just that length; seconds."""
        ...

    def stop(self) -> None:
        """End it, and leave nothing behind. Also after a start that has failed."""
        ...


def find_program(name: str, package: str) -> tuple[str, dict[str, str]]:
    """A program on PATH, or else the one that `make bench-peers` has unpacked, and the environment
    that it needs. Raises LeftOut."""
    found = shutil.which(name)
    if found:
        return found, dict(os.environ)
    unpacked = DEBIAN / "usr" / "bin" / name
    if not unpacked.exists():
        raise LeftOut(f"{package} is not installed")
    libraries = ":".join(str(path) for path in sorted((DEBIAN / "usr" / "lib").glob("*-linux-*")))
    return str(unpacked), {**os.environ, "LD_LIBRARY_PATH": libraries}


def version_of(command: list[str], environment: dict[str, str]) -> str:
    """What a program prints of its version. Raises LeftOut if it does not run."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LeftOut(f"{Path(command[0]).name} does not run")
    return done.stdout


def connect(address: str, process: "subprocess.Popen[Any]") -> socket.socket:
    """A connection to the Unix socket of a server that has just been started. Raises LeftOut if it
    ends, or does not listen in time."""
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        made = socket.socket(socket.AF_UNIX)
        try:
            made.connect(address)
        except OSError:
            made.close()
            time.sleep(0.01)
            continue
        # As much on its way as the kernel lets us: fewer changes of turn.
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            made.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        return made
    raise LeftOut("it did not start")


def end(process: "subprocess.Popen[Any]") -> None:
    """Ask a process of ours to end, and see to it."""
    process.terminate()
    try:
        process.wait(_START_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class SocketServer:
    """What Redis and memcached have in common: a process that listens on a Unix socket in a folder
    of its own."""

    def __init__(self) -> None:
        self._opened = contextlib.ExitStack()

    def serve(self, command: list[str], address_flag: str, environment: dict[str, str]) -> None:
        """Start it, and connect. Raises LeftOut."""
        folder = self._opened.enter_context(tempfile.TemporaryDirectory(prefix="kvd-bench-"))
        address = f"{folder}/peer.sock"
        process = subprocess.Popen(
            [*command, address_flag, address],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        self._opened.callback(end, process)
        self._connection = self._opened.enter_context(connect(address, process))
        self._received = Received(self._connection)

    def stop(self) -> None:
        """See Peer."""
        self._opened.close()


def pieces(payload: Bytes, most: int) -> list[Bytes]:
    """The payload in parts of at most so many bytes."""
    return [payload[start : start + most] for start in range(0, payload.size, most)]


class Received:
    """What comes from a socket: lines, and bytes that go straight to where they belong."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()

    def line(self) -> bytes:
        """The next line, without its end."""
        while (at := self._buffer.find(b"\r\n")) < 0:
            self._buffer += self._some(256)
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 2]
        return line

    def into(self, target: Bytes) -> None:
        """Fill `target`, and take the end of line behind it."""
        view = memoryview(target)
        at = min(len(self._buffer), len(view))
        view[:at] = self._buffer[:at]
        del self._buffer[:at]
        while at < len(view):
            count = self._connection.recv_into(view[at:])
            if not count:
                raise ConnectionError("the server has closed the connection")
            at += count
        if self.line():
            raise ValueError("the value is longer than what was stored")

    def _some(self, most: int) -> bytes:
        found = self._connection.recv(most)
        if not found:
            raise ConnectionError("the server has closed the connection")
        return found
