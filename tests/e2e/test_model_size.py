"""What `kvctl model-size` tells of a file is what a daemon then has of its model."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd_client.integrations.llama.worker import LlamaWorker
from kvd_client.kvctl.model_size import blocks_in
from tests.e2e.workers import TINY_OPTIONS
from tests.llama import tiny_models
from tests.support import Daemon, running_daemon

pytestmark = pytest.mark.model

BLOCK = 32


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon("--max-memory", "16MiB", runtime_dir=tmp_path / "run") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second layer has no K/V."""
    path = tmp_path_factory.mktemp("sparse") / "sparse.gguf"
    return tiny_models.write_heads_by_layer(path, (4, 0, 2))


def kvctl(daemon: Daemon, *arguments: str | Path) -> Any:
    command = [sys.executable, "-m", "kvd_client.kvctl", "--runtime-dir", daemon.runtime_dir]
    done = subprocess.run(
        [*command, *arguments, "--json"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def worker(daemon: Daemon, path: Path, **options: Any) -> LlamaWorker:
    return LlamaWorker(
        path, runtime_dir=daemon.runtime_dir, timeout=10, **{**TINY_OPTIONS, **options}
    )


@pytest.mark.parametrize("kv_type", ["f16", "q4_0"])
def test_the_daemon_has_the_sizes_that_were_told(small: Daemon, sparse: Path, kv_type: str) -> None:
    types = ("--type-k", kv_type, "--type-v", kv_type)
    told = kvctl(small, "model-size", sparse, *types)
    assert told["shared"]
    with worker(small, sparse, type_k=kv_type, type_v=kv_type):
        (model,) = kvctl(small, "models")["models"]
    assert model["bytes_per_token"] == told["bytes_per_token"]
    assert model["payload_bytes"] == told["block"]["payload_bytes"]
    assert model["stride_bytes"] == told["block"]["stride_bytes"]


def test_workers_share_a_model_with_layers_without_kv(small: Daemon, sparse: Path) -> None:
    prompt = np.random.default_rng(3).integers(1, tiny_models.N_VOCAB, 4 * BLOCK + 5)
    prompt = prompt.astype(np.int32)
    continued = []
    for expected in (0, 4 * BLOCK + 4):
        with worker(small, sparse) as opened:
            with opened.open(prompt) as sequence:
                assert sequence.matched_tokens == expected
                continued.append(list(sequence.generate(8)))
            opened.client.flush()
    assert len(continued[1]) == 8


def test_as_many_blocks_fit_as_were_told(small: Daemon, sparse: Path) -> None:
    """A daemon that is filled until it evicts, its client's staging apart."""
    told = kvctl(small, "model-size", sparse)
    stride = told["block"]["stride_bytes"]
    assert told["budget"] == {
        "bytes": 16 << 20,
        "source": "daemon",
        "blocks": blocks_in(16 << 20, stride, BLOCK),
        "tokens": BLOCK * blocks_in(16 << 20, stride, BLOCK),
    }
    random = np.random.default_rng(4)
    with worker(small, sparse) as opened:
        status = opened.client.status()
        while not status["counters"]["evicted_blocks"]:
            prompt = random.integers(1, tiny_models.N_VOCAB, 480).astype(np.int32)
            with opened.open(prompt) as sequence:
                sequence.prefill()
            opened.client.flush()
            status = opened.client.status()
    (model,) = status["models"]
    # The directory and the rest of a slot may cost one block more or less than there would be.
    beside = status["accounting"]["staging_bytes"] // stride
    assert told["budget"]["blocks"] - model["blocks"]["total"] - beside in (0, 1)
