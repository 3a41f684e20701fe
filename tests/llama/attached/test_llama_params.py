"""Which Llamas may share, and that their fingerprints are those of engines with the same
parameters."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from kvd_client.integrations.llama.attached import llama_params
from kvd_client.integrations.llama.attached.llama_params import read_llama
from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable, Reason
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.kv.fingerprint import Fingerprint, fingerprint
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.runtime.params import LoraAdapter, RopeParams
from tests.e2e.llamas import open_llama, settled
from tests.llama import tiny_models
from tests.llama.blocks import export_all, prompt, same_bytes
from tests.llama.tiny_models import N_CTX_TRAIN, N_VOCAB

pytestmark = pytest.mark.model

Make = Callable[..., llama_cpp.Llama]


@pytest.fixture
def make(tiny_dir: Path) -> Iterator[Make]:
    """Makes Llamas, by default of the plain tiny model, and closes them."""
    made: list[llama_cpp.Llama] = []

    def one(path: Path | None = None, **options: Any) -> llama_cpp.Llama:
        path = settled(path or tiny_dir / "llama.gguf")
        made.append(open_llama(path, **{"n_ctx": 256, **options}))
        return made[-1]

    yield one
    for llama in made:
        llama.close()


def of(tiny: LlamaModel, **options: Any) -> Fingerprint:
    with LlamaEngine(model=tiny, **{"n_ctx": 256, "n_threads": 1, **options}) as engine:
        return fingerprint(engine)


YARN = llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN


@pytest.mark.parametrize(
    ("of_llama", "of_engine"),
    [
        ({}, {}),
        ({"type_k": 8, "type_v": 2}, {"type_k": "q8_0", "type_v": "q4_0"}),
        ({"n_ctx": N_CTX_TRAIN + 1}, {"n_ctx": N_CTX_TRAIN + 1}),
        ({"n_batch": 32, "n_ubatch": 16, "offload_kqv": False}, {}),
        ({"use_mmap": False}, {}),
        ({"rope_freq_base": 20_000.0}, {"rope": RopeParams(freq_base=20_000.0)}),
        ({"rope_freq_scale": 0.5}, {"rope": RopeParams(freq_scale=0.5)}),
        ({"yarn_beta_fast": 16.0}, {"rope": RopeParams(yarn_beta_fast=16.0)}),
        ({"yarn_attn_factor": 2.0}, {"rope": RopeParams(yarn_attn_factor=2.0)}),
        (
            {"rope_scaling_type": YARN, "yarn_ext_factor": 0.5, "yarn_orig_ctx": 128},
            {"rope": RopeParams("yarn", yarn_ext_factor=0.5, yarn_orig_ctx=128)},
        ),
    ],
)
def test_the_fingerprint_is_that_of_an_engine(
    tiny: LlamaModel, make: Make, of_llama: dict[str, Any], of_engine: dict[str, Any]
) -> None:
    found = fingerprint(read_llama(make(**of_llama)))
    assert found == of(tiny, **of_engine)
    # And no parameter is left out.
    plain = fingerprint(read_llama(make()))
    assert (found == plain) == (of(tiny, **of_engine) == of(tiny))


def test_adapters_are_in_the_fingerprint(tiny: LlamaModel, tiny_dir: Path, make: Make) -> None:
    adapter = settled(tiny_dir / "lora-6.gguf")
    found = {
        fingerprint(read_llama(make(lora_path=str(adapter), lora_scale=scale))).digest
        for scale in (0.0, 0.5, 1.0)
    }
    assert len(found) == 3
    assert of(tiny, loras=[LoraAdapter(str(adapter), 0.5)]).digest in found
    assert of(tiny).digest not in found


def test_yarn_numbers_that_llama_always_gives_are_those_of_no_numbers(tiny: LlamaModel) -> None:
    given = RopeParams(yarn_attn_factor=1.0, yarn_beta_fast=32.0, yarn_beta_slow=1.0)
    assert of(tiny, rope=given) == of(tiny)


def test_they_are_not_of_another_llama_cpp(
    tiny: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may take other numbers when none are given."""
    monkeypatch.setattr(llama_cpp, "__version__", "0.3.99")
    given = RopeParams(yarn_attn_factor=1.0)
    assert of(tiny, rope=given).fields["rope.yarn_attn_factor"] != "model"


def test_k_and_v_of_both_yarn_numbers_are_equal(tiny: LlamaModel, make: Make) -> None:
    """What the fingerprint says, seen in the bytes: with YaRN on, where they count."""
    blocks = []
    for rope in (
        RopeParams("yarn", freq_scale=0.25),
        RopeParams("yarn", None, 0.25, None, 1.0, 32.0, 1.0),
        RopeParams("yarn", None, 0.25, None, 1.0, 8.0, 1.0),
    ):
        with LlamaEngine(model=tiny, n_ctx=256, n_threads=1, rope=rope) as engine:
            engine.prefill(0, prompt(40, N_VOCAB), 0)
            blocks.append(export_all(engine, 0))
    assert same_bytes(blocks[0], blocks[1])
    assert not same_bytes(blocks[0], blocks[2])


def test_no_overrides_are_none(make: Make) -> None:
    """A Llama gives llama.cpp a list of them that has nothing but its end."""
    assert fingerprint(read_llama(make(kv_overrides={}))) == fingerprint(read_llama(make()))


