"""One booted container for all tests of the service, or one loud line for why there is none."""

from collections.abc import Iterator

import pytest

from tests.system.container import CannotRun, Container, booted


@pytest.fixture(scope="session")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    try:
        with booted(tmp_path_factory.mktemp("system")) as running:
            yield running
    except CannotRun as reason:
        pytest.skip(
            f"NOT TESTED: the service under a real systemd, which needs a container: {reason}"
        )
