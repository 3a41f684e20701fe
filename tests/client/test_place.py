"""Whom a client believes: squatters, other users' daemons, and directories that others can write
to. Nothing is ever sent to somebody who is not believed."""

import ctypes
import os
import platform
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import kvd_client
from kvd_client.errors import Unavailable
from kvd_client.handshake import Handshake
from kvd_client.place import connect_lifeline
from kvd_client.private import start_private_daemon
from kvd_proto import codec
from kvd_proto.messages import Hello
from kvd_proto.paths import LIFELINE_SOCKET, runtime_dirs
from tests.users import ALICE, GROUP, SERVICE, STRANGER, daemon_of_service, needs_root, run_as

pytestmark = needs_root

LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can write to, with the sticky bit, like /tmp."""
    with tempfile.TemporaryDirectory(prefix="kvd-place-") as made:
        os.chmod(made, 0o1777)
        yield Path(made)


def refusal(directory: Path) -> str:
    with pytest.raises(PermissionError) as refused:
        connect_lifeline(directory)
    assert refused.value.strerror is not None
    return refused.value.strerror


class Listening:
    """Somebody who listens in a directory, open to all, and notes what he is told."""

    def __init__(self, directory: Path, uid: int) -> None:
        self.told: list[bytes] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(directory / LIFELINE_SOCKET))
        os.chmod(directory / LIFELINE_SOCKET, 0o777)

        def listen() -> None:
            # SO_PEERCRED has the thread's credentials; seteuid of Python is the whole process's.
            libc_setresuid(uid)
            self._socket.listen()

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()

    def heard(self) -> list[bytes]:
        """All that connections have said."""
        self._socket.setblocking(False)
        try:
            while True:
                connection, _ = self._socket.accept()
                connection.setblocking(True)
                with connection:
                    while said := connection.recv(1 << 16):
                        self.told.append(said)
        except BlockingIOError:
            return self.told

    def close(self) -> None:
        self._socket.close()


def libc_setresuid(uid: int) -> None:
    """The effective uid of this thread alone, which the C library's wrapper would not do."""
    number = {"x86_64": 117, "aarch64": 147}[platform.machine()]
    assert LIBC.syscall(number, -1, uid, -1) == 0, os.strerror(ctypes.get_errno())


@contextmanager
def listening(directory: Path, uid: int) -> Iterator[Listening]:
    somebody = Listening(directory, uid)
    try:
        yield somebody
    finally:
        somebody.close()


def make(directory: Path, owner: int, mode: int = 0o755) -> Path:
    directory.mkdir()
    os.chown(directory, owner, owner)
    directory.chmod(mode)
    return directory


def test_a_squatter_in_tmp_is_told_nothing(place: Path) -> None:
    """STRANGER makes the directory in which ALICE's daemon would be, and waits for her prompts."""
    squat = make(place / f"kvd-{ALICE.uid}", STRANGER.uid)
    with listening(squat, STRANGER.uid) as squatter:
        reason = run_as(ALICE, lambda: refusal(squat))
        assert reason == (
            f"it belongs to user {STRANGER.uid}, and need not be there by root's will"
        )

        def connect() -> str:
            with pytest.raises(Unavailable) as refused:
                kvd_client.connect(squat, fail_open=False).ping()
            return str(refused.value)

        assert reason in run_as(ALICE, connect)
        assert squatter.heard() == []


def test_a_squatter_keeps_no_private_daemon_from_starting(place: Path) -> None:
    """It is not taken for a daemon that listens already, and the daemon says what is wrong."""
    squat = make(place / f"kvd-{os.geteuid()}", STRANGER.uid)
    with (
        listening(squat, STRANGER.uid) as squatter,
        pytest.raises(Unavailable, match=f"belongs to user {STRANGER.uid}, not to 0"),
    ):
        start_private_daemon([squat], "test-squatted", "16MiB")
    assert squatter.told == []


def test_a_service_is_believed_where_only_root_can_have_put_it(place: Path) -> None:
    with daemon_of_service("--socket-group", str(GROUP), "--max-memory", "16MiB") as daemon:
        run_as(ALICE, lambda: connect_lifeline(daemon.runtime_dir).close())
        connect_lifeline(daemon.runtime_dir).close()
        # The same daemon, in a place in which others than root can make directories.
        os.chmod(daemon.runtime_dir.parent, 0o1777)
        for user in (ALICE, STRANGER):
            reason = run_as(user, lambda: refusal(daemon.runtime_dir))
            assert reason.startswith(f"it belongs to user {SERVICE.uid}")
        run_as(SERVICE, lambda: connect_lifeline(daemon.runtime_dir).close())
        os.chmod(daemon.runtime_dir.parent, 0o755)


def test_who_listens_must_be_whose_directory_it_is(place: Path) -> None:
    """The directory was exchanged after it was looked at, or its owner has let somebody in."""
    with listening(make(place / "run", 0), STRANGER.uid) as other:
        assert refusal(place / "run") == f"user {STRANGER.uid} listens in a directory of user 0"
        assert other.heard() == []


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_directory_that_others_can_write_to_is_not_believed(place: Path, mode: int) -> None:
    with listening(make(place / "run", 0, mode), 0):
        assert refusal(place / "run").startswith("others than its owner may write to it")


def test_a_link_is_not_believed(place: Path) -> None:
    """Not even to the right place: in /tmp others could have made it, and change it."""
    target = make(place / "run", 0)
    (place / "link").symlink_to(target)
    with listening(target, 0):
        assert refusal(place / "link") == "it is not a directory"
        connect_lifeline(target).close()


def test_the_next_directory_is_tried(place: Path) -> None:
    squat = make(place / "squat", STRANGER.uid)
    own = make(place / "own", 0, 0o700)
    with listening(squat, STRANGER.uid) as squatter, listening(own, 0) as daemon:
        handshake = Handshake.begin([squat, own], "test", 0)
        assert handshake.path == own
        handshake.lose(Unavailable("done"))
        assert squatter.heard() == []
        assert [type(codec.decode_datagram(said)) for said in daemon.heard()] == [Hello]


def test_a_member_of_the_group_looks_where_the_service_is() -> None:
    assert runtime_dirs(environ={})[0] == Path("/run/kvd")
    assert runtime_dirs("b", {})[0] == Path("/run/kvd-b")
