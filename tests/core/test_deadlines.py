"""Who is due when, though owners change their minds; and no more entries than there are owners."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from kvd.core.deadlines import SMALL, Deadlines
from kvd.core.sequences import Context, Sequence, State, Waiter
from kvd_proto.messages import Alloc
from tests.core.driver import alloc


def sequence(idle: float, touched: float = 0.0) -> Sequence:
    return Sequence(None, 0, 1, "", None, None, idle, touched)


def waiter(context: Context, since: float, wait_ms: int) -> Waiter:
    made = Waiter(1, 1, context, alloc(1, wait_ms=wait_ms), since)
    context.waiting[made] = None
    return made


def drain(deadlines: Deadlines, now: float) -> list[object]:
    found = []
    while (owner := deadlines.pop(now)) is not None:
        found.append(owner)
    return found


def test_the_first_that_is_due_comes_first() -> None:
    deadlines = Deadlines()
    late, early, never = sequence(2.0), sequence(1.0), sequence(0.0)
    for owner in (late, early, never):
        deadlines.add(owner)
    assert deadlines.next() == 1.0
    assert deadlines.pop(0.5) is None
    assert drain(deadlines, 2.0) == [early, late]
    assert (deadlines.next(), len(deadlines)) == (None, 0)


def test_those_of_one_moment_come_in_the_order_of_their_coming() -> None:
    deadlines = Deadlines()
    owners = [sequence(1.0) for _ in range(5)]
    for owner in owners:
        deadlines.add(owner)
    assert drain(deadlines, 1.0) == owners


def test_what_was_put_off_comes_later() -> None:
    deadlines = Deadlines()
    one, other = sequence(1.0), sequence(2.0)
    deadlines.add(one)
    deadlines.add(other)
    one.touched = 5.0
    assert deadlines.next() == 2.0
    assert drain(deadlines, 2.0) == [other]
    assert deadlines.next() == 6.0


def test_what_has_ended_is_not_heard_of() -> None:
    deadlines = Deadlines()
    context = Context(1, None, None, deque())
    ended, waiting = sequence(1.0), waiter(context, 0.0, 1500)
    deadlines.add(ended)
    deadlines.add(waiting)
    ended.state = State.COMPLETED
    assert deadlines.next() == 1.5
    del context.waiting[waiting]
    assert deadlines.next() is None
    assert len(deadlines) == 0


def test_long_timeouts_do_not_pile_up() -> None:
    """A day's timeout for sequences that live for a moment."""
    deadlines = Deadlines()
    open_ones: deque[Sequence] = deque()
    for number in range(10_000):
        made = sequence(86_400.0, touched=float(number))
        deadlines.add(made)
        open_ones.append(made)
        if len(open_ones) > 10:
            open_ones.popleft().state = State.COMPLETED
        assert len(deadlines) <= SMALL + 1
    assert drain(deadlines, 1e9) == list(open_ones)


def test_many_that_live_are_not_looked_through_each_time() -> None:
    deadlines = Deadlines()
    looked = 0

    class Watched(Waiter):
        @property
        def due(self) -> float:
            nonlocal looked
            looked += 1
            return self.since

    for number in range(10_000):
        deadlines.add(Watched(1, 1, None, Alloc(1, "", b"", 0, 0, 0), float(number)))
    assert looked < 4 * 10_000


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("add", "touch", "end", "pass")),
            st.integers(0, 9),
            st.sampled_from((0.0, 0.5, 1.0, 4.0)),
        ),
        max_size=60,
    )
)
def test_beside_a_list_that_is_searched(moves: list[tuple[str, int, float]]) -> None:
    deadlines, owners, now = Deadlines(), [], 0.0
    for move, which, seconds in moves:
        if move == "add":
            owners.append(sequence(seconds, now))
            deadlines.add(owners[-1])
        elif move == "pass":
            now += seconds
            due = [each for each in owners if each.due is not None and each.due <= now]
            assert set(map(id, drain(deadlines, now))) == set(map(id, due))
            for owner in due:
                owner.state = State.TIMED_OUT
        elif which < len(owners):
            if move == "touch":
                owners[which].touched = now
            else:
                owners[which].state = State.COMPLETED
        times = [each.due for each in owners if each.due is not None]
        assert deadlines.next() == min(times, default=None)
