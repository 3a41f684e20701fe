"""The daemon's side of the lifeline, against real client processes."""

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.lifeline import DatagramTooLong, Listener, Peer, PeerGone, SendQueueFull

TIMEOUT = 30  # seconds; nothing here should take a tenth of one


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "lifeline.sock")


@pytest.fixture
def listener(path: str) -> Iterator[Listener]:
    made = Listener(path)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_descriptor_is_leaked() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"), key=int)
    yield
    assert sorted(os.listdir("/proc/self/fd"), key=int) == before


def readable(fd: int, events: int = select.POLLIN) -> bool:
    poller = select.poll()
    poller.register(fd, events)
    return bool(poller.poll(TIMEOUT * 1000))


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.settimeout(TIMEOUT)
    client.connect(path)
    return client


@contextlib.contextmanager
def pair(listener: Listener) -> Iterator[tuple[Peer, socket.socket]]:
    """A Peer and its client's socket, both in this process."""
    with connect(listener.path) as client:
        assert readable(listener.fd)
        peer = listener.accept()
        assert peer is not None
        try:
            yield peer, client
        finally:
            peer.close()


@contextlib.contextmanager
def client_process(path: str, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that connects as `lifeline`, says so, and runs `code`; killed at the end."""
    begin = f"""
    import os, signal, socket, sys
    lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline.connect({path!r})
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(begin) + textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def accept(listener: Listener) -> Peer:
    assert readable(listener.fd)
    peer = listener.accept()
    assert peer is not None
    return peer


def test_socket_file_is_private_and_goes_with_the_listener(path: str):
    umask = os.umask(0)
    try:
        listener = Listener(path)
        assert os.umask(0) == 0  # put back
    finally:
        os.umask(umask)
    found = os.stat(path)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert not os.get_inheritable(listener.fd)
    assert listener.accept() is None
    listener.close()
    listener.close()
    assert not os.path.exists(path)


def test_stale_socket_is_replaced_but_nothing_else(path: str):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(path)
    listener = Listener(path)
    with pair(listener):
        pass
    # Somebody has put his own there meanwhile: it stays.
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(path)
        listener.close()
    assert os.path.exists(path)
    os.unlink(path)
    Path(path).write_text("a file")
    with pytest.raises(FileExistsError):
        Listener(path)
    assert Path(path).read_text() == "a file"


def test_path_that_is_too_long_is_an_error_that_leaves_nothing(tmp_path: Path):
    with pytest.raises(OSError, match="too long"):
        Listener(str(tmp_path / ("x" * 108)))


def test_peer_is_who_the_kernel_says(listener: Listener):
    with client_process(listener.path, "lifeline.recv(1)") as process:
        peer = accept(listener)
        assert (peer.pid, peer.uid, peer.gid) == (process.pid, os.geteuid(), os.getegid())
        assert not os.get_inheritable(peer.fd)
        assert not os.get_inheritable(peer.pidfd)
        assert peer.recv(100) is None
        with open(f"/proc/self/fdinfo/{peer.pidfd}") as info:
            assert f"Pid:\t{process.pid}\n" in info.read()
        peer.close()


def test_sigkill_ends_both_descriptors(listener: Listener):
    with client_process(listener.path, "lifeline.recv(1)") as process:
        peer = accept(listener)
        process.kill()
        # Not waited for yet: a zombie is dead.
        assert readable(peer.pidfd)
        assert readable(peer.fd)
        with pytest.raises(PeerGone) as caught:
            peer.recv(100)
        assert caught.value.pid == process.pid
        peer.close()


def test_forked_child_keeps_the_socket_open_but_not_the_pidfd(listener: Listener):
    code = """
    child = os.fork()
    if child == 0:
        signal.pause()
    print(child, flush=True)
    lifeline.recv(1)
    """
    with client_process(listener.path, code) as process:
        peer = accept(listener)
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            process.kill()
            assert readable(peer.pidfd)
            assert peer.recv(100) is None
        finally:
            os.kill(child, signal.SIGKILL)
        peer.close()


def test_living_process_that_closes_its_lifeline_ends_only_the_socket(listener: Listener):
    with client_process(listener.path, "lifeline.close(); sys.stdin.read()"):
        peer = accept(listener)
        assert readable(peer.fd)
        with pytest.raises(PeerGone):
            peer.recv(100)
        with pytest.raises(PeerGone):
            peer.send(b"x")
        peer.close()


def test_process_that_died_before_it_was_accepted(listener: Listener):
    with client_process(listener.path, "") as process:
        process.wait(TIMEOUT)
    assert readable(listener.fd)
    peer = listener.accept()
    if peer is None:  # kernels that give no pidfd of a process that was reaped
        assert listener.refused == 1
        return
    assert peer.pid == process.pid
    with pytest.raises(PeerGone):
        peer.recv(100)
    peer.close()


def test_datagrams_keep_their_borders_and_an_empty_one_is_not_the_end(listener: Listener):
    with pair(listener) as (peer, client):
        for message in (b"one", b"", b"three"):
            client.send(message)
        assert [peer.recv(100) for _ in range(4)] == [b"one", b"", b"three", None]
        peer.send(b"four")
        peer.send(b"five")
        assert client.recv(100) == b"four"
        assert client.recv(100) == b"five"
        client.send(b"last words")
        client.close()
        assert peer.recv(100) == b"last words"
        with pytest.raises(PeerGone):
            peer.recv(100)


def test_shut_down_ends_the_connection_for_both_sides(listener: Listener):
    with pair(listener) as (peer, client):
        peer.shut_down()
        peer.shut_down()
        assert client.recv(100) == b""
        assert readable(peer.fd)
        with pytest.raises(PeerGone):
            peer.recv(100)


def test_datagram_that_is_too_long_is_lost_and_the_next_is_not(listener: Listener):
    with pair(listener) as (peer, client):
        client.send(b"x" * 101)
        client.send(b"y" * 100)
        with pytest.raises(DatagramTooLong) as caught:
            peer.recv(100)
        assert caught.value.limit == 100
        assert peer.recv(100) == b"y" * 100
        with pytest.raises(OSError, match="Message too long") as too_long:
            peer.send(b"x" * 10_000_000)
        assert too_long.value.errno == errno.EMSGSIZE
        peer.send(b"still there")
        assert client.recv(100) == b"still there"


def test_descriptors_arrive_and_stay_the_senders(listener: Listener, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"content")
    with pair(listener) as (peer, client), open(tmp_path / "file", "rb") as file:
        peer.send(b"take", [file.fileno(), file.fileno()])
        file.close()
        message, fds, _, _ = socket.recv_fds(client, 100, 10)
        assert message == b"take"
        assert [os.pread(fd, 100, 0) for fd in fds] == [b"content"] * 2
        for fd in fds:
            os.close(fd)


def test_queue_keeps_order_and_descriptors_and_is_bounded(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"content")
    ours, client = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.settimeout(TIMEOUT)
    peer = Peer(ours, max_queued=5)
    sent = 0
    while not peer.wants_write:
        peer.send(sent.to_bytes(4, "little") * 256)
        sent += 1
    for _ in range(4):
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        peer.send(sent.to_bytes(4, "little") * 256, [fd])
        os.close(fd)
        sent += 1
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SendQueueFull) as caught:
        peer.send(b"too many", [0])
    assert caught.value.queued == 5
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not peer.flush()

    # There is room again, but what is queued has to go first.
    assert client.recv(2000) == bytes(4 * 256)
    with pytest.raises(SendQueueFull):
        peer.send(b"too many still")
    for number in range(1, sent):
        message, fds, _, _ = socket.recv_fds(client, 2000, 10)
        assert message == number.to_bytes(4, "little") * 256
        assert len(fds) == (1 if number >= sent - 4 else 0)
        for fd in fds:
            assert os.pread(fd, 100, 0) == b"content"
            os.close(fd)
        peer.flush()
    assert peer.flush()
    assert not peer.wants_write
    peer.send(b"direct again")
    assert client.recv(100) == b"direct again"
    peer.close()
    client.close()


