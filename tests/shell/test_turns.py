"""Whose turn it is: fair between lanes, and in an order that no memory minds."""

import random

from kvd.turns import Entry, Order, Turns

COPY, FREE, TAKE, ALONE = Order.COPY, Order.FREE, Order.TAKE, Order.ALONE


def run(turns: Turns[str], steps: dict[str, int]) -> list[str]:
    """Do everything, `steps` steps of each job (1 unless named)."""
    done: list[str] = []
    left = dict(steps)
    while (entry := turns.next()) is not None:
        done.append(entry.job)
        left[entry.job] = left.get(entry.job, 1) - 1
        if left[entry.job]:
            turns.pause(entry)
        else:
            turns.done(entry)
    return done


def test_nothing_is_nobodys_turn():
    assert Turns[str]().next() is None


def test_lanes_take_turns_and_each_is_first_in_first_out():
    turns: Turns[str] = Turns()
    for job, lane in (("a1", 1), ("a2", 1), ("b1", 2), ("c1", 3)):
        turns.add(job, TAKE, lane)
    assert run(turns, {"a1": 3, "b1": 2}) == ["a1", "b1", "c1", "a1", "b1", "a1", "a2"]


def test_a_lane_with_many_jobs_has_no_more_turns_than_one_with_one():
    turns: Turns[str] = Turns()
    for number in range(5):
        turns.add(f"many{number}", COPY, "many")
    turns.add("one", COPY, "one")
    assert run(turns, {"one": 2})[:4] == ["many0", "one", "many1", "one"]


def test_copies_alternate_with_the_others():
    turns: Turns[str] = Turns()
    turns.add("copy", COPY, 1)
    turns.add("take", TAKE, 2)
    assert run(turns, {"copy": 3, "take": 3}) == ["take", "copy"] * 3


def test_what_is_given_back_comes_before_what_is_taken():
    turns: Turns[str] = Turns()
    turns.add("take", TAKE, 1)
    first = turns.next()
    assert first is not None
    turns.pause(first)
    turns.add("free1", FREE, 1)
    turns.add("free2", FREE, 2)
    assert run(turns, {"take": 2, "free1": 3}) == ["free1"] * 3 + ["free2", "take", "take"]


def test_who_must_be_alone_comes_behind_all_before_and_ahead_of_all_after():
    turns: Turns[str] = Turns()
    turns.add("take", TAKE, 1)
    turns.add("free", FREE, 2)
    turns.add("report", ALONE, None)
    turns.add("later free", FREE, 2)
    turns.add("later take", TAKE, 3)
    turns.add("second report", ALONE, None)
    turns.add("last", TAKE, 3)
    assert run(turns, {"take": 2}) == [
        "free", "take", "take", "report", "later free", "later take", "second report", "last",
    ]  # fmt: skip


def test_copies_do_not_wait_for_who_must_be_alone():
    turns: Turns[str] = Turns()
    turns.add("take", TAKE, 1)
    turns.add("report", ALONE, None)
    turns.add("copy", COPY, 2)
    assert run(turns, {"take": 3, "copy": 2}) == ["take", "copy", "take", "copy", "take", "report"]


def test_the_rules_hold_in_any_order_of_coming():
    """Against the rules themselves, on a thousand seeded mixtures."""
    for seed in range(1000):
        rng = random.Random(seed)
        turns: Turns[int] = Turns()
        came: list[tuple[Order, int]] = []
        done: list[int] = []
        while len(came) < 40 or turns.next() is not None:
            if len(came) < 40 and rng.random() < 0.5:
                came.append((rng.choice(list(Order)), rng.randrange(3)))
                turns.add(len(came) - 1, *came[-1])
            entry: Entry[int] | None = turns.next()
            if entry is None:
                continue
            job, order, lane = entry.job, entry.order, entry.lane
            waiting = [number for number in range(len(came)) if number not in done]
            before = [number for number in waiting if number < job]
            same = [number for number in before if came[number] == (order, lane)]
            assert not same, "a lane is first in, first out"
            memory = [number for number in before if came[number][0] is not COPY]
            alone = [number for number in before if came[number][0] is ALONE]
            if order is not COPY:
                assert not alone, "it overtook one that must be alone"
            if order is ALONE:
                assert not memory, "it is not alone"
            if order is TAKE:
                frees = [number for number in before if came[number][0] is FREE]
                assert not frees, "it takes what is not given back"
            if rng.random() < 0.3:
                turns.pause(entry)
            else:
                turns.done(entry)
                done.append(job)
        assert sorted(done) == list(range(40)), seed
