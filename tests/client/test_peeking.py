"""peek: what it says after everything that can happen to a cache, and that it waits for nobody."""

import asyncio
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import kvd_client
from kvd_client import PromptKeys, aio, errors
from tests.client.blocks import BLOCK_TOKENS, MODEL, eventually, mappings, store
from tests.client.test_lifecycle import SMALL, mortal, restart, worker
from tests.support import Daemon, start_daemon

PROMPT = list(range(10 * BLOCK_TOKENS))
OTHER = kvd_client.Model("other", bytes([1] * 32), "array", MODEL.layers, 2 * BLOCK_TOKENS)

__all__ = ["mortal", "worker"]  # fixtures


@pytest.fixture
def context(client: kvd_client.Client) -> Any:
    with client.open_context(MODEL, n_seq_max=4) as opened:
        yield opened


# --- what is cached


def test_it_counts_the_full_blocks_that_are_cached(context: kvd_client.Context):
    assert context.peek(PROMPT) == 0
    store(context, PROMPT[:20])
    assert context.peek(PROMPT) == 16, "a block that is not full is not counted"
    with context.alloc(PROMPT) as sequence:
        assert sequence.matched_tokens == 20
    store(context, PROMPT)
    assert context.peek(PROMPT) == len(PROMPT)
    assert context.peek([*PROMPT, 7]) == len(PROMPT)
    assert context.peek(PROMPT[:-1]) == len(PROMPT) - BLOCK_TOKENS
    assert context.peek(PROMPT[:40] + [7] * 40) == 40
    assert context.peek(PROMPT[1:]) == context.peek([]) == context.peek(PROMPT[:7]) == 0


def test_another_client_sees_it_too_and_leases_nothing(
    context: kvd_client.Context, other: kvd_client.Client
):
    with other.open_context(MODEL) as there:
        store(context, PROMPT)
        before = other.status()
        assert there.peek(PROMPT) == len(PROMPT)
        after = other.status()
        for report in (before, after):
            del report["uptime_seconds"], report["rss_bytes"]
        assert before["accounting"] == after["accounting"]
        assert before["counters"] == after["counters"], "it is no use of anything"


def test_what_was_evicted_is_not_counted(context: kvd_client.Context):
    client = context.client
    store(context, PROMPT)
    client.evict("", 4)
    assert context.peek(PROMPT) == len(PROMPT) - 4 * BLOCK_TOKENS
    with context.alloc(PROMPT) as sequence:
        assert sequence.matched_tokens == context.peek(PROMPT)
    client.evict()
    assert context.peek(PROMPT) == 0
    store(context, PROMPT)
    assert context.peek(PROMPT) == len(PROMPT)
    client.forget(MODEL, PROMPT)
    assert context.peek(PROMPT) == 0


def test_the_keys_of_a_prompt_are_computed_once_for_each_model(
    context: kvd_client.Context, other: kvd_client.Client, monkeypatch: pytest.MonkeyPatch
):
    store(context, PROMPT)
    keys = PromptKeys(PROMPT)
    with other.open_context(MODEL) as same, other.open_context(OTHER) as another:
        assert [each.peek(keys) for each in (context, same, another)] == [80, 80, 0]

        def never(*_: object) -> bytes:
            raise AssertionError("computed again")

        monkeypatch.setattr("kvd_client.peeking.block_key", never)
        assert [each.peek(keys) for each in (context, same, another)] == [80, 80, 0]
        with pytest.raises(AssertionError, match="computed again"):
            same.peek(PROMPT)


def test_what_are_no_tokens_is_refused(context: kvd_client.Context):
    with pytest.raises(errors.BadMessage):
        context.peek([[1, 2], [3, 4]])
    with pytest.raises(errors.BadMessage):
        PromptKeys([-1])


def test_the_daemon_needs_not_answer(mortal: Daemon, worker: kvd_client.Client):
    context = worker.open_context(MODEL)
    store(context, PROMPT)
    mortal.process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert context.peek(PROMPT) == len(PROMPT)
        assert time.monotonic() - started < 1
    finally:
        mortal.process.send_signal(signal.SIGCONT)
    context.close()


def test_a_thread_that_waits_for_an_id_holds_nobody_up(client: kvd_client.Client):
    with client.open_context(MODEL, n_seq_max=1) as context:
        store(context, PROMPT)
        sequence = context.alloc(PROMPT)

        def waits() -> None:
            with pytest.raises(errors.NoSequenceFree):
                context.alloc(PROMPT, wait=3.0)

        thread = threading.Thread(target=waits)
        thread.start()
        eventually(lambda: not can_lock(client))
        assert context.peek(PROMPT) == len(PROMPT)
        assert not can_lock(client), "the other thread does not wait any more: nothing was tested"
        thread.join()
        sequence.release()


def can_lock(client: kvd_client.Client) -> bool:
    found = client.lock.acquire(blocking=False)
    if found:
        client.lock.release()
    return found


