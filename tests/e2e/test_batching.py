"""The batching worker on a tiny model: what it shares, how it ends, and life without a daemon."""

import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd_client.integrations.llama.batching.request import Request, RequestFailed
from kvd_client.integrations.llama.batching.worker import BatchingWorker
from kvd_client.integrations.llama.errors import DecodeFailed, ImportFailed
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.worker import LlamaWorker
from tests.e2e.batching import BLOCK, LAST_BITS, TINY, ExactWorker, Recorder, difference
from tests.llama import tiny_models
from tests.support import Daemon, running_daemon

pytestmark = pytest.mark.model

_seeds = itertools.count(500)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_llama(tmp_path_factory.mktemp("tiny") / "llama.gguf")


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(
        model_path=tiny, n_ctx=1024, n_batch=1024, n_ubatch=1024, n_threads=1, n_seq_max=1
    ) as engine:
        yield engine


@pytest.fixture
def worker(daemon: Daemon, tiny: Path) -> Iterator[BatchingWorker]:
    """With an empty cache: of 95 letters, many prompts begin with the same one."""
    with open_worker(tiny, daemon.runtime_dir) as opened:
        opened.llama.client.evict()
        yield opened


def open_worker(model: Path, runtime_dir: Path, **options: Any) -> BatchingWorker:
    return ExactWorker(model, runtime_dir=runtime_dir, **{**TINY, **options})


def fresh(n_tokens: int) -> np.ndarray:
    """Tokens that no other test has stored."""
    random = np.random.default_rng(next(_seeds))
    return random.integers(1, tiny_models.N_VOCAB, n_tokens).astype(np.int32)


def finish(worker: BatchingWorker, *requests: Request) -> None:
    """Step until these requests have ended, and nothing lingers."""
    step_until(worker, lambda: all(request.ended for request in requests))
    step_until(worker, lambda: not worker.step())


