"""Messages to systemd: the sd_notify protocol, in the few lines that it takes.

Covers readiness, reloading, status, stopping, the watchdog and extensions of a timeout.
Does not cover when to send them (server.py), nor units (systemd/).

A message is one datagram of `NAME=value` lines to the socket that the service manager names in
$NOTIFY_SOCKET. Without that variable everything here does nothing.
"""

import os
import socket
import time
from collections.abc import Mapping

_MICROSECONDS = 1_000_000


class Notifier:
    """Sends to one socket, or nowhere. Never blocks and, once constructed, never raises: each
    method returns whether the message was handed to the kernel (False, too, without a socket).

    `watchdog_interval` is the time in seconds after which watchdog() is due each time, half of what
    the service manager allows, or None if it does not ask for it.
    """

    def __init__(self, address: str | None, *, watchdog_interval: float | None = None) -> None:
        """`address` is a path, or `@name` for an abstract socket; ValueError if it is neither."""
        self.watchdog_interval = watchdog_interval
        self._address = ""
        self._sock: socket.socket | None = None
        if address is None:
            return
        if not address.startswith(("/", "@")) or len(address) < 2:
            raise ValueError(f"NOTIFY_SOCKET is neither a path nor @name: {address!r}")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_UNIX, kind)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "Notifier":
        """From $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID. ValueError on nonsense in them."""
        return cls(environ.get("NOTIFY_SOCKET"), watchdog_interval=_watchdog_interval(environ))

    def ready(self) -> bool:
        """Start-up is finished."""
        return self._send("READY=1")

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        # A line break would begin another assignment.
        return self._send("STATUS=" + " ".join(text.splitlines()))

    def reloading(self) -> bool:
        """The configuration is being read again; `ready` ends it."""
        # By the time systemd tells it from a message that was late (Type=notify-reload).
        now = int(time.monotonic() * _MICROSECONDS)
        return self._send(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def stopping(self) -> bool:
        """Shutdown has begun."""
        return self._send("STOPPING=1")

    def watchdog(self) -> bool:
        """A sign of life."""
        return self._send("WATCHDOG=1")

    def close(self) -> None:
        """Afterwards nothing is sent. Closing again does nothing."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _send(self, message: str) -> bool:
        if self._sock is None:
            return False
        try:
            self._sock.sendto(message.encode(errors="replace"), socket.MSG_NOSIGNAL, self._address)
        except OSError:  # no socket there, its queue is full: the daemon's work goes on
            return False
        return True


def _watchdog_interval(environ: Mapping[str, str]) -> float | None:
    allowed = environ.get("WATCHDOG_USEC")
    if allowed is None or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not allowed.isdecimal() or int(allowed) == 0:
        raise ValueError(f"WATCHDOG_USEC is not a positive number: {allowed!r}")
    return int(allowed) / 2 / _MICROSECONDS
