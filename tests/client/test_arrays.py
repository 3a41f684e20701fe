"""The array API, with a small NumPy transformer (examples/array_engine.py) and real daemons.

Exact means exact here: all logits, compared with np.array_equal. The transformer's sums do not
depend on how tokens are split into chunks, so the reference is always one run with a private cache.
"""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvd_client
from examples.array_engine import PrivateCache, Transformer
from kvd_client import errors
from kvd_client.arrays import KV, ArrayContext, ArrayLayer, ArrayModel, ArraySequence
from kvd_proto.messages import MAX_APPEND_BLOCKS
from tests.support import Daemon, running_daemon, start_daemon

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 8
SMALL = [ArrayLayer(2, 16, 16), ArrayLayer(1, 16, 8)]
_seeds = count(100)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    run = tmp_path_factory.mktemp("kvd") / "run"
    with running_daemon("--max-memory", "256MiB", runtime_dir=run) as started:
        yield started


@pytest.fixture
def client(daemon: Daemon) -> Iterator[kvd_client.Client]:
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=1 << 20) as connected:
        yield connected
        assert connected.verify()["ok"]


@pytest.fixture
def other(daemon: Daemon) -> Iterator[kvd_client.Client]:
    """Another client of the same daemon."""
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=1 << 20) as connected:
        yield connected


@pytest.fixture
def engine() -> Transformer:
    """A model that no other test has seen, so that its cache is empty."""
    return Transformer(next(_seeds), BLOCK)


@pytest.fixture
def context(client: kvd_client.Client, engine: Transformer) -> Iterator[ArrayContext]:
    with ArrayContext(client, engine.model) as opened:
        yield opened


def small_model(block_tokens: int = BLOCK, dtype: str = "float32") -> ArrayModel:
    """A model without an engine, for random rows; a new identity each time."""
    return ArrayModel("small", f"test {next(_seeds)}", SMALL, dtype, block_tokens)


def prompt_of(n_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n_tokens).tolist()


def rows_of(model: ArrayModel, n_tokens: int, seed: int = 0) -> list[KV]:
    """Random K and V of every layer, any bit pattern of integers, finite floats."""
    draw = np.random.default_rng(seed)

    def rows(heads: int, dim: int) -> np.ndarray:
        shape = (n_tokens, heads, dim)
        if model.dtype.kind == "f":
            return draw.standard_normal(shape).astype(model.dtype)
        limits = np.iinfo(model.dtype)
        return draw.integers(limits.min, limits.max, shape, model.dtype, endpoint=True)

    return [
        KV(rows(layer.kv_heads, layer.k_dim), rows(layer.kv_heads, layer.v_dim))
        for layer in model.layers
    ]


def append(sequence: ArraySequence, tokens: list[int], rows: list[KV]) -> None:
    sequence.append(tokens, [each.k for each in rows], [each.v for each in rows])


def holds(sequence: ArraySequence, rows: list[KV], n_tokens: int) -> bool:
    """Whether the sequence has exactly the first `n_tokens` of these rows, gathered and viewed."""
    for layer, (k, v) in enumerate(rows):
        gathered = sequence.gather(layer)
        if not (
            np.array_equal(gathered.k, k[:n_tokens]) and np.array_equal(gathered.v, v[:n_tokens])
        ):
            return False
        at = 0
        for block in sequence.views(layer):
            n = len(block.k)
            if not np.array_equal(block.k, k[at : at + n]) or not np.array_equal(
                block.v, v[at : at + n]
            ):
                return False
            at += n
        if at != n_tokens:
            return False
    return True


def alone(engine: Transformer, prompt: list[int], n_tokens: int) -> np.ndarray:
    return engine.generate(prompt, PrivateCache(BLOCK), n_tokens)


def store(
    context: ArrayContext, engine: Transformer, prompt: list[int], n_tokens: int
) -> np.ndarray:
    """Generate with a sequence of the context, and wait until its K/V is visible to others."""
    with context.alloc(prompt[:-1]) as sequence:
        logits = engine.generate(prompt[sequence.matched_tokens :], sequence, n_tokens)
        sequence.flush()
        commit = sequence.release()
    if commit is not None:
        context.client.flush(commit)
    return logits


def status_of(client: kvd_client.Client, name: str = "") -> dict[str, Any]:
    """Counters, or the blocks of the youngest model called `name`."""
    report = client.status()
    if not name:
        return report["counters"]
    return [model for model in report["models"] if model["name"] == name][-1]["blocks"]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def is_inside(array: np.ndarray, buffer: Any) -> bool:
    whole = np.frombuffer(buffer, np.uint8)
    start = address(whole)
    return start <= address(array) and address(array) + array.nbytes <= start + whole.nbytes


# --- a worker process: the engine in a process of its own

