"""Different contexts, one cache: which workers find what another has stored, and which never do.

What is in a fingerprint, field by field, is in tests/llama/kv/test_fingerprint.py; here it is a
daemon that is asked.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from kvd_client.integrations.llama.errors import NotShareable, Reason
from kvd_client.integrations.llama.kv import fingerprint
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.runtime.params import LoraAdapter, RopeParams
from kvd_client.integrations.llama.worker import LlamaWorker
from tests.llama import tiny_models
from tests.support import Daemon, running_daemon

pytestmark = pytest.mark.model

BLOCK = 32
PROMPT = 6 * BLOCK + 11
BASE: dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_seq_max": 2}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("run") / "kvd"
    with running_daemon("--max-memory", "1GiB", runtime_dir=directory) as running:
        yield running


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.write_llama(folder / "plain.gguf")
    tiny_models.write_llama(folder / "other.gguf", seed=1)
    tiny_models.write_sliding_window(folder / "window.gguf")
    tiny_models.write_m_rope(folder / "m-rope.gguf")
    for seed in (6, 7):
        tiny_models.write_lora(folder / f"lora-{seed}.gguf", seed=seed)
    return folder


@pytest.fixture(autouse=True)
def _empty(daemon: Daemon, models: Path) -> Iterator[None]:
    """Nothing is left in the cache for the next test."""
    yield
    with worker(daemon, models / "plain.gguf") as opened:
        opened.client.evict()


def worker(daemon: Daemon, path: Path, **options: Any) -> LlamaWorker:
    return LlamaWorker(path, runtime_dir=daemon.runtime_dir, timeout=10, **{**BASE, **options})


def prompt() -> np.ndarray:
    return np.random.default_rng(1).integers(1, tiny_models.N_VOCAB, PROMPT, dtype=np.int32)


def store(opened: LlamaWorker) -> None:
    with opened.open(prompt()) as sequence:
        assert sequence.matched_tokens == 0
        sequence.prefill()
    assert not sequence.problem
    assert not opened.client.flush().failures


def exported(opened: LlamaWorker, seq: int, length: int) -> list[bytes]:
    """The full blocks of a sequence, and whatever is stored of it, byte for byte."""
    engine = opened.engine
    blocks = []
    for start in range(0, length - BLOCK + 1, BLOCK):
        memory = np.zeros(engine.layout.state_bytes(BLOCK), np.uint8)
        engine.export_block(seq, start, BLOCK, memory.ctypes.data, memory.size)
        blocks.append(memory.tobytes())
    return blocks


def stored(opened: LlamaWorker) -> list[bytes]:
    with opened.open(prompt()) as sequence:
        assert sequence.matched_tokens == PROMPT - 1
        found = [bytes(sequence.leased.block(index)) for index in range(PROMPT // BLOCK)]
        sequence.close(store=False)
    return found


ALIKE = {
    "n_ctx": {"n_ctx": 256},
    "n_batch": {"n_batch": 32},
    "n_ubatch": {"n_ubatch": 16},
    "n_threads": {"n_threads": 2},
    "n_seq_max": {"n_seq_max": 7},
    "all of them": {"n_ctx": 300, "n_batch": 48, "n_ubatch": 48, "n_threads": 2, "n_seq_max": 1},
    "swa_full": {"swa_full": False},
}


@pytest.mark.parametrize(
    ("model", "change"),
    [("plain", change) for change in ALIKE]
    + [("window", "all of them"), ("window", "swa_full"), ("m-rope", "all of them")],
)
@pytest.mark.parametrize("first", [True, False], ids=["stores", "finds"])
def test_contexts_that_compute_alike_share(
    daemon: Daemon, models: Path, change: str, first: bool, model: str
) -> None:
    path = models / f"{model}.gguf"
    pair = [{}, ALIKE[change]]
    storing, finding = reversed(pair) if first else pair
    with worker(daemon, path, **storing) as one, worker(daemon, path, **finding) as other:
        store(one)
        expected = stored(one)
        with other.open(prompt()) as sequence:
            assert sequence.matched_tokens == PROMPT - 1
            other.engine.check_range(sequence.seq_id, 0, PROMPT - 1)
            assert exported(other, sequence.seq_id, PROMPT - 1) == expected
            # The last bits depend on the batches, with or without a cache.
            assert np.abs(sequence.prefill() - whole(path, finding)).max() < 1e-2
            sequence.close(store=False)


def whole(path: Path, options: dict[str, Any]) -> np.ndarray:
    """Logits of a context of its own, without a cache."""
    with LlamaEngine(model_path=path, **{**BASE, **options}) as engine:
        engine.prefill(0, prompt(), 0)
        return engine.logits()


@pytest.mark.parametrize("model", ["plain", "window", "m-rope"])
def test_other_sequences_in_the_context_change_no_byte(
    daemon: Daemon, models: Path, model: str
) -> None:
    """One is there before, and cut in the middle, so that what is imported lies in two places."""
    path = models / f"{model}.gguf"
    others = np.random.default_rng(2).integers(1, tiny_models.N_VOCAB, 150, dtype=np.int32)
    with worker(daemon, path) as one, worker(daemon, path, n_seq_max=3) as other:
        store(one)
        expected = stored(one)
        with (
            other.open(others, use=False, store=False) as first,
            other.open(others[::-1], use=False, store=False) as second,
        ):
            first.prefill()
            second.prefill()
            other.engine.truncate(first.seq_id, 40)
            with other.open(prompt()) as sequence:
                assert sequence.matched_tokens == PROMPT - 1
                other.engine.check_range(sequence.seq_id, 0, PROMPT - 1)
                assert exported(other, sequence.seq_id, PROMPT - 1) == expected
                difference = np.abs(sequence.prefill() - whole(path, {})).max()
                # The last bits depend on where the cells lie, with or without a cache.
                assert difference < 1e-2
                sequence.close(store=False)


def test_a_context_with_other_sequences_stores_for_all(daemon: Daemon, models: Path) -> None:
    path = models / "plain.gguf"
    others = np.random.default_rng(2).integers(1, tiny_models.N_VOCAB, 150, dtype=np.int32)
    with worker(daemon, path) as one, worker(daemon, path) as other:
        with one.open(others, store=False) as first:
            first.prefill()
            store(one)
        expected = stored(one)
        with other.open(prompt()) as sequence:
            assert sequence.matched_tokens == PROMPT - 1
            assert exported(other, sequence.seq_id, PROMPT - 1) == expected
            sequence.close(store=False)


OTHERWISE = {
    "type_k": {"type_k": "q8_0"},
    "type_v": {"type_v": "q8_0"},
    "RoPE base": {"rope": RopeParams(freq_base=20_000.0)},
    "RoPE scale": {"rope": RopeParams(freq_scale=0.5)},
    "RoPE scaling": {"rope": RopeParams(scaling_type="yarn", freq_scale=0.25)},
    "LoRA": {"lora": ("lora-6", 1.0)},
    "LoRA scale": {"lora": ("lora-6", 0.5)},
    "another LoRA": {"lora": ("lora-7", 1.0)},
    "model file": {"file": "other"},
}


@pytest.mark.parametrize("change", OTHERWISE)
def test_what_computes_otherwise_finds_nothing(daemon: Daemon, models: Path, change: str) -> None:
    """Neither of two workers finds what the other has stored; each finds its own."""
    options = dict(OTHERWISE[change])
    path = models / f"{options.pop('file', 'plain')}.gguf"
    if "lora" in options:
        name, scale = options.pop("lora")
        options["loras"] = [LoraAdapter(str(models / f"{name}.gguf"), scale)]
    with worker(daemon, models / "plain.gguf") as one, worker(daemon, path, **options) as other:
        store(one)
        store(other)  # in which nothing is found
        assert stored(one) != stored(other)


def test_a_context_longer_than_the_models_own_finds_nothing(daemon: Daemon, models: Path) -> None:
    """Some models have other RoPE factors there. This one has not, but that cannot be asked."""
    path = models / "plain.gguf"
    with worker(daemon, path) as one, worker(daemon, path, n_ctx=1024) as other:
        assert one.engine.model.rope_original_context == one.engine.n_ctx == 512
        store(one)
        store(other)  # in which nothing is found


def test_two_scales_of_one_adapter_are_two(daemon: Daemon, models: Path) -> None:
    def adapted(scale: float) -> LlamaWorker:
        lora = LoraAdapter(str(models / "lora-6.gguf"), scale)
        return worker(daemon, models / "plain.gguf", loras=[lora])

    with adapted(1.0) as one, adapted(0.5) as other, adapted(1.0) as again:
        store(one)
        store(other)
        assert stored(one) == stored(again) != stored(other)


@pytest.mark.parametrize("what", ["version", "libraries", "processor"])
def test_another_build_finds_nothing(
    daemon: Daemon, models: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As a worker on another llama-cpp-python, or with other libraries or another CPU, would be."""
    path = models / "plain.gguf"
    with worker(daemon, path) as one:
        store(one)
        if what == "version":
            monkeypatch.setattr(llama_cpp, "__version__", "0.0.0")
        elif what == "libraries":
            monkeypatch.setattr(fingerprint, "_libraries_digest", lambda: b"another")
        else:
            monkeypatch.setattr(
                fingerprint.bindings, "llama_print_system_info", lambda: b"CPU : NEON = 1 | "
            )
        with worker(daemon, path) as other:
            store(other)  # in which nothing is found


def test_without_rotation_quantised_rows_are_others(
    daemon: Daemon, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = models / "plain.gguf", {"type_k": "q8_0", "type_v": "q8_0"}
    with worker(daemon, path, **options) as one:
        store(one)
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
        with worker(daemon, path, **options) as other:
            store(other)  # in which nothing is found


def test_without_flash_attention_nothing_is_shared(daemon: Daemon, models: Path) -> None:
    with pytest.raises(NotShareable, match="flash_attn=True") as refusal:
        worker(daemon, models / "plain.gguf", flash_attn=False)
    assert refusal.value.reason is Reason.FLASH_ATTENTION
