"""A large cache is adopted in seconds, and served at once."""

import os
import time
from pathlib import Path

from kvd_proto.messages import Alloc, OpenContext, RegisterModel
from tests.shell.raw import FINGERPRINT, raw_client, until
from tests.soak.large import BLOCK_TOKENS, LAYERS, leave_behind, prompt
from tests.support import running_daemon

GIB = float(os.environ.get("KVD_SOAK_GIB", 10))
"""Needs that much of /dev/shm."""
BLOCKS_A_CHAIN = 32
INSTANCE = "test-large"


def test_a_large_cache_is_adopted_quickly_and_checked_behind_the_work(tmp_path: Path) -> None:
    runtime_dir = tmp_path / "rt"
    budget = int((GIB + 1) * (1 << 30))
    n_blocks = int(GIB * (1 << 30)) // 741_376
    arena = leave_behind(runtime_dir, INSTANCE, budget, n_blocks, BLOCKS_A_CHAIN)
    start = time.monotonic()
    with running_daemon(
        "--max-memory", str(budget), runtime_dir=runtime_dir, instance=INSTANCE
    ) as daemon:
        ready = time.monotonic() - start
        with raw_client(daemon, staging_bytes=0) as client:
            rows = [list(layer) for layer in LAYERS]
            message = RegisterModel("large", FINGERPRINT, "array", BLOCK_TOKENS, rows)
            model = client.call(message).model
            context = client.call(OpenContext(model, 4, [])).context
            found = client.call(Alloc(context, "", prompt(3, BLOCKS_A_CHAIN), 0, 0, 0))
            answered = time.monotonic() - start
            assert found.matched_tokens == BLOCKS_A_CHAIN * BLOCK_TOKENS
            until(lambda: client.status()["recovery"]["unchecked_blocks"] == 0, 300)
            checked = time.monotonic() - start
            assert client.status()["counters"]["adopted_blocks"] == n_blocks
            assert client.status()["counters"]["damaged_blocks"] == 0
            assert client.verify()["differences"] == []
    print(
        f"\n{n_blocks * arena.stride_bytes / (1 << 30):.1f} GiB in {n_blocks} blocks: ready after "
        f"{ready:.2f} s, first hit after {answered:.2f} s, all checked after {checked:.2f} s"
    )
    assert answered < 2 + 0.2 * GIB  # against what it costs to read it all: many times as much
