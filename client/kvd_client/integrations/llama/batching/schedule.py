"""Who computes what next: the rules of continuous batching. No llama.cpp, no I/O, no clock.

    submit ─► WAITING ──started──► RUNNING ──sampled──► LINGERING ──gone──► GONE
                 ▲  │                │  │   eog, length
                 │  │                │  └──end: cancelled, timeout, failed─────►│
                 │  └────────────────┼──────────────end────────────────────────►│
                 └─────put_back──────┘

A job is a request as it is seen here. RUNNING ones have a sequence of the context. LINGERING ones
are answered; their sequence is there until what is new in it has been stored.

The rules:
- Rank is priority, then age. Who ranks first is served first, in everything.
- A step decodes all jobs of which one token is left to compute, in one batch, and of prompts at
  most n_batch tokens more. So a long prompt delays others by so much at a time, and stops nobody.
- A piece of a prompt is a batch of its own, n_batch tokens long but for the last: results depend on
  how tokens are split into batches, and this split is that of a context that computes the prompt
  alone.
- Who shares the beginning of its prompt with a job that ranks before it waits until that one has
  computed it, and then shares its cells. Nothing is lost by waiting: that job's turn is first.
- A job starts when a sequence is free and its tokens find room, with some to spare for all to go
  on. The first in rank that finds none waits, and nobody overtakes it, so that it finds some at
  last. Of lower priority it puts back as many as it needs.
- If there is no room all the same, what lingers goes, and then the last in rank is put back: it
  starts again later, with all that it has generated so far. The first in rank never is, so it ends.
"""

from bisect import insort
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvd_client.integrations.llama.batching.cells import Cells

Tokens = npt.NDArray[np.int32]

GROWTH = 32
"""Cells that each job should find free to go on, before another one starts."""
WORTH_WAITING = 32
"""Tokens of a common prefix that somebody is going to compute; fewer are computed twice. A batch of
so few costs hardly more than one of a single token."""


class State(Enum):
    """See the drawing above."""

    WAITING = auto()
    RUNNING = auto()
    LINGERING = auto()
    GONE = auto()


