"""Where metrics are served: on a Unix socket in the runtime directory, on loopback, or on sockets
that systemd has passed, so that the service need not be able to make any.

There is no password, so nothing but this machine can ask: other addresses are refused, whoever
bound them.
"""

import importlib.util
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kvd import log
from kvd.group import SOCKET_MODE, admit

METRICS_SOCKET = "metrics.sock"
UNIX = "unix"
"""The setting for that."""
PASSED_NAME = "metrics"
"""FileDescriptorName= of a socket unit."""
BACKLOG = 16
_FIRST_PASSED = 3  # SD_LISTEN_FDS_START
_ADDRESS = re.compile(r"(?:([0-9.]+)|\[([0-9a-fA-F:.]+)\]):([0-9]{1,5})")


class Address(NamedTuple):
    """A loopback address to listen at."""

    host: str
    port: int


class CannotServe(Exception):
    """Metrics are asked for, and cannot be served as they are; the message says what to do."""


ALLOWED = (
    '"unix", or an address of this machine alone, like "127.0.0.1:9187" or "[::1]:9187": there is '
    "no password"
)


def parse(setting: str) -> Address | None:
    """The address that a setting names; None: it is "", or a Unix socket. Raises ValueError."""
    if setting in ("", UNIX):
        return None
    found = _ADDRESS.fullmatch(setting)
    if found is None:
        raise ValueError(f"it is {ALLOWED}")
    host, port = found[1] or found[2], int(found[3])
    if not ipaddress.ip_address(host).is_loopback or not 1 <= port <= 65535:
        raise ValueError(f"it is {ALLOWED}")
    return Address(host, port)


def check_installed(setting: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise CannotServe if metrics are asked for and what writes them is not there."""
    wanted = f"metrics = {setting!r}" if setting else ""
    if not wanted and any(name == PASSED_NAME for name in _passed(environ).values()):
        wanted = "a socket for metrics was passed"
    if wanted and importlib.util.find_spec("prometheus_client") is None:
        raise CannotServe(
            f"{wanted}, but the package prometheus_client is not installed: "
            "pip install 'kvd-cache[metrics]'"
        )


class Listener(NamedTuple):
    """A listening socket, and the file to remove with it, if it is ours."""

    sock: socket.socket
    path: Path | None = None

    def __str__(self) -> str:
        """Where it listens, for people."""
        name = self.sock.getsockname()
        if self.sock.family == socket.AF_UNIX:
            return str(name)
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"

    def close(self) -> None:
        """Close it."""
        self.sock.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def listen(
    setting: str, runtime_dir: Path, group: int | None, environ: Mapping[str, str] = os.environ
) -> list[Listener]:
    """Bind what the setting asks for, and take what systemd has passed. The caller holds the
    instance's lock. A Unix socket is this user's, and that `group`'s (a gid) if there is one.
    Raises CannotServe and OSError, leaving nothing open but what was passed."""
    listeners = _passed_sockets(environ)
    address = parse(setting)
    if address is not None:
        listeners.append(Listener(_bind_address(setting, address)))
    elif setting == UNIX:
        path = runtime_dir / METRICS_SOCKET
        listeners.append(Listener(_bind_path(path, group), path))
    return listeners


def _bind_address(setting: str, address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"metrics = {setting!r}: {error.strerror}") from error
    return sock


def _bind_path(path: Path, group: int | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        umask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(umask)
        if group is not None:
            admit(path, group, SOCKET_MODE)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _passed_sockets(environ: Mapping[str, str]) -> list[Listener]:
    """The listening sockets called "metrics" that systemd has passed. Raises CannotServe for one
    that is no such thing, or that others than this machine can reach."""
    listeners = []
    for fd, name in _passed(environ).items():
        if name != PASSED_NAME:
            log.warning("descriptor not used", fd=fd, name=name, known=PASSED_NAME)
            continue
        try:
            sock = socket.socket(fileno=fd)
            is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise CannotServe(f"the descriptor passed for metrics is no socket: {error}") from error
        if not is_listening or sock.type != socket.SOCK_STREAM:
            raise CannotServe("the socket passed for metrics is not a stream that is listened at")
        if sock.family != socket.AF_UNIX:
            host = sock.getsockname()[0]
            if not ipaddress.ip_address(host).is_loopback:
                raise CannotServe(
                    f"the socket passed for metrics listens at {host}, and metrics have no "
                    "password: ListenStream=127.0.0.1:9187"
                )
        sock.set_inheritable(False)
        listeners.append(Listener(sock))
    return listeners


def _passed(environ: Mapping[str, str]) -> dict[int, str]:
    """The descriptors that were passed to this process, and their names: sd_listen_fds(3)."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = environ.get("LISTEN_FDS", "0")
    if not count.isdecimal():
        raise CannotServe(f"LISTEN_FDS is not a number: {count!r}")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    fds = range(_FIRST_PASSED, _FIRST_PASSED + int(count))
    return {fd: names[index] if index < len(names) else "" for index, fd in enumerate(fds)}
