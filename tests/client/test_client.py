"""The blocking client and a daemon: store, match, fetch, and what is refused."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kvd_client
from kvd_client import errors
from tests.client.blocks import (
    BLOCK_TOKENS,
    MODEL,
    PAYLOAD_BYTES,
    STRIDE,
    eventually,
    holds,
    payload,
    payloads,
    store,
)
from tests.support import Daemon

ROOT = Path(__file__).resolve().parents[2]
PROMPT = list(range(100, 100 + 3 * BLOCK_TOKENS))


def test_what_was_stored_comes_back(context: kvd_client.Context) -> None:
    store(context, PROMPT)
    with context.alloc([*PROMPT, 1, 2]) as sequence:
        assert sequence.matched_tokens == len(PROMPT)
        assert sequence.full_tokens == len(PROMPT)
        assert sequence.shared
        assert holds(sequence, PROMPT)


def test_nothing_is_matched_of_another_prompt(context: kvd_client.Context) -> None:
    store(context, PROMPT)
    with context.alloc([1, *PROMPT[1:]]) as sequence:
        assert (sequence.matched_tokens, sequence.n_blocks, sequence.last_block_tokens) == (0, 0, 0)


def test_a_match_ends_inside_a_block(context: kvd_client.Context) -> None:
    store(context, PROMPT)
    asked = [*PROMPT[:-3], 7, 7, 7]
    with context.alloc(asked) as sequence:
        assert sequence.matched_tokens == len(PROMPT) - 3
        assert sequence.full_tokens == 2 * BLOCK_TOKENS
        assert sequence.last_block_tokens == BLOCK_TOKENS
        assert bytes(sequence.block(2)) == payload(PROMPT)


def test_a_tail_is_found_and_then_replaced_by_a_longer_one(context: kvd_client.Context) -> None:
    short, longer = PROMPT[:11], PROMPT[:14]
    store(context, short)
    with context.alloc(longer) as sequence:
        assert sequence.matched_tokens == 11
        assert sequence.last_block_tokens == 3
        assert bytes(sequence.block(1)) == payload(short)
    store(context, longer)
    with context.alloc(PROMPT) as sequence:
        assert sequence.matched_tokens == 14
        assert bytes(sequence.block(1)) == payload(longer)


def test_an_empty_prompt_matches_nothing(context: kvd_client.Context) -> None:
    with context.alloc([]) as sequence:
        assert (sequence.matched_tokens, sequence.n_blocks) == (0, 0)


def test_refresh_tells_the_blocks_of_what_was_appended(
    client: kvd_client.Client, context: kvd_client.Context
) -> None:
    with context.alloc(PROMPT) as sequence:
        client.flush(sequence.append(PROMPT[:8], payloads(PROMPT[:8])))
        assert sequence.n_blocks == 0
        assert sequence.refresh() == 8
        assert holds(sequence, PROMPT[:8])
        client.flush(sequence.append(PROMPT[8:20], payloads(PROMPT[:20], 8)))
        assert sequence.n_blocks == 1
        assert sequence.refresh(1) == 20
        assert sequence.last_block_tokens == 4
        assert holds(sequence, PROMPT[:20])
        with pytest.raises(errors.BadMessage):
            sequence.refresh(4)


def test_an_append_lets_go_of_the_block_beyond_the_last_full_match(
    context: kvd_client.Context,
) -> None:
    """Its lease ends with the append, so it must not be read any more."""
    store(context, PROMPT)
    asked = [*PROMPT[:20], 7, 7, 7, 7]
    with context.alloc(asked) as sequence:
        view = sequence.block(2)
        assert sequence.n_blocks == 3
        sequence.append(asked[16:], payloads(asked, 16))
        assert sequence.n_blocks == 2
        with pytest.raises(ValueError, match="released"):
            view[0]
        with pytest.raises(errors.BadMessage):
            sequence.block(2)
        assert bytes(sequence.block(1)) == payload(PROMPT[:16])


def test_read_into_copies_exactly_one_block(context: kvd_client.Context) -> None:
    store(context, PROMPT)
    target = np.full(PAYLOAD_BYTES + 2, 0xEE, np.uint8)
    with context.alloc(PROMPT) as sequence:
        assert sequence.read_into(1, target) == PAYLOAD_BYTES
        assert target[:-2].tobytes() == payload(PROMPT[:16])
        assert target[-2:].tolist() == [0xEE, 0xEE]
        # Any contiguous memory will do, whatever it thinks its items are.
        words = np.zeros((PAYLOAD_BYTES // 8, 2), np.uint32)
        assert sequence.read_into(0, words) == PAYLOAD_BYTES
        with pytest.raises(errors.BadPayload, match="small"):
            sequence.read_into(0, target[:-3])
        with pytest.raises(errors.BadPayload):
            sequence.read_into(0, target[::2])
        with pytest.raises(errors.BadPayload):
            sequence.read_into(0, memoryview(bytes(PAYLOAD_BYTES)))


def test_blocks_can_be_written_in_place(
    client: kvd_client.Client, context: kvd_client.Context
) -> None:
    with context.alloc(PROMPT) as sequence:
        staged = sequence.stage(len(PROMPT))
        assert [offset % STRIDE for offset in staged.offsets] == [0, 0, 0]
        for index, block in enumerate(payloads(PROMPT)):
            staged.block(index)[:] = block
        commit = sequence.append(PROMPT, staged)
        assert (commit.stored, commit.present, commit.joined) == (3, 0, 0)
        client.flush(commit)
    with context.alloc(PROMPT) as sequence:
        assert holds(sequence, PROMPT)


def test_tokens_may_be_any_flat_integers(context: kvd_client.Context) -> None:
    store(context, PROMPT)
    packed = np.asarray(PROMPT, "<u4").tobytes()
    forms = (tuple(PROMPT), np.asarray(PROMPT, np.int64), np.asarray(PROMPT, ">u2"), packed)
    for form in forms:
        with context.alloc(form) as sequence:
            assert sequence.matched_tokens == len(PROMPT)
    with context.alloc(bytearray(packed)) as sequence:
        assert sequence.matched_tokens == len(PROMPT)
    for wrong in ([-1], [1 << 32], [1 << 70], [0.5], [[1, 2]], [[1], [2, 3]], ["a"], "text"):
        with pytest.raises(errors.BadMessage):
            context.alloc(wrong)  # type: ignore[arg-type]


def test_payloads_of_another_size_or_number_are_refused_and_cost_nothing(
    client: kvd_client.Client, context: kvd_client.Context
) -> None:
    assert client.session is not None
    assert client.session.staging is not None
    with context.alloc(PROMPT) as sequence:
        good = payloads(PROMPT)
        for wrong in (
            good[:2],
            [*good, good[0]],
            [*good[:2], good[2][:-1]],
            [],
            [1, 2, 3],
            good[0],
        ):
            with pytest.raises(errors.BadPayload):
                sequence.append(PROMPT, wrong)  # type: ignore[arg-type]
        with pytest.raises(errors.BadPayload):
            sequence.append(PROMPT, sequence.stage(8))
        with pytest.raises(errors.BadMessage):
            sequence.append([], [])
        assert sequence.full_tokens == 0
        client.flush(sequence.append(PROMPT, good))
        assert sequence.refresh() == len(PROMPT)


def test_what_was_staged_is_committed_once_and_only_in_its_session(
    daemon: Daemon, context: kvd_client.Context
) -> None:
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=1 << 16) as second,
        second.open_context(MODEL) as elsewhere,
        context.alloc([]) as sequence,
        elsewhere.alloc([]) as stranger,
    ):
        staged = sequence.stage(8)
        staged.block(0)[:] = payload(PROMPT[:8])
        with pytest.raises(errors.BadStaging, match="session"):
            stranger.append(PROMPT[:8], staged)
        sequence.append(PROMPT[:8], staged)
        with pytest.raises(errors.BadStaging):
            sequence.append(PROMPT[8:16], staged)
        given_back = sequence.stage(8)
        sequence.unstage(given_back)
        sequence.unstage(given_back)
        with pytest.raises(errors.BadStaging):
            sequence.append(PROMPT[8:16], given_back)


def test_a_reservation_is_room_and_a_limit(
    client: kvd_client.Client, context: kvd_client.Context
) -> None:
    with context.alloc(PROMPT, reserve_tokens=16) as sequence:
        assert client.status()["models"][0]["blocks"]["filling"] == 2
        with pytest.raises(errors.ReservationExceeded):
            sequence.append(PROMPT, payloads(PROMPT))
        client.flush(sequence.append(PROMPT[:16], payloads(PROMPT[:16])))
        assert client.status()["models"][0]["blocks"]["filling"] == 0


def test_ids_run_out_and_come_back(context: kvd_client.Context) -> None:
    held = [context.alloc([]) for _ in range(4)]
    assert sorted(sequence.seq_id for sequence in held) == [0, 1, 2, 3]
    with pytest.raises(errors.NoSequenceFree):
        context.alloc([])
    with pytest.raises(errors.NoSequenceFree) as refused:
        context.alloc([], wait=0.02)
    assert refused.value.details["waited_ms"] == 20
    held[2].release()
    again = context.alloc([], wait=5)
    assert again.seq_id == 2
    assert again.generation > held[2].generation


def test_waiting_times_are_checked(context: kvd_client.Context) -> None:
    for wait in (-1.0, float("inf"), float("nan"), 1e9):
        with pytest.raises(errors.BadMessage):
            context.alloc([], wait=wait)
        with pytest.raises(errors.BadMessage):
            context.alloc([], idle_timeout=wait)


def test_a_sequence_that_nobody_touches_takes_no_more(context: kvd_client.Context) -> None:
    client = context.client
    assert isinstance(client, kvd_client.Client)
    with context.alloc([], idle_timeout=0.01) as sequence:
        eventually(lambda: client.sequences()[0]["state"] == "TIMED_OUT")
        with pytest.raises(errors.SequenceEnded):
            sequence.append(PROMPT, payloads(PROMPT))
    assert client.sequences() == []


def test_an_owner_that_says_it_lives_is_not_timed_out(context: kvd_client.Context) -> None:
    client = context.client
    assert isinstance(client, kvd_client.Client)
    kept = context.alloc(PROMPT, idle_timeout=60)
    lost = context.alloc(PROMPT, idle_timeout=0.01)
    eventually(lambda: client.sequences()[1]["state"] == "TIMED_OUT")
    for keep_alive in (kept.keep_alive, context.keep_alive):
        eventually(lambda: client.sequences()[0]["idle_seconds"] > 0.1)
        started = time.monotonic()
        keep_alive()
        idle = client.sequences()[0]["idle_seconds"]
        assert idle <= time.monotonic() - started + 0.001
    assert context.keep_alive() == [lost]
    with pytest.raises(errors.SequenceEnded):
        lost.keep_alive()
    with pytest.raises(errors.SequenceEnded):
        lost.append(PROMPT, payloads(PROMPT))
    lost.release()
    assert context.keep_alive() == []
    kept.release()


def test_what_is_closed_says_so(client: kvd_client.Client, context: kvd_client.Context) -> None:
    sequence = context.alloc([])
    sequence.release()
    for use in (
        sequence.release,
        sequence.refresh,
        sequence.keep_alive,
        lambda: sequence.block(0),
        lambda: sequence.stage(8),
        lambda: sequence.append(PROMPT, payloads(PROMPT)),
    ):
        with pytest.raises(errors.Closed):
            use()
    left = context.alloc([])
    context.close()
    context.close()
    assert left.released
    assert client.sequences() == []
    with pytest.raises(errors.Closed):
        context.alloc([])
    client.close()
    client.close()
    for ask in (client.ping, client.status, lambda: client.open_context(MODEL)):
        with pytest.raises(errors.Closed):
            ask()


def test_closing_the_client_closes_everything_that_it_opened(
    daemon: Daemon, other: kvd_client.Client
) -> None:
    client = kvd_client.connect(daemon.runtime_dir, staging_bytes=0)
    with client.open_context(MODEL) as context, context.alloc([]) as sequence:
        assert len(other.sequences()) == 1
        client.close()
        assert sequence.released
        assert context.closed
    eventually(lambda: other.status()["clients"] == 1)
    assert other.sequences() == []


def test_an_error_in_a_sequence_releases_it_as_failed(
    client: kvd_client.Client, context: kvd_client.Context
) -> None:
    before = client.status()["counters"]["sequences_failed"]
    with pytest.raises(ZeroDivisionError), context.alloc([]):
        raise ZeroDivisionError
    assert client.sequences() == []
    assert client.status()["counters"]["sequences_failed"] == before + 1


def test_a_model_that_cannot_be_is_refused_and_leaves_nothing(client: kvd_client.Client) -> None:
    layers = MODEL.layers
    for model, error in (
        (kvd_client.Model("m", bytes(32), "array", ()), errors.BadMessage),
        (kvd_client.Model("m", bytes(31), "array", layers), errors.BadMessage),
        (kvd_client.Model("m", bytes(32), "no such", layers), errors.BadMessage),
        (kvd_client.Model("", bytes(32), "array", layers), errors.BadMessage),
        (kvd_client.Model("m", b"h" * 32, "array", (("f16", 1 << 24, "f16", 1),)),
         errors.ModelTooLarge),
    ):  # fmt: skip
        with pytest.raises(error):
            client.open_context(model)
    with pytest.raises(errors.BadMessage):
        client.open_context(MODEL, n_seq_max=99)
    with client.open_context(MODEL):
        other_rows = (("f16", 32, "f16", 32),)
        same = kvd_client.Model("tiny", bytes(32), "array", other_rows, BLOCK_TOKENS)
        with pytest.raises(errors.GeometryMismatch):
            client.open_context(same)
        assert client.clients()[0]["contexts"] == 1
    assert client.contexts == set()


def test_evict_drops_what_nobody_leases(
    client: kvd_client.Client, context: kvd_client.Context
) -> None:
    store(context, PROMPT)
    with context.alloc(PROMPT[:8]) as sequence:
        assert client.evict("no such model").blocks == 0
        assert client.evict("tiny", 1).blocks == 1
        evicted = client.evict()
        assert (evicted.blocks, evicted.freed_bytes) == (1, STRIDE)
        assert holds(sequence, PROMPT[:8])
    with context.alloc(PROMPT) as sequence:
        assert sequence.matched_tokens == 8


def test_a_pin_keeps_what_nobody_leases(
    client: kvd_client.Client, context: kvd_client.Context
) -> None:
    store(context, PROMPT)
    assert client.pin(MODEL, [*PROMPT[:16], 7], owner="o") == 16
    assert client.pin(MODEL.arena_fingerprint, PROMPT[:8], owner="p", ttl=3600) == 8
    assert client.pin(MODEL, [9, 9], owner="o") == 0
    o, p = client.pins()
    assert (o["owner"], o["tokens"], o["blocks"], o["expires_seconds"]) == ("o", 16, 2, None)
    assert (p["owner"], p["tokens"], p["blocks"], p["model"]) == ("p", 8, 1, "tiny")
    assert 3590 < p["expires_seconds"] <= 3600
    assert client.evict().blocks == 1
    assert client.status()["models"][0]["blocks"]["pinned"] == 2
    with context.alloc(PROMPT) as sequence:
        assert sequence.matched_tokens == 16
    assert client.verify()["differences"] == []
    assert client.unpin("o", "another model") == 0
    assert client.unpin("o", "tiny") == 1
    assert client.unpin("p") == 1
    assert client.pins() == []
    assert client.evict().blocks == 2


def test_a_short_pin_ends_by_itself(client: kvd_client.Client, context: kvd_client.Context) -> None:
    store(context, PROMPT[:8])
    assert client.pin(MODEL, PROMPT[:8], owner="o", ttl=0.0001) == 8
    eventually(lambda: client.pins() == [])
    assert client.evict().blocks == 1


@pytest.mark.parametrize(
    ("owner", "ttl", "tokens"),
    [
        ("", 0, [1]),
        ("o" * 65, 0, [1]),
        ("équipe", 0, [1]),
        ("o", -1, [1]),
        ("o", float("nan"), [1]),
        ("o", float("inf"), [1]),
        ("o", 0, [-1]),
    ],
)
def test_a_pin_that_cannot_be_is_refused(
    client: kvd_client.Client,
    context: kvd_client.Context,
    owner: str,
    ttl: float,
    tokens: list[int],
) -> None:
    assert context
    with pytest.raises(errors.BadMessage):
        client.pin(MODEL, tokens, owner=owner, ttl=ttl)
    with pytest.raises(errors.UnknownModel):
        client.pin(bytes(32), [1], owner="o")


def test_reports(client: kvd_client.Client, context: kvd_client.Context) -> None:
    store(context, PROMPT)
    with context.alloc(PROMPT, request="chat 7"):
        (row,) = client.sequences()
        assert (row["request"], row["tokens"], row["leased_blocks"]) == ("chat 7", 24, 3)
        (row,) = client.clients()
        assert (row["client"], row["sequences"], row["leased_blocks"]) == ("python", 1, 3)
        status = client.status()
        assert status["models"][0]["blocks"]["active"] == 3
        assert status["accounting"]["active_bytes"] == 3 * STRIDE
        assert status["accounting"]["drift_bytes"] == 0
    assert client.verify()["ok"]
    assert client.ping().instance == status["instance"]


# --- two processes

WORKER = """
import sys
import kvd_client
from tests.client.blocks import MODEL, holds, store

