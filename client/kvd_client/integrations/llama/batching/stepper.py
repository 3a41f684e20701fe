"""What a step of the batching worker does. Threads, and what others see of it: worker.py.

What is decided is in schedule.py; here it is carried out, in this order: end what has run out of
time; start who may start (an id and a leased prefix from the daemon, cells shared with another
sequence, blocks imported); decode one token of each who has one, then pieces of prompts; and export
some blocks of what is new. Nothing of it waits for the daemon but the round trips that open and
release a sequence, and no token is told later for the sake of storing it.
"""

import logging
import time
from dataclasses import dataclass

from kvd_client.errors import KvdError, NoSequenceFree, SequenceLimit, StaleHandle
from kvd_client.integrations.llama.batching.request import Request
from kvd_client.integrations.llama.batching.schedule import Job, Schedule, Start, State
from kvd_client.integrations.llama.errors import DecodeFailed, LlamaEngineError
from kvd_client.integrations.llama.worker import LlamaSequence, LlamaWorker, Pick

logger = logging.getLogger("kvd_client")

BLOCKS_A_STEP = 4
"""Exported after each step, of all sequences together. A block of a small model costs 0.1 ms, of a
large one some, with steps that last as many times longer."""
_NO_ROOM = 1
"""The code of DecodeFailed."""
PAUSE = 0.01
"""Seconds until the daemon is asked again for an id that it did not have."""
_LINGER = 1.0
"""Seconds after which an answered request gives up storing the rest: the daemon hangs."""


@dataclass(eq=False, slots=True)
class Live:
    """A request that is not gone, and its sequence if it has one."""

    job: Job
    request: Request
    pick: Pick | None
    sequence: LlamaSequence | None = None
    ended_at: float = 0.0

    @property
    def open(self) -> LlamaSequence:
        assert self.sequence is not None
        return self.sequence


