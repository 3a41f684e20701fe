"""How metrics are served: where, to whom, and that nobody can hold it up, or the daemon with it."""

import contextlib
import os
import random
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.core.histogram import Histogram
from kvd.metrics.http import ACCEPTED_A_SECOND, MAX_CONNECTIONS, MAX_HEAD_BYTES, READ_SECONDS
from kvd.metrics.listening import Address, CannotServe, listen, parse
from kvd.metrics.service import Metrics
from kvd.metrics.snapshot import Snapshot
from kvd.timing import BOUNDS
from kvd_proto.messages import Ping
from tests.shell.raw import Raw, raw_client, until
from tests.shell.scraping import connect, free_port, get, metrics_socket, scrape, value
from tests.support import Daemon, running_daemon

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
MEMORY = ("--max-memory", "4MiB")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    runtime_dir = tmp_path_factory.mktemp("http") / "rt"
    with running_daemon(*MEMORY, "--metrics", "unix", runtime_dir=runtime_dir) as running:
        yield running


@pytest.fixture(autouse=True)
def goes_on(daemon: Daemon) -> Iterator[None]:
    """Whatever a test has done, the next scrape and the next client are served."""
    yield
    assert daemon.process.poll() is None, daemon.log.read_text()
    assert " error " not in daemon.log.read_text()
    assert value(scrape(daemon), "kvd_accounting_drift_bytes") == 0
    with raw_client(daemon) as client:
        client.call(Ping())


def say(daemon: Daemon, *parts: bytes) -> bytes:
    """Send bytes as they are; all that is answered."""
    with connect(metrics_socket(daemon)) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                sock.sendall(part)
        return rest_of(sock)


def rest_of(sock: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            answer += part
    return answer


# --- HTTP


def test_paths(daemon: Daemon) -> None:
    assert get(daemon, "/healthz")[::2] == (200, "ok\n")
    metrics = get(daemon, "/metrics?x=y")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert metrics.headers["cache-control"] == "no-store"
    assert get(daemon, "/history.json").headers["content-type"] == "application/json"
    assert get(daemon, "/").headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/x", "/metrics/", "//", "/../etc/passwd", "/page.html"):
        assert get(daemon, path).status == 404, path


def test_head_is_get_without_the_body(daemon: Daemon) -> None:
    answer = get(daemon, "/metrics", method="HEAD")
    assert (answer.status, answer.body) == (200, "")
    assert int(answer.headers["content-length"]) > 1000


def test_a_request_may_come_in_pieces(daemon: Daemon) -> None:
    answer = say(daemon, *[REQUEST[index : index + 1] for index in range(len(REQUEST))])
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET http://localhost/metrics HTTP/1.1\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (b"G" * (MAX_HEAD_BYTES + 1), 431),
    ],
)
def test_what_is_no_request_is_told_so(daemon: Daemon, request_: bytes, status: int) -> None:
    assert say(daemon, request_).startswith(b"HTTP/1.1 %d " % status)


def test_random_bytes(daemon: Daemon) -> None:
    chance = random.Random(4)
    for _ in range(60):
        sent = bytearray(REQUEST * 2)
        for _ in range(chance.randrange(1, 20)):
            sent[chance.randrange(len(sent))] = chance.randrange(256)
        with connect(metrics_socket(daemon)) as sock:
            sock.sendall(sent[: chance.randrange(1, len(sent))])


# --- who takes his time, and who has none


def test_silent_connections_keep_nobody_out(daemon: Daemon) -> None:
    """Twice as many as there may be: the oldest silent ones go."""
    silent: list[socket.socket] = []
    try:
        for number in range(2 * MAX_CONNECTIONS):
            silent.append(connect(metrics_socket(daemon)))
            silent[-1].sendall(b"GET /metrics HT")
            if number % 20 == 0:
                assert get(daemon, "/healthz").status == 200
        assert value(scrape(daemon), "process_open_fds") < 2 * MAX_CONNECTIONS
        began = time.monotonic()
        for sock in silent:
            assert rest_of(sock) == b"", "they are closed without an answer"
        assert time.monotonic() - began < READ_SECONDS + 5
    finally:
        for sock in silent:
            sock.close()


def test_who_does_not_read_its_answers_keeps_nobody_out(daemon: Daemon) -> None:
    with contextlib.ExitStack() as opened:
        for _ in range(MAX_CONNECTIONS):
            sock = opened.enter_context(connect(metrics_socket(daemon)))
            sock.sendall(REQUEST)
        assert get(daemon, "/healthz").status == 200
        assert scrape(daemon)


