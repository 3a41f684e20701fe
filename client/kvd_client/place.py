"""Whether the daemon in a directory may be believed: what is checked before a client says a word.

A client tells a daemon its prompts, and computes with the K/V that it gets back. Anybody can make a
directory in /tmp, call it as another user's daemon would, and listen there. So a lifeline is
connected only to

    a directory     that is no symbolic link; that neither its group nor the world can write to; and
                    that belongs to us or to root, or lies where only root can put one (/run)
    a listener      whose process, as the kernel saw it when it began to listen, was of the same
                    user as the directory

The second check also holds when the directory is exchanged between the first one and connecting.
"""

import errno
import os
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from kvd_proto.paths import LIFELINE_SOCKET

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


class Listener(NamedTuple):
    """A process when it began to listen. In a container of its own, `pid` may be 0."""

    pid: int
    uid: int


def connect_lifeline(directory: Path) -> socket.socket:
    """A lifeline to whoever listens in `directory`, non-blocking.

    Raises OSError if nobody does, and PermissionError with the reason if it may not be believed.
    """
    owner = _owner(directory)
    kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    lifeline = socket.socket(socket.AF_UNIX, kind)
    try:
        lifeline.connect(str(directory / LIFELINE_SOCKET))
        listener = listener_of(lifeline).uid
        if listener != owner:
            raise _distrust(f"user {listener} listens in a directory of user {owner}")
    except BaseException:
        lifeline.close()
        raise
    return lifeline


def listener_of(lifeline: socket.socket) -> Listener:
    """Who listens at the other end, as the kernel saw it."""
    raw = lifeline.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Listener(*_CREDENTIALS.unpack(raw)[:2])


def _owner(directory: Path) -> int:
    """The uid whose daemon is expected in the directory."""
    found = os.stat(directory, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        raise _distrust("it is not a directory")
    if found.st_mode & 0o022:
        mode = stat.S_IMODE(found.st_mode)
        raise _distrust(f"others than its owner may write to it: mode {mode:04o}")
    if found.st_uid not in (os.geteuid(), 0) and not _only_root_writes(directory.parent):
        raise _distrust(f"it belongs to user {found.st_uid}, and need not be there by root's will")
    return found.st_uid


def _only_root_writes(directory: Path) -> bool:
    found = os.stat(directory)
    return found.st_uid == 0 and not found.st_mode & 0o022


def _distrust(reason: str) -> PermissionError:
    return PermissionError(errno.EPERM, reason)