class Stepper:
    """Carries requests out, in one thread. The worker's context has no other user."""

    def __init__(self, llama: LlamaWorker, blocks_a_step: int) -> None:
        self.llama = llama
        self.engine = llama.engine
        self.blocks_a_step = blocks_a_step
        self._schedule = Schedule(
            n_ctx=self.engine.n_ctx,
            n_batch=self.engine.n_batch,
            n_seq_max=self.engine.n_seq_max,
        )
        self._live: dict[Job, Live] = {}
        self._ask_again_at = 0.0
        self._computed = 0
        """Tokens of this step."""

    def _carry_out(self) -> bool:
        """One step. Returns whether there is more to do at once."""
        self._expire()
        self._start_some()
        plan = self._schedule.plan()
        self._computed = 0
        self._decode(plan.rows)
        for job in plan.prefills:
            self._prefill(job)
        exported = self._store_some()
        return bool(self._schedule.running or exported)

    def _take(self, live: Live) -> None:
        self._schedule.submit(live.job)
        self._live[live.job] = live

    def _cancel(self, job: Job) -> None:
        if job.state in (State.WAITING, State.RUNNING):
            self._end(job, "cancelled")

    def _expire(self) -> None:
        for job in self._schedule.expired(time.monotonic()):
            self._end(job, "timeout")

    # --- starting, and ending

    def _start_some(self) -> None:
        if time.monotonic() < self._ask_again_at:
            return
        while True:
            victim = self._schedule.outranked()
            if victim is not None:
                self._put_back(victim)
                continue
            start = self._schedule.next_start()
            if start is None or not self._start(start):
                return

    def _start(self, start: Start) -> bool:
        """Open its sequence. False if the daemon has no id for it now."""
        job, donor = start
        live = self._live[job]
        like = None if donor is None else self._live[donor].open
        try:
            sequence = self.open_sequence(job, like)
        except (NoSequenceFree, SequenceLimit, StaleHandle):
            # All ids of this or of all contexts are in use, or the daemon has gone just now.
            self._ask_again_at = time.monotonic() + PAUSE
            return False
        except (KvdError, LlamaEngineError) as error:
            self._end(job, f"failed: {error}")
            return True
        live.sequence = sequence
        if not live.request.put_back:
            live.request.matched_tokens = sequence.matched_tokens
            live.request.copied_tokens = sequence.copied_tokens
        copied = sequence.copied_tokens
        self._schedule.started(job, sequence.length, donor if copied else None, copied)
        return True

    def open_sequence(self, job: Job, like: LlamaSequence | None) -> LlamaSequence:
        """A sequence for what there is of a job, sharing cells with `like`. For classes that look
        closer, or open it otherwise."""
        return self.llama.open(job.tokens, like=like)

    def _put_back(self, job: Job) -> None:
        self._close_sequence(self._live[job])
        self._schedule.put_back(job)
        self._live[job].request.put_back += 1

    def _end(self, job: Job, reason: str) -> None:
        """It ends without its answer, and what it has is given back at once."""
        live = self._live.pop(job)
        self._close_sequence(live, failed=True)
        self._schedule.end(job, reason)
        live.request.finish(reason)

    def _gone(self, job: Job) -> None:
        self._close_sequence(self._live.pop(job))
        self._schedule.gone(job)

    def _close_sequence(self, live: Live, failed: bool = False) -> None:
        sequence, live.sequence = live.sequence, None
        if sequence is not None:
            sequence.close(store=False, failed=failed)

    def _end_all(self, reason: str) -> None:
        """Whoever is not answered ends, and nothing is open any more."""
        for live in list(self._live.values()):
            if live.job.state is State.LINGERING:
                self._gone(live.job)
            else:
                self._end(live.job, reason)

    # --- computing

    def _decode(self, rows: list[Job]) -> None:
        """One batch of one token of each."""
        while rows:
            opened = [self._live[job].open for job in rows]
            tokens = [int(job.tokens[-1]) for job in rows]
            positions = [sequence.length for sequence in opened]
            try:
                self.engine.decode(tokens, positions, [each.seq_id for each in opened], True)
            except DecodeFailed as error:
                self._could_not(rows, error)
                rows = [job for job in rows if job.state is State.RUNNING]
                continue
            for job, sequence, token in zip(rows, opened, tokens, strict=True):
                sequence.took(token, None)
                self._note(job)
            # All logits are read before the next batch; a callback ends nobody but its own request.
            for row, job in enumerate(rows):
                self._sample(job, row)
            return

    def _prefill(self, job: Job) -> None:
        """The next piece of a prompt, as a batch of its own."""
        while job.state is State.RUNNING:
            sequence = self._live[job].open
            try:
                pending = sequence.prefill_some()
            except DecodeFailed as error:
                self._could_not([job], error)
                continue
            self._note(job)
            if not pending:
                self._sample(job, -1)
            return

    def _note(self, job: Job) -> None:
        """Its row or piece was computed."""
        before = job.length
        self._schedule.computed(job)
        self._computed += job.length - before
        self._live[job].request.computed_tokens += job.length - before

    def _sample(self, job: Job, row: int) -> None:
        live = self._live[job]
        try:
            if live.pick is None:
                token = self.engine.argmax(row)
            else:
                token = live.pick(self.engine.logits(row))
            if not 0 <= token < self.engine.n_vocab:
                raise ValueError(f"picked {token}, which is no token of this model")
            is_eog = self.engine.is_eog(token)
            if not is_eog:
                live.request.took(token)
        except Exception as error:
            self._end(job, f"failed: {type(error).__name__}: {error}")
            return
        self._schedule.sampled(job, token, is_eog)
        if job.ended is not None:
            live.ended_at = time.monotonic()
            live.request.finish(job.ended)

    def _could_not(self, jobs: list[Job], error: DecodeFailed) -> None:
        """Decoding a batch of `jobs` failed: make room if that is why, or end them."""
        victim = self._schedule.victim()
        if error.code == _NO_ROOM and victim is not None:
            if victim.state is State.LINGERING:
                self._gone(victim)
            else:
                logger.debug("the context is full: a request is put back")
                self._put_back(victim)
            return
        for job in jobs:
            self._end(job, f"failed: {error}")

    # --- storing

    def _store_some(self) -> int:
        """Export some blocks, of those first that only wait for that; returns how many.

        As many as were computed in this step, if that is more than `blocks_a_step`: so a prompt is
        stored as it is computed, in a thousandth of that time.
        """
        most = max(self.blocks_a_step, self._computed // self.llama.context.model.block_tokens)
        left, now = most, time.monotonic()
        for job in self._schedule.lingering + self._schedule.running:
            live = self._live[job]
            lingers = job.state is State.LINGERING
            if left > 0:
                left -= live.open.store(tail=lingers, wait=0.0, most=left)
            if lingers and (not live.open.unstored_tokens or now - live.ended_at > _LINGER):
                self._gone(job)
        return most - left

    def _store_rest(self) -> None:
        """Export all that is new of answered requests; waits for room in the staging."""
        for live in self._live.values():
            if live.job.state is State.LINGERING:
                live.open.store(tail=True)
