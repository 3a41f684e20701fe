"""The daemon's side of the lifeline: a Unix socket that proves who a client is, and that it lives.

Covers the listening socket, accepting, the peer's credentials and pidfd, datagrams out with
descriptors and in without, and the end of it all.
Does not cover what the datagrams mean (kvd_proto), what a session is and what its end gives back
(server.py, kvd.core), nor the client's side (kvd_client).

Two descriptors of a Peer belong into the poll loop, since each notices what the other does not:
`fd` ends when the client closes its lifeline while its process lives on, and `pidfd` when the
process dies although a forked child still holds the lifeline open.
"""

import collections
import contextlib
import ctypes
import errno
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvd.group import SOCKET_MODE, admit

MAX_QUEUED = 64  # datagrams; a client that reads has one or two on the way

# From asm-generic/socket.h: Python's socket module names none of them.
_SO_PEERGROUPS = 59  # Linux 4.13
_SO_PEERPIDFD = 77  # Linux 6.5
_SO_PASSRIGHTS = 83  # Linux 6.16

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


_MAX_GROUPS = 65536  # NGROUPS_MAX
_libc = ctypes.CDLL(None, use_errno=True)


class PeerGone(Exception):
    """The client's end of the lifeline is closed."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"the lifeline of process {pid} is closed")
        self.pid = pid


class DatagramTooLong(Exception):
    """The client sent more than `limit` bytes at once; the datagram is lost, the next can be
    received."""

    def __init__(self, pid: int, limit: int) -> None:
        super().__init__(f"process {pid} sent a datagram of more than {limit} bytes")
        self.pid = pid
        self.limit = limit


class SendQueueFull(Exception):
    """The client does not read: `queued` datagrams wait for it. This one was not queued."""

    def __init__(self, pid: int, queued: int) -> None:
        super().__init__(f"process {pid} does not read its lifeline, {queued} datagrams wait")
        self.pid = pid
        self.queued = queued


@dataclass(frozen=True, slots=True)
class _Queued:
    message: bytes
    fds: tuple[int, ...]  # duplicates, our own


class Peer:
    """One client's lifeline. Nothing here blocks.

    `fd` and `pidfd` are for the poll loop only; both belong to the Peer. `pid`, `uid` and `gid` are
    those of the process that connected, as the kernel saw it at that moment; `pid` is for people,
    and only the pidfd is proof.
    """

    def __init__(self, sock: socket.socket, *, max_queued: int = MAX_QUEUED) -> None:
        """Takes over a connected SOCK_SEQPACKET socket. ProcessLookupError, and the socket is
        closed, if the process that connected is gone already."""
        self._sock = sock
        self._max_queued = max_queued
        self._queue: collections.deque[_Queued] = collections.deque()
        self._closed = False
        try:
            sock.setblocking(False)
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self.pid, self.uid, self.gid = _CREDENTIALS.unpack(raw)
            self.pidfd = _open_pidfd(sock, self.pid)
        except BaseException:
            sock.close()
            raise
        self.fd = sock.fileno()

    def groups(self) -> frozenset[int]:
        """All groups of the process that connected, as the kernel saw them at that moment: `gid`
        and the supplementary ones. Raises OSError."""
        # Not through the socket module, which takes no more than 256 of them.
        found = (ctypes.c_uint32 * _MAX_GROUPS)()
        length = ctypes.c_uint32(ctypes.sizeof(found))
        result = _libc.getsockopt(
            self.fd, socket.SOL_SOCKET, _SO_PEERGROUPS, found, ctypes.byref(length)
        )
        if result:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        count = length.value // ctypes.sizeof(ctypes.c_uint32)
        return frozenset([self.gid, *found[:count]])

    @property
    def wants_write(self) -> bool:
        """Datagrams are queued: watch `fd` for writability, and then call flush()."""
        return bool(self._queue)

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send one datagram with copies of `fds`, or queue it if the socket's buffer is full. The
        caller may close `fds` at once.

        Raises PeerGone, or SendQueueFull when `max_queued` datagrams wait already. Any other
        OSError (EMSGSIZE: too long for the socket) concerns this datagram alone.
        """
        if not self._queue and self._send_now(message, fds):
            return
        if len(self._queue) >= self._max_queued:
            raise SendQueueFull(self.pid, len(self._queue))
        self._queue.append(_Queued(message, _duplicate(fds)))

    def flush(self) -> bool:
        """Send what is queued, as far as it goes; True when nothing is left. Raises as send()."""
        while self._queue:
            first = self._queue[0]
            if not self._send_now(first.message, first.fds):
                return False
            self._queue.popleft()
            _close_all(first.fds)
        return True

    def recv(self, max_bytes: int) -> bytes | None:
        """The next datagram, or None if there is none. Descriptors that come with it are closed.

        Raises PeerGone at the end of the connection, and DatagramTooLong.
        """
        try:
            # Without a buffer for them the kernel drops descriptors before they become ours.
            message, _, flags, _ = self._sock.recvmsg(max_bytes, 0, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise PeerGone(self.pid) from error
        if flags & socket.MSG_TRUNC:
            raise DatagramTooLong(self.pid, max_bytes)
        if not message and self._hung_up():
            raise PeerGone(self.pid)
        return message

    def shut_down(self) -> None:
        """End the connection; both sides then see its end, this one in its poll loop."""
        with contextlib.suppress(OSError):  # it has ended already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close both descriptors and drop what is queued. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._sock.close()
        os.close(self.pidfd)
        while self._queue:
            _close_all(self._queue.popleft().fds)

    def _send_now(self, message: bytes, fds: Sequence[int]) -> bool:
        try:
            socket.send_fds(self._sock, [message], list(fds), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except ConnectionError as error:  # BrokenPipeError among them
            raise PeerGone(self.pid) from error
        return True

    def _hung_up(self) -> bool:
        # An empty datagram looks like the end of the connection, but only the latter hangs up.
        return self._poll(self.fd, select.POLLRDHUP)

    @staticmethod
    def _poll(fd: int, events: int) -> bool:
        poller = select.poll()
        poller.register(fd, events)
        return bool(poller.poll(0))


class Listener:
    """The listening socket at `path`, mode 0600: only this user (and root) can connect; with a
    `group` (a gid) it is 0660, and that group's members can, too.

    `fd` is for the poll loop, level-triggered. `refused` counts the connections that were closed
    at once, for want of descriptors or because their process was gone.
    """

    def __init__(
        self,
        path: str,
        *,
        group: int | None = None,
        backlog: int = 128,
        are_short: Callable[[], bool] = lambda: False,
    ) -> None:
        """Removes a socket that a dead daemon left at `path`: the caller holds the instance's lock.
        FileExistsError if something else is there, OSError if the path is too long (107 bytes),
        PermissionError as admit() does.
        The umask is changed for a moment, so no other thread may create files meanwhile.

        While `are_short` says that descriptors are, whoever connects is closed at once."""
        _remove_stale(path)
        self.path = path
        self.refused = 0
        self._are_short = are_short
        kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_UNIX, kind)
        try:
            _refuse_descriptors(self._sock)
            umask = os.umask(0o177)
            try:
                self._sock.bind(path)
            finally:
                os.umask(umask)
            self._bound = os.stat(path, follow_symlinks=False)
            if group is not None:
                admit(path, group, SOCKET_MODE)
            self._sock.listen(backlog)
            self._spare = _open_spare()
        except BaseException:
            self._sock.close()
            raise
        self.fd = self._sock.fileno()

    def accept(self) -> Peer | None:
        """The next client, or None if none waits or the one that did was refused."""
        if self._are_short():
            self._refuse_one()
            return None
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._refuse_one()
            elif error.errno not in (errno.ENOBUFS, errno.ENOMEM):
                raise
            return None
        try:
            return Peer(sock)
        except OSError:  # the process is gone, or there is no descriptor for its pidfd
            self.refused += 1
            return None

    def close(self) -> None:
        """Close, and remove the socket file if it is still ours. Closing again does nothing."""
        if self._sock.fileno() < 0:
            return
        self._sock.close()
        self._give_up_spare()
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return
        if os.path.samestat(found, self._bound):
            os.unlink(self.path)

    def _refuse_one(self) -> None:
        # Left alone, a client that cannot be accepted keeps a level-triggered loop spinning. So the
        # spare descriptor is given up for a moment, to accept it and let it go.
        self._give_up_spare()
        with contextlib.suppress(OSError):  # it went away, or another process was faster (ENFILE)
            self._sock.accept()[0].close()
            self.refused += 1
        with contextlib.suppress(OSError):  # the next time, then
            self._spare = _open_spare()

    def _give_up_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
        self._spare = -1


def _open_pidfd(sock: socket.socket, pid: int) -> int:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ESRCH, errno.ENODATA):
            raise ProcessLookupError(errno.ESRCH, f"process {pid} is gone") from error
        if error.errno != errno.ENOPROTOOPT:
            raise
    # Before Linux 6.5. If the client has died since it connected, and its process id was given out
    # anew, this is the pidfd of a stranger. The end of the connection still tells of the death,
    # unless a forked child holds it open.
    return os.pidfd_open(pid)


def _refuse_descriptors(sock: socket.socket) -> None:
    # Dropping a descriptor that a client sent can block: the last close of a socket that lingers,
    # or of a file on a dead network mount, is then ours. With this option, which accepted sockets
    # inherit, it is the client's sendmsg that fails.
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise


def _remove_stale(path: str) -> None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "there is something that is no socket", path)
    os.unlink(path)


def _open_spare() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def _duplicate(fds: Sequence[int]) -> tuple[int, ...]:
    duplicates: list[int] = []
    try:
        for fd in fds:
            duplicates.append(os.dup(fd))  # noqa: PERF401 - what was duplicated before an error must be known
    except OSError:
        _close_all(duplicates)
        raise
    return tuple(duplicates)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
