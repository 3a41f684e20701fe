"""Ghosts: what is remembered of dropped blocks, for how long, and at which price."""

from random import Random

import pytest

from kvd.core import ghosts
from kvd.core.ghosts import Ghost, Ghosts
from kvd.core.reasons import Reason


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Ghosts:
    """Three generations of two."""
    monkeypatch.setattr(ghosts, "GENERATION", 2)
    monkeypatch.setattr(ghosts, "GENERATIONS", 3)
    return Ghosts()


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def noted(found: Ghosts, first: int, end: int) -> None:
    """One block is dropped each second."""
    for number in range(first, end):
        found.noted(float(number), Reason.ROOM).append(key(number))


def test_a_ghost_says_when_and_why() -> None:
    found = Ghosts()
    found.noted(5.0, Reason.ROOM).append(key(1))
    found.noted(5.0, Reason.COMMAND).append(key(2))
    found.noted(6.0, Reason.COMMAND).append(key(3))
    assert found.find(key(1)) == Ghost(5.0, Reason.ROOM)
    assert found.find(key(2)) == Ghost(5.0, Reason.COMMAND)
    assert found.find(key(3)) == Ghost(6.0, Reason.COMMAND)
    assert found.find(key(4)) is None
    assert found.complete_since is None


def test_the_oldest_are_forgotten_and_it_is_known_since_when(small: Ghosts) -> None:
    noted(small, 0, 6)
    assert [small.find(key(number)) is not None for number in range(6)] == [True] * 6
    assert small.complete_since is None
    noted(small, 6, 7)
    assert [small.find(key(number)) is not None for number in range(7)] == [False] * 2 + [True] * 5
    assert small.complete_since == 2.0
    noted(small, 7, 100)
    assert len(small) == 6
    assert small.complete_since == 94.0


def test_what_was_dropped_again_is_told_as_it_was_last(small: Ghosts) -> None:
    small.noted(1.0, Reason.ROOM).append(key(1))
    noted(small, 2, 4)
    small.noted(9.0, Reason.QUOTA).append(key(1))
    assert small.find(key(1)) == Ghost(9.0, Reason.QUOTA)


def test_so_many_blocks_are_remembered_and_no_more() -> None:
    """PROTOCOL.md promises the least."""
    least = (ghosts.GENERATIONS - 1) * ghosts.GENERATION
    found = Ghosts()
    noted(found, 0, least)
    assert found.complete_since is None
    noted(found, least, 3 * least)
    assert least <= len(found) <= least + ghosts.GENERATION
    assert found.find(key(2 * least)) is not None
    assert f"{least:,}" == "57,344"


def test_models_that_gave_way_are_remembered_a_bounded_number_of_them() -> None:
    found = Ghosts()
    for number in range(200):
        found.note_arena(key(number), float(number), 3)
    assert len(found.arenas) == ghosts.MAX_ARENAS
    assert found.arenas[key(199)] == 199.0
    assert key(0) not in found.arenas
    assert found.counts[Reason.ARENA] == 600


def test_who_asks_again_and_again_does_not_make_them_live_longer(small: Ghosts) -> None:
    for number in range(100):
        noted(small, number, number + 1)
        assert small.find(key(number)) == Ghost(float(number), Reason.ROOM)
        assert len(small) <= 6
    assert small.find(key(90)) is None


def test_what_follows_a_key_does_not_count(small: Ghosts) -> None:
    small.noted(5.0, Reason.ROOM).append(key(1) + b"checksum")
    assert small.find(key(1)) == Ghost(5.0, Reason.ROOM)


@pytest.mark.parametrize("seed", range(20))
def test_each_is_counted_once_whenever_one_asks(small: Ghosts, seed: int) -> None:
    random = Random(seed)
    counts = dict.fromkeys(Reason, 0)
    when = 0.0
    for number in range(300):
        reason = random.choice((Reason.ROOM, Reason.QUOTA))
        if random.random() < 0.3:
            when = float(number)
        small.noted(when, reason).append(key(number))
        counts[reason] += 1
        if random.random() < 0.2:
            assert small.find(key(number)) == Ghost(when, reason)
        if random.random() < 0.2:
            assert small.counts == counts
    assert small.counts == counts
