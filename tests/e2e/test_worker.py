"""A llama.cpp worker and the daemon, on a tiny model: sharing, sequences side by side, outages."""

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd_client.integrations.llama.errors import NotShareable, Reason
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.worker import LlamaSequence, LlamaWorker
from tests.e2e.workers import TINY_OPTIONS, store_at_once, worker_process
from tests.llama import tiny_models
from tests.support import Daemon, running_daemon

pytestmark = pytest.mark.model

BLOCK = 32
PATIENT = 10.0
"""Seconds: tests that are not about outages must not see one on a busy machine."""
_seeds = itertools.count(100)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_llama(tmp_path_factory.mktemp("tiny") / "llama.gguf")


@pytest.fixture
def worker(daemon: Daemon, tiny: Path) -> Iterator[LlamaWorker]:
    with open_worker(tiny, daemon.runtime_dir, timeout=PATIENT) as opened:
        yield opened


def open_worker(model: Path, runtime_dir: Path, **options: Any) -> LlamaWorker:
    return LlamaWorker(model, runtime_dir=runtime_dir, **{**TINY_OPTIONS, **options})


def fresh_prompt(n_tokens: int) -> np.ndarray:
    """A prompt that no other test has stored."""
    random = np.random.default_rng(next(_seeds))
    return random.integers(1, tiny_models.N_VOCAB, n_tokens).astype(np.int32)


def run(worker: LlamaWorker, prompt: np.ndarray, n_tokens: int = 8) -> tuple[int, list[int]]:
    """Matched tokens, and the greedy continuation."""
    with worker.open(prompt) as sequence:
        tokens = list(sequence.generate(n_tokens))
        return sequence.matched_tokens, tokens


def test_two_workers_that_store_a_prefix_at_once_store_it_once(daemon: Daemon, tiny: Path) -> None:
    prompt = fresh_prompt(4 * BLOCK + 5)
    with (
        open_worker(tiny, daemon.runtime_dir, timeout=PATIENT) as watcher,
        worker_process(store_at_once, tiny, daemon.runtime_dir) as one,
        worker_process(store_at_once, tiny, daemon.runtime_dir) as other,
    ):
        before = watcher.client.status()
        for pipe in (one, other):
            pipe.send(prompt)
        assert [one.recv(), other.recv()] == [0, 0]
        for pipe in (one, other):
            pipe.send("now")
        assert [one.recv(), other.recv()] == [[], []]
        after = watcher.client.status()
        grown = {
            name: after["counters"][name] - before["counters"][name]
            for name in ("stored_blocks", "present_blocks", "joined_blocks", "failed_blocks")
        }
        assert grown["stored_blocks"] == 5
        assert grown["present_blocks"] + grown["joined_blocks"] == 5
        assert grown["failed_blocks"] == 0
        assert run(watcher, prompt)[0] == len(prompt) - 1


