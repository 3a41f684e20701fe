"""A daemon and the real model for whole runs of workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.llama.tiny_models import smollm2_path
from tests.support import Daemon, running_daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("run") / "kvd"
    with running_daemon("--max-memory", "512MiB", runtime_dir=directory) as running:
        yield running


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return smollm2_path()