WORKER = """
import sys
import numpy as np
import kvd_client
from examples.array_engine import Transformer
from kvd_client.arrays import ArrayContext

runtime_dir, seed, block, prompt, n_tokens, out = sys.argv[1:]
prompt = [int(token) for token in prompt.split(",")]
engine = Transformer(int(seed), int(block))
with kvd_client.connect(runtime_dir) as client, ArrayContext(client, engine.model) as context:
    with context.alloc(prompt[:-1]) as sequence:
        print(sequence.matched_tokens, flush=True)
        sys.stdin.readline()
        logits = engine.generate(prompt[sequence.matched_tokens :], sequence, int(n_tokens))
        commit = sequence.release()
    if commit is not None:
        client.flush(commit)
np.save(out, logits)
"""


class Worker:
    """A process that allocs, says what it matched, waits for `go`, and generates."""

    def __init__(self, daemon: Daemon, seed: int, prompt: list[int], n_tokens: int, out: Path):
        self.out = out
        arguments = [daemon.runtime_dir, seed, BLOCK, ",".join(map(str, prompt)), n_tokens, out]
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, arguments)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.matched_tokens = int(self.process.stdout.readline())

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def logits(self) -> np.ndarray:
        with self.process:
            assert self.process.wait(60) == 0
        return np.load(self.out)


# --- exactness


def test_decode_equals_a_private_cache(context: ArrayContext, engine: Transformer) -> None:
    prompt = prompt_of(37)
    private = PrivateCache(BLOCK)
    expected = engine.generate(prompt, private, 40)
    with context.alloc(prompt[:-1]) as sequence:
        assert sequence.matched_tokens == 0
        assert np.array_equal(engine.generate(prompt, sequence, 40), expected)
        assert sequence.length == 37 + 39
        assert sequence.sealed_tokens > 0
        assert sequence.store_error is None
        n_tokens = private.positions.stop
        assert holds(sequence, private.layers, n_tokens)


@pytest.mark.parametrize(("n_common", "matched"), [(40, 40), (37, 37), (41, 41), (75, 75), (5, 5)])
def test_another_process_continues_from_the_shared_prefix(
    daemon: Daemon,
    context: ArrayContext,
    engine: Transformer,
    tmp_path: Path,
    n_common: int,
    matched: int,
) -> None:
    first = prompt_of(60)
    logits = store(context, engine, first, 20)
    # What it decoded is cached like the prompt.
    known = [*first, *(int(row.argmax()) for row in logits)]
    prompt = [*known[:n_common], 255 - known[n_common], *prompt_of(5, seed=2)]
    worker = Worker(daemon, engine.seed, prompt, 20, tmp_path / "logits.npy")
    assert worker.matched_tokens == matched
    worker.go()
    assert np.array_equal(worker.logits(), alone(engine, prompt, 20))


def test_a_full_match_leaves_the_last_token_to_compute(
    context: ArrayContext, engine: Transformer
) -> None:
    prompt = prompt_of(33)
    expected = store(context, engine, prompt, 3)
    with context.alloc(prompt[:-1]) as sequence:
        assert sequence.matched_tokens == 32
        assert np.array_equal(engine.generate(prompt[32:], sequence, 3), expected)


def test_every_length_across_block_boundaries(context: ArrayContext, engine: Transformer) -> None:
    private = PrivateCache(BLOCK)
    with context.alloc([]) as sequence:
        for n_tokens, token in enumerate(prompt_of(3 * BLOCK + 1), 1):
            assert np.array_equal(
                engine.forward([token], sequence), engine.forward([token], private)
            )
            full, rest = divmod(n_tokens, BLOCK)
            sizes = [len(block.v) for block in sequence.views(1)]
            assert sizes == [BLOCK] * full + [rest] * (rest > 0)
            if rest == 0:
                assert sequence.flush() == n_tokens
            assert holds(sequence, private.layers, n_tokens)


def test_after_eviction_and_storing_again(
    client: kvd_client.Client, context: ArrayContext, engine: Transformer
) -> None:
    prompt = prompt_of(50)
    expected = alone(engine, prompt, 10)
    for _ in range(2):
        with context.alloc(prompt) as sequence:
            assert sequence.matched_tokens == 0
        assert np.array_equal(store(context, engine, prompt, 10), expected)
        assert np.array_equal(store(context, engine, prompt, 10), expected)
        with context.alloc(prompt) as sequence:
            assert sequence.matched_tokens == 50
        assert client.evict("tiny-bytes").blocks >= 8


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int8", "uint8"])
def test_every_element_type_comes_back_to_the_bit(
    client: kvd_client.Client, other: kvd_client.Client, dtype: str
) -> None:
    model = small_model(dtype=dtype)
    rows, tokens = rows_of(model, 29), prompt_of(29)
    with ArrayContext(client, model) as context, context.alloc(tokens) as sequence:
        append(sequence, tokens, rows)
        assert holds(sequence, rows, 29)
        commit = sequence.release()
        assert commit is not None
        client.flush(commit)
    with ArrayContext(other, model) as context, context.alloc(tokens) as sequence:
        assert sequence.matched_tokens == 29
        assert holds(sequence, rows, 29)


# --- storing


