"""kvctl warm: prompts are computed by a real worker, stored, pinned, and found by others."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

import kvd_client
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.prompts import BadPrompt, read_prompt
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.worker import LlamaWorker
from tests.llama import tiny_models
from tests.support import Daemon, running_daemon

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

OPTIONS: dict[str, Any] = {"n_threads": 1, "n_seq_max": 1}
TEXT = "You answer questions about the harbour, in one sentence, and say so if you do not know.\n"


def command(daemon: Daemon, model: Path, *arguments: object) -> list[str]:
    start = [sys.executable, "-m", "kvd_client.kvctl", "warm", "--threads", "1"]
    start += ["--runtime-dir", str(daemon.runtime_dir), "--timeout", "60", "--model", str(model)]
    return [*start, *map(str, arguments)]


def warm(daemon: Daemon, model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(daemon, model, *arguments), capture_output=True, text=True, timeout=120
    )


def pins_of(daemon: Daemon, owner: str) -> list[int]:
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client:
        return sorted(row["tokens"] for row in client.pins() if row["owner"] == owner)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_llama(tmp_path_factory.mktemp("tiny") / "llama.gguf")


def ids(path: Path, n_tokens: int, seed: int) -> Path:
    tokens = np.random.default_rng(seed).integers(1, tiny_models.N_VOCAB, n_tokens)
    path.write_text(json.dumps(tokens.tolist()))
    return path


def test_a_text_is_there_for_others_bit_for_bit(
    daemon: Daemon, smollm2: Path, tmp_path: Path
) -> None:
    """Longer than a batch, and with an open tail."""
    prompt = tmp_path / "system.txt"
    prompt.write_text(TEXT * 34)
    done = warm(daemon, smollm2, "--json", "--owner", "text", prompt)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["prompts"]
    assert row["tokens"] == row["computed"] == row["cached"] > 600
    assert (row["file"], row["found"], row["problem"]) == (str(prompt), 0, "")
    assert pins_of(daemon, "text") == [row["tokens"]]

    with (
        LlamaWorker(
            smollm2, runtime_dir=daemon.runtime_dir, timeout=10, n_ctx=1024, **OPTIONS
        ) as worker,
        LlamaEngine(model=worker.engine.model, n_ctx=1024, **OPTIONS) as private,
    ):
        tokens = worker.engine.tokenize(TEXT * 34 + "Where is the lighthouse?")
        with worker.open(tokens) as sequence:
            assert sequence.matched_tokens == row["tokens"]
            logits = sequence.prefill()
        private.prefill(0, tokens[: row["tokens"]], 0)
        private.prefill(0, tokens[row["tokens"] :], row["tokens"])
        assert np.array_equal(logits, private.logits())

        # Nobody evicts it, and warming again computes nothing.
        worker.client.evict()
        again = warm(daemon, smollm2, "--json", "--owner", "text", prompt)
        (row_again,) = json.loads(again.stdout)["prompts"]
        assert (row_again["found"], row_again["computed"]) == (row["tokens"], 0)
        assert pins_of(daemon, "text") == [row["tokens"]]


def test_a_chat_begins_as_the_models_template_writes_it(smollm2: Path, tmp_path: Path) -> None:
    system = {"role": "system", "content": "You know the harbour."}
    prompt = tmp_path / "chat.json"
    prompt.write_text(json.dumps({"messages": [system]}))
    with LlamaModel(smollm2) as model:
        tokens = read_prompt(prompt, model)
        template = model.chat_template
        assert template is not None
        formatter = Jinja2ChatFormatter(template, "<|im_end|>", "<|im_start|>")
        user: Any = {"role": "user", "content": "Where is the lighthouse?"}
        whole = model.tokenize(
            formatter(messages=[system, user]).prompt,
            add_special=False,  # type: ignore[list-item]
        )
    assert 5 < len(tokens) < len(whole)
    assert np.array_equal(whole[: len(tokens)], tokens)


def test_only_what_is_missing_is_computed(daemon: Daemon, tiny: Path, tmp_path: Path) -> None:
    short, long = ids(tmp_path / "a.json", 70, 1), tmp_path / "b.json"
    long.write_text(json.dumps([*json.loads(short.read_text()), *range(1, 40)]))
    done = warm(daemon, tiny, "--json", "--owner", "parts", short, long)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["prompts"]
    assert [(row["found"], row["computed"]) for row in rows] == [(0, 70), (70, 39)]
    assert pins_of(daemon, "parts") == [70, 109]


def test_pins_end_when_their_time_is_over(daemon: Daemon, tiny: Path, tmp_path: Path) -> None:
    done = warm(daemon, tiny, "--for", "1000", "--owner", "hour", ids(tmp_path / "a.json", 40, 2))
    assert done.returncode == 0, done.stderr
    assert "40" in done.stdout
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client:
        (row,) = (row for row in client.pins() if row["owner"] == "hour")
    assert 900 < row["expires_seconds"] <= 1000


def test_other_kv_types_are_other_kv(daemon: Daemon, tiny: Path, tmp_path: Path) -> None:
    prompt = ids(tmp_path / "a.json", 64, 3)
    for kv_type in ("f16", "q8_0", "f16"):
        done = warm(daemon, tiny, "--json", "--type-k", kv_type, "--type-v", kv_type, prompt)
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)["prompts"]
        assert row["cached"] == 64
    assert row["found"] == 64


def test_what_does_not_fit_is_said(tiny: Path, tmp_path: Path) -> None:
    """Some of it is stored and pinned then, and the exit code is 1."""
    flags = ("--max-memory", "2MiB")
    with running_daemon(*flags, runtime_dir=tmp_path / "rt") as daemon:
        prompt = ids(tmp_path / "a.json", 4000, 4)
        done = warm(daemon, tiny, "--json", prompt)
        assert done.returncode == 1, done.stderr
        (row,) = json.loads(done.stdout)["prompts"]
        assert 0 < row["cached"] < 4000
        assert row["problem"]
        assert pins_of(daemon, "warm") == [row["cached"]]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", "[1, 2", "a.json"),
        ("a.json", "[]", "nothing in it"),
        ("a.json", "[1, true]", "neither a list of token ids"),
        ("a.json", "[1, 96]", "token id 96"),
        ("a.json", "[-1]", "token id -1"),
        ("a.json", "3", "neither a list of token ids"),
        ("a.json", "[" * 100_000, "a.json"),
        ("a.json", '{"prompt": "x"}', '"messages"'),
        ("a.json", '{"messages": [{"role": "user", "content": "x"}]}', "no chat template"),
        ("a.txt", "\xff", "a.txt"),
        ("a.json", None, "No such file"),
    ],
)
def test_a_bad_prompt_is_named(
    tiny: Path, tmp_path: Path, name: str, content: str | None, complaint: str
) -> None:
    bad = tmp_path / name
    if content is not None:
        bad.write_text(content, encoding="latin-1")
    with LlamaModel(tiny) as model, pytest.raises(BadPrompt) as caught:
        read_prompt(bad, model)
    assert str(caught.value).startswith(f"{bad}: ")
    assert complaint in str(caught.value)


def test_nothing_is_computed_if_one_prompt_is_bad(
    daemon: Daemon, tiny: Path, tmp_path: Path
) -> None:
    good, bad = ids(tmp_path / "good.json", 50, 5), tmp_path / "none.json"
    done = warm(daemon, tiny, "--owner", "none", good, bad)
    assert done.returncode == 2
    assert done.stderr.startswith(f"kvctl: {bad}: ")
    assert pins_of(daemon, "none") == []


def test_what_cannot_be_a_model_is_said(daemon: Daemon, tiny: Path, tmp_path: Path) -> None:
    prompt = ids(tmp_path / "a.json", 50, 6)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:1000])
    for model, *flags in (
        (tmp_path / "none.gguf",),
        (broken,),
        (tiny, "--type-k", "q9"),
        (tiny, "--n-ctx", "10"),
        (tiny, "--lora", str(tmp_path / "none")),
        (tiny_models.write_recurrent(tmp_path / "mamba.gguf"),),
    ):
        done = warm(daemon, model, *flags, prompt)
        assert done.returncode == 2, (model, flags)
        assert done.stderr.startswith("kvctl: ")
        assert "Traceback" not in done.stderr


def test_progress_is_shown_on_a_terminal(daemon: Daemon, smollm2: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "progress.txt"
    prompt.write_text("Progress. " * 600)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(daemon, smollm2, "--n-batch", "128", prompt),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while more := os.read(ours, 4096):
                shown += more
        except OSError:  # how a terminal says that its other end has been closed
            pass
        os.close(ours)
    assert process.returncode == 0, shown
    lines = [line for line in shown.split(b"\r") if b"tokens" in line]
    assert len(lines) >= 5
    assert b"progress.txt [" in lines[0]
    assert b"left" in lines[2]
    assert max(map(len, lines)) <= 79 + len("\x1b[K")
