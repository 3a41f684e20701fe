"""Hostile messages by the million.

KVD_SOAK_FUZZ is how many, KVD_SEED the seed of the stream.
"""

import os
from pathlib import Path

import pytest

from tests.shell import fuzz
from tests.shell.conftest import Bystander
from tests.shell.raw import raw_client
from tests.support import running_daemon

MESSAGES = int(os.environ.get("KVD_SOAK_FUZZ", "1000000"))
SEED = int(os.environ.get("KVD_SEED", "1"))


@pytest.mark.timeout(3600)
def test_a_million_hostile_messages_hurt_nobody(tmp_path: Path):
    flags = ("--max-memory", "16MiB", "--max-sequences", "16")
    with (
        running_daemon(*flags, runtime_dir=tmp_path / "rt") as daemon,
        raw_client(daemon, name="bystander") as client,
    ):
        fuzz.run(daemon, Bystander(client), MESSAGES, SEED)
