"""Memory moves between models block by block, as the system sees it; and not below a minimum, nor
beyond a cap, of a real daemon's configuration."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd_proto.errors import AllLeased, OverQuota
from kvd_proto.messages import Allocated, Evict
from tests.shell.raw import BLOCK_TOKENS, STRIDE, Raw, make_alloc, many_tokens, raw_client
from tests.support import Daemon, running_daemon

KEPT, OTHER = bytes([7]) * 32, bytes([8]) * 32
CONFIG = """
max_memory = "2MiB"
max_reserved = "2MiB"
[models.kept]
minimum = "512KiB"
cap = "1MiB"
"""
STAGING = 1 << 18


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    (tmp_path / "kvd.toml").write_text(CONFIG)
    flags = ("--config", str(tmp_path / "kvd.toml"))
    with running_daemon(*flags, runtime_dir=tmp_path / "rt") as running:
        yield running


class Model:
    """A client of one model, and the memory of its arena."""

    def __init__(self, daemon: Daemon, client: Raw, name: str, fingerprint: bytes) -> None:
        before = set(daemon.segments())
        self.client = client
        self.context = client.open(8, name=name, fingerprint=fingerprint)
        (arena,) = (each for each in set(daemon.segments()) - before if ".arena-" in each)
        self.arena = Path("/dev/shm") / arena
        self.prompts: list[bytes] = []

    def store(self, n_blocks: int) -> None:
        """A prompt of at most 60 blocks, and no longer leased."""
        self.prompts.append(many_tokens(100_000 * len(self.prompts), n_blocks * BLOCK_TOKENS))
        self.client.release(self.context, self.client.store(self.context, self.prompts[-1]))

    def use_all(self) -> None:
        """Let what is left of it be the youngest."""
        for prompt in self.prompts:
            self.client.release(self.context, self.client.alloc(self.context, prompt))

    @property
    def blocks(self) -> int:
        """What it has in memory, as the system counts."""
        return self.arena.stat().st_blocks * 512 // STRIDE


@pytest.fixture
def models(daemon: Daemon) -> Iterator[list[Model]]:
    with (
        raw_client(daemon, staging_bytes=STAGING) as first,
        raw_client(daemon, staging_bytes=STAGING) as second,
    ):
        yield [Model(daemon, first, "kept", KEPT), Model(daemon, second, "other", OTHER)]


def row(model: Model, name: str) -> dict[str, int]:
    found: dict[str, int] = next(
        each for each in model.client.status()["models"] if each["name"] == name
    )
    return found


def test_memory_moves_as_far_as_minimum_and_cap_let_it(models: list[Model]) -> None:
    kept, other = models
    for _ in range(5):
        kept.store(50)
    beside = (64 << 10) + (8 << 10)  # its directory and its index
    assert kept.blocks * STRIDE + beside == 1 << 20, "it is at its cap, and has evicted its own"
    told = row(kept, "kept")
    assert (told["minimum_bytes"], told["cap_bytes"]) == (512 << 10, 1 << 20)
    for _ in range(8):
        other.store(50)
        accounting = other.client.status()["accounting"]
        assert accounting["drift_bytes"] == 0
    assert kept.blocks * STRIDE + beside == 512 << 10, "the other one took all but its minimum"
    before = other.blocks
    kept.use_all()
    kept.store(40)
    assert kept.client.status()["accounting"]["drift_bytes"] == 0
    assert (kept.blocks, other.blocks) == (110 + 40, before - 40), "and gives way as it must"
    kept.client.call(Evict("", 0))
    assert kept.client.status()["accounting"]["drift_bytes"] == 0  # behind what is punched
    assert (kept.blocks, other.blocks) == (0, 0), "what is free goes back to the system"
    assert kept.client.verify()["ok"]


def test_what_is_promised_is_there_whatever_others_lease(models: list[Model]) -> None:
    kept, other = models
    leased = 0
    for n_blocks in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        asked = other.client.ask(make_alloc(other.context, b"", reserve=n_blocks * BLOCK_TOKENS))
        leased += isinstance(asked, Allocated) and n_blocks
    asked = other.client.ask(make_alloc(other.context, b"", reserve=1))
    assert isinstance(asked, AllLeased)
    assert leased > 100
    accounting = other.client.status()["accounting"]
    directory = (16 << 10) + (4 << 10)  # and index, at first
    assert accounting["promised_bytes"] == (512 << 10) - directory
    assert accounting["unassigned_bytes"] >= accounting["promised_bytes"]
    fits = ((512 - 64 - 8) << 10) // STRIDE
    kept.client.alloc(kept.context, b"", reserve=fits * BLOCK_TOKENS)
    assert kept.client.status()["accounting"]["promised_bytes"] == 0
    beyond = make_alloc(kept.context, b"", reserve=200 * BLOCK_TOKENS)
    assert isinstance(kept.client.ask(beyond), OverQuota)


def test_people_see_what_is_promised(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "kvd_client.kvctl", "--runtime-dir", str(daemon.runtime_dir)]
    shown = subprocess.run([*command, "status"], capture_output=True, text=True, check=True).stdout
    assert "of that, 512.0 KiB is promised" in shown
