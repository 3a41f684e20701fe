"""A daemon for a module's tests, and somebody in it who must not notice any of them."""

from collections.abc import Iterator

import pytest

from tests.shell import raw
from tests.shell.raw import Raw, expected_blocks, many_tokens, raw_client, until
from tests.support import Daemon, running_daemon

BYSTANDERS_TOKENS = many_tokens(500_000, 4 * raw.BLOCK_TOKENS)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    flags = ("--max-memory", "16MiB", "--max-sequences", "16")
    runtime_dir = tmp_path_factory.mktemp("daemon") / "rt"
    environ = {"KVD_MAX_SESSION_SEQUENCES": "16"}  # so that one client can take all
    with running_daemon(*flags, runtime_dir=runtime_dir, environ=environ) as running:
        yield running


class Bystander:
    """A client with an open sequence of four blocks, which it reads again and again."""

    def __init__(self, client: Raw) -> None:
        self.client = client
        self.context = client.open()
        self.sequence = client.store(self.context, BYSTANDERS_TOKENS, fill=7)

    def check(self) -> None:
        """Its K/V is there and what it was, and it is answered."""
        assert self.client.read(self.context, self.sequence) == expected_blocks(4, fill=7)
        again = self.client.alloc(self.context, BYSTANDERS_TOKENS)
        assert again.matched_tokens == 4 * raw.BLOCK_TOKENS
        self.client.release(self.context, again)


@pytest.fixture(scope="module")
def bystander(daemon: Daemon) -> Iterator[Bystander]:
    with raw_client(daemon, name="bystander") as client:
        yield Bystander(client)


@pytest.fixture
def nothing_is_lost(daemon: Daemon, bystander: Bystander) -> Iterator[None]:
    """What anybody holds is given back, everything adds up, and the bystander has noticed
    nothing."""
    before = bystander.client.status()
    yield
    assert daemon.process.poll() is None, daemon.log.read_text()
    bystander.check()
    until(lambda: bystander.client.status()["clients"] == 1)
    after = bystander.client.status()
    for name in ("active_bytes", "filling_bytes", "staging_bytes"):
        assert after["accounting"][name] == before["accounting"][name], name
    assert after["sequences"] == before["sequences"]
    report = bystander.client.verify()
    assert report["ok"], report["differences"]