def test_two_processes_store_the_same_prefix_once(
    daemon: Daemon, client: kvd_client.Client, engine: Transformer, tmp_path: Path
) -> None:
    prompt = prompt_of(60)
    workers = [Worker(daemon, engine.seed, prompt, 24, tmp_path / f"{name}.npy") for name in "ab"]
    before = status_of(client)
    for worker in workers:
        assert worker.matched_tokens == 0
        worker.go()
    expected = alone(engine, prompt, 24)
    for worker in workers:
        assert np.array_equal(worker.logits(), expected)
    after = status_of(client)
    n_blocks = -(-(60 + 23) // BLOCK)
    made = {name: after[name] - before[name] for name in after if name != "evicted"}
    assert made["stored_blocks"] == n_blocks
    assert made["present_blocks"] + made["joined_blocks"] == n_blocks
    assert status_of(client, "tiny-bytes")["cached"] == n_blocks


@pytest.mark.parametrize("is_stored", [True, False])
def test_release_stores_the_open_block_unless_told_not_to(
    client: kvd_client.Client, other: kvd_client.Client, is_stored: bool
) -> None:
    model = small_model()
    rows, tokens = rows_of(model, 21), prompt_of(21)
    with ArrayContext(client, model) as context, context.alloc([]) as sequence:
        append(sequence, tokens, rows)
        sequence.flush()
        commit = sequence.release(store=is_stored)
        if commit is not None:
            client.flush(commit)
        assert (commit is not None) == is_stored
    with ArrayContext(other, model) as context, context.alloc([*tokens, 7]) as sequence:
        assert sequence.matched_tokens == (21 if is_stored else 16)
        assert holds(sequence, rows, sequence.matched_tokens)


def test_a_match_that_ends_inside_a_block_takes_only_the_rows_that_agree(
    client: kvd_client.Client, other: kvd_client.Client
) -> None:
    model = small_model()
    tokens = prompt_of(24)
    rows, later = rows_of(model, 24), rows_of(model, 9, seed=1)
    with ArrayContext(client, model) as context, context.alloc([]) as sequence:
        append(sequence, tokens, rows)
        sequence.flush()
    branch = [*tokens[:19], *prompt_of(9, seed=3)]
    branch[19] = tokens[19] + 1
    mixed = [
        KV(np.concatenate([a.k[:19], b.k]), np.concatenate([a.v[:19], b.v]))
        for a, b in zip(rows, later, strict=True)
    ]
    with ArrayContext(other, model) as context, context.alloc(branch) as sequence:
        assert sequence.matched_tokens == 19
        assert sequence.sealed_tokens == 16
        assert holds(sequence, rows, 19)
        append(sequence, branch[19:], later)
        assert holds(sequence, mixed, 28)
        sequence.flush()
    with ArrayContext(client, model) as context:
        for prompt, expected in ((tokens, rows), (branch, mixed)):
            with context.alloc(prompt) as sequence:
                assert sequence.matched_tokens >= 24
                assert holds(sequence, expected, sequence.matched_tokens)


def test_a_match_that_adds_nothing_stores_nothing(client: kvd_client.Client) -> None:
    model = small_model()
    tokens = prompt_of(13)
    with ArrayContext(client, model) as context:
        with context.alloc([]) as sequence:
            append(sequence, tokens, rows_of(model, 13))
        client.flush()
        before = status_of(client)["requests"]
        with context.alloc(tokens[:11]) as sequence:
            assert sequence.matched_tokens == 11
            assert sequence.release() is None
        assert status_of(client)["requests"] - before == 2  # alloc and release


def test_rows_beyond_the_last_token_are_zero(client: kvd_client.Client) -> None:
    """What the staging held before does not go along."""
    model = small_model()
    tokens = prompt_of(11)
    with ArrayContext(client, model) as context:
        with context.alloc([]) as sequence:
            append(sequence, prompt_of(64, seed=9), rows_of(model, 64, seed=9))
            sequence.flush()
        with context.alloc([]) as sequence:
            append(sequence, tokens, rows_of(model, 11))
            commit = sequence.release()
            assert commit is not None
            client.flush(commit)
        with context.context.alloc(tokens) as plain:
            payload = plain.block(1)
            for layer in range(len(SMALL)):
                k, v = model.show(layer, np.frombuffer(payload, np.uint8))
                assert k[:3].all()
                assert v[:3].all()
                assert not k[3:].any()
                assert not v[3:].any()
                del k, v


def test_a_decoded_token_takes_no_round_trip(
    client: kvd_client.Client, other: kvd_client.Client
) -> None:
    model = small_model(block_tokens=32)
    rows, tokens = rows_of(model, 32), prompt_of(96)
    with ArrayContext(client, model) as context, context.alloc([]) as sequence:
        append(sequence, tokens[:32], rows)
        sequence.flush()
        before = status_of(other)["requests"]
        for token in tokens[32:63]:
            append(sequence, [token], [KV(each.k[:1], each.v[:1]) for each in rows])
            sequence.views(0)
        assert status_of(other)["requests"] == before
        append(sequence, tokens[63:64], [KV(each.k[:1], each.v[:1]) for each in rows])
        for token in tokens[64:]:
            append(sequence, [token], [KV(each.k[:1], each.v[:1]) for each in rows])
        # Two blocks became full: an append each, and for the first the question where it lies now.
        wait_for(lambda: status_of(other)["requests"] - before >= 2)
        assert status_of(other)["requests"] - before <= 3


def test_a_chunk_that_is_not_written_in_all_layers_is_not_stored(client: kvd_client.Client) -> None:
    model = small_model()
    rows, tokens = rows_of(model, 30), prompt_of(30)
    with ArrayContext(client, model) as context:
        with context.alloc([]) as sequence:
            append(sequence, tokens[:13], [KV(k[:13], v[:13]) for k, v in rows])
            sequence.extend(tokens[13:])
            sequence.write(0, rows[0].k[13:], rows[0].v[13:])
            # In this layer the new tokens can be read, in the other one they cannot yet.
            assert np.array_equal(sequence.gather(0).k, rows[0].k)
            assert np.array_equal(sequence.gather(1).k, rows[1].k[:13])
            sequence.flush()
            commit = sequence.release()
            assert commit is not None
            client.flush(commit)
        with context.alloc(tokens) as sequence:
            assert sequence.matched_tokens == 13
            assert holds(sequence, rows, 13)


# --- views


def test_views_are_read_only_and_lie_in_arena_and_staging(client: kvd_client.Client) -> None:
    model = small_model()
    tokens = prompt_of(20)
    with ArrayContext(client, model) as context, context.alloc([]) as sequence:
        append(sequence, tokens, rows_of(model, 20))
        assert client.session is not None
        assert client.session.staging is not None
        staging = client.session.staging.buffer
        assert all(is_inside(each, staging) for block in sequence.views(0) for each in block)
        assert sequence.flush() == 16
        arena = context.context.arena
        assert arena is not None
        mapping = arena._map()
        *sealed, tail = sequence.views(1)
        assert len(sealed) == 2
        assert all(is_inside(each, mapping) for block in sealed for each in block)
        assert all(is_inside(each, staging) for each in tail)
        assert np.shares_memory(sequence.views(1)[0].k, sealed[0].k)
        for block in (*sealed, tail):
            for each in block:
                with pytest.raises(ValueError, match="read-only"):
                    each[0] = 1
                with pytest.raises(ValueError, match="WRITEABLE"):
                    each.setflags(write=True)
        gathered = sequence.gather(1)
        assert gathered.k.flags.c_contiguous
        assert not np.shares_memory(gathered.k, sealed[0].k)
        del mapping, block, each, sealed, tail


def test_a_client_does_not_close_while_one_looks_at_what_is_not_stored(daemon: Daemon) -> None:
    """The daemon takes the staging back at the end of the session: a view would show zeros."""
    model = small_model()
    rows, tokens = rows_of(model, 5), prompt_of(5)
    with kvd_client.connect(daemon.runtime_dir) as client:
        context = ArrayContext(client, model)
        sequence = context.alloc([])
        append(sequence, tokens, rows)
        (view,) = sequence.views(0)
        with pytest.raises(errors.ViewsAlive):
            client.close()
        assert np.array_equal(view.k, rows[0].k)
        assert holds(sequence, rows, 5)
        del view
        client.close()


def test_release_refuses_while_a_view_is_alive_and_changes_nothing(
    client: kvd_client.Client,
) -> None:
    model = small_model()
    rows, tokens = rows_of(model, 20), prompt_of(20)
    with ArrayContext(client, model) as context:
        sequence = context.alloc([])
        append(sequence, tokens[:12], [KV(k[:12], v[:12]) for k, v in rows])
        sequence.flush()
        for index in (0, -1):  # in the arena, in the staging
            part = sequence.views(1)[index].v[1:, 0]
            with pytest.raises(errors.ViewsAlive):
                sequence.release()
            with pytest.raises(errors.ViewsAlive):
                context.close()
            with pytest.raises(errors.ViewsAlive):
                client.close()
            assert not sequence.released
            del part
        append(sequence, tokens[12:], [KV(k[12:], v[12:]) for k, v in rows])
        assert holds(sequence, rows, 20)
        sequence.release()
        for use in (sequence.release, lambda: sequence.views(0), lambda: sequence.extend([1])):
            with pytest.raises(errors.Closed):
                use()


def test_a_view_shows_the_same_while_its_block_is_sealed_and_the_staging_is_used_again(
    daemon: Daemon,
) -> None:
    model = small_model()
    room = 4 * model.block_bytes
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=room) as client,
        ArrayContext(client, model) as context,
    ):
        rows, tokens = rows_of(model, 8), prompt_of(8)
        first, second = context.alloc([]), context.alloc([])
        append(first, tokens, rows)
        view = first.views(0)[0].k
        for turn in range(20):
            append(second, prompt_of(24, turn), rows_of(model, 24, turn))
            second.flush()
        assert np.array_equal(view, rows[0].k)
        assert first.sealed_tokens == 0
        assert second.sealed_tokens == 480
        del view
        assert first.flush() == 8
        assert holds(first, rows, 8)