def test_asyncio_has_it_as_a_plain_call(daemon: Daemon):
    async def story() -> None:
        async with (
            aio.connect(daemon.runtime_dir) as client,
            client.open_context(MODEL) as context,
        ):
            with kvd_client.connect(daemon.runtime_dir) as writer:
                store(writer.open_context(MODEL), PROMPT)
            assert context.peek(PROMPT) == len(PROMPT)
            assert await context.reopen()

    asyncio.run(story())


# --- without a daemon, and after it


@pytest.mark.parametrize("kill", [False, True])
def test_it_says_0_while_the_daemon_is_away_and_what_is_warm_after_that(
    mortal: Daemon, worker: kvd_client.Client, kill: bool
):
    """These daemons keep nothing when they are stopped, and all when they are killed."""
    context = worker.open_context(MODEL)
    store(context, PROMPT)
    store(context, [9] * 40)
    keys = PromptKeys(PROMPT)
    assert context.peek(keys) == len(PROMPT)
    second = restart(mortal, kill=kill)
    try:
        assert context.peek(keys) == 0, "it is of a session that has ended"
        assert context.reopen()
        assert context.peek(keys) == (len(PROMPT) if kill else 0)
        assert context.peek([9] * 41) == (40 if kill else 0)
        assert context.peek([8] * 40) == 0
        store(context, PROMPT + [5] * 16)
        assert context.peek(PROMPT + [5] * 16) == len(PROMPT) + 16
        # What was found stays until nobody of before can read it.
        eventually(lambda: worker.evict() and context.peek(keys) == 0)
        assert worker.verify()["ok"]
        context.close()
    finally:
        second.stop()


def test_it_says_0_as_soon_as_the_daemon_is_dead(mortal: Daemon, worker: kvd_client.Client):
    context = worker.open_context(MODEL)
    store(context, PROMPT)
    mortal.kill()
    assert context.peek(PROMPT) == 0
    with pytest.raises(errors.Unavailable):
        context.reopen()
    context.close()


def test_without_a_daemon_it_says_0(tmp_path: Path):
    with kvd_client.connect(tmp_path / "nobody", fail_open=True) as client:
        context = client.open_context(MODEL)
        assert context.peek(PROMPT) == 0
        assert not context.reopen()


def test_a_context_that_was_opened_without_a_daemon_sees_it_when_it_is_open(tmp_path: Path):
    with kvd_client.connect(tmp_path / "run", fail_open=True) as client:
        context = client.open_context(MODEL)
        daemon = start_daemon(*SMALL, runtime_dir=tmp_path / "run")
        try:
            eventually(context.reopen)
            store(context, PROMPT)
            assert context.peek(PROMPT) == len(PROMPT)
            context.close()
        finally:
            daemon.stop()


def test_closed_ones_and_forked_children_cannot_peek(client: kvd_client.Client):
    context = client.open_context(MODEL)
    child = os.fork()
    if not child:
        try:
            context.peek(PROMPT)
        except errors.Forked:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    context.close()
    with pytest.raises(errors.Closed):
        context.peek(PROMPT)


def test_a_closed_client_has_nothing_mapped(daemon: Daemon):
    before = mappings()
    with kvd_client.connect(daemon.runtime_dir) as client:
        context = client.open_context(MODEL)
        store(context, PROMPT)
        assert context.peek(PROMPT)
        assert any(".index-" in line for line in mappings())
    del context
    assert mappings() == before


# --- while others work


def test_beside_everything_that_changes(daemon: Daemon):
    """Never more than was ever stored of a prompt, never an error, and the truth in the end."""
    prompts = [[number] * (12 * BLOCK_TOKENS) for number in range(60)]
    stored = [prompt[: (number % 12) * BLOCK_TOKENS] for number, prompt in enumerate(prompts)]
    stop = time.monotonic() + 4
    failures: list[BaseException] = []
    seen = 0

    def churn(seed: int) -> None:
        chance = random.Random(seed)
        try:
            with kvd_client.connect(daemon.runtime_dir) as client:
                context = client.open_context(MODEL)
                while time.monotonic() < stop:
                    store(context, chance.choice(stored))
                    if chance.random() < 0.3:
                        client.evict("", chance.randrange(1, 60))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(2)]
    with kvd_client.connect(daemon.runtime_dir) as client, client.open_context(MODEL) as context:
        keys = [PromptKeys(prompt) for prompt in prompts]
        for thread in threads:
            thread.start()
        while time.monotonic() < stop:
            for number, each in enumerate(keys):
                found = context.peek(each)
                assert found % BLOCK_TOKENS == 0
                assert found <= len(stored[number])
                seen += found > 0
        for thread in threads:
            thread.join()
        assert not failures
        assert seen > 100, "there was never anything to see"
        for number, each in enumerate(keys):
            with context.alloc(prompts[number]) as sequence:
                assert context.peek(each) == sequence.matched_tokens
        assert client.verify()["ok"]