runtime_dir, n_tokens = sys.argv[1:]
tokens = list(range(int(n_tokens)))
with kvd_client.connect(runtime_dir, staging_bytes=1 << 20) as client:
    with client.open_context(MODEL) as context:
        print("ready", flush=True)
        sys.stdin.readline()
        store(context, tokens)
        with context.alloc(tokens) as sequence:
            print(sequence.matched_tokens, holds(sequence, tokens), flush=True)
"""


class Worker:
    """A process that stores the tokens 0 .. n-1 when it is told to, and reads them back."""

    def __init__(self, daemon: Daemon, n_tokens: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(daemon.runtime_dir), str(n_tokens)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def result(self) -> str:
        out, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0
        return out.strip()


def test_one_process_fetches_what_another_has_stored(
    daemon: Daemon, client: kvd_client.Client, context: kvd_client.Context
) -> None:
    worker = Worker(daemon, 100)
    worker.go()
    assert worker.result() == "100 True"
    with context.alloc([*range(90), 1]) as sequence:
        assert sequence.matched_tokens == 90
        assert bytes(sequence.block(11)) == payload(range(96))
    assert client.verify()["ok"]


def test_processes_that_store_the_same_prefix_at_once_store_it_once(
    daemon: Daemon, client: kvd_client.Client
) -> None:
    before = client.status()["counters"]["stored_blocks"]
    workers = [Worker(daemon, 800) for _ in range(2)]
    for worker in workers:
        worker.go()
    assert [worker.result() for worker in workers] == ["800 True"] * 2
    (model,) = client.status()["models"]
    assert model["blocks"]["cached"] == 100
    assert client.status()["counters"]["stored_blocks"] == before + 100
    assert client.verify()["ok"]


def test_threads_take_turns(client: kvd_client.Client, context: kvd_client.Context) -> None:
    """The thread rule: calls are put behind each other, and each gets its own answer."""
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(30):
                tokens = [number, turn, *range(14)]
                store(context, tokens)
                with context.alloc(tokens, wait=5) as sequence:
                    assert holds(sequence, tokens)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert client.sequences() == []
