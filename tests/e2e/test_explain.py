"""A llama.cpp worker asks why a prompt is not cached, and for sequences that share nothing."""

from pathlib import Path

import numpy as np
import pytest

import kvd_client
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.worker import LlamaWorker, explain_engine
from tests.e2e.test_worker import BLOCK, PATIENT, fresh_prompt, open_worker
from tests.e2e.workers import TINY_OPTIONS
from tests.llama import tiny_models
from tests.support import Daemon

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_llama(tmp_path_factory.mktemp("tiny") / "llama.gguf")


def compute(worker: LlamaWorker, prompt: np.ndarray, **wishes: bool) -> tuple[int, np.ndarray]:
    """Matched tokens and the logits after the prompt; what is stored is visible then."""
    with worker.open(prompt, **wishes) as sequence:
        logits = sequence.prefill().copy()
    worker.client.flush()
    return sequence.matched_tokens, logits


def test_what_is_not_to_be_stored_leaves_nothing_and_what_is_not_to_be_used_is_computed(
    daemon: Daemon, tiny: Path
) -> None:
    prompt = fresh_prompt(2 * BLOCK + 1)
    with open_worker(tiny, daemon.runtime_dir, timeout=PATIENT) as worker:
        _, expected = compute(worker, prompt, store=False)
        assert worker.explain(prompt)["matched_tokens"] == 0
        compute(worker, prompt)
        matched, _ = compute(worker, prompt)
        assert matched == 2 * BLOCK
        matched, logits = compute(worker, prompt, use=False)
        assert (matched, np.array_equal(logits, expected)) == (0, True)


def test_two_workers_of_other_types_are_told_in_what_they_differ(
    daemon: Daemon, tiny: Path
) -> None:
    prompt = fresh_prompt(2 * BLOCK + 1)
    with (
        open_worker(tiny, daemon.runtime_dir, timeout=PATIENT) as worker,
        open_worker(tiny, daemon.runtime_dir, timeout=PATIENT, type_k="q8_0") as other,
    ):
        compute(worker, prompt)
        assert worker.explain(prompt)["missing"] is None
        report = other.explain(prompt)
        assert (report["matched_tokens"], report["missing"]["why"]) == (0, "not_known")
        assert report["not_exportable"] is None
        rows = [row for row in report["others"] if row["tokens"] == 2 * BLOCK]
        assert [row["differs"] for row in rows] == [
            [{"name": "type_k", "here": "q8_0", "there": "f16"}]
        ]
        assert rows[0]["traits_known"]


def test_a_worker_tells_why_its_engine_could_not_give_a_block_out(
    daemon: Daemon, tiny: Path
) -> None:
    prompt = fresh_prompt(2 * BLOCK + 1)
    with open_worker(tiny, daemon.runtime_dir, timeout=PATIENT) as worker:
        with worker.open(prompt) as sequence:
            sequence.prefill()
            # As after a context shift: the sequence has not what it is said to have.
            worker.engine.truncate(sequence.seq_id, BLOCK // 2)
        report = worker.explain(prompt)
        assert report["matched_tokens"] == 0
        assert "ends at 16" in report["not_exportable"]


def test_of_a_model_that_cannot_be_shared_the_reason_is_told(
    daemon: Daemon, tmp_path: Path
) -> None:
    path = tiny_models.write_recurrent(tmp_path / "recurrent.gguf")
    options = {**TINY_OPTIONS, "require_shareable": False}
    with (
        LlamaEngine(model_path=path, **options) as engine,
        kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client,
    ):
        report = explain_engine(engine, client, fresh_prompt(5))
    assert report["asked_tokens"] == 4
    assert "use it without sharing" in report["not_exportable"]


def test_an_engine_without_a_worker_is_explained_as_with_one(daemon: Daemon, tiny: Path) -> None:
    prompt = fresh_prompt(2 * BLOCK + 1)
    with open_worker(tiny, daemon.runtime_dir, timeout=PATIENT) as worker:
        compute(worker, prompt)
        found = explain_engine(worker.engine, worker.client, prompt)
        assert found == worker.explain(prompt)