def test_an_error_under_way_gives_the_sequence_back(client: kvd_client.Client) -> None:
    model = small_model()
    tokens = prompt_of(12)
    with ArrayContext(client, model, n_seq_max=1) as context:
        with pytest.raises(ZeroDivisionError), context.alloc([]) as sequence:  # noqa: PT012
            append(sequence, tokens, rows_of(model, 12))
            sequence.flush()
            views = sequence.views(0)
            raise ZeroDivisionError
        # The views held it back; they would not have outlived the lease unnoticed.
        assert not sequence.released
        del views
        sequence.release(store=False, failed=True)
        with context.alloc(tokens) as sequence:
            assert sequence.matched_tokens == 8


# --- flow control, faults


def test_a_chunk_larger_than_the_staging_is_stored_all_the_same(
    daemon: Daemon, client: kvd_client.Client, engine: Transformer
) -> None:
    prompt = prompt_of(160)
    room = 5 * 8192  # of 20 blocks
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=room) as narrow,
        ArrayContext(narrow, engine.model) as context,
    ):
        logits = store(context, engine, prompt, 5)
    assert np.array_equal(logits, alone(engine, prompt, 5))
    with ArrayContext(client, engine.model) as context, context.alloc(prompt) as sequence:
        assert sequence.matched_tokens == 160


