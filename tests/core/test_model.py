"""The core against a simple reference, with steps that hypothesis chooses and shrinks.

KVD_EXAMPLES and KVD_STEPS make it longer: 2000 and 50 before a release. Everything that is checked
after each step is in world.py.
"""

import os
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.core.reference import Context, Sequence, Session
from tests.core.world import KINDS, OWNERS, SHARES, STAGING, TENANTS, VOCABULARY, Shares, World

EXAMPLES = int(os.environ.get("KVD_EXAMPLES", 300))
STEPS = int(os.environ.get("KVD_STEPS", 40))

T = TypeVar("T")

which = st.integers(0, 11)
"""Which of the sessions, contexts or sequences there are, in the order of their making."""
prompts = st.lists(st.sampled_from(VOCABULARY), max_size=7).map(tuple)
appendices = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=6).map(tuple)
kinds = st.sampled_from(KINDS)
tenants = st.sampled_from(("", "", "", "t", "u", "nobody"))


class CoreMachine(RuleBasedStateMachine):
    world: World

    @initialize(
        spare_pages=st.sampled_from((1, 2, 4, 8)),
        max_sequences=st.sampled_from((3, 5)),
        tenants=st.sampled_from(TENANTS),
        max_models=st.sampled_from((1, 2)),
        shares=st.sampled_from(SHARES),
    )
    def begin(
        self,
        spare_pages: int,
        max_sequences: int,
        tenants: tuple[int | None, ...],
        max_models: int,
        shares: Shares,
    ) -> None:
        """Two workers have come up, of the first two tenants, if others' minima leave them room."""
        self.world = World(spare_pages, max_sequences, tenants, max_models, shares)
        for which in range(2):
            session = self.world.connect(which)
            if session is None:
                assert shares.models
                continue
            self.world.register(session, KINDS[0])
            for model in session.models:
                self.world.open_context(session, model, 2, [])

    def _session(self, which: int) -> Session:
        return _pick(list(self.world.sessions.values()), which)

    def _context(self, which: int) -> Context:
        return _pick(list(self.world.contexts.values()), which)

    def _sequence(self, which: int) -> Sequence:
        return _pick(self.world.known_sequences(), which)

    @rule(which=which)
    def connect(self, which: int) -> None:
        self.world.connect(which)

    @precondition(lambda self: self.world.sessions)
    @rule(which=which)
    def disconnect(self, which: int) -> None:
        self.world.disconnect(self._session(which))

    @precondition(lambda self: self.world.sessions)
    @rule(which=which, kind=kinds)
    def register(self, which: int, kind: object) -> None:
        self.world.register(self._session(which), kind)

    @precondition(lambda self: self.world.sessions)
    @rule(
        which=which,
        model=st.integers(1, 5),
        n_ids=st.sampled_from((2, 1, 3)),
        busy=st.lists(st.integers(0, 2), max_size=3),
    )
    def open_context(self, which: int, model: int, n_ids: int, busy: list[int]) -> None:
        self.world.open_context(self._session(which), model, n_ids, busy)

    @precondition(lambda self: self.world.contexts)
    @rule(which=which)
    def close_context(self, which: int) -> None:
        self.world.close_context(self._context(which))

    @precondition(lambda self: self.world.contexts)
    @rule(
        which=which,
        tokens=prompts,
        reserve=st.sampled_from((0, 0, 0, 1, 3, 5, 60)),
        wait_ms=st.sampled_from((0, 250, 500)),
        idle_ms=st.sampled_from((0, 0, 250, 1000)),
        wish=st.sampled_from(("", "", "", "not used", "not stored")),
    )
    def alloc(
        self,
        which: int,
        tokens: tuple[int, ...],
        reserve: int,
        wait_ms: int,
        idle_ms: int,
        wish: str,
    ) -> None:
        use, store = wish != "not used", wish != "not stored"
        self.world.alloc(self._context(which), tokens, reserve, wait_ms, idle_ms, use, store)

    # The more rules do it, the more often it is done.
    @precondition(lambda self: self.world.known_sequences())
    @rule(which=which, tokens=appendices)
    def append(self, which: int, tokens: tuple[int, ...]) -> None:
        self.world.append(self._sequence(which), tokens)

    @precondition(lambda self: len(self.world.known_sequences()) > 1)
    @rule(first=which, second=which, tokens=appendices, more=appendices)
    def append_alike(
        self, first: int, second: int, tokens: tuple[int, ...], more: tuple[int, ...]
    ) -> None:
        """Two append the same, and the second goes on."""
        self.world.append(self._sequence(first), tokens)
        self.world.append(self._sequence(second), (*tokens, *more)[:6])

    @precondition(lambda self: self.world.known_sequences())
    @rule(which=which, tokens=prompts, start=st.integers(0, 6))
    def append_elsewhere(self, which: int, tokens: tuple[int, ...], start: int) -> None:
        self.world.append(self._sequence(which), tokens, start=start)

    @precondition(lambda self: self.world.known_sequences())
    @rule(which=which, tokens=appendices, offset=st.sampled_from((0, 4, 4100, STAGING, 1 << 63)))
    def append_from_nowhere(self, which: int, tokens: tuple[int, ...], offset: int) -> None:
        self.world.append(self._sequence(which), tokens, offset=offset)

    @precondition(lambda self: self.world.known_sequences())
    @rule(which=which, first_block=st.sampled_from((0, 1, 5)))
    def get(self, which: int, first_block: int) -> None:
        self.world.get(self._sequence(which), first_block)

    @precondition(lambda self: self.world.known_sequences())
    @rule(which=which, n_named=st.integers(0, 2))
    def keep_alive(self, which: int, n_named: int) -> None:
        sequence = self._sequence(which)
        peers = [each for each in self.world.known_sequences() if each.context is sequence.context]
        self.world.keep_alive([sequence, *peers[:n_named]])

    @precondition(lambda self: self.world.known_sequences())
    @rule(which=which, outcome=st.sampled_from((0, 1)))
    def release(self, which: int, outcome: int) -> None:
        self.world.release(self._sequence(which), outcome)

    @precondition(lambda self: self.world.sessions)
    @rule(which=which, before_last=st.integers(-1, 3))
    def flush(self, which: int, before_last: int) -> None:
        session = self._session(which)
        self.world.flush(session, max(0, session.last_commit - before_last))

    @precondition(lambda self: self.world.sessions)
    @rule(
        which=which,
        name=st.sampled_from(("", "a", "b", "c")),
        n_blocks=st.integers(0, 2),
        tenant=tenants,
    )
    def evict(self, which: int, name: str, n_blocks: int, tenant: str) -> None:
        self.world.evict(self._session(which), name, n_blocks, tenant)

    @precondition(lambda self: self.world.sessions)
    @rule(which=which, kind=kinds, tokens=appendices, tenant=tenants)
    def forget(self, which: int, kind: Any, tokens: tuple[int, ...], tenant: str) -> None:
        self.world.forget(self._session(which), kind, tokens, tenant)

    @precondition(lambda self: self.world.sessions)
    @rule(which=which, kind=kinds, tokens=prompts, tenant=tenants)
    def explain(self, which: int, kind: Any, tokens: tuple[int, ...], tenant: str) -> None:
        self.world.explain(self._session(which), kind, tokens, tenant)

    @precondition(lambda self: self.world.sessions)
    @rule(
        which=which,
        kind=kinds,
        tokens=prompts,
        owner=st.sampled_from(OWNERS),
        ttl_ms=st.sampled_from((0, 250, 1000)),
    )
    def pin(self, which: int, kind: Any, tokens: tuple[int, ...], owner: str, ttl_ms: int) -> None:
        self.world.pin(self._session(which), kind, tokens, owner, ttl_ms)

    @precondition(lambda self: self.world.sessions)
    @rule(which=which, owner=st.sampled_from(OWNERS), name=st.sampled_from(("", "a", "b", "c")))
    def unpin(self, which: int, owner: str, name: str) -> None:
        self.world.unpin(self._session(which), owner, name)

    @rule(
        spare_pages=st.sampled_from((-12, -6, -2, 1, 4, 8)),
        which=which,
        spare=st.sampled_from((None, -3, 1, 4, 12)),
    )
    def reconfigure(self, spare_pages: int, which: int, spare: int | None) -> None:
        self.world.reconfigure(spare_pages, which, spare)

    @rule(seconds=st.sampled_from((0.125, 0.25, 0.5)))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @precondition(lambda self: self.world.shell.queue)
    @rule(fails=st.sampled_from((0, 1, 2, 3)), which=st.integers(0, 3))
    def work(self, fails: int, which: int) -> None:
        """Bit i is set: item i of the shell's job fails, `which` of those that may be next."""
        self.world.work(fails, which)

    @precondition(lambda self: self.world.shell.queue)
    @rule(jobs=st.integers(2, 4))
    def work_well(self, jobs: int) -> None:
        for _ in range(jobs):
            self.world.work()

    @precondition(lambda self: self.world.sessions)
    @rule(which=which, context=st.integers(69, 73), seq_id=st.integers(0, 2), age=st.integers(1, 4))
    def misuse(self, which: int, context: int, seq_id: int, age: int) -> None:
        self.world.ask_as_nobody()
        self.world.misuse(self._session(which), context, seq_id, age)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


def _pick(things: list[T], which: int) -> T:
    return things[which % len(things)]


@pytest.mark.timeout(3600)
def test_core_against_the_reference() -> None:
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
