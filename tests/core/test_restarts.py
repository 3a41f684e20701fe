"""Seeded stories in which the daemon dies at any moment and is started again, over and over.

Everything that is checked after each step is in world.py and restarts.py. A longer run, or one
story again: KVD_SIMULATIONS (how many) and KVD_SEED (the first one).
"""

import os
from random import Random

import pytest

from tests.core.restarts import Crashed, RestartingWorld
from tests.core.test_simulation import Life
from tests.core.world import KINDS, Shares, World

SIMULATIONS = int(os.environ.get("KVD_SIMULATIONS", 300))
FIRST_SEED = int(os.environ.get("KVD_SEED", 0))
STEPS = 250


@pytest.mark.timeout(7200)
def test_the_daemon_dies_at_any_moment() -> None:
    lives = adopted = damaged = refused = kept_pins = 0
    for seed in range(FIRST_SEED, FIRST_SEED + SIMULATIONS):
        story = Story(Random(seed))
        try:
            story.live()
        except BaseException as error:
            error.add_note(f"again: KVD_SEED={seed} KVD_SIMULATIONS=1 pytest {__file__}")
            raise
        lives += story.world.lives
        adopted += story.world.adopted
        damaged += story.world.damaged
        refused += story.world.refused
        kept_pins += story.world.kept_pins
    print(f"{SIMULATIONS} stories from seed {FIRST_SEED}: {lives} daemons, which adopted {adopted}")
    print(f"blocks and {kept_pins} pins, found {damaged} blocks damaged, refused {refused} arenas")
    if SIMULATIONS >= 100:
        assert lives > 4 * SIMULATIONS
        assert adopted > 2 * SIMULATIONS
        assert damaged > SIMULATIONS // 10
        assert kept_pins > SIMULATIONS // 4


class Story(Life):
    """A life in which daemons come and go."""

    world: RestartingWorld

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.frailty = random.choice((0.01, 0.03, 0.1))
        self.harm = random.choice((0, 0, 1, 2))
        self.weights |= {
            self.reader_leaves: random.choice((1, 5, 20)),
            self.look_for_readers: random.choice((5, 20)),
            self.register_in_vain: 2,
            self.jump: 1,
        }

    def _make_world(
        self,
        spare_pages: int,
        max_sequences: int,
        spare_of_tenants: tuple[int | None, ...],
        max_models: int,
        shares: Shares,
    ) -> World:
        return RestartingWorld(
            self.random, spare_pages, max_sequences, spare_of_tenants, max_models, shares
        )

    def live(self) -> None:
        steps, weights = list(self.weights), list(self.weights.values())
        for step in self.random.choices(steps, weights, k=STEPS):
            if self.world.shell.fuse <= 0 and self.random.random() < self.frailty:
                self.world.shell.fuse = self.random.randint(1, 40)
            try:
                step()
            except Crashed:
                self.world.shell.fuse = self.random.choice((-1, -1, self.random.randint(1, 15)))
                self.world.restart(
                    damages=self.random.randint(0, self.harm),
                    spoils_uses=self.harm == 2 and self.random.random() < 0.2,
                )
        self.world.finish()

    def reader_leaves(self) -> None:
        self.world.reader_leaves()

    def look_for_readers(self) -> None:
        self.world.look_for_readers()

    def register_in_vain(self) -> None:
        if session := self._session():
            self.world.register_in_vain(session, self.random.choice(KINDS))

    def jump(self) -> None:
        """The clock jumps, as after the machine was suspended."""
        self.world.pass_time(self.random.choice((3600.0, 1e6)))