def test_open_blocks_of_more_sequences_than_the_staging_holds(daemon: Daemon) -> None:
    model = small_model()
    room = 2 * model.block_bytes
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=room) as client,
        ArrayContext(client, model) as context,
    ):
        sequences = [context.alloc([]) for _ in range(5)]
        for step in range(12):
            for index, sequence in enumerate(sequences):
                append(sequence, [index], rows_of(model, 1, seed=100 * index + step))
        for index, sequence in enumerate(sequences):
            rows = [rows_of(model, 1, seed=100 * index + step) for step in range(12)]
            joined = [
                KV(*(np.concatenate(parts) for parts in zip(*layer, strict=True)))
                for layer in zip(*rows, strict=True)
            ]
            assert holds(sequence, joined, 12)


def test_sequences_released_before_their_blocks_are_sealed_leave_them_whole(
    daemon: Daemon, client: kvd_client.Client
) -> None:
    """Their staging is not used again before the copy has ended, and then it is."""
    layers = [ArrayLayer(8, 256, 256)] * 4
    model = ArrayModel("large", f"test {next(_seeds)}", layers, "uint8", 256)
    prompts = {turn: prompt_of(512, turn) for turn in range(6)}
    # Made before, and no room for more than one sequence: so the next one comes while the copy of
    # the one before is under way.
    rows = [rows_of(model, 512, turn) for turn in prompts]
    room = 2 * model.block_bytes
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=room) as narrow,
        ArrayContext(narrow, model) as context,
    ):
        for turn, tokens in prompts.items():
            with context.alloc([]) as sequence:
                append(sequence, tokens, rows[turn])
                assert sequence.store_error is None
        narrow.flush()
    with ArrayContext(client, model) as context:
        for turn, tokens in prompts.items():
            with context.alloc(tokens) as sequence:
                assert sequence.matched_tokens == 512
                assert holds(sequence, rows_of(model, 512, turn), 512)


def test_a_client_without_staging_reads_and_goes_on_alone(
    daemon: Daemon, context: ArrayContext, engine: Transformer
) -> None:
    prompt = prompt_of(30)
    store(context, engine, prompt[:21], 1)
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as reader,
        ArrayContext(reader, engine.model) as reading,
        reading.alloc(prompt[:-1]) as sequence,
    ):
        assert sequence.matched_tokens == 21
        logits = engine.generate(prompt[21:], sequence, 20)
        assert isinstance(sequence.store_error, errors.StagingFull)
    assert np.array_equal(logits, alone(engine, prompt, 20))


def test_a_full_budget_stops_storing_and_nothing_else(tmp_path: Path) -> None:
    model = small_model()
    with (
        running_daemon("--max-memory", "1MiB", runtime_dir=tmp_path / "run") as daemon,
        kvd_client.connect(daemon.runtime_dir, staging_bytes=128 << 10) as client,
        ArrayContext(client, model) as context,
    ):
        rows, tokens = rows_of(model, 3200), prompt_of(3200)
        sequence = context.alloc([])
        for at in range(0, 3200, 50):
            end = at + 50
            append(sequence, tokens[at:end], [KV(k[at:end], v[at:end]) for k, v in rows])
        assert holds(sequence, rows, 3200)
        assert isinstance(sequence.store_error, errors.AllLeased)
        stored = sequence.sealed_tokens
        assert stored > 0
        sequence.release()
        with context.alloc(tokens) as again:
            assert again.matched_tokens >= stored
            assert holds(again, rows, again.matched_tokens)
        assert client.verify()["ok"]


