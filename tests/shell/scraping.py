"""Asks a daemon over HTTP, as Prometheus or a browser does: on its Unix socket, or an address."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from tests.support import Daemon

SECONDS = 20.0
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = connect(self._path)


def connect(path: Path) -> socket.socket:
    """A bare connection."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Blocking: with a timeout it would be an error that the daemon's backlog is full.
    sock.connect(str(path))
    sock.settimeout(SECONDS)
    return sock


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def metrics_socket(daemon: Daemon) -> Path:
    return daemon.runtime_dir / "metrics.sock"


def get(
    where: Daemon | tuple[str, int], path: str, *, method: str = "GET", **headers: str
) -> Answer:
    """What a path answers."""
    connection = (
        http.client.HTTPConnection(*where, timeout=SECONDS)
        if isinstance(where, tuple)
        else _UnixConnection(metrics_socket(where))
    )
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, names, response.read().decode())
    finally:
        connection.close()


def scrape(where: Daemon | tuple[str, int]) -> Series:
    """All series, as Prometheus' own parser reads them; fails if one is there twice."""
    answer = get(where, "/metrics")
    assert answer.status == 200, answer.body
    found: Series = {}
    for family in text_string_to_metric_families(answer.body):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def value(series: Series, name: str, **labels: str) -> float:
    """One series."""
    return series[name, frozenset(labels.items())]


def history(where: Daemon | tuple[str, int]) -> dict[str, Any]:
    answer = get(where, "/history.json")
    assert answer.status == 200, answer.body
    return json.loads(answer.body)