def test_bytes_in_status_equal_the_formulas(daemon: Daemon, tiny: Path) -> None:
    with open_worker(tiny, daemon.runtime_dir, timeout=PATIENT, type_k="f32") as worker:
        prompt = fresh_prompt(3 * BLOCK + 1)
        layers = worker.engine.layout.layers
        per_token = sum(row.k_row_bytes + row.v_row_bytes for row in layers)
        payload = 16 + 12 * BLOCK + 8 + 24 * len(layers) + BLOCK * per_token
        stride = -(-payload // 4096) * 4096
        with worker.open(prompt) as sequence:
            sequence.prefill()
        worker.client.flush()
        status = worker.client.status()
        (model,) = (m for m in status["models"] if m["bytes_per_token"] == per_token)
        assert model["payload_bytes"] == payload
        assert model["stride_bytes"] == stride
        assert model["blocks"] == {
            "free": 0,
            "filling": 0,
            "active": 0,
            "cached": 4,
            "pinned": 0,
            "total": 4,
        }
        accounting = status["accounting"]
        held = sum(m["blocks"]["cached"] * m["stride_bytes"] for m in status["models"])
        assert accounting["cached_bytes"] == held
        assert accounting["os_bytes"] == os_bytes(daemon)
        assert accounting["drift_bytes"] == 0
        assert worker.client.verify()["differences"] == []


def os_bytes(daemon: Daemon) -> int:
    """st_blocks of the daemon's segments and stagings, counted without its help."""
    segments = [Path("/dev/shm") / n for n in daemon.segments() if not n.endswith(".lock")]
    total = sum(path.stat().st_blocks * 512 for path in segments)
    seen = set()
    for entry in os.scandir(f"/proc/{daemon.process.pid}/fd"):
        if "memfd:kvd-staging" in os.readlink(entry.path):
            found = os.stat(entry.path)
            if found.st_ino not in seen:
                seen.add(found.st_ino)
                total += found.st_blocks * 512
    return total


def test_an_alloc_and_a_commit_of_many_blocks_are_one_request_each(worker: LlamaWorker) -> None:
    def requests() -> int:
        found: int = worker.client.status()["counters"]["requests"]
        return found

    prompt = fresh_prompt(10 * BLOCK)
    before = requests()
    with worker.open(prompt) as sequence:
        assert requests() == before + 1
        sequence.prefill()
        sequence.store()
        worker.client.flush()
        assert requests() == before + 3, "one append of ten blocks, and the flush"
    with worker.open(prompt) as again:
        assert again.matched_tokens == len(prompt) - 1
        assert requests() == before + 5, "one release, one alloc that matches ten blocks"


def test_decoded_tokens_need_no_round_trip(worker: LlamaWorker) -> None:
    with worker.open(fresh_prompt(20)) as sequence:
        logits = sequence.prefill()
        before = worker.client.status()["counters"]["requests"]
        for _ in range(11):  # tokens 21 to 31: the first block stays open
            logits = sequence.decode(int(logits.argmax()))
            sequence.store()
        assert worker.client.status()["counters"]["requests"] == before


def test_sequences_side_by_side_store_and_fetch_the_right_bytes(
    daemon: Daemon, worker: LlamaWorker, tiny: Path
) -> None:
    """Interleaved decoding scatters the cells; ids are used again; every block is still exact."""
    for _ in range(2):
        prompts = [fresh_prompt(n) for n in (70, 45, 90)]
        opened = [worker.open(prompt) for prompt in prompts]
        assert len({sequence.seq_id for sequence in opened}) == 3
        for sequence in opened:
            sequence.prefill()
        for _ in range(40):
            worker.decode_each(opened, [int(each.logits.argmax()) for each in opened])
        opened[0].close()
        # In the cells that are free now, in front of the others' own:
        for _ in range(30):
            worker.decode_each(opened[1:], [int(each.logits.argmax()) for each in opened[1:]])
        texts = [each.tokens.copy() for each in opened]
        payloads = [blocks_in_context(each) for each in opened[1:]]
        for sequence in opened[1:]:
            sequence.close()
        worker.client.flush()
    with open_worker(tiny, daemon.runtime_dir, timeout=PATIENT) as other:
        for text, payload in zip(texts[1:], payloads, strict=True):
            with other.open(np.append(text, np.int32(1))) as sequence:
                assert sequence.matched_tokens == len(text)
                for ours, theirs in zip(blocks_in_context(sequence), payload, strict=True):
                    assert np.array_equal(ours, theirs)
                sequence.close(store=False)
        assert other.client.verify()["ok"]


def blocks_in_context(sequence: LlamaSequence) -> list[np.ndarray]:
    """What an export of each full block gives now."""
    engine = sequence.worker.engine
    found = []
    for start in range(0, sequence.length - BLOCK + 1, BLOCK):
        payload = np.zeros(engine.layout.state_bytes(BLOCK), np.uint8)
        engine.export_block(sequence.seq_id, start, BLOCK, payload.ctypes.data, payload.size)
        found.append(payload)
    return found


def test_other_kv_types_never_match(daemon: Daemon, worker: LlamaWorker, tiny: Path) -> None:
    prompt = fresh_prompt(64)
    run(worker, prompt)
    with open_worker(tiny, daemon.runtime_dir, timeout=PATIENT, type_k="q8_0") as other:
        assert run(other, prompt)[0] == 0
    assert run(worker, prompt)[0] == 63


def test_a_model_that_cannot_be_shared_is_refused_with_the_reason(
    daemon: Daemon, tmp_path: Path
) -> None:
    model = tiny_models.write_recurrent(tmp_path / "recurrent.gguf")
    with pytest.raises(NotShareable) as refused:
        open_worker(model, daemon.runtime_dir)
    assert refused.value.reason is Reason.RECURRENT


def test_flash_attention_off_is_refused_with_the_reason(daemon: Daemon, tiny: Path) -> None:
    with pytest.raises(NotShareable, match="flash_attn=True") as refused:
        open_worker(tiny, daemon.runtime_dir, flash_attn=False)
    assert refused.value.reason is Reason.FLASH_ATTENTION


def test_an_exception_in_a_sequence_gives_its_id_back(worker: LlamaWorker) -> None:
    for _ in range(2 * worker.engine.n_seq_max):
        with pytest.raises(ZeroDivisionError), worker.open(fresh_prompt(10)):
            raise ZeroDivisionError
    assert worker.client.status()["sequences"]["in_use"] == 0


# -- outages ------------------------------------------------------------------------------------


@pytest.fixture
def alone(tiny: Path) -> Iterator[Callable[[np.ndarray, int], list[int]]]:
    """Greedy texts of a private context."""
    with LlamaEngine(model_path=tiny, **TINY_OPTIONS) as engine:

        def generate(prompt: np.ndarray, n_tokens: int) -> list[int]:
            engine.prefill(0, prompt, 0)
            found = [engine.argmax()]
            for position in range(len(prompt), len(prompt) + n_tokens - 1):
                engine.prefill(0, np.array(found[-1:], np.int32), position)
                found.append(engine.argmax())
            engine.clear(0)
            return found

        yield generate


def test_without_a_daemon_a_worker_computes_and_comes_back_by_itself(
    tiny: Path,
    tmp_path: Path,
    alone: Callable[[np.ndarray, int], list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime_dir = tmp_path / "run"
    prompt = fresh_prompt(80)
    caplog.set_level(logging.WARNING, "kvd_client")
    with open_worker(tiny, runtime_dir, timeout=PATIENT) as worker:
        for _ in range(3):
            assert run(worker, prompt) == (0, alone(prompt, 8))
        assert len(caplog.records) == 1, "one outage, one warning"
        with running_daemon(runtime_dir=runtime_dir):
            wait_until(lambda: run(worker, prompt)[0] == 79)
            assert worker.client.verify()["ok"]


def test_a_daemon_that_dies_takes_no_sequence_along(
    tiny: Path, tmp_path: Path, alone: Callable[[np.ndarray, int], list[int]]
) -> None:
    runtime_dir = tmp_path / "run"
    prompt = fresh_prompt(80)
    with (
        running_daemon(runtime_dir=runtime_dir) as daemon,
        open_worker(tiny, runtime_dir, timeout=PATIENT) as worker,
    ):
        run(worker, prompt)
        worker.client.flush()
        with worker.open(prompt) as sequence:
            assert sequence.matched_tokens == 79
            tokens = []
            for token in sequence.generate(60):
                tokens.append(token)
                if len(tokens) == 20:
                    daemon.kill()
        assert len(tokens) == 60
        # One id is held by a sequence from before while the next daemon comes.
        held = worker.open(prompt)
        with running_daemon(runtime_dir=runtime_dir, instance=daemon.instance):
            wait_until(lambda: run(worker, prompt)[0] == 79)
            ids = [row["seq_id"] for row in worker.client.sequences()]
            assert ids == [held.seq_id]
            held.prefill()
            held.close()
            assert worker.client.sequences() == []
            assert worker.client.verify()["ok"]


def test_a_hung_daemon_costs_little(
    tiny: Path, tmp_path: Path, alone: Callable[[np.ndarray, int], list[int]]
) -> None:
    runtime_dir = tmp_path / "run"
    prompt = fresh_prompt(40)
    with (
        running_daemon(runtime_dir=runtime_dir) as daemon,
        open_worker(tiny, runtime_dir, timeout=0.2) as worker,
    ):
        run(worker, prompt)
        daemon.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert run(worker, prompt) == (0, alone(prompt, 8))
        waited = time.monotonic() - started
        daemon.process.send_signal(signal.SIGCONT)
        # One answer is waited for, and perhaps one new session; not each call.
        assert waited < 5
        wait_until(lambda: run(worker, prompt)[0] == 39)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in 30 s"
