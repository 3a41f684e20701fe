"""The SequenceCache protocol on a daemon, used as the example server's scheduler uses it: with
states of real contexts, by two caches that stand for two processes."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any, NamedTuple

import llama_cpp.llama_cpp as bindings
import numpy as np
import pytest

from kvd_client.client import Client, Context
from kvd_client.errors import KvdError
from kvd_client.integrations.llama.foreign import Before, ForeignContext
from kvd_client.integrations.llama.kv.blobs import BadState, StateForm
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.sequence_cache import STAGING_WAIT, Match, SequenceCache
from kvd_client.integrations.llama.worker import LlamaWorker, model_of
from tests.e2e.workers import TINY_OPTIONS
from tests.llama import tiny_models
from tests.support import Daemon, running_daemon

pytestmark = pytest.mark.model

BLOCK = 32
PATIENT = 10.0
_seeds = itertools.count(7000)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_llama(tmp_path_factory.mktemp("tiny") / "llama.gguf")


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(model_path=tiny, **TINY_OPTIONS) as made:
        yield made


@pytest.fixture
def one(daemon: Daemon, engine: LlamaEngine) -> Iterator[SequenceCache]:
    with open_cache(daemon.runtime_dir, engine) as cache:
        yield cache


@pytest.fixture
def other(daemon: Daemon, engine: LlamaEngine) -> Iterator[SequenceCache]:
    with open_cache(daemon.runtime_dir, engine) as cache:
        yield cache


def open_cache(
    runtime_dir: Path, engine: LlamaEngine, timeout: float = PATIENT, staging: int = 1 << 20
) -> SequenceCache:
    client = Client(runtime_dir, fail_open=True, timeout=timeout, staging_bytes=staging)
    return SequenceCache(model_of(engine, BLOCK), StateForm(engine.layout), engine.n_vocab, client)


def fresh_prompt(n_tokens: int) -> list[int]:
    random = np.random.default_rng(next(_seeds))
    return random.integers(1, tiny_models.N_VOCAB, n_tokens).tolist()


class Computed(NamedTuple):
    state: np.ndarray
    logits: np.ndarray


def compute(engine: LlamaEngine, tokens: list[int]) -> Computed:
    """The state of all tokens, decoded in an empty sequence."""
    engine.prefill(0, np.array(tokens, np.int32), 0)
    found = Computed(state_of(engine), engine.logits())
    engine.clear(0)
    return found


def state_of(engine: LlamaEngine) -> np.ndarray:
    size = native.state_seq_get_size(engine._context, 0)
    state = np.empty(size, np.uint8)
    assert native.state_seq_get_data(engine._context, state.ctypes.data, size, 0) == size
    return state


def continued(engine: LlamaEngine, state: np.ndarray, suffix: list[int]) -> np.ndarray:
    """Logits after a restored state and a suffix."""
    taken = native.state_seq_set_data(engine._context, state.ctypes.data, state.size, 0)
    assert taken == state.size
    engine.prefill(0, np.array(suffix, np.int32), engine.length(0))
    logits = engine.logits()
    engine.clear(0)
    return logits


def save(cache: SequenceCache, engine: LlamaEngine, tokens: list[int]) -> Computed:
    computed = compute(engine, tokens)
    cache.save(tokens, computed.state, None)
    cache.settle()
    return computed


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in 30 s"
        time.sleep(0.01)


def in_use(cache: SequenceCache) -> int:
    return int(cache.client.status()["sequences"]["in_use"])


# --------------------------------------------------------------------------------------- matches


@pytest.mark.parametrize("shared", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 4 * BLOCK])
def test_a_prefix_is_found_by_another_process_at_once_and_to_the_token(
    one: SequenceCache, other: SequenceCache, engine: LlamaEngine, shared: int
) -> None:
    stored = fresh_prompt(4 * BLOCK + 9)
    save(one, engine, stored)
    suffix = fresh_prompt(16)
    suffix[0] = (stored[shared] + 1) % tiny_models.N_VOCAB
    asked = stored[:shared] + suffix
    match = other.lookup(asked)
    assert match is not None
    assert match.tokens == tuple(asked[:shared])
    assert match.length == shared
    assert not match.has_prompt_logits
    loaded = other.load(match)
    assert loaded is not None
    assert loaded.tokens == asked[:shared]
    assert loaded.prompt_logits is None
    # Bit for bit what the saver's own state, cut at the same place, goes on with.
    alone = compute(engine, stored).state
    taken = native.state_seq_set_data(engine._context, alone.ctypes.data, alone.size, 0)
    assert taken == alone.size
    engine.truncate(0, shared)
    engine.prefill(0, np.array(suffix, np.int32), shared)
    expected = engine.logits()
    engine.clear(0)
    assert np.array_equal(continued(engine, loaded.state_bytes, suffix), expected)


def test_the_last_token_is_left_to_decode(
    one: SequenceCache, other: SequenceCache, engine: LlamaEngine
) -> None:
    tokens = fresh_prompt(2 * BLOCK)
    save(one, engine, tokens)
    match = other.lookup(tokens)
    assert match is not None
    assert match.length == len(tokens) - 1
    assert other.lookup(tokens[:1]) is None
    assert other.lookup([]) is None


def test_only_what_is_new_is_stored(one: SequenceCache, engine: LlamaEngine) -> None:
    def stored_blocks() -> int:
        return int(one.client.status()["counters"]["stored_blocks"])

    tokens = fresh_prompt(9 * BLOCK + 3)
    before = stored_blocks()
    save(one, engine, tokens[: 4 * BLOCK])
    assert stored_blocks() - before == 4
    save(one, engine, tokens[: 4 * BLOCK])
    assert stored_blocks() - before == 4
    save(one, engine, tokens)  # in several appends: the staging holds no more than a few blocks
    assert stored_blocks() - before == 10
    match = one.lookup([*tokens, 1])
    assert match is not None
    assert match.length == len(tokens)


def test_a_worker_finds_what_the_cache_has_saved_and_the_other_way_round(
    daemon: Daemon, one: SequenceCache, engine: LlamaEngine, tiny: Path
) -> None:
    tokens, others = fresh_prompt(3 * BLOCK + 7), fresh_prompt(2 * BLOCK + 7)
    save(one, engine, tokens)
    with LlamaWorker(
        tiny, runtime_dir=daemon.runtime_dir, timeout=PATIENT, **TINY_OPTIONS
    ) as worker:
        with worker.open(np.array(tokens)) as sequence:
            assert sequence.matched_tokens == len(tokens) - 1
        with worker.open(np.array(others)) as sequence:
            sequence.prefill()
        worker.client.flush()
    match = one.lookup([*others, 1])
    assert match is not None
    assert match.length == len(others)
    loaded = one.load(match)
    assert loaded is not None
    # In an empty context cells are in order, and the ids that llama.cpp ignores are 0.
    assert np.array_equal(loaded.state_bytes, compute(engine, others).state)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"flash_attn": False}),
        ("heads-by-layer", {"type_k": "q8_0", "type_v": "q4_0"}),
        ("m-rope", {}),
        ("m-rope", {"flash_attn": False, "type_k": "q8_0"}),
    ],
)
def test_contexts_of_every_form_share_among_themselves(
    daemon: Daemon, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """Two contexts that somebody else has made, each with a cache of its own."""
    path = tmp_path / f"{name}.gguf"
    write = {
        "llama": tiny_models.write_llama,
        "heads-by-layer": tiny_models.write_heads_by_layer,
        "m-rope": tiny_models.write_m_rope,
    }
    write[name](path)
    tokens, suffix = fresh_prompt(3 * BLOCK + 9), fresh_prompt(5)
    with contextlib.ExitStack() as resources:
        engines, caches = [], []
        for _ in range(2):
            made = LlamaEngine(model_path=path, require_shareable=False, **TINY_OPTIONS, **options)
            engines.append(resources.enter_context(made))
            client = Client(daemon.runtime_dir, fail_open=True, timeout=PATIENT)
            context = foreign_of(made)
            cache = SequenceCache(model_of(context, BLOCK), context.form, made.n_vocab, client)
            caches.append(resources.enter_context(cache))
        computed = save(caches[0], engines[0], tokens)
        match = found(caches[1], [*tokens, 1])
        assert match.length == len(tokens)
        loaded = caches[1].load(match)
        assert loaded is not None
        # Bit for bit what the context itself goes on with, and what it would store again.
        expected = continued(engines[0], computed.state, suffix)
        assert np.array_equal(continued(engines[1], loaded.state_bytes, suffix), expected)
        assert np.array_equal(loaded.state_bytes, computed.state)


def foreign_of(engine: LlamaEngine) -> ForeignContext:
    return ForeignContext(
        engine.model.path,
        engine.model.pointer,
        bindings.llama_model_default_params(),
        engine._context,
        engine.params.to_native(),
        Before.now(engine.model.path, ()),
    )


# ---------------------------------------------------------------------------------------- leases


def test_a_match_is_leased_until_it_is_loaded(one: SequenceCache, engine: LlamaEngine) -> None:
    tokens = fresh_prompt(2 * BLOCK + 1)
    save(one, engine, tokens)
    match = one.lookup(tokens)
    assert match is not None
    assert in_use(one) == 1
    assert one.lookup(tokens) is match, "asked again in the meantime: the same, and no other lease"
    assert in_use(one) == 1
    assert one.load(match) is not None
    assert in_use(one) == 0


def test_a_match_that_is_not_loaded_is_given_back_by_itself(
    one: SequenceCache, engine: LlamaEngine
) -> None:
    tokens = fresh_prompt(2 * BLOCK + 1)
    save(one, engine, tokens)
    match = one.lookup(tokens)
    assert match is not None
    wait_until(lambda: in_use(one) == 0)
    # Whoever comes later all the same gets it, unless it was evicted.
    assert one.load(match) is not None
    one.lookup(tokens)
    one.client.evict()  # leased, so it stays
    assert one.lookup(tokens) is not None
    wait_until(lambda: in_use(one) == 0)
    one.client.evict()
    assert one.load(match) is None
    assert in_use(one) == 0


def test_another_lookup_and_a_save_give_a_match_back(
    one: SequenceCache, engine: LlamaEngine
) -> None:
    tokens, others = fresh_prompt(2 * BLOCK + 1), fresh_prompt(BLOCK + 1)
    save(one, engine, tokens)
    save(one, engine, others)
    assert one.lookup(tokens) is not None
    second = one.lookup(others)
    assert second is not None
    assert in_use(one) == 1
    save(one, engine, [*others, 5])
    assert in_use(one) == 0
    assert one.lookup(fresh_prompt(5)) is None
    assert in_use(one) == 0


# ------------------------------------------------------------------------- what is not of the text


def test_prompts_with_images_are_matched_up_to_them_and_not_stored(
    one: SequenceCache, engine: LlamaEngine
) -> None:
    """The script gives an image ids below 0."""
    tokens = fresh_prompt(2 * BLOCK)
    save(one, engine, tokens)
    match = one.lookup([*tokens, -5, -6, 3, 4])
    assert match is not None
    assert match.length == len(tokens)
    stored = one.client.status()["counters"]["stored_blocks"]
    for strange in (-5, tiny_models.N_VOCAB, 1 << 40):
        other = fresh_prompt(BLOCK)
        one.save([*other, strange], compute(engine, [*other, 1]).state, None)
    assert one.client.status()["counters"]["stored_blocks"] == stored


def test_a_state_of_something_else_is_refused(one: SequenceCache, engine: LlamaEngine) -> None:
    tokens = fresh_prompt(BLOCK)
    state = compute(engine, tokens).state
    with pytest.raises(BadState, match="33 tokens has"):
        one.save([*tokens, 1], state, None)
    state[0] ^= 1
    with pytest.raises(BadState, match="begins with"):
        one.save(tokens, state, None)
    assert one.lookup([*tokens, 1]) is None


# --------------------------------------------------------------------------------------- outages


def test_without_a_daemon_nothing_is_found_and_nothing_fails(
    engine: LlamaEngine, tmp_path: Path
) -> None:
    runtime_dir = tmp_path / "kvd"
    tokens = fresh_prompt(2 * BLOCK)
    computed = compute(engine, tokens)
    with open_cache(runtime_dir, engine) as cache:
        assert cache.lookup(tokens) is None
        cache.save(tokens, computed.state, None)
        with running_daemon(runtime_dir=runtime_dir) as daemon:

            def is_back() -> bool:
                cache.save(tokens, computed.state, None)
                return cache.lookup(tokens) is not None

            wait_until(is_back)
            good = cache.load(found(cache, tokens))
            assert good is not None
            match = found(cache, tokens)
            daemon.kill()
            try:
                loaded = cache.load(match)
            except KvdError:
                loaded = None  # the script counts it, and computes
            # What it has leased it may still read, and then it is right.
            assert loaded is None or np.array_equal(loaded.state_bytes, good.state_bytes)
            assert cache.lookup(tokens) is None
            cache.save(tokens, computed.state, None)
            with running_daemon(runtime_dir=runtime_dir, instance=daemon.instance):
                wait_until(is_back)
                assert cache.load(found(cache, tokens)) is not None
                assert in_use(cache) == 0
                assert cache.client.verify()["ok"]


def test_a_daemon_that_hangs_in_a_save_costs_one_timeout(
    engine: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a state that is larger than the staging, which a daemon that works is waited for."""
    tokens = fresh_prompt(400)
    state = compute(engine, tokens).state
    timeout = 0.2
    assert timeout < STAGING_WAIT / 2
    with (
        running_daemon(runtime_dir=tmp_path / "kvd") as daemon,
        open_cache(daemon.runtime_dir, engine, timeout, staging=64 << 10) as cache,
    ):
        plain = Context.alloc

        def alloc(self: Context, *arguments: Any, **named: Any) -> Any:
            leased = plain(self, *arguments, **named)
            daemon.process.send_signal(SIGSTOP)
            return leased

        try:
            with monkeypatch.context() as patch:
                patch.setattr(Context, "alloc", alloc)
                begun = time.monotonic()
                cache.save(tokens, state)
                assert time.monotonic() - begun < STAGING_WAIT
        finally:
            daemon.process.send_signal(SIGCONT)

        def is_stored() -> bool:
            cache.save(tokens, state)
            match = cache.lookup(tokens)
            return match is not None and match.length == len(tokens) - 1

        wait_until(is_stored)
        assert cache.client.verify()["ok"]


def test_what_the_daemon_refuses_is_logged(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt that is larger than the budget."""
    runtime_dir = tmp_path / "kvd"
    tokens = fresh_prompt(500)
    with (
        LlamaEngine(model_path=tiny, type_k="f32", type_v="f32", **TINY_OPTIONS) as engine,
        running_daemon("--max-memory", "1MiB", runtime_dir=runtime_dir),
        open_cache(runtime_dir, engine, staging=256 << 10) as cache,
        Client(runtime_dir, staging_bytes=256 << 10),  # half of it is staging then
    ):
        save(cache, engine, tokens)
        assert any("a prompt was not stored" in line for line in caplog.messages)
        caplog.clear()
        save(cache, engine, fresh_prompt(BLOCK))
        assert not caplog.messages
        match = cache.lookup(tokens)
        assert match is None or match.length < len(tokens) - 1
        assert cache.client.verify()["ok"]


def found(cache: SequenceCache, tokens: list[int]) -> Match:
    match = cache.lookup(tokens)
    assert match is not None
    return match
