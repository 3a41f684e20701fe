"""An ordinary Llama that shares: what it finds, what it says, and what it never stores.

What a plain Llama says is compared where it computes the same batches: one that is asked the same
prompts in turn, and keeps their common prefixes in its context, as shared ones fetch them.
"""

import contextlib
import gc
import itertools
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from kvd_client import connect
from kvd_client.integrations.llama import share
from kvd_client.integrations.llama.attached.known import common_prefix
from kvd_client.integrations.llama.attached.sharing import MIN_TOKENS, LlamaShare
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.batch import Batch
from kvd_client.integrations.llama.runtime.params import LoraAdapter
from kvd_client.integrations.llama.worker import LlamaWorker
from tests.e2e.llamas import BLOCK, PATIENT, first_logits, logits, open_llama, run, settled, shared
from tests.e2e.test_worker import wait_until
from tests.e2e.workers import TINY_OPTIONS, worker_process
from tests.llama import tiny_models
from tests.support import Daemon, running_daemon

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]
_numbers = itertools.count()
Make = Callable[..., llama_cpp.Llama]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return settled(tiny_models.write_llama(tmp_path_factory.mktemp("tiny") / "llama.gguf"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return settled(tiny_models.write_lora(tmp_path_factory.mktemp("lora") / "lora.gguf"))


@pytest.fixture
def make(tiny: Path) -> Iterator[Make]:
    """Makes Llamas of the tiny model, or of another, and closes them."""
    made: list[llama_cpp.Llama] = []

    def one(path: Path = tiny, **options: Any) -> llama_cpp.Llama:
        made.append(open_llama(path, **options))
        return made[-1]

    yield one
    for llama in made:
        llama.close()


def fresh_prompt(n_tokens: int) -> list[int]:
    """A prompt that no other test has stored: none begins with the same token, or with the same
    two once they are used up."""
    number = next(_numbers)
    random = np.random.default_rng(500 + number)
    found: list[int] = random.integers(1, tiny_models.N_VOCAB, n_tokens).tolist()
    again, first = divmod(number, tiny_models.N_VOCAB - 1)
    return [first + 1, again + 1, *found[2:]]


def matched(daemon: Daemon, make: Make, prompt: list[int], **options: Any) -> int:
    """How many tokens of a prompt another Llama finds."""
    llama = make(**options)
    with shared(llama, daemon) as handle:
        run(llama, [*prompt, 1], 1)
        return handle.matched_tokens


# -- finding, and saying the same ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"type_k": 8, "type_v": 8}, {"n_batch": 64, "n_ubatch": 24}, {"n_ctx": 999}]
)
def test_what_one_has_computed_another_finds(
    daemon: Daemon, make: Make, options: dict[str, Any]
) -> None:
    prompt = fresh_prompt(5 * BLOCK + 7)
    plain, one, other = (make(**options) for _ in range(3))
    first, second = shared(one, daemon), shared(other, daemon)
    run(plain, prompt)
    run(one, prompt)
    assert first.matched_tokens == 0
    first.client.flush()
    text = [*prompt, *fresh_prompt(9)]
    assert np.array_equal(first_logits(other, text), first_logits(plain, text))
    assert second.matched_tokens == len(prompt)
    counters = second.counters
    assert (counters.prompts, counters.prompt_tokens) == (1, len(text))
    assert (counters.live_tokens, counters.imported_tokens) == (0, len(prompt))
    assert counters.decoded_tokens == 9
    assert run(other, text) == run(plain, text)
    assert second.client.verify()["ok"]


@pytest.mark.parametrize(
    "write",
    [tiny_models.write_sliding_window, tiny_models.write_m_rope, tiny_models.write_heads_by_layer],
)
def test_every_kind_of_model_that_shares(
    daemon: Daemon, make: Make, tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    model = settled(write(tmp_path / "model.gguf"))
    prompt = fresh_prompt(5 * BLOCK + 7)
    plain, one, other = (make(model) for _ in range(3))
    first, second = shared(one, daemon), shared(other, daemon)
    run(plain, prompt)
    run(one, prompt)
    first.client.flush()
    text = [*prompt, *fresh_prompt(9)]
    assert np.array_equal(first_logits(other, text), first_logits(plain, text))
    assert second.matched_tokens == second.counters.imported_tokens == len(prompt)
    assert run(other, text) == run(plain, text)
    assert second.client.verify()["ok"]


def test_a_growing_chat_goes_from_llama_to_llama(daemon: Daemon, make: Make) -> None:
    """Each turn decodes what follows the longest common prefix with the turns before, and no more;
    each Llama has old turns in its context, and some that went on otherwise."""
    plain = make()
    llamas = [make() for _ in range(3)]
    handles = [shared(llama, daemon) for llama in llamas]
    chat, before = fresh_prompt(45), np.empty(0, np.int32)
    for turn in range(9):
        llama, handle = llamas[turn % 3], handles[turn % 3]
        decoded = handle.counters.decoded_tokens
        if turn == 5:
            chat = chat[: len(chat) - 50] + fresh_prompt(3)
        expected = min(common_prefix(before, np.array(chat, np.int32)), len(chat) - 1)
        answer = run(llama, chat, 12)
        assert handle.matched_tokens == expected
        assert handle.counters.decoded_tokens - decoded == len(chat) - expected + 11
        assert answer == run(plain, chat, 12)
        before = np.array([*chat, *answer[:-1]], np.int32)
        chat = [*chat, *answer, *fresh_prompt(7)]
        handle.client.flush()


def test_a_chat_of_the_real_model_in_two_llamas(daemon: Daemon, make: Make, smollm2: Path) -> None:
    options: dict[str, Any] = {"n_ctx": 1024}
    plain = make(smollm2, **options)
    llamas = [make(smollm2, **options) for _ in range(2)]
    handles = [shared(llama, daemon) for llama in llamas]
    system = "You answer in a few words. The ship's cook is called Ben. The captain is Ann. " * 8
    chat: list[Any] = [{"role": "system", "content": system}]
    for turn, question in enumerate(("Who cooks?", "And who steers?", "What is a mast? ⛵")):
        chat.append({"role": "user", "content": question})
        named: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0}
        llama, handle = llamas[turn % 2], handles[turn % 2]
        if turn == 1:
            chunks = llama.create_chat_completion(chat, stream=True, **named)
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            answer = "".join(delta.get("content", "") for delta in deltas)
        else:
            answer = llama.create_chat_completion(chat, **named)["choices"][0]["message"]["content"]
        expected = plain.create_chat_completion(chat, **named)
        assert answer == expected["choices"][0]["message"]["content"]
        assert np.array_equal(llama._input_ids, plain._input_ids)
        assert np.array_equal(logits(llama), logits(plain))
        if turn:
            assert handle.matched_tokens > 150
            assert handle.counters.imported_tokens > 10
        handle.client.flush()
        chat.append({"role": "assistant", "content": answer})


def test_a_prompt_that_is_in_the_context_is_not_fetched(daemon: Daemon, make: Make) -> None:
    prompt = fresh_prompt(100)
    plain, llama = make(), make()
    handle = shared(llama, daemon)
    for _ in range(2):
        assert run(llama, prompt) == run(plain, prompt)
    assert handle.counters.imported_tokens == 0
    assert handle.counters.live_tokens == 100
    # After a reset it is not there any more, as far as a Llama tells, but it is cached.
    handle.client.flush()
    llama.reset()
    plain_again = make()
    run(plain_again, prompt)
    assert run(llama, prompt) == run(plain_again, prompt)
    assert handle.counters.imported_tokens == 99


def test_logprobs_and_echo_are_those_of_a_plain_llama(
    daemon: Daemon, make: Make, smollm2: Path
) -> None:
    options: dict[str, Any] = {"n_ctx": 256, "n_batch": 256, "logits_all": True}
    short: dict[str, Any] = {"min_tokens": 8}  # sorting the logprobs of a token takes long
    plain, one, other = (make(smollm2, **options) for _ in range(3))
    first, second = shared(one, daemon, **short), shared(other, daemon, **short)
    text = "The captain of the ship is called Ann, and its cook is called Ben. "

    def ask(llama: llama_cpp.Llama, **named: Any) -> Any:
        reply = llama.create_completion(text, max_tokens=4, temperature=0.0, logprobs=3, **named)
        return reply["choices"][0]["text"], reply["choices"][0]["logprobs"]

    expected = ask(plain, echo=True)
    assert len(expected[1]["token_logprobs"]) > 12
    assert ask(one, echo=True) == expected
    first.client.flush()
    # Logprobs of the answer alone need no more than the last token of the prompt.
    assert ask(other) == ask(plain)
    assert second.counters.imported_tokens > 12
    # What was imported has no scores, and says so.
    assert np.isnan(other.scores[0]).all()
    # With echo they are needed: the prompt is computed, though it is in the context.
    decoded = second.counters.decoded_tokens
    assert ask(other, echo=True) == expected
    assert second.counters.decoded_tokens - decoded > 12
    third = make(smollm2, **options)
    with shared(third, daemon, **short) as handle:
        assert ask(third, echo=True) == expected
        assert handle.counters.imported_tokens == 0 < handle.matched_tokens
        streamed = third.create_completion(
            text, max_tokens=4, temperature=0.0, logprobs=3, stream=True
        )
        assert sum(bool(chunk["choices"][0]["logprobs"]) for chunk in streamed) == 4
    fourth = make(smollm2, **options)
    with shared(fourth, daemon, **short) as handle:
        list(fourth.create_completion(text, max_tokens=4, temperature=0.0, stream=True))
        assert handle.counters.imported_tokens > 12
        # Who calls generate may look at all scores.
        fourth.reset()
        run(fourth, fourth.tokenize(text.encode()), 2)
        assert np.isfinite(fourth._scores).all()


def test_adapters_share_with_their_likes(
    daemon: Daemon, make: Make, tiny: Path, lora: Path
) -> None:
    prompt = fresh_prompt(3 * BLOCK + 5)
    adapted = {"lora_path": str(lora), "lora_scale": 0.5}
    plain, one, other = (make(**adapted) for _ in range(3))
    with shared(one, daemon) as handle:
        assert run(one, prompt) == run(plain, prompt)
        handle.client.flush()
    with shared(other, daemon) as handle:
        assert run(other, prompt) == run(plain, prompt)
        assert handle.matched_tokens == len(prompt) - 1
    assert matched(daemon, make, prompt) <= 1
    assert matched(daemon, make, prompt, **{**adapted, "lora_scale": 1.0}) <= 1


@pytest.mark.parametrize("adapted", [False, True])
def test_a_llama_and_a_worker_share_one_cache(
    daemon: Daemon, make: Make, tiny: Path, lora: Path, adapted: bool
) -> None:
    """Each finds what the other has stored, byte for byte what it would have computed."""
    loras = [LoraAdapter(str(lora), 0.5)] if adapted else []
    llama = make(**({"lora_path": str(lora), "lora_scale": 0.5} if adapted else {}))
    options = {**TINY_OPTIONS, "runtime_dir": daemon.runtime_dir, "timeout": PATIENT}
    with shared(llama, daemon) as handle, LlamaWorker(tiny, loras=loras, **options) as worker:
        assert handle.context.model.fingerprint == worker.context.model.fingerprint
        by_llama, by_worker = fresh_prompt(3 * BLOCK), fresh_prompt(3 * BLOCK)
        run(llama, by_llama, 1)
        handle.client.flush()
        with worker.open([*by_llama, 1]) as sequence:
            assert sequence.matched_tokens == 3 * BLOCK
            fetched = exported(worker.engine, sequence.seq_id)
            sequence.close(store=False)
        with worker.open(by_llama, use=False, store=False) as sequence:
            sequence.prefill()
            assert np.array_equal(exported(worker.engine, sequence.seq_id), fetched)
        with worker.open(by_worker) as sequence:
            sequence.prefill()
        worker.client.flush()
        run(llama, [*by_worker, 1], 1)
        assert handle.matched_tokens == 3 * BLOCK
        fetched = exported(handle._mover, 0)
        with worker.open(by_worker, use=False, store=False) as sequence:
            sequence.prefill()
            assert np.array_equal(exported(worker.engine, sequence.seq_id), fetched)


def exported(exporter: Any, seq: int) -> np.ndarray:
    size = exporter.layout.state_bytes(BLOCK)
    found = np.zeros((3, size), np.uint8)
    for index in range(3):
        exporter.export_block(seq, index * BLOCK, BLOCK, found[index].ctypes.data, size)
    return found


def test_llamas_in_threads(daemon: Daemon, make: Make) -> None:
    """Each belongs to one thread, which asks prompts that others ask too. Two share a client."""
    prompts = [fresh_prompt(n) for n in (70, 100, 33, 90)]
    prompts += [prompt[:60] + fresh_prompt(20) for prompt in prompts]
    plain = make()
    with connect(daemon.runtime_dir, timeout=PATIENT) as client:
        llamas = [make() for _ in range(4)]
        handles = [
            shared(llama, daemon, **({"client": client} if index < 2 else {}))
            for index, llama in enumerate(llamas)
        ]
        failures: list[BaseException] = []

        def work(llama: llama_cpp.Llama, seed: int) -> None:
            try:
                order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
                for index in order:
                    found.setdefault(index, set()).add(tuple(run(llama, prompts[index], 1)))
            except BaseException as error:
                failures.append(error)

        found: dict[int, set[tuple[int, ...]]] = {}
        threads = [
            threading.Thread(target=work, args=(llama, seed)) for seed, llama in enumerate(llamas)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert sum(handle.counters.imported_tokens for handle in handles) > 0
        for index, answers in found.items():
            assert answers == {tuple(run(plain, prompts[index], 1))}
            plain.reset()
        for handle in handles:
            handle.close()
        assert client.verify(checksums=True)["ok"]
        assert client.status()["sequences"]["in_use"] == 0


def test_a_draft_model_may_guess(daemon: Daemon, make: Make) -> None:
    """Guesses that were wrong are decoded and cut off again; they are nobody's prefix."""
    options: dict[str, Any] = {"n_batch": 512}
    pattern = fresh_prompt(6)
    prompt = fresh_prompt(40) + pattern * 6
    guessing = make(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=10), **options)
    handle = shared(guessing, daemon)
    text = run(guessing, prompt, 60)
    handle.client.flush()
    full = [*prompt, *text]
    plain, other = make(**options), make(**options)
    with shared(other, daemon) as finding:
        run(other, full, 1)
        assert finding.matched_tokens >= len(prompt) + 32
        # Only K/V of these tokens was brought in: a context of its own computes the same but for
        # the last bits, which the split into batches changes.
        assert np.allclose(logits(other), first_logits(plain, full), atol=0.05)
    assert handle.client.verify()["ok"]


# -- when it is stored ---------------------------------------------------------------------------


def test_nothing_is_stored_before_the_first_token(daemon: Daemon, make: Make) -> None:
    llama = make()
    handle = shared(llama, daemon)
    generator = llama.generate(fresh_prompt(3 * BLOCK + 30), temp=0.0)
    next(generator)
    assert handle._request is not None
    assert handle._request.storer is not None
    leased = handle._request.storer.leased
    assert leased.n_appends == 0
    next(generator)
    assert leased.n_appends == 1
    assert leased.full_tokens == 3 * BLOCK
    next(generator)
    assert leased.n_appends == 1
    next(generator)
    assert leased.n_appends == 2, "the fourth block has become full"
    generator.close()
    assert leased.released
    # Nor what is in the context already, and is stored nowhere yet.
    prompt = fresh_prompt(2 * BLOCK)
    llama.reset()
    llama.eval(prompt)
    generator = llama.generate([*prompt, 1], temp=0.0)
    next(generator)
    assert handle._request.storer is not None
    assert handle._request.storer.leased.n_appends == 0
    generator.close()
    handle.client.flush()
    assert matched(daemon, make, prompt) == 2 * BLOCK


def test_a_stream_that_is_left_is_stored_and_given_back(daemon: Daemon, make: Make) -> None:
    prompt = fresh_prompt(50)
    llama = make()
    handle = shared(llama, daemon)
    generator = llama.generate(prompt, temp=0.0)
    text = [next(generator) for _ in range(5)]
    del generator
    assert handle.client.sequences() == []
    handle.client.flush()
    assert matched(daemon, make, [*prompt, *text]) == 54
    # One that is left and goes on living is ended by the next; its own end changes nothing.
    left = llama.generate(fresh_prompt(60), temp=0.0)
    next(left)
    other = fresh_prompt(40)
    second = llama.generate(other, temp=0.0)
    text = [next(second) for _ in range(3)]
    left.close()
    assert handle._request is not None
    text.append(next(second))
    second.close()
    handle.client.flush()
    assert matched(daemon, make, [*other, *text]) == 43


def test_an_exception_on_the_way_ends_it_as_well(daemon: Daemon, make: Make) -> None:
    prompt = fresh_prompt(50)
    llama = make()
    handle = shared(llama, daemon)

    def fail(_ids: Any, _scores: Any) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(llama.generate(prompt, temp=0.0, stopping_criteria=fail))
    assert handle.client.sequences() == []
    handle.client.flush()
    assert matched(daemon, make, prompt) == 50


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_logits_processor_that_fails_changes_nothing(daemon: Daemon, make: Make) -> None:
    """llama.cpp calls it, and does not hear of its exception."""
    prompt = fresh_prompt(50)
    plain, llama = make(), make()
    handle = shared(llama, daemon)

    def fail(_ids: Any, _scores: Any) -> Any:
        raise ZeroDivisionError

    def answer(llama: llama_cpp.Llama) -> list[int]:
        processors = llama_cpp.LogitsProcessorList([fail])
        generator = llama.generate(prompt, temp=0.0, logits_processor=processors)
        return [next(generator) for _ in range(4)]

    assert answer(llama) == answer(plain)
    gc.collect()
    assert handle.client.sequences() == []


def test_short_prompts_are_left_alone_until_they_are_long(daemon: Daemon, make: Make) -> None:
    llama = make()
    handle = shared(llama, daemon, min_tokens=20)

    def asked() -> int:
        found: int = handle.client.status()["counters"]["queried_tokens"]
        return found

    before = asked()
    prompt = fresh_prompt(10)
    run(llama, prompt, 8)
    assert asked() == before
    text = run(llama, prompt, 30)
    assert asked() == before + 32, "when the first block was full"
    handle.client.flush()
    assert matched(daemon, make, [*prompt, *text]) == 39


def test_a_prompt_need_not_fill_a_block(daemon: Daemon, make: Make) -> None:
    llama, other = make(), make()
    handle, found = shared(llama, daemon), shared(other, daemon)
    for length, expected in [(MIN_TOKENS, MIN_TOKENS - 1), (MIN_TOKENS - 1, 0)]:
        prompt = fresh_prompt(length)
        run(llama, prompt, 1)
        handle.client.flush()
        run(other, prompt, 1)
        assert found.matched_tokens == expected


def test_generate_without_reset_goes_on(daemon: Daemon, make: Make) -> None:
    plain, llama = make(), make()
    handle = shared(llama, daemon)
    prompt, more = fresh_prompt(40), fresh_prompt(41)
    for each in (plain, llama):
        each.eval(prompt)
    generators = [each.generate(more, reset=False, temp=0.0) for each in (plain, llama)]
    texts = [[next(generator) for _ in range(3)] for generator in generators]
    assert texts[0] == texts[1]
    for generator in generators:
        generator.close()
    handle.client.flush()
    assert matched(daemon, make, [*prompt, *more, *texts[0]]) == 83


# -- what is never stored ------------------------------------------------------------------------


def decode_past_the_llama(llama: llama_cpp.Llama, tokens: list[int]) -> None:
    """As the handlers of images do: llama.cpp decodes, and n_tokens is set."""
    batch = Batch(len(tokens))
    batch.fill(tokens, np.arange(len(tokens)) + llama.n_tokens, 0, False)
    assert llama_cpp.llama_decode(llama.ctx, batch.native) == 0
    llama.n_tokens += len(tokens)


def test_embeddings_between_end_what_is_stored(daemon: Daemon, make: Make) -> None:
    before, after = fresh_prompt(2 * BLOCK), fresh_prompt(40)
    llama, plain = make(), make()
    handle = shared(llama, daemon)
    run(llama, fresh_prompt(150))
    embeddings = fresh_prompt(20)
    texts = []
    for each in (llama, plain):
        each.reset()
        each._ctx.kv_cache_clear()
        each.eval(before)
        each.input_ids[2 * BLOCK : 2 * BLOCK + 20] = 7
        decode_past_the_llama(each, embeddings)
        each.eval(after)
        prompt = each.input_ids[: each.n_tokens].tolist()
        texts.append(run(each, prompt, 30))
    assert texts[0] == texts[1]
    handle.close()
    # What comes before the embeddings would be the same with or without them.
    assert matched(daemon, make, [*prompt, *texts[0]]) <= 2 * BLOCK


def test_a_prompt_of_placeholders_is_not_looked_up(daemon: Daemon, make: Make) -> None:
    """Its tokens are cached, as text; what lies in the context is something else."""
    text = fresh_prompt(100)
    other = make()
    with shared(other, daemon) as handle:
        run(other, text, 1)
        handle.client.flush()
    llama = make()
    handle = shared(llama, daemon)
    llama.eval(text[:40])
    llama.input_ids[40:60] = text[40:60]
    decode_past_the_llama(llama, fresh_prompt(20))
    run(llama, text[:90], 1)
    assert handle.counters.imported_tokens == 0
    # When the context has been emptied they are text again.
    llama._ctx.kv_cache_clear()
    llama.reset()
    run(llama, text[:90], 1)
    assert handle.counters.imported_tokens == 89


def test_a_restored_state_is_not_stored(daemon: Daemon, make: Make) -> None:
    prompt = fresh_prompt(80)
    source = make()
    source.eval(prompt)
    state = source.save_state()
    llama = make()
    handle = shared(llama, daemon)
    # The same tokens are in the context when it is loaded: its K/V is another all the same.
    llama.eval(prompt[:60])
    llama.load_state(state)
    more = fresh_prompt(20)
    text = run(llama, [*prompt, *more], 20)
    assert handle.counters.live_tokens == 80
    run(llama, prompt[:50], 1)
    handle.client.flush()
    assert matched(daemon, make, [*prompt, *more, *text]) <= 1
    fresh = fresh_prompt(50)
    run(llama, fresh, 2)
    handle.client.flush()
    assert matched(daemon, make, fresh) == 50


def test_a_shifted_context_is_not_stored(daemon: Daemon, make: Make) -> None:
    prompt = fresh_prompt(80)
    llama = make()
    handle = shared(llama, daemon)
    run(llama, prompt, 1)
    llama._ctx.kv_cache_seq_rm(0, 10, 20)
    llama._ctx.kv_cache_seq_shift(0, 20, -1, -10)
    llama.n_tokens = 70
    llama.input_ids[10:70] = llama.input_ids[20:80]
    shifted = [*prompt[:10], *prompt[20:]]
    run(llama, [*shifted, *fresh_prompt(30)], 10)
    handle.close()
    assert matched(daemon, make, shifted) == 10


@pytest.mark.parametrize(
    "change",
    [
        lambda llama: llama._ctx.kv_cache_clear(),
        lambda llama: llama._ctx.kv_cache_seq_rm(-1, 0, -1),
        lambda llama: llama._ctx.kv_cache_seq_shift(0, 0, -1, 1),
        lambda llama: llama._ctx.kv_cache_seq_keep(1),
        lambda llama: llama._ctx.kv_cache_seq_cp(1, 0, 0, -1),
        lambda llama: llama._ctx.decode(llama._batch),
    ],
)
def test_whoever_changes_the_context_is_noticed(
    daemon: Daemon, make: Make, change: Callable[[Any], None]
) -> None:
    llama = make()
    handle = shared(llama, daemon)
    llama.eval(fresh_prompt(10))
    assert handle._known.length == 10
    llama._batch.set_batch(batch=[1], n_past=10, logits_all=False)
    change(llama)
    assert handle._known.length == 0


def test_what_was_there_before_is_computed_again(daemon: Daemon, make: Make) -> None:
    prompt = fresh_prompt(70)
    llama, plain = make(), make()
    run(llama, prompt)
    handle = shared(llama, daemon)
    assert handle._mover.scratch.seq == 255
    assert run(llama, prompt) == run(plain, prompt)
    assert handle.counters.decoded_tokens == 70 + 7
    handle.client.flush()
    assert matched(daemon, make, prompt) == 70


# -- outages, and the end ------------------------------------------------------------------------


def test_without_a_daemon_a_llama_goes_on_as_ever(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime_dir = tmp_path / "run"
    prompt = fresh_prompt(80)
    plain, llama = make(), make()
    handle = share(llama, runtime_dir=runtime_dir, timeout=PATIENT)
    for _ in range(2):
        assert run(llama, prompt) == run(plain, prompt)
    with running_daemon(runtime_dir=runtime_dir) as daemon:

        def is_back() -> bool:
            llama.reset()
            run(llama, prompt)
            return handle.matched_tokens == 79

        wait_until(is_back)
        assert daemon.process.poll() is None


def test_a_daemon_that_dies_takes_no_text_along(make: Make, tmp_path: Path) -> None:
    runtime_dir = tmp_path / "run"
    prompt = fresh_prompt(80)
    plain, llama = make(), make()
    with running_daemon(runtime_dir=runtime_dir) as daemon:
        handle = shared(llama, daemon)
        run(llama, prompt)
        run(plain, prompt)
        handle.client.flush()
        llama.reset()
        generator = llama.generate(prompt, temp=0.0)
        text = []
        for token in generator:
            text.append(token)
            if len(text) == 20:
                daemon.kill()
            if len(text) == 60:
                break
        generator.close()
        assert handle.matched_tokens == 79
        assert text == run(plain, prompt, 60)
        assert run(llama, [*prompt, *text], 5) == run(plain, [*prompt, *text], 5)
        with running_daemon(runtime_dir=runtime_dir, instance=daemon.instance) as again:

            def is_back() -> bool:
                llama.reset()
                run(llama, prompt)
                return handle.matched_tokens == 79

            wait_until(is_back)
            handle.close()
            with connect(again.runtime_dir) as client:
                assert client.verify(checksums=True)["ok"]
                assert client.sequences() == []


def test_its_end_leaves_a_plain_llama(daemon: Daemon, make: Make) -> None:
    llama = make()
    before, context_before = set(llama.__dict__), set(llama._ctx.__dict__)
    with shared(llama, daemon):
        with pytest.raises(ValueError, match="shared already"):
            shared(llama, daemon)
        run(llama, fresh_prompt(40))
    assert set(llama.__dict__) - before <= {"_sampler"}
    assert set(llama._ctx.__dict__) == context_before
    prompt = fresh_prompt(40)
    assert run(llama, prompt) == run(make(), prompt)
    with shared(llama, daemon) as handle:
        run(llama, prompt)
        assert handle.counters.prompts == 1


def test_a_llama_that_is_dropped_goes_at_once(daemon: Daemon, tiny: Path) -> None:
    """It has gigabytes: they do not wait for the garbage collector."""
    gc.disable()
    try:
        llama = open_llama(tiny)
        handle: LlamaShare = shared(llama, daemon)
        prompt = fresh_prompt(40)
        run(llama, prompt)
        gone = weakref.ref(llama)
        del llama
        assert gone() is None
        assert handle.closed
        assert handle.client.closed
    finally:
        gc.enable()


def test_closing_the_llama_stores_what_was_left(daemon: Daemon, make: Make, tiny: Path) -> None:
    prompt = fresh_prompt(60)
    llama = open_llama(tiny)
    shared(llama, daemon)
    generator = llama.generate(prompt, temp=0.0)
    next(generator)
    llama.close()
    assert matched(daemon, make, prompt) == 60
    generator.close()


def test_a_block_that_is_not_taken_is_computed(
    daemon: Daemon, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = fresh_prompt(4 * BLOCK)
    plain, one, other = make(), make(), make()
    with shared(one, daemon) as handle:
        run(one, prompt)
        handle.client.flush()
    handle = shared(other, daemon)
    taken = native.state_seq_set_data
    calls = itertools.count()

    def refuse_the_third(*arguments: Any) -> Any:
        return 0 if next(calls) == 2 else taken(*arguments)

    monkeypatch.setattr(native, "state_seq_set_data", refuse_the_third)
    assert run(other, prompt) == run(plain, prompt)
    assert handle.counters.imported_tokens == 0
    assert handle.counters.decoded_tokens == 4 * BLOCK + 7


# -- two processes ---------------------------------------------------------------------------------


def test_the_example_runs_as_its_docstring_says(daemon: Daemon, smollm2: Path) -> None:
    command = [sys.executable, "examples/llama_share.py", str(smollm2)]
    command += ["--runtime-dir", str(daemon.runtime_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said = [
        re.match(r"worker (\d) found (\d+) of (\d+)", line) for line in done.stdout.splitlines()
    ]
    found = [tuple(map(int, match.groups())) for match in said if match is not None]
    assert [worker for worker, _, _ in found] == [1, 2, 1]
    assert found[0][1] < 10, "how every chat begins"
    for _, matched_tokens, prompt_tokens in found[1:]:
        # All but the question, and at the most an answer that was tokenised otherwise.
        assert prompt_tokens - 60 < matched_tokens < prompt_tokens


def chat_in_turns(pipe: Connection, model: Path, runtime_dir: Path) -> None:
    """For each prompt that comes: its greedy text, and what was found and decoded of it."""
    llama = open_llama(model)
    handle = share(llama, runtime_dir=runtime_dir, timeout=PATIENT)
    with contextlib.suppress(EOFError):
        while True:
            prompt: list[int] = pipe.recv()
            decoded = handle.counters.decoded_tokens
            text = run(llama, prompt, 12)
            handle.client.flush()
            pipe.send((text, handle.matched_tokens, handle.counters.decoded_tokens - decoded))
    llama.close()


def test_a_chat_of_ten_turns_goes_from_process_to_process(
    daemon: Daemon, make: Make, tiny: Path
) -> None:
    plain = make()
    chat, before = fresh_prompt(100), np.empty(0, np.int32)
    with (
        worker_process(chat_in_turns, tiny, daemon.runtime_dir) as one,
        worker_process(chat_in_turns, tiny, daemon.runtime_dir) as other,
    ):
        for turn in range(10):
            pipe = (one, other)[turn % 2]
            pipe.send(chat)
            text, found, decoded = pipe.recv()
            common = common_prefix(before, np.array(chat, np.int32))
            assert (found, decoded) == (common, len(chat) - common + 11)
            assert text == run(plain, chat, 12)
            before = np.array([*chat, *text[:-1]], np.int32)
            chat = [*chat, *text, *fresh_prompt(9)]


def test_an_interrupt_in_an_import_leaves_nothing_wrong(
    daemon: Daemon, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = fresh_prompt(100)
    plain, one, other = make(), make(), make()
    with shared(one, daemon) as handle:
        run(one, prompt, 1)
        handle.client.flush()
    handle = shared(other, daemon, min_tokens=35)
    for each in (plain, other):
        run(each, prompt[:34], 1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(native, "state_seq_set_data", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(other, prompt, 1)
    # Its context ends where the import began: those are the tokens, and not the logits.
    assert other.n_tokens == BLOCK
    assert run(other, prompt[:BLOCK]) == run(plain, prompt[:BLOCK])
    assert run(other, prompt) == run(plain, prompt)
    assert handle.counters.imported_tokens > 0
    assert handle.client.verify()["ok"]


# -- beside it -------------------------------------------------------------------------------------


def test_a_client_that_was_closed_leaves_a_llama_that_computes(
    daemon: Daemon, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = fresh_prompt(60)
    plain, llama = make(), make()
    with connect(daemon.runtime_dir, timeout=PATIENT) as client:
        handle = shared(llama, daemon, client=client)
        assert run(llama, prompt) == run(plain, prompt)
    assert run(llama, prompt) == run(plain, prompt)
    assert "without the cache" in caplog.text
    handle.close()


def test_an_end_in_the_middle_of_a_hook_waits(daemon: Daemon, make: Make) -> None:
    """The garbage collector ends a generator whenever it likes: not while a hook is at work."""
    prompt = fresh_prompt(60)
    llama = make()
    handle = shared(llama, daemon)
    generator = llama.generate(prompt, temp=0.0)
    next(generator)
    with handle._lock:
        generator.close()
    assert len(handle.client.sequences()) == 1
    run(llama, fresh_prompt(40), 1)
    assert handle.client.sequences() == []
    handle.client.flush()
    assert matched(daemon, make, prompt) == 60


def test_a_context_that_is_to_be_turned_takes_nothing_in(daemon: Daemon, make: Make) -> None:
    """A shift turns the keys of all cells at the next decode: also of those that came meanwhile."""
    prompt = fresh_prompt(100)
    other, llama = make(), make()
    with shared(other, daemon) as handle:
        run(other, prompt, 1)
        handle.client.flush()
    handle = shared(llama, daemon)
    llama.eval(fresh_prompt(30))
    llama._ctx.kv_cache_seq_shift(0, 0, -1, 5)
    llama.reset()
    run(llama, prompt, 1)
    assert (handle.matched_tokens, handle.counters.imported_tokens) == (99, 0)
    llama.reset()
    run(llama, prompt, 1)
    assert handle.counters.imported_tokens == 99


def test_a_chain_that_was_left_is_not_gone_on_with(daemon: Daemon, make: Make) -> None:
    """In the middle of a run its user cuts the context, and goes on otherwise."""
    prompt, otherwise = fresh_prompt(2 * BLOCK + 5), fresh_prompt(3 * BLOCK)
    llama = make()
    handle = shared(llama, daemon)
    generator = llama.generate(prompt, temp=0.0)
    for _ in range(3):
        next(generator)
    llama.n_tokens = 20
    llama.eval(otherwise)
    for _ in range(3):
        next(generator)
    generator.close()
    handle.client.flush()
    # `generate` cuts what it did not choose itself, but for what it has counted already.
    assert matched(daemon, make, [*prompt[:20], *otherwise]) > 64
    assert matched(daemon, make, [*prompt[:64], *otherwise[44:]]) == 64


def test_a_verbose_llama_goes_on_saying_what_it_does(
    daemon: Daemon,
    make: Make,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native._log, "shown_by", None)
    llama = make()
    llama.verbose = True
    with shared(llama, daemon):
        llama_cpp._logger.set_verbose(True)
        native._log(2, b"said by llama.cpp\n", None)
        llama_cpp._logger.set_verbose(False)
        native._log(2, b"not said\n", None)
    llama.verbose = False
    assert capsys.readouterr().err == "said by llama.cpp\n"


def test_a_script_may_end_in_the_middle(daemon: Daemon, tiny: Path) -> None:
    """Without closing anything. What it has stored stays, and nothing is complained of."""
    code = """
import sys
from tests.e2e.llamas import open_llama
from kvd_client.integrations.llama import share

llama = open_llama(sys.argv[1])
share(llama, runtime_dir=sys.argv[2])
generator = llama.generate(list(range(1, 60)), temp=0.0)
print(next(generator))
"""
    command = [sys.executable, "-c", code, str(tiny), str(daemon.runtime_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().isdigit()
    assert done.stderr == ""
    with connect(daemon.runtime_dir) as client:
        assert client.sequences() == []


def test_importing_share_loads_nothing() -> None:
    code = "import sys; from kvd_client.integrations.llama import share; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "kvd_client.integrations.llama" in done.stdout.split()
    assert "llama_cpp" not in done.stdout.split()
