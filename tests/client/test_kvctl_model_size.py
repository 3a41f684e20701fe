"""kvctl model-size as a command. That its sizes are those of llama.cpp is shown in
tests/llama/files/test_model_size.py; that as many blocks fit a daemon, in
tests/e2e/test_model_size.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest

from kvd.settings import Settings
from kvd_client.kvctl import model_size
from kvd_client.kvctl.model_size import DEFAULT_BUDGET, blocks_in
from kvd_proto.geometry import round_up
from kvd_proto.index import memory_beside
from tests.support import parse_size, running_daemon

VALUES: dict[str, int | list[int]] = {
    "context_length": 1000,
    "embedding_length": 128,
    "block_count": 3,
    "attention.head_count": 4,
    "attention.head_count_kv": [4, 0, 2],
}


def write(path: Path, architecture: str = "llama", **changes: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**VALUES, **changes}.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf")


def run(
    runtime_dir: Path, *arguments: str | Path, **environ: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvd_client.kvctl", "model-size"]
    return subprocess.run(
        [*command, "--runtime-dir", runtime_dir, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **environ},
    )


ROWS = [(256, 256), (0, 0), (128, 128)]
TOKEN = sum(k + v for k, v in ROWS)


def test_the_report(tmp_path: Path, model: Path) -> None:
    done = run(tmp_path, model, "--json", "--budget", "64MiB", "--block-tokens", "16")
    payload = 16 + 16 * 12 + 8 + 24 * 3 + 16 * TOKEN
    stride = round_up(payload)
    n_blocks = blocks_in(64 << 20, stride, 16)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "file": str(model),
        "architecture": "llama",
        "type_k": "f16",
        "type_v": "f16",
        "shared": True,
        "reason": "",
        "why": "",
        "layers": [
            {"n_layers": 1, "has_window": False, "k_row_bytes": k, "v_row_bytes": v}
            for k, v in ROWS
        ],
        "window_tokens": None,
        "bytes_per_token": TOKEN,
        "block": {
            "tokens": 16,
            "payload_bytes": payload,
            "stride_bytes": stride,
            "padding_bytes": stride - payload,
        },
        "context": {
            "tokens": 1000,
            "state_bytes": 16 + 1000 * 12 + 8 + 24 * 3 + 1000 * TOKEN,
            "blocks": 63,
            "blocks_bytes": 63 * stride,
        },
        "budget": {
            "bytes": 64 << 20,
            "source": "option",
            "blocks": n_blocks,
            "tokens": 16 * n_blocks,
        },
    }


def test_for_people(tmp_path: Path, model: Path) -> None:
    done = run(tmp_path, model, "--type-k", "q8_0", "--n-ctx", "64")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "model.gguf\n"
        "llama, K in q8_0, V in f16\n"
        "kvd shares it\n"
        "\n"
        "LAYERS  SEE     K ROW  V ROW  TOKEN\n"
        "     1  all     136 B  256 B  392 B\n"
        "     1  no K/V    0 B    0 B    0 B\n"
        "     1  all      68 B  128 B  196 B\n"
        "\n"
        "token    588 bytes\n"
        "block    20.0 KiB: 32 tokens, 19,296 bytes and 1,184 of padding\n"
        "context  37.6 KiB: 64 tokens, or 2 blocks with 40.0 KiB\n"
        "budget   4.0 GiB, the default; no daemon answers\n"
        "fit      207,524 blocks, 6,640,768 tokens\n"
    )


def test_what_is_not_shared_is_sized_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "g.gguf", "grok")
    done = run(tmp_path, path)
    assert done.returncode == 0
    said = " ".join(done.stdout.split())
    assert "kvd does not share it: llama.cpp computes it without flash attention" in said
    assert max(map(len, done.stdout.splitlines())) <= 80
    report = json.loads(run(tmp_path, path, "--json").stdout)
    assert (report["shared"], report["reason"]) == (False, "flash-attention")
    assert report["window_tokens"] is None


def test_a_window_bounds_the_blocks(tmp_path: Path) -> None:
    path = write(
        tmp_path / "g.gguf", "gemma3",
        attention__sliding_window=96, attention__sliding_window_pattern=2,
    )  # fmt: skip
    report = json.loads(run(tmp_path, path, "--json", "--block-tokens", "96").stdout)
    assert report["shared"]
    assert report["window_tokens"] == 96
    assert {group["has_window"] for group in report["layers"]} == {True, False}
    done = run(tmp_path, path, "--block-tokens", "97")
    assert done.returncode == 2
    assert "at most 96, the model's window, not 97" in done.stderr


def test_what_has_no_size_a_token_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "mamba")
    done = run(tmp_path, path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "mamba is recurrent: it keeps a state of constant size" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    done = run(tmp_path, path, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert (report["shared"], report["reason"]) == (False, "recurrent")
    assert "cannot be cut into blocks" in report["why"]


# --- the budget


def test_the_budget_is_that_of_the_daemon(tmp_path: Path, model: Path) -> None:
    with running_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run") as daemon:
        budget = json.loads(run(daemon.runtime_dir, model, "--json").stdout)["budget"]
        assert (budget["bytes"], budget["source"]) == (64 << 20, "daemon")
        given = json.loads(run(daemon.runtime_dir, model, "--json", "--budget", "1GiB").stdout)
        assert (given["budget"]["bytes"], given["budget"]["source"]) == (1 << 30, "option")
        daemon.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        hung = json.loads(run(daemon.runtime_dir, model, "--json").stdout)["budget"]
        assert (hung["bytes"], hung["source"]) == (DEFAULT_BUDGET, "default")
        assert time.monotonic() - began < 10
        daemon.process.send_signal(signal.SIGCONT)


def test_the_default_is_that_of_the_daemon() -> None:
    assert Settings().max_memory == DEFAULT_BUDGET


@pytest.mark.parametrize("text", ["1", "4096", "7 KiB", "64mib", "4GiB", "2TiB", "12b"])
def test_sizes_are_read_as_in_the_settings(text: str) -> None:
    assert model_size._bytes(text) == parse_size(text)


@pytest.mark.parametrize("stride", [4096, 36 << 10, 741_376, 100 << 20])
@pytest.mark.parametrize("budget", [0, 4096, 1 << 20, 64 << 20, (4 << 30) + 12345, 1 << 44])
def test_one_block_more_would_not_fit(budget: int, stride: int) -> None:
    n_blocks = blocks_in(budget, stride, 32)

    def fits(n: int) -> bool:
        return n * stride + memory_beside(n, budget // stride, 32) <= budget

    assert n_blocks == 0 or fits(n_blocks)
    assert not fits(n_blocks + 1)


# --- what is wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: MODEL.gguf"),
        (["{model}", "--n-ctx", "0"], "a whole number from 1 on"),
        (["{model}", "--block-tokens", "1025"], "at most 1024"),
        (["{model}", "--budget", "0"], "a size above 0"),
        (["{model}", "--budget", "many"], "a size above 0"),
        (["{model}", "--budget", "4XiB"], "a size above 0"),
        (["{model}", "--type-k", "q9"], "one of f32"),
        (["{folder}/absent.gguf"], "No such file"),
        (["{folder}"], "Is a directory"),
        (["/dev/null"], "not a file"),
        ([__file__], "not a GGUF file"),
        (["{cut}"], "it is cut off"),
        (["{adapter}"], "not one whose K/V is known"),
    ],
)
def test_what_is_wrong_is_exit_code_2_and_a_line(
    tmp_path: Path, model: Path, arguments: list[str], said: str
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-40])
    adapter = write(tmp_path / "adapter.gguf", "no-such-architecture\N{ESCAPE}[31m")
    names = {"model": model, "folder": tmp_path, "cut": cut, "adapter": adapter}
    done = run(tmp_path, *(each.format(**names) for each in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "\N{ESCAPE}" not in done.stderr


def test_neither_llama_cpp_nor_gguf_is_needed(tmp_path: Path, model: Path) -> None:
    """Modules of these names that cannot be imported come first."""
    for name in ("llama_cpp", "gguf"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    assert run(tmp_path, model, PYTHONPATH=path).returncode == 0