class Job:
    """A prompt (int32 [n], n >= 1) and up to `max_tokens` (at least 1) tokens to follow it.

    `deadline` is on the clock of whoever calls Schedule.expired; None: never. Attributes are for
    reading; Schedule alone changes them.
    """

    def __init__(
        self,
        prompt: npt.ArrayLike,
        max_tokens: int,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        given = np.ascontiguousarray(prompt, np.int32)
        if given.ndim != 1 or not given.size:
            raise ValueError("a prompt is a flat array of at least one token")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is at least 1, not {max_tokens}")
        self.n_prompt = self.n_tokens = len(given)
        self.max_tokens = max_tokens
        self.priority = priority
        self.deadline = deadline
        self.number = 0
        """Jobs are numbered as they come."""
        self.state = State.WAITING
        self.length = 0
        """How many of its tokens are in the context."""
        self.ended: str | None = None
        """Why: "eog", "length", "cancelled", "timeout" or "failed: ..."."""
        self._buffer = np.empty(len(given) + max_tokens, np.int32)
        self._buffer[: len(given)] = given

    @property
    def tokens(self) -> Tokens:
        """The prompt and what was generated so far, a view."""
        return self._buffer[: self.n_tokens]

    @property
    def generated(self) -> int:
        """How many tokens were generated."""
        return self.n_tokens - self.n_prompt

    @property
    def pending(self) -> int:
        """Tokens that are not in the context; at least one, until it is answered."""
        return self.n_tokens - self.length

    @property
    def rank(self) -> tuple[int, int]:
        """Lower is first."""
        return -self.priority, self.number

    def _append(self, token: int) -> None:
        self._buffer[self.n_tokens] = token
        self.n_tokens += 1


class Start(NamedTuple):
    """A job that is to start, and one whose cells it can share as far as their tokens agree."""

    job: Job
    donor: Job | None


class Plan(NamedTuple):
    """What a step computes: one token of each of `rows`, in one batch; and then for each of
    `prefills` its next piece, in a batch of its own."""

    rows: list[Job]
    prefills: list[Job]


class Schedule:
    """All jobs that are not gone. `n_ctx` is in cells, `n_batch` in tokens."""

    def __init__(self, *, n_ctx: int, n_batch: int, n_seq_max: int) -> None:
        if n_batch < n_seq_max:
            raise ValueError(
                f"n_batch must be at least n_seq_max: one token of each of {n_seq_max} sequences "
                f"does not fit a batch of {n_batch}"
            )
        self.n_ctx, self.n_batch, self.n_seq_max = n_ctx, n_batch, n_seq_max
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        """Both in the order of rank."""
        self.lingering: list[Job] = []
        self.cells = Cells()
        self._submitted = 0

    # --- what comes and goes

    def check_fits(self, job: Job) -> None:
        """Raise ValueError for a job that could not be answered even by a context of its own. Does
        not change anything, and may be called from any thread."""
        # The last token is not decoded.
        if job.n_prompt + job.max_tokens - 1 > self.n_ctx:
            raise ValueError(
                f"a prompt of {job.n_prompt} tokens and {job.max_tokens} more do not fit a context "
                f"of {self.n_ctx}: ask for fewer, or make n_ctx larger"
            )

    def submit(self, job: Job) -> None:
        """Take a new job, one that fits."""
        self.check_fits(job)
        self._submitted += 1
        job.number = self._submitted
        insort(self.waiting, job, key=_rank)

    def started(self, job: Job, length: int, donor: Job | None = None, shared: int = 0) -> None:
        """The job has a sequence, with its first `length` tokens in it, at least one less than all;
        the first `shared` of them are in cells of `donor`."""
        assert job.state is State.WAITING
        assert shared <= length < job.n_tokens
        self.waiting.remove(job)
        insort(self.running, job, key=_rank)
        job.state = State.RUNNING
        job.length = length
        if donor is not None:
            self.cells.share(donor, job, shared)
        self.cells.extend(job, length - shared)

    def put_back(self, job: Job) -> None:
        """The job has lost its sequence, and waits to start again."""
        assert job.state is State.RUNNING
        self.running.remove(job)
        self.cells.remove(job)
        job.state = State.WAITING
        job.length = 0
        insort(self.waiting, job, key=_rank)

    def end(self, job: Job, reason: str) -> None:
        """A job that is not answered ends; if it has a sequence, that has gone too."""
        assert job.state in (State.WAITING, State.RUNNING)
        (self.waiting if job.state is State.WAITING else self.running).remove(job)
        self.cells.remove(job)
        job.state = State.GONE
        job.ended = reason

    def gone(self, job: Job) -> None:
        """The sequence of an answered job has gone."""
        assert job.state is State.LINGERING
        self.lingering.remove(job)
        self.cells.remove(job)
        job.state = State.GONE

    def expired(self, now: float) -> list[Job]:
        """Those whose deadline has passed, for the caller to end."""
        jobs = self.running + self.waiting
        return [job for job in jobs if job.deadline is not None and job.deadline <= now]

    # --- who starts

    def next_start(self) -> Start | None:
        """The job that is to start now, if one is."""
        if len(self.running) + len(self.lingering) >= self.n_seq_max:
            return None
        first = self._first()
        return first if first is not None and self._lacking(first) <= 0 else None

    def outranked(self) -> Job | None:
        """A running job that is to be put back, because one of higher priority cannot start."""
        if self.lingering or not (self.waiting and self.running):
            return None
        if self.running[-1].priority >= self.waiting[0].priority:
            return None
        first = self._first()
        if first is None:
            return None
        lower = [job for job in self.running if job.priority < first.job.priority]
        if lower and 0 < self._lacking(first) <= sum(job.n_tokens + GROWTH for job in lower):
            return lower[-1]
        return None

    def _first(self) -> Start | None:
        """The first of the waiting ones that does not wait for another one's prefix."""
        # Those further behind could not start now in any case, or only in place of these.
        for job in self.waiting[: 2 * self.n_seq_max]:
            donor, best, wait = None, 0, False
            for other in self.running + self.lingering:
                # At least one token is left to compute, for its logits.
                common = common_prefix(job.tokens[:-1], other.tokens)
                has = min(common, other.length)
                if has > best:
                    donor, best = other, has
                if common - has >= WORTH_WAITING and other.rank < job.rank:
                    wait = True
            if not wait:
                return Start(job, donor)
        return None

    def _lacking(self, start: Start) -> int:
        """Cells that are missing for it to start; 0 or less if it can."""
        taken = len(self.running) + len(self.lingering)
        if not taken:
            return 0
        job, donor = start
        shared = 0
        if donor is not None:
            shared = min(common_prefix(job.tokens[:-1], donor.tokens), donor.length)
        needed = job.n_tokens - shared + _growth(job)
        promised = sum(other.pending + _growth(other) for other in self.running)
        lacking = needed + promised + self.cells.used - self.n_ctx
        return max(1, lacking) if taken >= self.n_seq_max else lacking

    # --- who computes

    def plan(self) -> Plan:
        """What the next step computes; nothing changes."""
        rows = [job for job in self.running if job.pending == 1]
        prefills, left = [], self.n_batch
        for job in self.running:
            piece = min(job.pending, self.n_batch)
            if job.pending > 1 and piece <= left:
                prefills.append(job)
                left -= piece
        return Plan(rows, prefills)

    def computed(self, job: Job) -> None:
        """The job's row or piece of the plan is in the context."""
        assert job.state is State.RUNNING
        n = min(job.pending, self.n_batch)
        self.cells.extend(job, n)
        job.length += n

    def sampled(self, job: Job, token: int, is_eog: bool) -> None:
        """The token that follows, of a job of which none was pending. It may be the last one."""
        assert job.state is State.RUNNING
        assert not job.pending
        if not is_eog:
            job._append(token)
        if is_eog or job.generated == job.max_tokens:
            job.ended = "eog" if is_eog else "length"
            job.state = State.LINGERING
            self.running.remove(job)
            self.lingering.append(job)

    def victim(self) -> Job | None:
        """Whose sequence goes because the context is full: the caller calls `gone` or `put_back`
        with it. None if it is full of a single one."""
        if self.lingering:
            return self.lingering[0]
        return self.running[-1] if len(self.running) > 1 else None


def common_prefix(one: Tokens, other: Tokens) -> int:
    """How many tokens agree from the first on."""
    n = min(len(one), len(other))
    if not n or one[0] != other[0]:
        return 0
    differs = one[:n] != other[:n]
    first = int(differs.argmax())
    return first if differs[first] else n


def _rank(job: Job) -> tuple[int, int]:
    return job.rank


def _growth(job: Job) -> int:
    return min(job.max_tokens - job.generated, GROWTH)