def step_until(worker: BatchingWorker, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if not worker.step():
            worker.wait_for_news(0.01)
        assert time.monotonic() < deadline, "it did not come true in 30 s"


def until_over(moment: float) -> None:
    while time.monotonic() <= moment:
        time.sleep(0.01)


# -- answers ------------------------------------------------------------------------------------


def test_many_requests_at_once_are_each_answered_as_if_alone(
    worker: BatchingWorker, alone: LlamaEngine
) -> None:
    document = fresh(150)
    prompts = [np.append(document[: 10 * n], fresh(3 + n)) for n in range(16)]
    picks = [Recorder(n) for n in range(16)]
    worker.start()
    requests = [worker.submit(p, 20, pick=pick) for p, pick in zip(prompts, picks, strict=True)]
    for prompt, request, pick in zip(prompts, requests, picks, strict=True):
        result = request.result(30)
        assert (result.ended, len(result.tokens)) == ("length", 20)
        assert list(request) == result.tokens
        assert difference(alone, prompt, result.tokens, pick.logits) < LAST_BITS


def test_one_request_alone_is_computed_in_the_batches_of_a_private_context(
    worker: BatchingWorker,
) -> None:
    prompt = fresh(150)
    pick = Recorder()
    request = worker.submit(prompt, 12, pick=pick)
    finish(worker, request)
    answer = request.result().tokens
    with LlamaEngine(
        model=worker.engine.model, n_ctx=1024, n_batch=64, n_threads=1, n_seq_max=1
    ) as private:
        private.prefill(0, prompt, 0)
        assert np.array_equal(private.logits(), pick.logits[0])
        for position, (token, logits) in enumerate(
            zip(answer, pick.logits[1:], strict=False), len(prompt)
        ):
            private.prefill(0, np.array([token], np.int32), position)
            assert np.array_equal(private.logits(), logits)


def test_a_text_ends_where_the_model_ends_it(daemon: Daemon, smollm2: Path) -> None:
    with open_worker(smollm2, daemon.runtime_dir, n_seq_max=2) as worker:
        template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        prompt = worker.engine.tokenize(template.format("What is 1+1?"))
        request = worker.submit(prompt, 200)
        finish(worker, request)
        result = request.result()
        assert result.ended == "eog"
        assert 0 < len(result.tokens) < 200
        assert not any(worker.engine.is_eog(token) for token in result.tokens)


def test_tokens_come_one_by_one_by_iteration_and_by_callback(worker: BatchingWorker) -> None:
    told: list[int] = []
    later = threading.Event()
    request = worker.submit(fresh(20), 10, on_token=told.append)
    while len(told) < 4:
        worker.step()
    assert request.ended is None
    tokens = iter(request)
    assert [next(tokens) for _ in range(4)] == told
    # The fifth comes while another thread waits for it.
    waiter = threading.Thread(target=lambda: (next(tokens), later.set()))
    waiter.start()
    step_until(worker, later.is_set)
    waiter.join()
    finish(worker, request)
    assert [*told[:5], *tokens] == told
    assert len(told) == 10


# -- sharing ------------------------------------------------------------------------------------


def test_the_prefix_is_matched_before_anything_is_computed(
    daemon: Daemon, tiny: Path, worker: BatchingWorker
) -> None:
    prompt = fresh(5 * BLOCK + 7)
    request = worker.submit(prompt, 5)
    finish(worker, request)
    assert request.result().computed_tokens == len(prompt) + 4
    worker.llama.client.flush()
    with open_worker(tiny, daemon.runtime_dir) as other:
        again = other.submit(np.append(prompt, [*request.result().tokens[:4], 1, 2]), 1)
        finish(other, again)
        assert again.result().matched_tokens == len(prompt) + 4
        assert again.result().computed_tokens == 2


def test_two_sequences_of_a_worker_import_their_common_prefix_once(
    daemon: Daemon, tiny: Path, worker: BatchingWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = fresh(6 * BLOCK)
    finish(worker, worker.submit(document, 1))
    worker.llama.client.flush()
    with open_worker(tiny, daemon.runtime_dir) as other:
        imported: list[int] = []
        real = other.engine.import_blocks

        def import_blocks(seq: int, start: int, blocks: Any) -> None:
            found = list(blocks)
            imported.append(len(found))
            real(seq, start, found)

        monkeypatch.setattr(other.engine, "import_blocks", import_blocks)
        requests = [other.submit(np.append(document, fresh(5)), 4) for _ in range(3)]
        finish(other, *requests)
        assert imported == [6]
        results = [request.result() for request in requests]
        assert [result.matched_tokens for result in results] == [6 * BLOCK] * 3
        assert [result.copied_tokens for result in results] == [0, 6 * BLOCK, 6 * BLOCK]
        assert [result.computed_tokens for result in results] == [5 + 3] * 3


def test_what_goes_beyond_the_shared_cells_is_imported(
    daemon: Daemon, tiny: Path, worker: BatchingWorker, alone: LlamaEngine
) -> None:
    """Shared is up to the last whole block; what the cache has beyond it is imported."""
    document = fresh(2 * BLOCK + 9)
    longer = np.append(document, fresh(3 * BLOCK))
    finish(worker, worker.submit(longer, 1))
    worker.llama.client.flush()
    with open_worker(tiny, daemon.runtime_dir) as other:
        pick, prompt = Recorder(), np.append(longer, fresh(3))
        first = other.submit(np.append(document, fresh(50)), 30)
        second = other.submit(prompt, 6, pick=pick)
        finish(other, first, second)
        result = second.result()
        assert result.matched_tokens == len(longer)
        assert result.copied_tokens == 2 * BLOCK
        assert result.computed_tokens == 3 + 5
        assert other.checked_blocks >= 3
        assert difference(alone, prompt, result.tokens, pick.logits) < LAST_BITS


def test_what_another_sequence_cannot_share_is_imported(
    worker: BatchingWorker, alone: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = fresh(3 * BLOCK)
    first = worker.submit(document, 100)
    worker.step()
    step_until(worker, lambda: worker.llama.explain(document)["matched_tokens"] == 95)
    real, refused = worker.engine.check_range, []

    def check_range(seq: int, start: int, end: int) -> None:
        if not refused:
            refused.append(end)
            raise ImportFailed("a window has moved on")
        real(seq, start, end)

    monkeypatch.setattr(worker.engine, "check_range", check_range)
    pick, prompt = Recorder(), np.append(document, fresh(5))
    second = worker.submit(prompt, 4, pick=pick)
    finish(worker, first, second)
    assert refused == [96]
    result = second.result()
    assert (result.copied_tokens, result.matched_tokens, result.computed_tokens) == (0, 96, 5 + 3)
    assert difference(alone, prompt, result.tokens, pick.logits) < LAST_BITS


KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "heads-by-layer": (tiny_models.write_heads_by_layer, {}),
    "m-rope": (tiny_models.write_m_rope, {}),
    "window": (tiny_models.write_sliding_window, {}),
    # So small that the cells of a window that has moved on are used again at once.
    "window, dropped": (
        tiny_models.write_sliding_window,
        {"swa_full": False, "n_ubatch": 64, "n_seq_max": 2},
    ),
    "q8_0": (tiny_models.write_llama, {"type_k": "q8_0", "type_v": "q8_0"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_shares_in_a_worker_and_between_two(
    daemon: Daemon, tmp_path: Path, kind: str
) -> None:
    write, options = KINDS[kind]
    model = write(tmp_path / "model.gguf")
    document = fresh(4 * BLOCK)
    with LlamaEngine(
        model_path=model, n_ctx=1024, n_batch=64, n_threads=1, **{"n_seq_max": 1, **options}
    ) as private:
        for matched in (0, 1):
            with open_worker(model, daemon.runtime_dir, **options) as worker:
                # The first one is far beyond the document when the others begin.
                prompts = [np.append(document, fresh(250))]
                prompts += [np.append(document, fresh(3 + n)) for n in range(7)]
                picks = [Recorder(n) for n in range(8)]
                requests = [worker.submit(prompts[0], 40, pick=picks[0])]
                for _ in range(10):
                    worker.step()
                worker.llama.client.flush()
                requests += [
                    worker.submit(prompt, 40, pick=pick)
                    for prompt, pick in zip(prompts[1:], picks[1:], strict=True)
                ]
                finish(worker, *requests)
                worker.llama.client.flush()
                results = [request.result() for request in requests]
                assert (results[0].matched_tokens >= len(document)) == matched
                found = [max(each.copied_tokens, each.matched_tokens) for each in results[1:]]
                assert min(found) >= len(document)
                assert (results[1].copied_tokens == 0) == (kind == "window, dropped")
                for prompt, result, pick in zip(prompts, results, picks, strict=True):
                    assert (result.ended, len(result.tokens)) == ("length", 40)
                    tokens = np.append(prompt, result.tokens).astype(np.int32)
                    private.clear(0)
                    private.prefill(0, prompt, 0)
                    off = []
                    for position, logits in enumerate(pick.logits, len(prompt)):
                        off.append(float(np.abs(private.logits() - logits).max()))
                        private.prefill(0, tokens[position : position + 1], position)
                    assert max(off) < LAST_BITS


def test_a_common_prefix_is_computed_once_without_a_daemon(
    tiny: Path, tmp_path: Path, alone: LlamaEngine
) -> None:
    document = fresh(200)
    prompts = [np.append(document, fresh(5)) for _ in range(8)]
    picks = [Recorder(n) for n in range(8)]
    with open_worker(tiny, tmp_path / "nobody") as worker:
        requests = [worker.submit(p, 9, pick=pick) for p, pick in zip(prompts, picks, strict=True)]
        finish(worker, *requests)
    results = [request.result() for request in requests]
    assert results[0].computed_tokens == 205 + 8
    # Fewer tokens than are worth waiting for are computed by each.
    assert all(13 <= result.computed_tokens < 13 + BLOCK for result in results[1:])
    for prompt, result, pick in zip(prompts, results, picks, strict=True):
        assert difference(alone, prompt, result.tokens, pick.logits) < LAST_BITS


def test_new_blocks_are_stored_while_decoding_goes_on(
    daemon: Daemon, tiny: Path, worker: BatchingWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[int] = []
    real = worker.engine.export_block

    def export_block(*arguments: int) -> int:
        exports[-1] += 1
        return real(*arguments)

    monkeypatch.setattr(worker.engine, "export_block", export_block)
    prompt = fresh(8 * BLOCK)
    request = worker.submit(prompt, 4 * BLOCK)
    while not request.ended:
        exports.append(0)
        worker.step()
        if len(exports) == 3 * BLOCK:
            worker.llama.client.flush()
            with LlamaWorker(
                tiny, runtime_dir=daemon.runtime_dir, n_ctx=1024, n_threads=1, timeout=10
            ) as other:
                known = np.append(prompt, list(itertools.islice(request, 2 * BLOCK)))
                with other.open(np.append(known, np.int32(1))) as sequence:
                    assert sequence.matched_tokens == 10 * BLOCK
    # 64 tokens of the prompt a step, two blocks each; then one every 32nd step.
    assert exports[:5] == [2, 2, 2, 2, 0]
    assert max(exports) == 2
    assert sum(exports[4:-1]) == 3


def test_what_is_stored_has_the_right_tokens(
    daemon: Daemon, tiny: Path, worker: BatchingWorker, alone: LlamaEngine
) -> None:
    """All sequences interleaved; then each text is fetched by another worker, and goes on right."""
    prompts = [fresh(40 + 7 * n) for n in range(8)]
    requests = [worker.submit(prompt, 40, pick=Recorder(n)) for n, prompt in enumerate(prompts)]
    finish(worker, *requests)
    worker.llama.client.flush()
    with open_worker(tiny, daemon.runtime_dir) as other:
        texts = [
            np.append(prompt, request.result().tokens).astype(np.int32)
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        picks = [Recorder(n) for n in range(8)]
        again = [other.submit(text, 5, pick=pick) for text, pick in zip(texts, picks, strict=True)]
        finish(other, *again)
        for text, request, pick in zip(texts, again, picks, strict=True):
            result = request.result()
            assert result.matched_tokens == len(text) - 1
            assert difference(alone, text, result.tokens, pick.logits) < LAST_BITS
        assert other.checked_blocks >= 8


@pytest.mark.timeout(330)
def test_the_example_answers_the_second_process_from_the_cache(
    daemon: Daemon, smollm2: Path
) -> None:
    example = Path(__file__).parents[2] / "examples" / "batching_worker.py"
    command = [sys.executable, str(example), str(smollm2), "--runtime-dir", str(daemon.runtime_dir)]
    said = subprocess.run(
        [*command, "--tokens", "4"], check=True, capture_output=True, text=True, timeout=300
    ).stdout
    rows = re.findall(r"(\w+) +matched +(\d+)  shared +(\d+)  computed +(\d+)", said)
    assert [row[0] for row in rows] == ["length"] * 16, said
    matched, shared, computed = ([int(row[column]) for row in rows] for column in (1, 2, 3))
    assert computed[0] > 500, "the document, once"
    assert max(computed[1:]) < 60
    assert min(shared[1:8] + shared[9:]) > 500
    assert min(matched[8:]) > 500
    assert said.count("first token after") == 2


def test_requests_wait_while_others_have_all_ids_of_the_daemon(tiny: Path, tmp_path: Path) -> None:
    runtime_dir = tmp_path / "run"
    with (
        running_daemon("--max-sequences", "8", runtime_dir=runtime_dir),
        open_worker(tiny, runtime_dir) as one,
        open_worker(tiny, runtime_dir) as other,
    ):
        first = [one.submit(fresh(5), 40) for _ in range(8)]
        one.step()
        waiting = other.submit(fresh(5), 3)
        late = other.submit(fresh(5), 3, timeout=0.05)
        assert not other.step()
        step_until(other, lambda: late.ended is not None)
        assert (waiting.ended, late.ended) == (None, "timeout")
        finish(one, *first)
        finish(other, waiting)
        assert len(waiting.result().tokens) == 3


# -- the end ------------------------------------------------------------------------------------


def test_a_cancelled_request_gives_its_id_back_at_once(worker: BatchingWorker) -> None:
    requests = [worker.submit(fresh(60), 20) for _ in range(10)]
    worker.step()
    assert len(worker.llama.client.sequences()) == 8
    for request in (*requests[:3], requests[9]):
        request.cancel()
    worker.step()
    assert [request.ended for request in requests] == [
        *["cancelled"] * 3, *[None] * 6, "cancelled"
    ]  # fmt: skip
    assert len(worker.llama.client.sequences()) == 6, "nine were waiting, and starts at once"
    for request in requests:
        request.cancel()
    worker.step()
    assert worker.llama.client.sequences() == []
    assert requests[3].result().ended == "cancelled"
    assert worker.llama.client.verify()["ok"]


def test_a_request_whose_time_is_over_ends_and_says_so(worker: BatchingWorker) -> None:
    told: list[int] = []

    def on_token(token: int) -> None:
        told.append(token)
        if len(told) == 3:
            until_over(begun + 0.5)

    begun = time.monotonic()
    running = worker.submit(fresh(20), 900, timeout=0.5, on_token=on_token)
    finish(worker, running)
    result = running.result()
    assert result.ended == "timeout"
    assert result.tokens == told
    assert len(told) <= 3
    late = worker.submit(fresh(20), 5, timeout=0)
    worker.step()
    assert late.result().ended == "timeout"
    assert late.result().computed_tokens == 0
    assert worker.llama.client.sequences() == []


def test_a_context_that_is_full_cuts_no_answer(
    daemon: Daemon, tiny: Path, alone: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: list[int] = []
    with open_worker(tiny, daemon.runtime_dir, n_ctx=256, n_seq_max=8) as worker:
        real = worker.engine.decode

        def decode(tokens: list[int], *arguments: Any) -> None:
            schedule = worker._schedule
            try:
                real(tokens, *arguments)
            except DecodeFailed as error:
                full.append(error.code)
                assert schedule.cells.used + len(tokens) > schedule.n_ctx
                raise
            assert schedule.cells.used + len(tokens) <= schedule.n_ctx

        monkeypatch.setattr(worker.engine, "decode", decode)
        prompts = [fresh(20 + n) for n in range(6)]
        picks = [Recorder(n) for n in range(6)]
        requests = [
            worker.submit(p, 150, pick=pick) for p, pick in zip(prompts, picks, strict=True)
        ]
        finish(worker, *requests)
        results = [request.result() for request in requests]
        assert full
        assert set(full) == {1}
        assert results[0].put_back == 0, "the oldest goes on"
        assert sum(result.put_back for result in results) > 0
        for prompt, result, pick in zip(prompts, results, picks, strict=True):
            assert (result.ended, len(result.tokens)) == ("length", 150)
            assert difference(alone, prompt, result.tokens, pick.logits) < LAST_BITS
        assert worker.llama.client.verify()["ok"]


def test_an_urgent_request_takes_the_place_of_another(worker: BatchingWorker) -> None:
    requests = [worker.submit(fresh(10), 40) for _ in range(8)]
    for _ in range(5):
        worker.step()
    urgent = worker.submit(fresh(10), 3, priority=1)
    for _ in range(3):
        worker.step()
    assert urgent.ended == "length"
    finish(worker, *requests)
    assert [request.result().put_back for request in requests] == [0] * 7 + [1]
    assert [len(request.result().tokens) for request in requests] == [40] * 8


def test_a_sampler_that_raises_fails_its_request_alone(worker: BatchingWorker) -> None:
    def broken(_: np.ndarray) -> int:
        raise ZeroDivisionError("no")

    good = worker.submit(fresh(10), 5)
    bad = worker.submit(fresh(10), 5, pick=broken)
    deaf = worker.submit(fresh(10), 5, on_token=lambda _: 1 / 0)
    wild = worker.submit(fresh(10), 5, pick=lambda _: 96)
    finish(worker, good, bad, deaf, wild)
    assert good.result().ended == "length"
    assert bad.ended == "failed: ZeroDivisionError: no"
    with pytest.raises(RequestFailed, match="ZeroDivisionError: no"):
        bad.result()
    with pytest.raises(RequestFailed, match="division by zero"):
        list(deaf)
    assert wild.ended == "failed: ValueError: picked 96, which is no token of this model"
    assert worker.llama.client.sequences() == []


def test_what_cannot_be_answered_is_refused_when_it_is_submitted(worker: BatchingWorker) -> None:
    with pytest.raises(ValueError, match="do not fit a context of 1024"):
        worker.submit(fresh(1000), 100)
    with pytest.raises(ValueError, match=r"token ids are 0 \.\. 95, not 96"):
        worker.submit([1, 96], 5)


def test_who_would_wait_for_ever_is_told(worker: BatchingWorker) -> None:
    request = worker.submit(fresh(10), 5)
    with pytest.raises(RuntimeError, match="wait for ever"):
        request.result()
    with pytest.raises(RuntimeError, match="wait for ever"):
        next(iter(request))
    worker.start()
    assert len(request.result(30).tokens) == 5


def test_a_thread_of_the_callers_can_run_it_and_nobody_steps_beside_it(
    worker: BatchingWorker,
) -> None:
    runner = threading.Thread(target=worker.run)
    inside, go_on = threading.Event(), threading.Event()

    def on_token(_: int) -> None:
        inside.set()
        assert go_on.wait(30)

    request = worker.submit(fresh(10), 3, on_token=on_token)
    runner.start()
    assert inside.wait(30)
    with pytest.raises(RuntimeError, match="another thread steps this worker"):
        worker.step()
    go_on.set()
    assert len(request.result(30).tokens) == 3
    worker.stop()
    runner.join(30)
    assert not runner.is_alive()
    assert worker.submit(fresh(5), 2).ended is None
    worker.step()


def test_the_end_of_a_worker_is_told_to_who_waits(daemon: Daemon, tiny: Path) -> None:
    worker = open_worker(tiny, daemon.runtime_dir)
    worker.start()
    answered = worker.submit(fresh(3 * BLOCK + 3), 2)
    assert answered.result(30).ended == "length"
    request = worker.submit(fresh(10), 1000)
    next(iter(request))
    worker.close()
    with pytest.raises(RequestFailed, match="the worker was closed"):
        request.result()
    with pytest.raises(RuntimeError, match="the worker was closed"):
        worker.submit(fresh(5), 5)


def test_what_was_answered_is_stored_before_the_end(
    daemon: Daemon, tiny: Path, worker: BatchingWorker
) -> None:
    prompt = fresh(3 * BLOCK + 3)
    for matched in (0, len(prompt) - 1):
        with open_worker(tiny, daemon.runtime_dir) as other:
            other.start()
            assert other.submit(prompt, 1).result(30).matched_tokens == matched


# -- outages ------------------------------------------------------------------------------------


def test_the_daemon_dies_and_comes_back_in_the_middle(
    tiny: Path, tmp_path: Path, alone: LlamaEngine
) -> None:
    """Requests keep coming, each is answered, and in the end the cache is in use again."""
    runtime_dir = tmp_path / "run"
    document = fresh(100)
    asked: list[tuple[np.ndarray, Request, Recorder]] = []
    with (
        running_daemon(runtime_dir=runtime_dir) as daemon,
        open_worker(tiny, runtime_dir) as worker,
    ):
        worker.start()

        def ask(n: int) -> None:
            for _ in range(n):
                prompt, pick = np.append(document, fresh(20)), Recorder(len(asked))
                asked.append((prompt, worker.submit(prompt, 30, pick=pick), pick))

        def ask_until(condition: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 30
            while not condition():
                ask(1)
                asked[-1][1].result(30)
                assert time.monotonic() < deadline, "it did not come true in 30 s"

        ask(12)
        next(iter(asked[5][1]))
        daemon.kill()
        ask(12)
        asked[-1][1].result(30)
        session = worker.llama.client.session
        assert session is None or session.lost is not None
        with running_daemon(runtime_dir=runtime_dir, instance=daemon.instance):
            ask_until(lambda: asked[-1][1].matched_tokens >= 100)
            ask(12)
            for prompt, request, pick in asked:
                result = request.result(30)
                assert (result.ended, len(result.tokens)) == ("length", 30)
                assert difference(alone, prompt, result.tokens, pick.logits) < LAST_BITS
            worker.close()
            with LlamaWorker(tiny, runtime_dir=runtime_dir, n_ctx=256, timeout=10) as watcher:
                assert watcher.client.sequences() == []
                assert watcher.client.verify()["ok"]
