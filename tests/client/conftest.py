"""Real daemons for the client's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvd_client
from tests.client.blocks import MODEL, eventually
from tests.support import Daemon, running_daemon


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("kvd") / "run"
    with running_daemon("--max-memory", "64MiB", runtime_dir=directory) as running:
        yield running


@pytest.fixture
def daemon(shared_daemon: Daemon) -> Iterator[Daemon]:
    """A daemon with an empty cache. After the test it must have got everything back."""
    yield shared_daemon
    with kvd_client.connect(shared_daemon.runtime_dir, staging_bytes=0) as client:
        eventually(lambda: len(client.clients()) == 1)
        assert client.sequences() == []
        # What was posted last may still be copied.
        eventually(lambda: is_empty(client))
        assert client.verify()["ok"]


def is_empty(client: kvd_client.Client) -> bool:
    """Whether nothing is left, after what can be evicted has been."""
    for row in client.pins():
        client.unpin(row["owner"])
    client.evict()
    accounting = client.status()["accounting"]
    return not any(
        accounting[f"{part}_bytes"] for part in ("filling", "active", "pinned", "cached", "staging")
    )


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[Daemon]:
    """One for this test alone, which may stop or kill it."""
    with running_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[kvd_client.Client]:
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=1 << 20) as connected:
        yield connected


@pytest.fixture
def other(daemon: Daemon) -> Iterator[kvd_client.Client]:
    """Another client of the same daemon, which stages nothing."""
    with kvd_client.connect(daemon.runtime_dir, name="other", staging_bytes=0) as connected:
        yield connected


@pytest.fixture
def context(client: kvd_client.Client) -> Iterator[kvd_client.Context]:
    with client.open_context(MODEL, n_seq_max=4) as opened:
        yield opened
