"""Which engines have equal fingerprints, and which must not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.kv.fingerprint import Fingerprint, fingerprint
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.runtime.params import LoraAdapter, RopeParams
from tests.llama.tiny_models import N_CTX_TRAIN, write_llama

pytestmark = pytest.mark.model


def of(**arguments: object) -> Fingerprint:
    with LlamaEngine(**({"n_ctx": 256, "n_threads": 1} | arguments)) as engine:  # type: ignore[arg-type]
        return fingerprint(engine)


@pytest.fixture(scope="module")
def plain(tiny: LlamaModel) -> Fingerprint:
    return of(model=tiny)


def test_each_field_changes_the_digest(plain: Fingerprint) -> None:
    assert len(plain.digest) == 32
    assert Fingerprint.of_fields(plain.fields) == plain
    digests = {plain.digest}
    for name, value in plain.fields.items():
        for changed in (value + "x", ""):
            if changed != value:
                other = Fingerprint.of_fields({**plain.fields, name: changed})
                assert other.digest not in digests, name
                digests.add(other.digest)
        without = {key: kept for key, kept in plain.fields.items() if key != name}
        assert Fingerprint.of_fields(without).digest not in digests


def test_the_order_of_fields_does_not_count_but_their_borders_do(plain: Fingerprint) -> None:
    backwards = dict(reversed(plain.fields.items()))
    assert Fingerprint.of_fields(backwards).digest == plain.digest
    assert Fingerprint.of_fields({"a": "bc"}).digest != Fingerprint.of_fields({"ab": "c"}).digest


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"type_k": "q8_0"}, "type_k"),
        ({"type_v": "q8_0"}, "type_v"),
        ({"rope": RopeParams(scaling_type="yarn")}, "rope.scaling_type"),
        ({"rope": RopeParams(freq_base=20_000.0)}, "rope.freq_base"),
        ({"rope": RopeParams(freq_scale=0.5)}, "rope.freq_scale"),
        ({"rope": RopeParams(yarn_ext_factor=1.0)}, "rope.yarn_ext_factor"),
        ({"rope": RopeParams(yarn_attn_factor=2.0)}, "rope.yarn_attn_factor"),
        ({"rope": RopeParams(yarn_beta_fast=16.0)}, "rope.yarn_beta_fast"),
        ({"rope": RopeParams(yarn_beta_slow=2.0)}, "rope.yarn_beta_slow"),
        ({"rope": RopeParams(yarn_orig_ctx=128)}, "rope.yarn_orig_ctx"),
        ({"n_ctx": N_CTX_TRAIN + 1}, "rope.factors"),
    ],
)
def test_what_changes_k_or_v_changes_the_fingerprint(
    tiny: LlamaModel, plain: Fingerprint, arguments: dict[str, object], field: str
) -> None:
    changed = of(model=tiny, **arguments)
    assert changed.digest != plain.digest
    assert differing(changed, plain) == {field}


def test_adapters_and_their_scales_count(
    tiny: LlamaModel, tiny_dir: Path, plain: Fingerprint
) -> None:
    def adapted(name: str, scale: float) -> Fingerprint:
        return of(model=tiny, loras=[LoraAdapter(str(tiny_dir / name), scale)])

    prints = [plain, adapted("lora-6.gguf", 1.0)]
    prints += [adapted("lora-7.gguf", 1.0), adapted("lora-6.gguf", 0.5)]
    assert len({one.digest for one in prints}) == 4
    assert all(differing(one, plain) == {"lora"} for one in prints[1:])
    assert adapted("lora-6.gguf", 0.0) == plain


@pytest.mark.parametrize(
    ("variable", "field"),
    [("LLAMA_ATTN_ROT_DISABLE", "attn_rot"), ("GGML_CPU_DISABLE_FUSION", "cpu_fusion")],
)
def test_the_environment_that_llama_cpp_reads_counts(
    tiny_dir: Path, plain: Fingerprint, variable: str, field: str
) -> None:
    assert differing(in_a_new_process(tiny_dir, {variable: "1"}), plain) == {field}


def test_rotation_is_what_the_context_was_made_with(
    tiny: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    with LlamaEngine(model=tiny, n_ctx=256, n_threads=1) as engine:
        monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE")
        assert fingerprint(engine).fields["attn_rot"] == "off"


def test_the_models_content_counts_not_its_name(tmp_path: Path, plain: Fingerprint) -> None:
    same = write_llama(tmp_path / "elsewhere.gguf")
    assert of(model_path=same) == plain
    other = write_llama(tmp_path / "other.gguf", seed=1)
    assert differing(of(model_path=other), plain) == {"model"}


def test_what_does_not_change_k_or_v_does_not_count(tiny: LlamaModel, plain: Fingerprint) -> None:
    for arguments in (
        {"n_threads": 2},
        {"n_batch": 32, "n_ubatch": 16},
        {"n_seq_max": 200},
        {"n_ctx": N_CTX_TRAIN},
        {"type_k": 1},
    ):
        assert of(model=tiny, **arguments) == plain


@pytest.mark.parametrize("seed", ["1", "2"])
def test_it_is_equal_in_other_processes(tiny_dir: Path, plain: Fingerprint, seed: str) -> None:
    zeros = {"LLAMA_ATTN_ROT_DISABLE": "0", "GGML_CPU_DISABLE_FUSION": "0"}
    assert in_a_new_process(tiny_dir, {"PYTHONHASHSEED": seed, **zeros}) == plain


def test_a_model_file_that_changed_under_the_engine_is_refused(
    tiny_dir: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(tiny_dir / "llama.gguf", tmp_path))
    with LlamaEngine(model_path=path, n_ctx=256, n_threads=1) as engine:
        fingerprint(engine)
        write_llama(tmp_path / "new.gguf", seed=1).replace(path)
        with pytest.raises(LlamaEngineError, match="has changed since it was loaded"):
            fingerprint(engine)
        path.unlink()
        with pytest.raises(LlamaEngineError, match="cannot be read any more"):
            fingerprint(engine)


def test_an_engine_that_cannot_share_has_none(tiny: LlamaModel) -> None:
    with (
        LlamaEngine(
            model=tiny, n_ctx=256, n_threads=1, flash_attn=False, require_shareable=False
        ) as engine,
        pytest.raises(NotShareable),
    ):
        fingerprint(engine)


def test_an_adapter_file_that_changes_later_does_not_count(
    tiny: LlamaModel, tiny_dir: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(tiny_dir / "lora-6.gguf", tmp_path))
    with LlamaEngine(model=tiny, n_ctx=256, n_threads=1, loras=[LoraAdapter(str(path))]) as engine:
        before = fingerprint(engine)
        shutil.copy(tiny_dir / "lora-7.gguf", path)
        assert fingerprint(engine) == before


_PROGRAM = """
import json, sys
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.kv.fingerprint import fingerprint
with LlamaEngine(model_path=sys.argv[1], n_ctx=256, n_threads=1) as engine:
    found = fingerprint(engine)
print(json.dumps([found.digest.hex(), found.fields]))
"""


def in_a_new_process(tiny_dir: Path, environment: dict[str, str]) -> Fingerprint:
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tiny_dir / "llama.gguf")],
        env=os.environ | environment,
        capture_output=True,
        check=True,
        text=True,
    )
    digest, fields = json.loads(found.stdout)
    return Fingerprint(bytes.fromhex(digest), fields)


def differing(one: Fingerprint, other: Fingerprint) -> set[str]:
    assert one.fields.keys() == other.fields.keys()
    return {name for name in one.fields if one.fields[name] != other.fields[name]}
