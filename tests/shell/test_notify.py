"""sd_notify messages, against a real datagram socket in the service manager's place."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A bound socket, and what $NOTIFY_SOCKET would say."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@kvdtest-notify-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(name.replace("@", "\0", 1))
        bound.settimeout(30)
        yield bound, name


def test_messages(manager: tuple[socket.socket, str]):
    bound, name = manager
    notifier = Notifier.from_env({"NOTIFY_SOCKET": name})
    for call, message in (
        (notifier.ready, b"READY=1"),
        (lambda: notifier.status("12 blocks"), b"STATUS=12 blocks"),
        (lambda: notifier.status("ä\nREADY=1\r\nx\udc80"), "STATUS=ä READY=1 x?".encode()),
        (notifier.watchdog, b"WATCHDOG=1"),
        (notifier.stopping, b"STOPPING=1"),
    ):
        assert call()
        assert bound.recv(1000) == message
    notifier.close()
    notifier.close()
    assert not notifier.ready()


def test_without_a_socket_nothing_happens():
    notifier = Notifier.from_env({})
    assert notifier.watchdog_interval is None
    assert not notifier.ready()
    assert not notifier.status("text")
    assert not notifier.stopping()
    notifier.close()


def test_service_manager_that_is_gone_or_does_not_read_holds_nobody_up(tmp_path: Path):
    name = str(tmp_path / "notify")
    notifier = Notifier.from_env({"NOTIFY_SOCKET": name})
    assert not notifier.ready()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(name)
        sent = 0
        while sent < 1_000_000 and notifier.watchdog():
            sent += 1
        assert 0 < sent < 1_000_000
        bound.recv(100)
        assert notifier.watchdog()
    assert not notifier.ready()
    notifier.close()


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.25),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_PID": str(os.getpid())}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], interval: float | None):
    assert Notifier.from_env(environ).watchdog_interval == interval


@pytest.mark.parametrize(
    "environ",
    [
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": "@"},
        {"NOTIFY_SOCKET": "vsock:2:1234"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "-1"},
    ],
)
def test_nonsense_is_refused_at_construction(environ: dict[str, str]):
    with pytest.raises(ValueError, match=r"NOTIFY_SOCKET|WATCHDOG_USEC"):
        Notifier.from_env(environ)
