"""Blocks that go together: as if they had gone one after the other."""

from collections.abc import Sequence
from random import Random

import pytest

from kvd.core import dropping
from kvd.core.arenas import Arena
from kvd.core.dropping import Dropping
from kvd.core.events import Effect
from kvd.core.reasons import Reason
from kvd.core.shares import ModelRule
from kvd.core.tenants import TenantRule
from kvd.core.tree import Block
from kvd_proto.messages import COMPLETED, Release
from tests.core.driver import PAGE, Handle
from tests.core.test_shares import Sharing

Gone = tuple[str, str, bytes, Reason]

RULES: list[tuple[TenantRule | ModelRule, ...]] = [
    (),
    (TenantRule("a", minimum=20 * PAGE), TenantRule("b", minimum=12 * PAGE)),
    (TenantRule("a", quota=30 * PAGE), TenantRule("b", quota=40 * PAGE)),
    (TenantRule("a", quota=40 * PAGE), ModelRule("m", minimum=20 * PAGE), ModelRule("n", 0)),
    (ModelRule("m", cap=30 * PAGE), ModelRule("n", minimum=10 * PAGE, cap=30 * PAGE)),
]


def story(
    rules: tuple[TenantRule | ModelRule, ...], seed: int, most: int
) -> tuple[list[Gone], list[object], list[int]]:
    """What goes of which tenant and model, in this order; what is there in the end; and how many
    went at once."""
    random = Random(seed)
    gone: list[Gone] = []
    runs: list[int] = []

    with pytest.MonkeyPatch.context() as patch:
        forget = Dropping._forget

        def watched(
            self: Dropping,
            arena: Arena,
            blocks: Sequence[Block],
            reason: Reason,
            effects: list[Effect],
        ) -> None:
            gone.extend((arena.tenant.name, arena.name, each.tokens, reason) for each in blocks)
            runs.append(len(blocks))
            forget(self, arena, blocks, reason, effects)

        patch.setattr(Dropping, "_forget", watched)
        patch.setattr(dropping, "MOST_AT_ONCE", most)
        driver = Sharing(*rules)
        kept: list[tuple[bytes, Handle]] = []
        for _ in range(40):
            tenant, name = random.choice("ab"), random.choice("mn")
            keep = len(kept) < 2 and random.random() < 0.3
            n_blocks = 1 if keep else random.choice((1, 2, 5, 9))
            handle = driver.fill(tenant, n_blocks, name, keep=keep)
            if keep:
                kept.append((f"{tenant} {name}".encode(), handle))
            elif kept and random.random() < 0.3:
                session, handle = kept.pop(0)
                driver.ask(session, Release(*handle.fields, COMPLETED))
    order = [
        (each.arena.name, each.tokens, each.used) for each in driver.cache.budget.oldest_first()
    ]
    totals = [driver.cache.budget.unassigned, driver.cache.budget.promised, driver.counts()]
    return gone, [order, totals], runs


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("rules", RULES, ids=["plain", "minima", "quotas", "models", "caps"])
def test_what_goes_at_once_is_what_would_have_gone_one_by_one(
    rules: tuple[TenantRule | ModelRule, ...], seed: int
) -> None:
    gone, left, runs = story(rules, seed, dropping.MOST_AT_ONCE)
    one_by_one, left_by_them, ones = story(rules, seed, 1)
    assert gone == one_by_one
    assert left == left_by_them
    assert max(ones) == 1
    assert max(runs) > 1, "nothing is tested"
