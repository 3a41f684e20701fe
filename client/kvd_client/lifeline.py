"""The client's side of the lifeline: its datagrams, and the descriptors that come with them.

What they mean: handshake.py and session.py. The daemon's side: kvd.lifeline.
"""

import array
import os
import socket
from typing import Any, NamedTuple

from kvd_client.errors import KvdError, Unavailable
from kvd_proto import codec

_ROOM_FOR_FDS = socket.CMSG_SPACE(4 * array.array("i").itemsize)


class Received(NamedTuple):
    """A datagram and its descriptors, which are ours now; None at the lifeline's end."""

    message: Any
    fds: list[int]


def receive_datagram(lifeline: socket.socket) -> Received | None:
    """What has arrived on a lifeline, or None. Raises OSError, and Unavailable for garbage."""
    try:
        # Not socket.recv_fds: it drops its flags (Python 3.11 to 3.13 at least), and then programs
        # that we start inherit the descriptors.
        datagram, ancillary, _, _ = lifeline.recvmsg(
            codec.MAX_DATAGRAM_BYTES, _ROOM_FOR_FDS, socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return None
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if not datagram:
        return Received(None, fds.tolist())
    try:
        return Received(codec.decode_datagram(datagram), fds.tolist())
    except KvdError as error:
        for fd in fds:
            os.close(fd)
        raise Unavailable(f"the daemon's message cannot be read: {error}") from None
