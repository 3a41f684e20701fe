"""The rules of continuous batching, without llama.cpp: who starts, who computes, who is put back.

The simulation is a context of so many cells, counted token by token, in which jobs come, are
cancelled and run out of time at random; it refuses a batch that has no room, as llama.cpp does.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvd_client.integrations.llama.batching.cells import Cells
from kvd_client.integrations.llama.batching.schedule import (
    GROWTH,
    WORTH_WAITING,
    Job,
    Schedule,
    State,
    common_prefix,
)


def prompt(n_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, n_tokens, dtype=np.int32)


def submit(schedule: Schedule, tokens: np.ndarray, max_tokens: int = 4, **options: int) -> Job:
    job = Job(tokens, max_tokens, **options)
    schedule.submit(job)
    return job


def start_all(schedule: Schedule) -> list[Job]:
    """Those that start now, each with nothing in its sequence but what it shares."""
    found = []
    while (start := schedule.next_start()) is not None:
        job, donor = start
        shared = 0
        if donor is not None:
            shared = min(common_prefix(job.tokens[:-1], donor.tokens), donor.length)
        schedule.started(job, shared, donor, shared)
        found.append(job)
    return found


def compute(schedule: Schedule) -> list[tuple[Job, int]]:
    """Carry out a plan; returns how many tokens of whom were computed. None ends its text."""
    plan = schedule.plan()
    found = []
    for job in plan.rows + plan.prefills:
        before = job.length
        schedule.computed(job)
        found.append((job, job.length - before))
        if not job.pending:
            schedule.sampled(job, 7, is_eog=False)
    return found


def test_a_long_prompt_delays_no_other_token_by_more_than_a_batch() -> None:
    schedule = Schedule(n_ctx=4096, n_batch=64, n_seq_max=4)
    short = [submit(schedule, prompt(1, seed), 20) for seed in range(3)]
    long = submit(schedule, prompt(400, 9))
    assert start_all(schedule) == [*short, long]
    for _ in range(6):
        assert compute(schedule) == [*((job, 1) for job in short), (long, 64)]
    assert compute(schedule) == [*((job, 1) for job in short), (long, 16)]
    assert compute(schedule)[-1] == (long, 1)


def test_pieces_are_whole_batches_from_where_computing_begins() -> None:
    schedule = Schedule(n_ctx=4096, n_batch=64, n_seq_max=4)
    first = submit(schedule, prompt(150, 1))
    schedule.started(first, 21)  # so much was imported
    second = submit(schedule, prompt(70, 2))
    schedule.started(second, 0)
    # Beside the last piece of the first one, less than a whole piece of the second would fit.
    assert [compute(schedule) for _ in range(4)] == [
        [(first, 64)],
        [(first, 64)],
        [(first, 1), (second, 64)],
        [(first, 1), (second, 6)],
    ]


def test_priority_goes_first_and_then_age() -> None:
    schedule = Schedule(n_ctx=4096, n_batch=8, n_seq_max=4)
    jobs = [submit(schedule, prompt(8, seed), priority=seed % 2) for seed in range(4)]
    assert start_all(schedule) == [jobs[1], jobs[3], jobs[0], jobs[2]]
    order = [compute(schedule)[-1][0] for _ in range(4)]
    assert order == [jobs[1], jobs[3], jobs[0], jobs[2]]


def test_who_shares_a_prefix_waits_for_it_and_shares_its_cells() -> None:
    schedule = Schedule(n_ctx=4096, n_batch=64, n_seq_max=4)
    document = prompt(128)
    first = submit(schedule, np.append(document, prompt(10, 1)))
    other = submit(schedule, np.append(document, prompt(10, 2)))
    stranger = submit(schedule, prompt(10, 3))
    assert start_all(schedule) == [first, stranger]
    compute(schedule)
    assert start_all(schedule) == []
    compute(schedule)
    assert start_all(schedule) == [other]
    assert other.length == 128
    assert schedule.cells.used == 128


def test_a_short_common_beginning_is_not_waited_for() -> None:
    schedule = Schedule(n_ctx=4096, n_batch=64, n_seq_max=4)
    begin = prompt(WORTH_WAITING - 1)
    jobs = [submit(schedule, np.append(begin, prompt(100, seed))) for seed in (1, 2)]
    assert start_all(schedule) == jobs


def test_nobody_waits_for_who_ranks_behind() -> None:
    schedule = Schedule(n_ctx=4096, n_batch=64, n_seq_max=4)
    document = prompt(300)
    first = submit(schedule, document)
    assert start_all(schedule) == [first]
    urgent = submit(schedule, np.append(document, prompt(9, 1)), priority=1)
    assert start_all(schedule) == [urgent]
    assert compute(schedule) == [(urgent, 64)]


def test_the_first_that_finds_no_room_is_not_overtaken() -> None:
    schedule = Schedule(n_ctx=256, n_batch=64, n_seq_max=4)
    running = submit(schedule, prompt(150))
    large = submit(schedule, prompt(150, 1))
    small = submit(schedule, prompt(5, 2))
    assert start_all(schedule) == [running]
    schedule.end(running, "cancelled")
    assert start_all(schedule) == [large, small]


def test_room_is_kept_for_all_to_go_on() -> None:
    def fits(n_ctx: int) -> bool:
        schedule = Schedule(n_ctx=n_ctx, n_batch=64, n_seq_max=4)
        submit(schedule, prompt(50), 100)
        submit(schedule, prompt(60, 1), 100)
        return len(start_all(schedule)) == 2

    assert fits(50 + 60 + 2 * GROWTH)
    assert not fits(50 + 60 + 2 * GROWTH - 1)


def test_higher_priority_takes_the_place_of_lower() -> None:
    schedule = Schedule(n_ctx=4096, n_batch=64, n_seq_max=2)
    jobs = [submit(schedule, prompt(5, seed), 20) for seed in range(2)]
    start_all(schedule)
    compute(schedule)
    equal = submit(schedule, prompt(5, 3))
    assert schedule.outranked() is None
    urgent = submit(schedule, prompt(5, 4), priority=1)
    victim = schedule.outranked()
    assert victim is jobs[1], "the youngest"
    schedule.put_back(victim)
    assert schedule.outranked() is None
    assert start_all(schedule) == [urgent]
    schedule.end(urgent, "cancelled")
    assert start_all(schedule) == [victim], "it is older than the equal one"
    assert (victim.length, victim.n_tokens, equal.state) == (0, 6, State.WAITING)


def test_what_could_never_fit_is_refused() -> None:
    schedule = Schedule(n_ctx=256, n_batch=64, n_seq_max=4)
    schedule.submit(Job(prompt(156), 101))  # the last token is not decoded
    with pytest.raises(ValueError, match="do not fit a context of 256"):
        schedule.submit(Job(prompt(157), 101))
    with pytest.raises(ValueError, match="at least 1"):
        Job(prompt(1), 0)
    with pytest.raises(ValueError, match="at least one token"):
        Job([], 1)
    with pytest.raises(ValueError, match="n_batch"):
        Schedule(n_ctx=256, n_batch=7, n_seq_max=8)


def test_a_deadline_holds_for_waiting_and_running_ones() -> None:
    schedule = Schedule(n_ctx=4096, n_batch=64, n_seq_max=1)
    running = Job(prompt(5), 9, deadline=2.0)
    waiting = Job(prompt(5), 9, deadline=1.0)
    forever = Job(prompt(5), 9)
    for job in (running, waiting, forever):
        schedule.submit(job)
    start_all(schedule)
    assert schedule.expired(0.9) == []
    assert schedule.expired(1.0) == [waiting]
    assert schedule.expired(2.5) == [running, waiting]


def test_a_full_context_gives_up_what_lingers_first_and_then_the_last_in_rank() -> None:
    schedule = Schedule(n_ctx=4096, n_batch=64, n_seq_max=4)
    answered = submit(schedule, prompt(5), 1)
    last, first = submit(schedule, prompt(5, 1), 9), submit(schedule, prompt(5, 2), 9, priority=1)
    start_all(schedule)
    compute(schedule)
    assert schedule.victim() is answered
    schedule.gone(answered)
    assert schedule.victim() is last
    schedule.put_back(last)
    assert schedule.victim() is None, "nobody but the first is left"
    assert first.state is State.RUNNING


def test_cells_are_counted_once_for_all_who_share_them() -> None:
    cells = Cells()
    cells.extend("a", 10)
    cells.share("a", "b", 6)
    cells.extend("b", 3)
    cells.share("b", "c", 8)
    assert cells.used == 13
    cells.remove("a")
    assert cells.used == 9
    cells.remove("b")
    assert cells.used == 8
    cells.extend("d", 5)
    cells.remove("c")
    assert cells.used == 5


# -- the simulation -----------------------------------------------------------------------------


@dataclass
class Arrival:
    at: int
    n_shared: int
    n_own: int
    max_tokens: int
    priority: int
    cancel_after: int | None
    timeout: int | None
    eog_after: int


@dataclass
class World:
    """A context, and what is done with it. Time is counted in steps."""

    schedule: Schedule
    cells: dict[Job, list[object]] = field(default_factory=dict)
    """The cells of each sequence; the same object is the same cell."""
    ends: dict[Job, list[str]] = field(default_factory=dict)
    steps: int = 0

    def used(self) -> int:
        return len({id(cell) for cells in self.cells.values() for cell in cells})

    def room(self, n: int) -> bool:
        return self.used() + n <= self.schedule.n_ctx

    def end(self, job: Job, reason: str) -> None:
        self.cells.pop(job, None)
        self.schedule.end(job, reason)
        self.ends[job].append(reason)

    def put_back(self, job: Job) -> None:
        first = min((*self.schedule.running, *self.schedule.waiting), key=lambda each: each.rank)
        assert job is not first, "the first in rank is put back"
        del self.cells[job]
        self.schedule.put_back(job)

    def gone(self, job: Job) -> None:
        del self.cells[job]
        self.schedule.gone(job)

    def start_some(self) -> None:
        schedule = self.schedule
        while True:
            victim = schedule.outranked()
            if victim is not None:
                self.put_back(victim)
                continue
            start = schedule.next_start()
            if start is None:
                return
            job, donor = start
            assert len(self.cells) < schedule.n_seq_max, "no sequence is free"
            shared = 0
            if donor is not None:
                agree = (
                    job.tokens[:-1][: donor.length]
                    == donor.tokens[: job.n_tokens - 1][: donor.length]
                )
                shared = len(agree) if agree.all() else int(agree.argmin())
            cells = self.cells[donor][:shared] if donor is not None else []
            assert self.room(job.n_tokens - shared), "it was to find room"
            self.cells[job] = list(cells)
            schedule.started(job, shared, donor, shared)

    def decode(self, jobs: list[Job], eog: dict[Job, int]) -> int:
        """One batch; who is put back for want of room is not in it. Returns its tokens."""
        schedule = self.schedule
        while jobs:
            sizes = [min(job.pending, schedule.n_batch) for job in jobs]
            if self.room(sum(sizes)):
                break
            victim = schedule.victim()
            assert victim is not None, "a single sequence that does not fit"
            if victim.state is State.LINGERING:
                self.gone(victim)
            else:
                self.put_back(victim)
            jobs = [job for job in jobs if job.state is State.RUNNING]
        else:
            return 0
        assert sum(sizes) <= schedule.n_batch
        for job, size in zip(jobs, sizes, strict=True):
            self.cells[job] += [object() for _ in range(size)]
            schedule.computed(job)
            if not job.pending:
                schedule.sampled(job, 1000 + job.n_tokens % 3, job.generated == eog[job])
                if job.ended is not None:
                    self.ends[job].append(job.ended)
        return sum(sizes)

    def step(self, eog: dict[Job, int]) -> None:
        schedule = self.schedule
        self.steps += 1
        self.start_some()
        plan = schedule.plan()
        computed = self.decode(plan.rows, eog)
        prefilled = sum(self.decode([j], eog) for j in plan.prefills if j.state is State.RUNNING)
        assert prefilled <= schedule.n_batch
        if schedule.running or schedule.waiting:
            assert computed + prefilled or schedule.lingering, "nobody goes on"
        assert schedule.cells.used == self.used() <= schedule.n_ctx
        for job in schedule.running + schedule.lingering:
            assert len(self.cells[job]) == job.length


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        at=st.integers(0, 30),
        n_shared=st.sampled_from([0, 0, 10, 40, 70]),
        n_own=st.integers(1, 40),
        max_tokens=st.integers(1, 80),
        priority=st.sampled_from([0, 0, 0, 1, 2]),
        cancel_after=st.none() | st.integers(0, 30),
        timeout=st.none() | st.integers(0, 60),
        eog_after=st.integers(0, 90),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=300)
@given(
    arrivals=ARRIVALS,
    n_ctx=st.integers(190, 400),
    n_batch=st.integers(4, 64),
    n_seq_max=st.integers(1, 4),
    lingers=st.integers(0, 3),
)
@example([Arrival(0, 70, 40, 80, 0, None, None, 90)] * 25, 190, 4, 4, 3)
def test_every_request_ends_exactly_once_whatever_happens(
    arrivals: list[Arrival], n_ctx: int, n_batch: int, n_seq_max: int, lingers: int
) -> None:
    world = World(Schedule(n_ctx=n_ctx, n_batch=n_batch, n_seq_max=n_seq_max))
    schedule = world.schedule
    document = prompt(70)
    coming = sorted(enumerate(arrivals), key=lambda each: each[1].at)
    cancels: dict[Job, int] = {}
    eog: dict[Job, int] = {}
    lingering_since: dict[Job, int] = {}
    # Everything computed one after the other, as often as there are jobs to be put back for.
    total = sum(-(-110 // n_batch) + a.max_tokens + lingers + 2 for a in arrivals)
    limit = 60 + total * (len(arrivals) + 1)
    while coming or schedule.waiting or schedule.running or schedule.lingering:
        while coming and coming[0][1].at <= world.steps:
            seed, arrival = coming.pop(0)
            tokens = np.append(document[: arrival.n_shared], prompt(arrival.n_own, seed + 1))
            deadline = None if arrival.timeout is None else float(world.steps + arrival.timeout)
            job = Job(tokens, arrival.max_tokens, priority=arrival.priority, deadline=deadline)
            schedule.submit(job)
            world.ends[job] = []
            eog[job] = arrival.eog_after
            if arrival.cancel_after is not None:
                cancels[job] = world.steps + arrival.cancel_after
        for job, at in cancels.items():
            if at == world.steps and job.state in (State.WAITING, State.RUNNING):
                world.end(job, "cancelled")
        for job in schedule.expired(world.steps):
            world.end(job, "timeout")
        world.step(eog)
        for job in list(schedule.lingering):
            if world.steps - lingering_since.setdefault(job, world.steps) >= lingers:
                world.gone(job)
        assert world.steps < limit, "somebody starves"
    assert len(world.ends) == len(arrivals)
    for job, ends in world.ends.items():
        assert ends == [job.ended]
        if job.ended == "length":
            assert job.generated == job.max_tokens
        if job.ended == "eog":
            assert job.generated == eog[job]
    assert world.used() == schedule.cells.used == 0
