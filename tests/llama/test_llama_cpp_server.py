"""What the launcher of llama_cpp.server makes of its models' settings. No daemon: a Llama shares as
soon as one comes. Whole servers are in tests/e2e."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp.server.model import LlamaProxy
from llama_cpp.server.settings import ModelSettings

from kvd_client.integrations.llama_cpp_server import (
    CannotShare,
    Options,
    load_and_share,
    parser_of_our_flags,
)
from tests.support import running_daemon

pytestmark = pytest.mark.model

Load = Callable[..., Any]


@pytest.fixture
def load(tiny_dir: Path, tmp_path: Path) -> Iterator[Load]:
    """Loads a tiny model by name with settings; all is closed at the end."""
    loaded = []

    def load_one(
        name: str = "llama", block_tokens: int = 32, required: bool = False, **changes: Any
    ) -> Any:
        options = Options(str(tmp_path / "kvd"), 10.0, block_tokens, required)
        path = str(tiny_dir / f"{name}.gguf")
        settings = ModelSettings(model=path, n_ctx=256, verbose=False, **changes)
        llama = load_and_share(LlamaProxy.load_llama_from_model_settings, settings, options)
        loaded.append(llama)
        return llama

    yield load_one
    for llama in loaded:
        llama.close()


def has_flash_attention(llama: Any) -> bool:
    kind = llama.context_params.flash_attn_type
    return bool(kind == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED)


def test_flash_attention_is_on_unless_somebody_says_no(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert has_flash_attention(load())
    assert not has_flash_attention(load(flash_attn=False))
    monkeypatch.setenv("FLASH_ATTN", "0")
    assert not has_flash_attention(load())


def test_what_cannot_be_shared_is_loaded_as_it_was_asked_for(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    llama = load("not-causal", cache=True, embedding=True)
    (warning,) = ours(caplog)
    assert "not-causal.gguf is served without sharing: " in warning
    assert isinstance(llama.cache, llama_cpp.LlamaRAMCache)


def test_who_switches_flash_attention_off_is_told_what_it_costs(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    load(flash_attn=False)
    (warning,) = ours(caplog)
    assert warning.endswith("its flash_attn is set to false: set it to true, or leave it out")


def test_what_must_be_shared_is_not_served_otherwise(load: Load) -> None:
    assert load(required=True) is not None
    with pytest.raises(CannotShare, match=r"llama\.gguf cannot be shared: its flash_attn is set"):
        load(required=True, flash_attn=False)


def test_a_daemon_without_room_does_not_keep_a_model_from_being_served(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    f32 = llama_cpp.GGML_TYPE_F32
    with running_daemon("--max-memory", "1MiB", runtime_dir=tmp_path / "kvd"):
        llama = load(block_tokens=1024, type_k=f32, type_v=f32, cache=True)
    (warning,) = ours(caplog)
    assert "is served without sharing: " in warning
    assert "1048576" in warning
    assert llama.cache is not None


def test_a_cache_of_the_server_gives_way_and_it_says_so(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    assert load().cache is None
    assert ours(caplog) == []
    assert load(cache=True).cache is None
    (warning,) = ours(caplog)
    assert "the setting cache is left out" in warning


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The launcher's warnings."""
    return [record.message for record in caplog.records if record.name.endswith("cpp_server")]


def test_the_servers_own_flags_reach_it_as_they_were_given() -> None:
    before = ["--n_gpu_layers", "-1", "--model=a b.gguf", "--tensor_split", "0.5", "0.5"]
    after = ["--chat_template_kwargs", '{"a": "--kvd"}', "--kv_overrides", "a=int:1"]
    given = [*before, "--kvd-timeout", "2.5", "--kvd-runtime-dir=run", *after]
    found, theirs = parser_of_our_flags().parse_known_args(given)
    assert theirs == before + after
    assert vars(found) == {
        "kvd_timeout": 2.5,
        "kvd_runtime_dir": "run",
        "kvd_block_tokens": 32,
        "kvd_require_shareable": False,
    }


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    """The program itself: it changes its process, and does not put it back."""
    command = [sys.executable, "-m", "kvd_client.integrations.llama_cpp_server", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_server_ends_if_what_must_be_shared_cannot_be(tiny_dir: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny_dir / "llama.gguf"), "--n_ctx", "256", "--flash_attn", "false"]
    ours = ["--kvd-runtime-dir", str(tmp_path), "--kvd-require-shareable"]
    done = run(*flags, *ours)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.endswith("its flash_attn is set to false: set it to true, or leave it out")


def test_help_shows_the_flags_of_both() -> None:
    done = run("--kvd-timeout", "1", "--help")
    assert done.returncode == 0
    theirs, ours = done.stdout.split("sharing through kvd:")
    assert {"--n_ctx", "--config_file"} <= set(theirs.split())
    assert {"--kvd-runtime-dir", "--kvd-timeout", "--kvd-block-tokens"} <= set(ours.split())


@pytest.mark.parametrize(
    ("flags", "code", "complaint"),
    [
        ("--kvd-timeout 0", 2, "argument --kvd-timeout: a number of seconds above 0, not '0'"),
        ("--kvd-block-tokens 9999", 2, "argument --kvd-block-tokens: at most 1024, not 9999"),
        ("--kvd-nonsense 1", 2, "unrecognized arguments: --kvd-nonsense 1"),
        ("--kvd-time 1 --model m", 2, "unrecognized arguments: --kvd-time 1"),
        ("--kvd-timeout 1", 1, "model\n  Field required"),
    ],
)
def test_a_wrong_flag_is_named(flags: str, code: int, complaint: str) -> None:
    done = run(*flags.split())
    assert done.returncode == code
    assert complaint in done.stderr