@pytest.mark.parametrize("fail_open", [True, False])
def test_the_daemon_is_killed_under_way(
    tmp_path: Path, engine: Transformer, fail_open: bool
) -> None:
    prompt = prompt_of(45)
    expected = alone(engine, prompt, 40)
    run, name = tmp_path / "run", "test-arrays-killed"
    with ExitStack() as stack:
        daemon = start_daemon(runtime_dir=run, instance=name)
        stack.callback(daemon.stop)
        client = kvd_client.connect(run, fail_open=fail_open, timeout=2)
        # Later than the client: a successor removes, at its end, what the killed one has left.
        restarted = stack.enter_context(ExitStack())
        stack.enter_context(client)
        context = stack.enter_context(ArrayContext(client, engine.model))
        store(context, engine, prompt[:29], 1)
        with context.alloc(prompt[:-1]) as sequence:
            assert sequence.matched_tokens == 29
            logits = [engine.forward(prompt[29:], sequence)[-1]]
            while len(logits) < 40:
                if len(logits) == 10:
                    daemon.kill()
                logits.append(engine.forward([int(logits[-1].argmax())], sequence)[-1])
            assert np.array_equal(np.stack(logits), expected)
            assert isinstance(sequence.store_error, errors.ServiceError)
        if fail_open:
            with context.alloc(prompt) as sequence:
                assert sequence.matched_tokens == 0
                assert np.array_equal(engine.generate(prompt, sequence, 40), expected)
        else:
            with pytest.raises(errors.Unavailable):
                context.alloc(prompt)
        restarted.enter_context(running_daemon(runtime_dir=run, instance=name))
        wait_for(lambda: shared_again(context))
        for least in (29, 44):  # what was on its way when the daemon died may be there, too
            with context.alloc(prompt[:-1]) as sequence:
                assert sequence.matched_tokens >= least
                logits = engine.generate(prompt[sequence.matched_tokens :], sequence, 40)
                assert np.array_equal(logits, expected)
                sequence.flush()


def shared_again(context: ArrayContext) -> bool:
    try:
        with context.alloc([]) as sequence:
            return sequence._sequence.shared
    except errors.Unavailable:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_without_a_daemon_everything_works_in_this_process(
    tmp_path: Path, engine: Transformer
) -> None:
    prompt = prompt_of(30)
    with (
        kvd_client.connect(tmp_path / "nobody", fail_open=True) as client,
        ArrayContext(client, engine.model, n_seq_max=1) as context,
        context.alloc(prompt[:-1]) as sequence,
    ):
        logits = engine.generate(prompt, sequence, 20)
        block = sequence.views(0)[0]
        with pytest.raises(ValueError, match="read-only"):
            block.k[0] = 1
        with pytest.raises(errors.ViewsAlive):
            sequence.release()
        del block
        assert sequence.flush() == 0
        assert sequence.release() is None
    assert np.array_equal(logits, alone(engine, prompt, 20))


def test_a_daemon_that_hangs_holds_a_sequence_up_for_a_bounded_time(tmp_path: Path) -> None:
    model = small_model()
    rows, tokens = rows_of(model, 400), prompt_of(400)
    room = 4 * model.block_bytes
    with (
        running_daemon(runtime_dir=tmp_path / "run") as daemon,
        kvd_client.connect(
            daemon.runtime_dir, fail_open=True, timeout=0.2, staging_bytes=room
        ) as client,
        ArrayContext(client, model) as context,
    ):
        with context.alloc([]) as sequence:
            daemon.process.send_signal(signal.SIGSTOP)
            started = time.monotonic()
            for at in range(0, 400, 10):
                end = at + 10
                append(sequence, tokens[at:end], [KV(k[at:end], v[at:end]) for k, v in rows])
            waited = time.monotonic() - started
            assert holds(sequence, rows, 400)
            assert isinstance(sequence.store_error, errors.StagingFull)
        assert waited < 1.5
        daemon.process.send_signal(signal.SIGCONT)


def test_nothing_is_stored_in_the_place_of_a_block_that_was_refused(tmp_path: Path) -> None:
    """What follows a refused block must not be filed where that block would have been."""
    model = small_model()
    rows, tokens = rows_of(model, 16), prompt_of(16, seed=5)
    with (
        running_daemon("--max-memory", "1MiB", runtime_dir=tmp_path / "run") as daemon,
        kvd_client.connect(daemon.runtime_dir, staging_bytes=128 << 10) as other,
        ArrayContext(other, model) as others,
        kvd_client.connect(daemon.runtime_dir, staging_bytes=128 << 10) as client,
        ArrayContext(client, model) as context,
    ):
        hog = others.alloc([])
        some = [KV(k[:8], v[:8]) for k, v in rows]
        for turn in range(400):
            append(hog, prompt_of(8, turn), some)
        assert isinstance(hog.store_error, errors.AllLeased)
        with context.alloc([]) as sequence:
            daemon.process.send_signal(signal.SIGSTOP)
            append(sequence, tokens[:8], some)
            sequence.extend(tokens[8:])
            daemon.process.send_signal(signal.SIGCONT)
            hog.release(store=False)  # its answer comes after the refusal
            other.evict()
            for layer, (k, v) in enumerate(rows):
                sequence.write(layer, k[8:], v[8:])
            assert isinstance(sequence.store_error, errors.AllLeased)
            assert holds(sequence, rows, 16)
        for prompt in (tokens, tokens[8:]):
            with others.alloc(prompt) as sequence:
                assert sequence.matched_tokens == 0


