"""The asyncio client: calls that overlap, cancellation, and what the blocking one does, too."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvd_client
from kvd_client import aio, errors
from kvd_proto.messages import Alloc, Allocated, ContextOpened, OpenContext, Release
from tests.client.blocks import (
    MODEL,
    PAYLOAD_BYTES,
    STRIDE,
    eventually,
    mappings,
    open_files,
    payload,
    payloads,
    store,
)
from tests.client.fake_daemon import fake_daemon
from tests.client.test_lifecycle import stopped
from tests.support import Daemon, running_daemon, start_daemon

PROMPT = list(range(24))
STAGING = 1 << 20


def run(work: Coroutine[Any, Any, None]) -> None:
    """In debug mode; warnings, of coroutines that nobody awaited among them, are errors."""
    asyncio.run(work, debug=True)
    gc.collect()


async def store_async(context: aio.AsyncContext, tokens: list[int]) -> None:
    client = context.client
    assert isinstance(client, aio.AsyncClient)
    async with context.alloc(tokens, wait=10) as sequence:
        rest = tokens[sequence.full_tokens :]
        if rest:
            commit = await sequence.append(rest, payloads(tokens, sequence.full_tokens))
            assert (await client.flush(commit)).failures == []


def holds(sequence: aio.AsyncSequence, tokens: list[int]) -> bool:
    return [bytes(sequence.block(index)) for index in range(sequence.n_blocks)] == payloads(tokens)


async def eventually_async(
    condition: Callable[[], Coroutine[Any, Any, object]], seconds: float = 10.0
) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def test_store_and_fetch_with_context_managers_or_awaits(daemon: Daemon) -> None:
    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=STAGING) as client,
            client.open_context(MODEL, n_seq_max=4) as context,
        ):
            await store_async(context, PROMPT)
            async with context.alloc([*PROMPT, 5]) as sequence:
                assert sequence.matched_tokens == 24
                assert holds(sequence, PROMPT)
                target = np.empty(PAYLOAD_BYTES, np.uint8)
                assert sequence.read_into(2, target) == PAYLOAD_BYTES
                assert target.tobytes() == payload(PROMPT)
            sequence = await context.alloc([])
            staged = await sequence.stage(16)
            sequence.unstage(staged)
            commit = await sequence.post_append(PROMPT[:8], payloads(PROMPT[:8]))
            assert (await client.flush()).failures == []
            assert commit.present == 1
            assert await sequence.refresh() == 8
            await sequence.keep_alive()
            assert await context.keep_alive() == []
            await sequence.release()
            with pytest.raises(errors.Closed):
                await sequence.release()
        client = await aio.connect(daemon.runtime_dir, staging_bytes=0)
        second = await client.open_context(MODEL)
        sequence = await asyncio.create_task(second.alloc(PROMPT))
        assert holds(sequence, PROMPT)
        assert (await client.sequences())[0]["tokens"] == 24
        assert (await client.status())["sequences"]["in_use"] == 1
        assert (await client.ping()).pid == daemon.process.pid
        assert len(await client.clients()) == 1
        assert (await client.evict()).blocks == 0
        await second.close()
        assert await client.pin(MODEL, PROMPT[:8], owner="o", ttl=60) == 8
        assert [row["tokens"] for row in await client.pins()] == [8]
        assert (await client.evict("tiny", 0)).blocks == 2
        assert await client.unpin("o") == 1
        assert (await client.evict("tiny", 1)).blocks == 1
        assert (await client.verify())["ok"]
        await client.close()
        await client.close()
        with pytest.raises(errors.Closed):
            await client.ping()

    run(work())


def test_an_alloc_that_waits_holds_nobody_up(daemon: Daemon) -> None:
    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=0) as client,
            client.open_context(MODEL, n_seq_max=1) as context,
        ):
            holder = await context.alloc([])
            waiting = [asyncio.create_task(context.alloc([], wait=30)) for _ in range(3)]
            await eventually_async(lambda: _waiting(client, 3))
            assert (await client.ping()).instance == daemon.instance
            await holder.release()
            for task in waiting:  # first come, first served
                sequence = await task
                assert sequence.seq_id == 0
                await sequence.release()

    run(work())


async def _waiting(client: aio.AsyncClient, n: int) -> bool:
    return bool((await client.status())["sequences"]["waiting"] == n)


def test_first_use_by_many_at_once_opens_one_session_and_one_context(daemon: Daemon) -> None:
    async def work() -> None:
        client = aio.AsyncClient(daemon.runtime_dir, staging_bytes=STAGING)
        await asyncio.gather(*(client.ping() for _ in range(10)))
        context = aio.AsyncContext(client, MODEL, 8)
        sequences = await asyncio.gather(*(context.alloc([]) for _ in range(8)))
        assert sorted(sequence.seq_id for sequence in sequences) == list(range(8))
        (row,) = await client.clients()  # one session, and only one
        assert (row["contexts"], row["sequences"]) == (1, 8)
        await client.close()

    run(work())


def test_many_coroutines_share_a_small_staging_and_few_ids(daemon: Daemon) -> None:
    async def one(context: aio.AsyncContext, number: int) -> None:
        tokens = [number, *PROMPT]
        await store_async(context, tokens)
        async with context.alloc(tokens, wait=10) as sequence:
            assert holds(sequence, tokens)

    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=5 * STRIDE) as client,
            client.open_context(MODEL, n_seq_max=3) as context,
        ):
            await asyncio.gather(*(one(context, number) for number in range(60)))
            assert (await client.verify())["ok"]
            (model,) = (await client.status())["models"]
            assert model["blocks"]["cached"] == 60 * 4
            assert await _in_use(client, 0)

    run(work())


def test_one_waits_for_room_that_another_gives_back(daemon: Daemon) -> None:
    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=2 * STRIDE) as client,
            client.open_context(MODEL) as context,
            context.alloc([]) as first,
            context.alloc([]) as second,
        ):
            staged = await first.stage(16)
            waiting = asyncio.create_task(second.stage(16))
            await asyncio.sleep(0)
            first.unstage(staged)
            second.unstage(await waiting)
            await first.stage(16)
            with pytest.raises(errors.StagingFull):
                await second.stage(8, wait=0.05)

    run(work())


def test_a_cancelled_alloc_is_released_when_its_answer_comes(daemon: Daemon) -> None:
    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=0) as client,
            client.open_context(MODEL, n_seq_max=1) as context,
        ):
            holder = await context.alloc([])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(context.alloc([], wait=60), 0.05)
            assert await _waiting(client, 1)
            await holder.release()
            async with context.alloc([], wait=5) as sequence:
                assert sequence.generation > holder.generation + 1
            assert await client.sequences() == []

    run(work())


def test_cancelling_at_any_moment_leaves_everything_in_order(daemon: Daemon) -> None:
    """At each of the first few hundred steps of the loop that a whole use takes."""

    async def use(context: aio.AsyncContext, number: int) -> None:
        tokens = [number, *PROMPT]
        async with context.alloc(tokens, wait=5) as sequence:
            await sequence.append(tokens, payloads(tokens))
            await sequence.refresh()

    async def work() -> None:
        async with aio.connect(daemon.runtime_dir, staging_bytes=8 * STRIDE) as client:
            async with client.open_context(MODEL, n_seq_max=2) as context:
                ended = 0
                for steps in range(60):
                    task = asyncio.create_task(use(context, steps))
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
                        ended += 1
                assert ended < 60
                for number in range(100, 110):
                    await use(context, number)
                    await store_async(context, [number, *PROMPT])
                await eventually_async(lambda: _in_use(client, 0))
                assert context.sequences == {}
                session = client.session
                assert session is not None
                assert session.staging is not None
                await client.flush()
                assert session.in_flight == 0
                assert session.staging.take([8 * STRIDE]) is not None
            assert (await client.clients())[0]["contexts"] == 0
            assert (await client.verify())["ok"]

    run(work())


async def _in_use(client: aio.AsyncClient, n: int) -> bool:
    return bool((await client.status())["sequences"]["in_use"] == n)


def test_cancelling_while_it_connects_or_opens_leaves_everything_in_order(daemon: Daemon) -> None:
    async def work() -> None:
        client = aio.AsyncClient(daemon.runtime_dir, staging_bytes=STAGING)
        context = aio.AsyncContext(client, MODEL, 4)
        for steps in range(30):
            tasks = [asyncio.create_task(context.alloc([])) for _ in range(2)]
            for _ in range(steps):
                await asyncio.sleep(0)
            tasks[0].cancel()
            with suppress(asyncio.CancelledError):
                await (await tasks[0]).release()
            await (await tasks[1]).release()
        (row,) = await client.clients()
        assert (row["contexts"], row["sequences"]) == (1, 0)
        await client.close()

    run(work())


def test_a_context_that_cannot_be_opened_fails_for_all_who_wait(daemon: Daemon) -> None:
    async def work() -> None:
        async with aio.connect(daemon.runtime_dir, staging_bytes=0) as client:
            with pytest.raises(errors.BadMessage):
                await client.open_context(MODEL, n_seq_max=99)
            assert client.contexts == set()
            context = aio.AsyncContext(client, MODEL, 99)
            results = await asyncio.gather(
                *(context.alloc([]) for _ in range(4)), return_exceptions=True
            )
            assert [type(result) for result in results] == [errors.BadMessage] * 4

    run(work())


def test_closing_tells_those_who_wait(daemon: Daemon) -> None:
    async def work() -> None:
        client = await aio.connect(daemon.runtime_dir, staging_bytes=STAGING)
        context = await client.open_context(MODEL, n_seq_max=1)
        sequence = await context.alloc([])
        waiting = [asyncio.create_task(context.alloc([], wait=60)) for _ in range(3)]
        await eventually_async(lambda: _waiting(client, 3))
        await sequence.post_append(PROMPT, payloads(PROMPT))
        await client.close()
        for task in waiting:
            with pytest.raises(errors.Closed):
                await task
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=0) as client,
            client.open_context(MODEL) as context,
        ):

            async def is_stored() -> bool:
                async with context.alloc(PROMPT) as sequence:
                    return sequence.matched_tokens == len(PROMPT)

            await eventually_async(is_stored)  # what was posted

    run(work())


def test_close_is_refused_under_views_and_everything_goes_on(daemon: Daemon) -> None:
    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=STAGING) as client,
            client.open_context(MODEL) as context,
        ):
            await store_async(context, PROMPT)
            async with context.alloc(PROMPT) as sequence:
                array = np.frombuffer(sequence.block(0), np.uint8)
                for end in (client.close, context.close, sequence.release):
                    with pytest.raises(errors.ViewsAlive):
                        await end()
                assert await client.ping()
                assert array.tobytes() == payload(PROMPT[:8])
                del array

    run(work())


def test_a_restart_is_noticed_by_all_and_survived(own_daemon: Daemon) -> None:
    daemon = own_daemon

    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=STAGING) as client,
            client.open_context(MODEL, n_seq_max=2) as context,
        ):
            old = await context.alloc([])
            held = await context.alloc([])
            waiting = [asyncio.create_task(context.alloc([], wait=60)) for _ in range(3)]
            await eventually_async(lambda: _waiting(client, 3))
            await asyncio.to_thread(daemon.kill)
            for task in waiting:
                with pytest.raises(errors.Unavailable):
                    await task
            second = await asyncio.to_thread(
                start_daemon,
                "--max-memory",
                "64MiB",
                runtime_dir=daemon.runtime_dir,
                instance=daemon.instance,
            )
            try:
                with pytest.raises(errors.StaleHandle):
                    await old.append(PROMPT, payloads(PROMPT))
                await old.release()
                new = await asyncio.gather(*(context.alloc([], wait=5) for _ in range(1)))
                assert new[0].seq_id == old.seq_id != held.seq_id
                assert await _in_use(client, 2)
                await held.release()
                assert await _in_use(client, 1)
            finally:
                await client.close()
                await asyncio.to_thread(second.stop)

    run(work())


def test_an_id_that_is_released_while_the_context_opens_again_comes_back(tmp_path: Path) -> None:
    """The daemon was told that it is busy, and must hear that it is not any more."""
    asked, go = threading.Event(), threading.Event()
    opened: list[OpenContext] = []
    released: list[Release] = []

    def answer(message: Any) -> Any:
        if isinstance(message, OpenContext):
            opened.append(message)
            if message.busy:
                asked.set()
                assert go.wait(10)
                return ContextOpened(6, [7] * len(message.busy))
        if isinstance(message, Alloc):
            return Allocated(len(opened) - 1, 1, 0, 0, b"")
        if isinstance(message, Release):
            released.append(message)
        return None

    async def work() -> None:
        async with aio.connect(tmp_path, staging_bytes=0) as client:
            context = await client.open_context(MODEL, n_seq_max=3)
            held = await context.alloc([])
            assert client.session is not None
            client.session.lose(errors.Unavailable("as if"))
            opening = asyncio.create_task(context.alloc([]))
            await asyncio.to_thread(asked.wait, 10)
            await held.release()
            go.set()
            assert (await opening).seq_id == 1
            assert [message.busy for message in opened] == [[], [0]]
            await client.close()

    with fake_daemon(tmp_path, answer):
        run(work())
    assert [(each.context, each.seq_id, each.generation) for each in released] == [(6, 0, 7)]


def test_a_hung_daemon_holds_up_nobody_for_long(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with aio.connect(daemon.runtime_dir, fail_open=True, staging_bytes=STAGING) as client:
            context = await client.open_context(MODEL, n_seq_max=8)
            with stopped(daemon):
                started = time.monotonic()
                sequences = await asyncio.gather(*(context.alloc([]) for _ in range(6)))
                assert time.monotonic() - started < 0.5
                assert sorted(each.seq_id for each in sequences) == [0, 1, 2, 3, 4, 5]
                assert not any(each.shared for each in sequences)
                warned = [each for each in caplog.records if each.name == "kvd_client"]
                assert len(warned) == 1
            for each in sequences:
                await each.release()

            async def came_back() -> bool:
                async with context.alloc([]) as sequence:
                    return sequence.shared

            await eventually_async(came_back)
            await store_async(context, PROMPT)

    caplog.set_level(logging.WARNING, "kvd_client")
    run(work())


def test_without_a_daemon_it_goes_on_and_comes_back(tmp_path: Path) -> None:
    async def work() -> None:
        with pytest.raises(errors.Unavailable):
            await aio.connect(tmp_path / "run")
        async with aio.connect(tmp_path / "run", fail_open=True, staging_bytes=0) as client:
            context = await client.open_context(MODEL)
            async with context.alloc([]) as sequence:
                assert not sequence.shared
            with running_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run"):

                async def came_back() -> bool:
                    async with context.alloc([]) as sequence:
                        return sequence.shared

                await eventually_async(came_back)

    run(work())


def test_a_deadline_counts_although_the_loop_was_held_up(daemon: Daemon) -> None:
    """The answer was there in time; it was our own loop that did not look."""

    async def work() -> None:
        async with aio.connect(daemon.runtime_dir, timeout=0.2, staging_bytes=0) as client:
            asking = asyncio.create_task(client.ping())
            await asyncio.sleep(0)
            time.sleep(0.4)  # what is tested: a loop that is held up
            assert (await asking).pid == daemon.process.pid
            with stopped(daemon), pytest.raises(errors.DeadlineExceeded):
                await client.ping()
            await client.ping()

    asyncio.run(work())


def test_a_client_belongs_to_its_loop_and_its_process(daemon: Daemon) -> None:
    kept: list[aio.AsyncClient] = []

    async def first() -> None:
        client = await aio.connect(daemon.runtime_dir, staging_bytes=0)
        kept.append(client)
        child = os.fork()
        if child == 0:
            code = 1
            with suppress(BaseException):
                try:
                    await client.ping()
                except errors.Forked:
                    await client.close()
                    code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert await client.ping()

    async def second() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await kept[0].ping()
        await kept[0].close()

    asyncio.run(first())
    asyncio.run(second())


def test_it_can_start_a_private_daemon(tmp_path: Path) -> None:
    instance = f"aio-{os.getpid()}"

    async def work() -> None:
        async with aio.connect(
            tmp_path / "run",
            instance=instance,
            start_private=True,
            max_memory="64MiB",
            staging_bytes=0,
        ) as client:
            pid = (await client.ping()).pid
            os.kill(pid, signal.SIGTERM)

    run(work())
    eventually(lambda: not [each for each in os.listdir("/dev/shm") if instance in each])


def test_it_leaves_no_descriptors_and_no_mappings(daemon: Daemon) -> None:
    async def use() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=STAGING) as client,
            client.open_context(MODEL) as context,
        ):
            await store_async(context, PROMPT)
            async with context.alloc(PROMPT) as sequence:
                assert holds(sequence, PROMPT)

    async def work() -> None:
        await use()
        before = open_files()
        for _ in range(20):
            await use()
        await eventually_async(lambda: _few(before))
        assert mappings() == []

    async def _few(most: int) -> bool:
        return open_files() <= most

    run(work())


def test_both_kinds_of_client_share_blocks(daemon: Daemon, context: kvd_client.Context) -> None:
    store(context, PROMPT)

    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=STAGING) as client,
            client.open_context(MODEL) as opened,
        ):
            async with opened.alloc(PROMPT) as sequence:
                assert holds(sequence, PROMPT)
            await store_async(opened, [7, *PROMPT])

    run(work())
    with context.alloc([7, *PROMPT]) as sequence:
        assert sequence.matched_tokens == 25


def test_what_is_never_awaited_is_warned_of(daemon: Daemon) -> None:
    """As with any coroutine; nothing is opened by it."""

    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=0) as client,
            client.open_context(MODEL) as context,
        ):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                context.alloc([])
                gc.collect()
            assert "never awaited" in str(caught[0].message)
            assert await _in_use(client, 0)

    asyncio.run(work())