def test_close_drops_the_queue_with_its_descriptors(listener: Listener):
    with pair(listener) as (peer, _client):
        while not peer.wants_write:
            peer.send(b"x" * 1000, [0])
        peer.send(b"x", [0, 0, 0])
        peer.close()
        peer.close()  # and no_descriptor_is_leaked


def test_descriptors_from_a_client_never_become_ours(listener: Listener):
    reading, writing = os.pipe()
    with pair(listener) as (peer, client):
        # Linux 6.16 and later refuse them on the client's side.
        with contextlib.suppress(PermissionError):
            socket.send_fds(client, [b"take these"], [writing] * 100)
            assert peer.recv(100) == b"take these"
        client.send(b"without")
        assert peer.recv(100) == b"without"
    # The way of older kernels, on a socket that did not get the option from a Listener.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = Peer(ours)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        socket.send_fds(theirs, [b"take these"], [writing] * 100)
        assert peer.recv(100) == b"take these"
    assert len(os.listdir("/proc/self/fd")) == descriptors
    os.close(writing)
    assert os.read(reading, 1) == b""  # nobody has the writing end any more
    os.close(reading)
    peer.close()
    theirs.close()


def test_client_is_refused_when_descriptors_run_out_and_the_next_is_not(listener: Listener):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [connect(listener.path) for _ in range(4)]
    filling: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        with contextlib.suppress(OSError):
            while True:
                filling.append(os.open("/dev/null", os.O_RDONLY))
        assert listener.accept() is None
        assert listener.refused == 1
        assert clients[0].recv(1) == b""  # it was told
        os.close(filling.pop())  # enough for the connection, not for its pidfd
        assert listener.accept() is None
        assert listener.refused == 2
        assert clients[1].recv(1) == b""
        os.close(filling.pop())
        peer = listener.accept()
        assert peer is not None
        peer.send(b"hello")
        assert clients[2].recv(10) == b"hello"
        peer.close()
        peer = listener.accept()
        assert peer is not None
        peer.close()
        assert listener.accept() is None
        assert listener.refused == 2
    finally:
        for fd in filling:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for client in clients:
            client.close()