@pytest.mark.parametrize(
    ("options", "reason", "word"),
    [
        ({"flash_attn": False}, Reason.FLASH_ATTENTION, "flash_attn=True"),
        ({"kv_overrides": {"llama.rope.freq_base": 1e5}}, Reason.OVERRIDES, "llama.rope.freq_base"),
        ({"embedding": True}, Reason.EMBEDDINGS, "embeddings"),
    ],
)
def test_what_the_fingerprint_does_not_cover_is_refused(
    make: Make, options: dict[str, Any], reason: Reason, word: str
) -> None:
    llama = make(**options)
    with pytest.raises(NotShareable, match=word) as refused:
        read_llama(llama)
    assert refused.value.reason is reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("recurrent", Reason.RECURRENT),
        ("llama-not-causal", Reason.NOT_CAUSAL),
    ],
)
def test_a_kind_of_model_that_cannot_be_shared_is_refused(
    tiny_dir: Path, make: Make, name: str, reason: Reason
) -> None:
    with pytest.raises(NotShareable) as refused:
        read_llama(make(tiny_dir / f"{name}.gguf"))
    assert refused.value.reason is reason


def test_a_gpu_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = make()
    apart = make(offload_kqv=False, op_offload=False)
    monkeypatch.setattr(llama_params.bindings, "llama_supports_gpu_offload", lambda: True)
    with pytest.raises(NotShareable, match="n_gpu_layers=0") as refused:
        read_llama(llama)
    assert refused.value.reason is Reason.GPU
    read_llama(apart)


def test_parameters_that_are_not_known_are_refused(make: Make) -> None:
    llama = make()
    llama.model_params.use_extra_bufts = not llama.model_params.use_extra_bufts
    with pytest.raises(NotShareable, match="use_extra_bufts"):
        read_llama(llama)


def replace_file(path: Path) -> None:
    other = tiny_models.write_llama(path.with_name("other.gguf"), seed=9)
    os.replace(other, path)


def rewrite_with_its_old_time(path: Path) -> None:
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [replace_file, rewrite_with_its_old_time, remove])
@pytest.mark.parametrize("which", ["model", "lora"])
def test_a_file_that_changed_since_it_was_loaded_is_refused(
    tmp_path: Path, make: Make, change: Callable[[Path], None], which: str
) -> None:
    model = tiny_models.write_llama(tmp_path / "llama.gguf")
    lora = settled(tiny_models.write_lora(tmp_path / "lora.gguf"))
    llama = make(model, lora_path=str(lora))
    read_llama(llama)
    change(model if which == "model" else lora)
    with pytest.raises(NotShareable) as refused:
        read_llama(llama)
    assert refused.value.reason is Reason.MODEL_FILE


def test_a_link_that_leads_elsewhere_by_now_is_refused(
    tmp_path: Path, tiny_dir: Path, make: Make
) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        settled(tiny_models.write_llama(tmp_path / name / "llama.gguf", seed=seed))
    current = tmp_path / "current"
    current.symlink_to("one")
    while time.time() <= current.lstat().st_ctime + 2 * llama_params.CLOCK_TICK:
        pass
    llama = make(current / "llama.gguf")
    read_llama(llama)
    new = tmp_path / "new"
    new.symlink_to("two")
    os.replace(new, current)
    with pytest.raises(NotShareable, match="has changed since it was loaded"):
        read_llama(llama)


def test_a_file_whose_loading_time_is_not_known_is_refused(make: Make) -> None:
    """Completions with `verbose` set llama.cpp's clock back."""
    llama = make()
    next(llama.generate([1, 2, 3]))
    read_llama(llama)
    llama.verbose = True
    with pytest.raises(NotShareable, match="before its first completion"):
        read_llama(llama)
    llama.verbose = False


def test_reading_leaves_the_context_as_it_was(make: Make) -> None:
    llama = make()
    memory = llama_cpp.llama_get_memory(llama.ctx)
    read_llama(llama)
    assert native.memory_seq_pos_max(memory, 0) == -1
    llama.eval([1, 2, 3])
    read_llama(llama)
    assert (native.memory_seq_pos_min(memory, 0), native.memory_seq_pos_max(memory, 0)) == (0, 2)
    assert native.memory_seq_pos_max(memory, llama_params.SCRATCH) == -1


def test_a_scratch_sequence_that_is_in_use_is_refused(make: Make) -> None:
    llama = make()
    llama.eval([1, 2, 3])
    llama._ctx.kv_cache_seq_cp(0, llama_params.SCRATCH, 0, -1)
    with pytest.raises(NotShareable, match="sequence 255"):
        read_llama(llama)


def test_a_closed_llama_is_refused(tiny_dir: Path) -> None:
    llama = open_llama(tiny_dir / "llama.gguf")
    llama.close()
    with pytest.raises(LlamaEngineError, match="closed"):
        read_llama(llama)


def test_a_copy_of_the_model_has_the_same_fingerprint(
    tmp_path: Path, tiny: LlamaModel, tiny_dir: Path, make: Make
) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(tiny_dir / "llama.gguf", copy)
    assert fingerprint(read_llama(make(copy))) == of(tiny)