def test_a_session_that_was_given_up_keeps_its_leases_until_release(tmp_path: Path) -> None:
    """The daemon hangs, and then goes on: what a sequence reads in the arena is not overwritten."""
    model = small_model()
    rows, tokens = rows_of(model, 64), prompt_of(64)
    with (
        running_daemon("--max-memory", "1MiB", runtime_dir=tmp_path / "run") as daemon,
        kvd_client.connect(daemon.runtime_dir, timeout=0.2, staging_bytes=64 << 10) as client,
        ArrayContext(client, model) as context,
        kvd_client.connect(daemon.runtime_dir, staging_bytes=64 << 10) as other,
        ArrayContext(other, model) as others,
    ):
        with context.alloc([]) as sequence:
            append(sequence, tokens, rows)
            sequence.flush()
        sequence = context.alloc(tokens)
        assert sequence.sealed_tokens == 64
        view = sequence.views(0)[3].k
        daemon.process.send_signal(signal.SIGSTOP)
        with pytest.raises(errors.DeadlineExceeded):
            client.ping()
        daemon.process.send_signal(signal.SIGCONT)
        assert other.evict("small").blocks == 0
        for turn in range(12):
            with others.alloc([]) as filling:
                append(filling, prompt_of(200, turn + 1), rows_of(model, 200, turn + 1))
                filling.flush()
        assert status_of(other)["evicted_blocks"] > 0
        assert holds(sequence, rows, 64)
        assert np.array_equal(view, rows[0].k[24:32])
        del view
        sequence.release()
        wait_for(lambda: len(other.clients()) == 1)
        other.evict("small")
        with others.alloc(tokens) as gone:
            assert gone.matched_tokens == 0


