"""The store's jobs: memory that is not wanted any more is not taken, and what was taken goes."""

import threading
from collections.abc import Iterator

import pytest

from kvd.staging import HEADER_BYTES
from kvd.store import StagingRoom, Store
from kvd_proto.errors import KvdError
from tests.shell.raw import until

SIZE = HEADER_BYTES + (64 << 20)


@pytest.fixture
def store() -> Iterator[Store]:
    opened = Store(lambda suffix: f"kvd-test-none.{suffix}", lambda _: None)
    yield opened
    opened.close(keep_arenas=False)


def test_the_staging_of_a_client_that_is_gone_before_is_never_made(store: Store) -> None:
    """Who connects and hangs up again and again takes no memory at all."""
    busy, told = threading.Event(), list[KvdError | None]()
    store.ask(busy.wait, lambda *_: None)
    rooms = []
    for number in range(100):
        session = b"%d" % number
        store.open_staging(session, SIZE, told.append)
        rooms.append(store.stagings[session])
        store.close_staging(session)
    store.open_staging(b"stays", SIZE, told.append)
    stays = store.stagings[b"stays"]
    busy.set()
    until(lambda: store.finish_jobs() or len(told) == 101)
    assert told == [None] * 101
    assert all(room.making is None and room.staging is None for room in rooms)
    assert stays.staging is not None
    assert stays.staging.backed_bytes() == SIZE


def test_what_has_been_made_of_it_goes_at_once_when_its_client_goes_meanwhile() -> None:
    room = StagingRoom(SIZE)
    making = room.make(0)
    for _ in range(3):
        assert next(making) > 0
    assert room.making is not None
    frame = room.making.gi_frame
    assert frame is not None
    assert list(room.end()) == []
    assert room.making.gi_frame is None, "its descriptor is closed with it"
    assert list(making) == []
    assert room.staging is None
