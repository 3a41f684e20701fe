"""Real daemons for the client's tests: a fresh one for each test that asks for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvd_client
from tests.client.blocks import MODEL
from tests.support import Daemon, running_daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that the test may stop or kill."""
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