def test_who_never_stops_talking_is_cut_off(daemon: Daemon) -> None:
    """Behind a request that was answered, or in a head that does not end."""
    for begin in (REQUEST, b"GET / HTTP/1.1\r\n"):
        with connect(metrics_socket(daemon)) as sock:
            sock.sendall(begin)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                sock.sendall(b"x" * (64 << 20))


def test_a_flood_is_slowed_down_and_hurts_no_client(daemon: Daemon) -> None:
    """Four who ask as fast as they can: so many are let in a second, and the rest waits where it
    costs nothing. A client of the daemon is served meanwhile."""
    answered: list[float] = []
    until_then = time.monotonic() + 3.0

    def ask() -> None:
        while time.monotonic() < until_then:
            answer = say(daemon, REQUEST)
            if answer.startswith(b"HTTP/1.1 200"):
                answered.append(time.monotonic())

    askers = [threading.Thread(target=ask) for _ in range(4)]
    began = time.monotonic()
    with raw_client(daemon) as client:
        for each in askers:
            each.start()
        pings = [ping(client) for _ in range(200)]
        while time.monotonic() < until_then:
            pings.append(ping(client))
        for each in askers:
            each.join()
    seconds = time.monotonic() - began
    assert 20 < len(answered) <= ACCEPTED_A_SECOND * (seconds + 2)
    pings.sort()
    assert pings[len(pings) // 2] < 0.02
    assert pings[-1] < 1.0


def ping(client: Raw) -> float:
    began = time.monotonic()
    client.call(Ping())
    return time.monotonic() - began


# --- whether it is well


def test_healthz_asks_the_loop_itself(tmp_path: Path) -> None:
    """The thread that answers lives all the time; what it says is how the loop is."""
    file = tmp_path / "hang"
    prefix = (sys.executable, "-m", "tests.shell.hanging_daemon", str(file))
    flags = (*MEMORY, "--metrics", "unix")
    with running_daemon(*flags, runtime_dir=tmp_path / "rt", prefix=prefix) as daemon:
        assert get(daemon, "/healthz").status == 200
        file.touch()
        until(lambda: get(daemon, "/healthz").status == 503)
        began = time.monotonic()
        answer = get(daemon, "/healthz")
        assert 0.9 < time.monotonic() - began < 5
        assert answer[::2] == (503, "the serving loop has not answered within 1 s\n")
        assert get(daemon, "/metrics")[::2] == (
            503,
            "the serving loop has not answered within 5 s\n",
        )
        assert get(daemon, "/").status == 200
        file.unlink()
        until(lambda: get(daemon, "/healthz").status == 200)
        assert scrape(daemon)


# --- where


def test_the_socket_is_the_daemons_own_users_and_goes_with_it(tmp_path: Path) -> None:
    with running_daemon(*MEMORY, "--metrics", "unix", runtime_dir=tmp_path / "rt") as daemon:
        found = metrics_socket(daemon).stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
    assert not metrics_socket(daemon).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root can give files to any group")
@pytest.mark.parametrize(("tenants", "mode"), [("", 0o660), ("[tenants.a]\nuids = [1]\n", 0o600)])
def test_members_of_the_group_may_ask_unless_there_are_tenants(
    tmp_path: Path, tenants: str, mode: int
) -> None:
    """Metrics are of all tenants, and no member is told of another tenant."""
    file = tmp_path / "kvd.toml"
    file.write_text('max_memory = "4MiB"\n' + tenants)
    flags = ("--config", str(file), "--metrics", "unix", "--socket-group", "52000")
    with running_daemon(*flags, runtime_dir=tmp_path / "rt") as daemon:
        assert stat.S_IMODE(metrics_socket(daemon).stat().st_mode) == mode
        assert stat.S_IMODE((daemon.runtime_dir / "requests.sock").stat().st_mode) == 0o660


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_loopback(tmp_path: Path, host: str) -> None:
    port = free_port()
    setting = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with running_daemon(*MEMORY, "--metrics", setting, runtime_dir=tmp_path / "rt"):
        where = (host, port)
        assert scrape(where)
        assert get(where, "/healthz", Host="localhost").status == 200
        assert get(where, "/healthz", Host=f"localhost:{port}").status == 200
        # A page of somebody else's, whose name was made to mean this address.
        for name in ("example.com", f"example.com:{port}", "localhost.example.com", "10.0.0.1"):
            assert get(where, "/history.json", Host=name).status == 421, name
    with pytest.raises(ConnectionRefusedError):
        get(where, "/healthz")


@pytest.mark.parametrize(
    ("setting", "address"),
    [
        ("", None),
        ("unix", None),
        ("127.0.0.1:9187", Address("127.0.0.1", 9187)),
        ("127.0.0.2:1", Address("127.0.0.2", 1)),
        ("[::1]:65535", Address("::1", 65535)),
    ],
)
def test_what_can_be_asked_for(setting: str, address: Address | None) -> None:
    assert parse(setting) == address


@pytest.mark.parametrize(
    "setting",
    [
        *("0.0.0.0:9187", "[::]:9187", "192.168.1.1:9187", "[fe80::1]:9187", "8.8.8.8:1"),
        *("127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "::1:9187", "localhost:9187", "yes"),
        *("9187", ":9187", "999.0.0.1:1", "unix:/x", "[127.0.0.1]:x", "[::ffff:8.8.8.8]:1"),
    ],
)
def test_what_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(setting)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        setting = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(OSError, match=rf"metrics = '{setting}': Address already in use"):
            listen(setting, tmp_path, None, {})


# --- sockets that systemd has passed

PASS = """
import os, socket, sys
names, addresses = sys.argv[1], sys.argv[2].split(",")
for fd, address in enumerate(addresses, 3):
    if address.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(address)
    else:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address.split(":")[0], int(address.split(":")[1])))
    sock.listen()
    os.dup2(sock.detach(), fd)
    os.set_inheritable(fd, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(addresses))}
os.environ["LISTEN_FDNAMES"] = names
os.execv(sys.argv[3], sys.argv[3:])
"""


def passing(names: str, *addresses: str) -> tuple[str, ...]:
    """The command that starts another one with listening sockets, as systemd does."""
    return (sys.executable, "-c", PASS, names, ",".join(addresses))


def test_passed_sockets_are_served_whatever_is_set(tmp_path: Path) -> None:
    port, path = free_port(), tmp_path / "passed.sock"
    prefix = passing(
        "metrics:other:metrics", f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}", str(path)
    )
    with running_daemon(*MEMORY, runtime_dir=tmp_path / "rt", prefix=prefix) as daemon:
        assert scrape(("127.0.0.1", port))
        with connect(path) as sock:
            sock.sendall(REQUEST)
            assert rest_of(sock).startswith(b"HTTP/1.1 200 ")
        assert "descriptor not used fd=4 name=other" in daemon.log.read_text()
    assert path.exists(), "it is systemd's"


@pytest.mark.parametrize(
    ("address", "reason"),
    [("0.0.0.0", "listens at 0.0.0.0"), ("file", "is no socket")],
)
def test_a_passed_socket_that_others_could_reach_is_refused(
    tmp_path: Path, address: str, reason: str
) -> None:
    prefix = passing("metrics", f"{address}:{free_port()}")
    if address == "file":
        prefix = (sys.executable, "-c", PASS.replace("sock.detach()", "os.open('/dev/null', 0)"))
        prefix += ("metrics", f"127.0.0.1:{free_port()}")
    with (
        pytest.raises(AssertionError, match=rf"(?s)did not start.*{reason}"),
        running_daemon(*MEMORY, runtime_dir=tmp_path / "rt", prefix=prefix),
    ):
        pass


def test_descriptors_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "metrics"}
    assert listen("", tmp_path, None, environ) == []
    with pytest.raises(CannotServe, match="LISTEN_FDS is not a number"):
        listen("", tmp_path, None, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"})


# --- a fault of ours


def test_a_fault_in_making_an_answer_is_an_answer_and_the_next_one_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop is this test; the thread and the socket are the real ones."""
    metrics = Metrics(listen("unix", tmp_path, None, {}))
    opened = tmp_path / "metrics.sock"
    logged: list[str] = []
    monkeypatch.setattr("kvd.log.error", lambda what, *_: logged.append(what))
    empty = Histogram(BOUNDS)
    broken = Snapshot({}, {}, {}, {}, {}, {}, empty, empty, empty, empty)
    metrics.start()
    try:
        with connect(opened) as sock:
            sock.sendall(REQUEST)
            assert select.select([metrics.questions.fd], [], [], 20)[0]
            (question,) = metrics.questions.take()
            question.give(broken)
            assert rest_of(sock).startswith(b"HTTP/1.1 500 ")
        assert "metrics failed" in logged
        with connect(opened) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert rest_of(sock).startswith(b"HTTP/1.1 200 ")
    finally:
        metrics.close()
    assert not opened.exists()
