"""Models for the llama.cpp tests, each loaded or written once, and a hash cache of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd_client.integrations.llama.runtime.model import LlamaModel
from tests.llama import tiny_models


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Never the cache of the user who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Iterator[LlamaModel]:
    with LlamaModel(tiny_models.smollm2_path()) as model:
        yield model


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tiny models, as <name>.gguf."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.write_llama(folder / "llama.gguf")
    tiny_models.write_heads_by_layer(folder / "heads-by-layer.gguf")
    tiny_models.write_sliding_window(folder / "sliding-window.gguf")
    tiny_models.write_m_rope(folder / "m-rope.gguf")
    tiny_models.write_recurrent(folder / "recurrent.gguf")
    tiny_models.write_encoder(folder / "encoder.gguf")
    tiny_models.write_not_causal(folder / "not-causal.gguf")
    tiny_models.write_llama(folder / "llama-not-causal.gguf", causal=False)
    tiny_models.write_lora(folder / "lora-6.gguf", seed=6)
    tiny_models.write_lora(folder / "lora-7.gguf", seed=7)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Iterator[LlamaModel]:
    """Plain attention, two layers."""
    with LlamaModel(tiny_dir / "llama.gguf") as model:
        yield model
