"""The beginning of a session: hello, and the daemon's welcome. It never waits.

A welcome may take its time (the daemon gives the staging its memory first, or hangs), so a
handshake can be left alone and looked at later. What follows it: session.py.
"""

import mmap
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from kvd_client.errors import DeadlineExceeded, KvdError, Unavailable, copy_error
from kvd_client.lifeline import receive_datagram
from kvd_client.place import connect_lifeline, listener_of
from kvd_client.session import Session
from kvd_client.staging import StagingArea
from kvd_proto import PROTOCOL_VERSION, codec
from kvd_proto.errors import from_wire
from kvd_proto.messages import Hello, Refused, Welcome


class Handshake:
    """A lifeline on which we said hello. Ends with a `session`, or with `lost`."""

    def __init__(self, lifeline: socket.socket, path: Path) -> None:
        """Takes over the socket. Use Handshake.begin()."""
        self._lifeline = lifeline
        self.path = path
        self.session: Session | None = None
        self.lost: KvdError | None = None
        self.on_end: Callable[[], None] | None = None
        self.waited_for = False
        """Whether somebody has waited for the welcome in vain."""

    @classmethod
    def begin(cls, paths: Sequence[Path], client: str, staging_bytes: int) -> "Handshake":
        """Say hello in the first directory in which somebody listens whom we may believe (see
        place.py). Raises Unavailable, and DeadlineExceeded if many have been waiting for it."""
        reasons = []
        for path in paths:
            try:
                lifeline = connect_lifeline(path)
            except BlockingIOError:  # as many wait for it as may: it does not take them
                raise DeadlineExceeded("the daemon does not answer", path=str(path)) from None
            except OSError as error:
                reasons.append(f"{path}: {error.strerror or error}")
                continue
            try:
                lifeline.send(codec.encode_datagram(Hello(PROTOCOL_VERSION, client, staging_bytes)))
            except OSError as error:
                lifeline.close()
                reasons.append(f"{path}: {error.strerror or error}")
            except BaseException:
                lifeline.close()
                raise
            else:
                return cls(lifeline, path)
        raise Unavailable("no daemon listens (" + "; ".join(reasons) + ")")

    @property
    def daemon_pid(self) -> int:
        """The process that should welcome us."""
        return listener_of(self._lifeline).pid

    def has_session(self) -> bool:
        """Whether the daemon has welcomed us."""
        return self.session is not None

    def readers(self) -> dict[int, Callable[[], None]]:
        return {self._lifeline.fileno(): self.receive}

    def receive(self) -> None:
        """Take in the welcome or the refusal, if it has come."""
        if self.lost is not None or self.session is not None:
            return
        fds: list[int] = []
        try:
            received = receive_datagram(self._lifeline)
            if received is None:
                return
            fds = received.fds
            self._answered(received.message, fds)
        except KvdError as error:
            self.lose(error)
        except (OSError, ValueError, zmq.ZMQError) as error:
            self.lose(Unavailable(f"the session cannot be opened: {error}"))
        except BaseException:
            self.lose(Unavailable("the handshake was interrupted"))
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def lose(self, error: KvdError) -> None:
        """Give up; whoever waits is told `error`."""
        if self.session is None and self.lost is None:
            self.lost = copy_error(error)
            self._end()
            self._lifeline.close()

    def _answered(self, message: Any, fds: list[int]) -> None:
        if isinstance(message, Refused):
            raise from_wire(message.code, message.message, message.details)
        if message is None:
            raise Unavailable("the daemon has hung up", path=str(self.path))
        if not isinstance(message, Welcome) or len(fds) != (message.staging_bytes > 0):
            raise Unavailable("the daemon did not welcome us", path=str(self.path))
        staging = StagingArea(mmap.mmap(fds[0], message.staging_bytes)) if fds else None
        session = Session(self._lifeline, message, staging, self.path)
        self._end()
        self.session = session

    def _end(self) -> None:
        if self.on_end is not None:
            self.on_end()
            self.on_end = None