def test_a_forked_child_is_refused_before_it_writes(client: kvd_client.Client) -> None:
    model = small_model()
    rows, tokens = rows_of(model, 12), prompt_of(12)
    with ArrayContext(client, model) as context, context.alloc([]) as sequence:
        append(sequence, tokens, rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork beside zmq's threads
            child = os.fork()
        if child == 0:
            refused = 0
            for use in (lambda: sequence.extend([1]), sequence.release, lambda: sequence.views(0)):
                try:
                    use()
                except errors.Forked:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert holds(sequence, rows, 12)


# --- bad input


def test_bad_rows_and_calls_are_refused_and_change_nothing(client: kvd_client.Client) -> None:
    model = small_model()
    rows, tokens = rows_of(model, 3), prompt_of(3)
    k, v = [each.k for each in rows], [each.v for each in rows]
    with ArrayContext(client, model) as context, context.alloc([]) as sequence:
        with pytest.raises(errors.BadMessage, match="extend first"):
            sequence.write(0, k[0], v[0])
        for bad_k, bad_v in (
            (k[:1], v),
            (k, [v[1], v[0]]),
            ([each[:2] for each in k], v),
            ([each.astype(np.float64) for each in k], v),
            ([each.reshape(3, -1) for each in k], v),
            (k, [each.view(np.int32) for each in v]),
        ):
            with pytest.raises(errors.BadPayload):
                sequence.append(tokens, bad_k, bad_v)
        for bad_tokens in ([], [-1], [1 << 32], [0.5], [[1, 2]]):
            with pytest.raises(errors.BadMessage):
                sequence.extend(bad_tokens)
        for layer in (-1, 2):
            with pytest.raises(errors.BadMessage, match="no such layer"):
                sequence.views(layer)
        assert sequence.length == 0
        assert sequence.views(0) == []
        assert sequence.gather(1).v.shape == (0, 1, 8)
        assert sequence.extend(tokens) == range(3)
        with pytest.raises(errors.BadMessage, match="all layers"):
            sequence.extend(tokens)
        with pytest.raises(errors.BadPayload):
            sequence.write(0, v[1], k[1])
        sequence.write(1, k[1], v[1])
        with pytest.raises(errors.BadMessage, match="extend first"):
            sequence.write(1, k[1], v[1])
        sequence.write(0, k[0], v[0])
        assert holds(sequence, rows, 3)


def test_all_ids_in_use_is_said_and_release_gives_one_back(client: kvd_client.Client) -> None:
    with ArrayContext(client, small_model(), n_seq_max=2) as context:
        first, second = context.alloc([1]), context.alloc([2])
        with pytest.raises(errors.NoSequenceFree):
            context.alloc([3])
        first.release()
        context.alloc([3], wait=1.0).release()
        assert not second.released
    assert second.released


# --- the model


def test_a_block_has_the_size_and_layout_of_the_format() -> None:
    model = ArrayModel("m", "x", [ArrayLayer(2, 6, 4), ArrayLayer(3, 5, 7)], "float16", 4)
    assert model.block_bytes == 4 * 2 * (2 * 6 + 2 * 4 + 3 * 5 + 3 * 7)
    assert model.model.layers == (("f16", 24, "f16", 16), ("f16", 30, "f16", 42))
    block = np.arange(model.block_bytes // 2, dtype=np.float16)
    flat = np.concatenate(
        [plane.ravel() for layer in range(2) for plane in model.show(layer, block.view(np.uint8))]
    )
    assert np.array_equal(flat, block)
    k, v = model.show(1, block.view(np.uint8))
    assert k.shape == (4, 3, 5)
    assert v.shape == (4, 3, 7)


def test_the_fingerprint_covers_identity_layout_and_type() -> None:
    def fingerprint(
        identity: str | bytes = "x", *layers: ArrayLayer, dtype: Any = "float16"
    ) -> bytes:
        found = ArrayModel("m", identity, layers or [ArrayLayer(2, 8, 8)] * 2, dtype).model
        assert len(found.fingerprint) == 32
        return found.fingerprint

    others = [
        fingerprint("y"),
        fingerprint(b"x\0"),
        fingerprint("x", ArrayLayer(4, 4, 4), ArrayLayer(2, 8, 8)),  # rows of equal bytes
        fingerprint("x", ArrayLayer(1, 16, 16), ArrayLayer(1, 16, 16)),
        fingerprint("x", ArrayLayer(2, 8, 8)),
        fingerprint(dtype="bfloat16"),
        fingerprint(dtype="int16"),
    ]
    assert len({fingerprint(), *others}) == 1 + len(others)
    assert fingerprint() == fingerprint(b"x") == fingerprint(dtype=np.float16)


def test_models_of_equal_row_bytes_never_match_each_other(client: kvd_client.Client) -> None:
    tokens = prompt_of(16)
    identity = f"test {next(_seeds)}"
    layouts = [ArrayLayer(2, 8, 8), ArrayLayer(1, 16, 16)]
    models = [ArrayModel("m", identity, [layer], "float32", BLOCK) for layer in layouts]
    for model in models:
        with ArrayContext(client, model) as context:
            with context.alloc(tokens) as sequence:
                assert sequence.matched_tokens == 0
                append(sequence, tokens, rows_of(model, 16))
                sequence.flush()
            with context.alloc(tokens) as sequence:
                assert sequence.matched_tokens == 16


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"identity": ""}, "identity"),
        ({"layers": []}, "layers"),
        ({"layers": [ArrayLayer(0, 8, 8)]}, "at least 1"),
        ({"layers": [ArrayLayer(2, 8, 8.0)]}, "whole numbers"),
        ({"dtype": "complex64"}, "types"),
        ({"dtype": ">f4"}, "byte order"),
        ({"dtype": "no-such"}, "NumPy type"),
    ],
)
def test_a_model_that_cannot_be_is_refused(arguments: dict[str, Any], fault: str) -> None:
    valid = {"name": "m", "identity": "x", "layers": [ArrayLayer(2, 8, 8)], "dtype": "float32"}
    with pytest.raises(errors.BadMessage, match=fault):
        ArrayModel(**{**valid, **arguments})


# --- the example


def test_the_example_runs_as_its_docstring_says(daemon: Daemon) -> None:
    said = []
    for question in ("What is a contribution?", "Who is the licensor?"):
        command = [sys.executable, "examples/array_engine.py", question]
        command += ["--runtime-dir", str(daemon.runtime_dir)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        said.append(done.stdout.splitlines())
    assert said[0][0].startswith("0 of ")
    assert int(said[1][0].split()[0]) > 300
    assert {lines[-1] for lines in said} == {"logits equal those of a private cache: True"}


def test_more_blocks_than_one_append_may_have(daemon: Daemon) -> None:
    n_tokens = MAX_APPEND_BLOCKS + 100
    model, prompt = small_model(block_tokens=1), prompt_of(n_tokens)
    rows = rows_of(model, n_tokens)
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=8 << 20) as client,
        ArrayContext(client, model) as context,
    ):
        with context.alloc([]) as sequence:
            append(sequence, prompt, rows)
        client.flush()
        assert status_of(client, "small")["cached"] == n_tokens
        with context.alloc(prompt) as sequence:
            assert sequence.matched_tokens == n_tokens
            assert holds(sequence, rows, n_tokens)


def test_an_append_of_too_many_blocks_is_refused_before_it_is_sent(
    client: kvd_client.Client,
) -> None:
    model = kvd_client.Model("many", bytes(32), "array", (("f16", 2, "f16", 2),), 1)
    with client.open_context(model) as context, context.alloc([]) as sequence:
        with pytest.raises(errors.BadMessage, match="fewer at a time"):
            sequence.stage(MAX_APPEND_BLOCKS + 1)
        assert sequence.full_tokens == 0
