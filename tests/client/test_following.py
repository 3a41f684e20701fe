"""Events from Python: at once, waited for, and with the asyncio client beside other calls."""

import asyncio
import threading
import time

import pytest

import kvd_client
from kvd_client import aio, errors
from tests.client.blocks import BLOCK_TOKENS, MODEL, store
from tests.support import Daemon

PROMPT = list(range(3 * BLOCK_TOKENS))


def test_what_has_happened_and_what_happens_next(
    client: kvd_client.Client, other: kvd_client.Client
) -> None:
    now = other.events()
    assert (now.events, now.lost) == ([], 0)
    with client.open_context(MODEL) as context:
        store(context, PROMPT)
    batch = other.events(now.next, wait=20)
    kinds = [event["kind"] for event in batch.events]
    assert [kind for kind in kinds if kind != "model"] == ["alloc", *["seal"] * 3, "release"]
    assert batch.events[-1]["tokens"] == len(PROMPT)
    assert (
        other.events(now.next, kinds=["seal"], most=2).events
        == [event for event in batch.events if event["kind"] == "seal"][:2]
    )
    assert other.events(now.next, kinds=["seal"], model="none").events == []


def test_waiting_ends_when_something_happens(
    daemon: Daemon, client: kvd_client.Client, other: kvd_client.Client
) -> None:
    start = client.events().next
    timer = threading.Timer(0.3, lambda: kvd_client.connect(daemon.runtime_dir).close())
    timer.start()
    began = time.monotonic()
    batch = other.events(start, wait=30)
    timer.join()
    assert 0.25 < time.monotonic() - began < 20
    assert batch.events[0]["kind"] == "session-opened"


def test_a_wait_longer_than_the_timeout_is_no_missed_deadline(daemon: Daemon) -> None:
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=0, timeout=1.0) as client:
        start = client.events().next
        began = time.monotonic()
        assert client.events(start, wait=1.5).events == []
        assert time.monotonic() - began > 1.4


def test_asyncio_goes_on_beside_a_wait(daemon: Daemon) -> None:
    async def work() -> None:
        async with aio.connect(daemon.runtime_dir, staging_bytes=0) as client:
            start = (await client.events()).next
            waiting = asyncio.create_task(client.events(start, wait=30))
            await asyncio.sleep(0)
            await client.ping()
            assert not waiting.done()
            async with client.open_context(MODEL) as context, context.alloc(PROMPT):
                pass
            batch = await waiting
            assert batch.events[0]["kind"] in ("model", "alloc")

    asyncio.run(work())


@pytest.mark.parametrize("wait", [-1.0, 60.5, float("nan")])
def test_what_cannot_be_waited_for(client: kvd_client.Client, wait: float) -> None:
    with pytest.raises(errors.BadMessage, match="wait is from 0 to 60 seconds"):
        client.events(wait=wait)
    with pytest.raises(errors.BadMessage, match="no such kind"):
        client.events(kinds=["fire"])
