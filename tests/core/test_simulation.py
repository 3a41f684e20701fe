"""Long runs of random steps over a tiny vocabulary, each from its seed: everything may happen at
any moment. Shorter runs that shrink to the few steps that matter: test_model.py.
"""

import os
from random import Random

import pytest

from tests.core.driver import walk_in_steps_of
from tests.core.reference import Session
from tests.core.world import (
    KINDS,
    OWNERS,
    SHARES,
    STAGING,
    TENANTS,
    VOCABULARY,
    Kind,
    Shares,
    World,
)

STEPS = int(os.environ.get("KVD_SIMULATION_STEPS", 100_000))
SEEDS = range(10)
STEPS_OF_A_LIFE = 500
"""Then everybody leaves, and nothing may be left."""


@pytest.mark.parametrize("seed", SEEDS)
def test_random_steps(seed: int) -> None:
    random = Random(seed)
    for _ in range(max(1, STEPS // len(SEEDS) // STEPS_OF_A_LIFE)):
        Life(random).live()


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_random_steps_with_leases_that_begin_and_end_block_by_block(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk_in_steps_of(1, monkeypatch)
    random = Random(seed)
    for _ in range(max(1, STEPS // len(SEEDS) // STEPS_OF_A_LIFE // 2)):
        Life(random).live()


class Life:
    """One daemon from its start to its end, with its own character: how much memory there is, how
    slow the shell, how alike the prompts, how often clients come and go."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.world = self._make_world(
            random.choice((1, 2, 4, 8, 40)),
            random.choice((3, 5)),
            random.choice(TENANTS),
            random.choice((1, 2)),
            random.choice(SHARES),
        )
        self.failures = random.choice(((0,), (0, 0, 0, 1), (0, 1, 2, 3)))
        self.likeness = random.choice((1, 5, 25))
        clumsy = random.choice((0, 1, 10))
        self.weights = {
            self.connect: 8,
            self.disconnect: random.choice((1, 4, 10)),
            self.register: 10,
            self.open_context: 10,
            self.close_context: random.choice((0, 4)),
            self.alloc: 60,
            self.append: 80,
            self.get: 10,
            self.keep_alive: 5,
            self.release: random.choice((20, 50)),
            self.flush: 10,
            self.evict: random.choice((0, 5)),
            self.forget: random.choice((0, 3)),
            self.explain: 10,
            self.pin: random.choice((0, 5, 20)),
            self.unpin: random.choice((1, 5)),
            self.reconfigure: random.choice((0, 2, 10)),
            self.pass_time: 10,
            self.work: random.choice((30, 80, 200)),
            self.append_wrongly: clumsy,
            self.misuse: clumsy,
        }

    def _make_world(
        self,
        spare_pages: int,
        max_sequences: int,
        spare_of_tenants: tuple[int | None, ...],
        max_models: int,
        shares: Shares,
    ) -> World:
        return World(spare_pages, max_sequences, spare_of_tenants, max_models, shares)

    def live(self) -> None:
        steps, weights = list(self.weights), list(self.weights.values())
        for step in self.random.choices(steps, weights, k=STEPS_OF_A_LIFE):
            step()
        self.world.finish()

    def _session(self):
        if not self.world.sessions:
            self.world.connect()
        sessions = list(self.world.sessions.values())
        return self.random.choice(sessions) if sessions else None

    def _context(self):
        if not self.world.contexts:
            self.open_context()
        contexts = list(self.world.contexts.values())
        return self.random.choice(contexts) if contexts else None

    def _sequence(self):
        if not self.world.known_sequences():
            self.alloc()
        sequences = self.world.known_sequences()
        return self.random.choice(sequences) if sequences else None

    def _tokens(self, low: int, high: int) -> tuple[int, ...]:
        n_tokens = self.random.randint(low, high)
        return tuple(self.random.choices(VOCABULARY, (self.likeness, 2, 1), k=n_tokens))

    def connect(self) -> None:
        self.world.connect(self.random.randrange(6))

    def disconnect(self) -> None:
        if self.world.sessions:
            self.world.disconnect(self._session())

    def register(self) -> None:
        if session := self._session():
            self.world.register(session, self.random.choice(KINDS))

    def open_context(self) -> None:
        if session := self._session():
            if not session.models:
                self.world.register(session, self.random.choice(KINDS))
            busy = self.random.sample(range(3), self.random.choice((0, 0, 0, 0, 1, 2)))
            model = self.random.choice([*session.models, 99])
            self.world.open_context(session, model, self.random.choice((1, 2, 2, 2, 3)), busy)

    def close_context(self) -> None:
        if context := self._context():
            self.world.close_context(context)

    def alloc(self) -> None:
        if context := self._context():
            self.world.alloc(
                context,
                self._tokens(0, 7),
                self.random.choice((0, 0, 0, 0, 0, 1, 3, 5, 60)),
                self.random.choice((0, 250, 500)),
                self.random.choice((0, 0, 250, 1000)),
                use=self.random.random() < 0.95,
                store=self.random.random() < 0.95,
            )

    def append(self) -> None:
        if sequence := self._sequence():
            self.world.append(sequence, self._tokens(1, 6))

    def append_wrongly(self) -> None:
        if sequence := self._sequence():
            self.world.append(sequence, self._tokens(0, 4), start=self.random.randint(0, 6))
        if sequence := self._sequence():
            offset = self.random.choice((0, 4, 4100, STAGING, 1 << 63))
            self.world.append(sequence, self._tokens(1, 4), offset=offset)

    def get(self) -> None:
        if sequence := self._sequence():
            self.world.get(sequence, self.random.choice((0, 0, 1, 5)))

    def keep_alive(self) -> None:
        if sequence := self._sequence():
            self.world.keep_alive([sequence] * self.random.choice((1, 2)))

    def release(self) -> None:
        if sequence := self._sequence():
            self.world.release(sequence, self.random.choice((0, 1)))

    def flush(self) -> None:
        if session := self._session():
            self.world.flush(session, self.random.randint(0, session.last_commit + 1))

    def evict(self) -> None:
        if session := self._session():
            name = self.random.choice(("", "a", "b", "c"))
            self.world.evict(session, name, self.random.choice((0, 1, 2)), self._tenant())

    def _tenant(self) -> str:
        return self.random.choice(("", "", "", *self.world.tenants, "nobody"))

    def _prompt(self, session: Session, kind: Kind) -> tuple[int, ...]:
        """Mostly of what is there."""
        arena = self.world.arena_of(session, kind)
        if arena is None or not arena.known() or self.random.random() < 0.3:
            return self._tokens(1, 7)
        path = self.random.choice(sorted(arena.known()))
        path = path[: self.random.randint(1, len(path))]
        return path + self._tokens(0, self.random.choice((0, 3)))

    def forget(self) -> None:
        if session := self._session():
            kind = self.random.choice(KINDS)
            self.world.forget(session, kind, self._prompt(session, kind), self._tenant())

    def explain(self) -> None:
        if session := self._session():
            kind = self.random.choice(KINDS)
            self.world.explain(session, kind, self._prompt(session, kind), self._tenant())

    def pin(self) -> None:
        if session := self._session():
            # Mostly what is there: most pins are of what was just stored.
            kind = self.random.choice(KINDS)
            tokens = self._tokens(0, 7)
            arena = self.world.arena_of(session, kind)
            if arena is not None and arena.sealed and self.random.random() < 0.8:
                tokens = self.random.choice(sorted(arena.sealed))
            ttl_ms = self.random.choice((0, 0, 250, 1000, 10_000))
            self.world.pin(session, kind, tokens, self.random.choice(OWNERS), ttl_ms)

    def unpin(self) -> None:
        if session := self._session():
            name = self.random.choice(("", "a", "b", "c"))
            self.world.unpin(session, self.random.choice(OWNERS), name)

    def reconfigure(self) -> None:
        spare_pages = self.random.choice((-12, -6, -2, 1, 4, 8))
        spare = self.random.choice((None, None, -3, 1, 4, 12))
        self.world.reconfigure(spare_pages, self.random.randrange(3), spare)

    def pass_time(self) -> None:
        self.world.pass_time(self.random.choice((0.125, 0.25, 0.5)))

    def work(self) -> None:
        self.world.work(self.random.choice(self.failures), self.random.randrange(4))

    def misuse(self) -> None:
        self.world.ask_as_nobody()
        if session := self._session():
            number = self.random.choice([*self.world.contexts, 69])
            seq_id, generation = self.random.randint(0, 2), self.random.randint(0, 9)
            self.world.misuse(session, number, seq_id, generation)
