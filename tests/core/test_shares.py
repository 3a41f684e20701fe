"""Minima and caps of tenants and models: stories with exact bytes. Random ones: test_model.py.

Models have a stride of one page. Beside its blocks a tenant's model takes BESIDE.
"""

import pytest

from kvd.core import dropping
from kvd.core.reasons import Reason
from kvd.core.shares import ModelRule, Share, may_lose
from kvd.core.tenants import TenantRule
from kvd_proto.errors import AllLeased, BudgetTooSmall, ModelTooLarge, OverQuota
from kvd_proto.messages import COMPLETED, Evict, Release
from tests.core.driver import PAGE, Driver, Handle, alloc, model

BUDGET = 64 * PAGE
STAGING, DIRECTORY = 2, 7
BESIDE = STAGING + DIRECTORY
"""In pages: the staging of its one session; directory and index once a slot is used."""


class Sharing(Driver):
    """A session for each model of each tenant."""

    def __init__(self, *rules: TenantRule | ModelRule) -> None:
        super().__init__(
            BUDGET,
            tenants=tuple(each for each in rules if isinstance(each, TenantRule)),
            models=tuple(each for each in rules if isinstance(each, ModelRule)),
        )
        self.contexts: dict[tuple[str, str], int] = {}
        self.n_prompts = 0

    def context_of(self, tenant: str, name: str = "m") -> int:
        if (tenant, name) not in self.contexts:
            session = f"{tenant} {name}"
            self.connect(session, tenant, staging=STAGING * PAGE)
            number = self.register(session.encode(), name)
            self.contexts[tenant, name] = self.context(session.encode(), number, n_ids=8)
        return self.contexts[tenant, name]

    def fill(self, tenant: str, n_blocks: int, name: str = "m", *, keep: bool = False) -> Handle:
        """Store so many blocks of a new prompt, and let them go, unless they are to be kept."""
        self.n_prompts += 1
        session = f"{tenant} {name}".encode()
        handle = self.alloc(session, self.context_of(tenant, name))
        tokens = range(1000 * self.n_prompts, 1000 * self.n_prompts + 2 * n_blocks)
        self.store(handle, 0, *tokens)
        if not keep:
            self.ask(session, Release(*handle.fields, COMPLETED))
        return handle

    def fits(self, tenant: str, name: str = "m") -> int:
        """How many blocks more it can have, if all that may go does."""
        session, context = f"{tenant} {name}".encode(), self.context_of(tenant, name)
        fitting, n_blocks = 0, BUDGET // PAGE
        while n_blocks:
            reply = self.ask(session, alloc(context, reserve=2 * (fitting + n_blocks)))
            asked = self.asked
            self.work()
            reply = self.replies[asked]
            if hasattr(reply, "seq_id"):
                fitting += n_blocks
                self.ask(session, Release(context, reply.seq_id, reply.generation, COMPLETED))
            n_blocks //= 2
        return fitting

    def cached(self, tenant: str) -> int:
        return sum(arena.cached for arena in self.cache.budget.tenants[tenant].arenas)


def test_what_is_promised_to_one_tenant_no_other_gets() -> None:
    driver = Sharing(TenantRule("a", minimum=30 * PAGE))
    budget = driver.cache.budget
    assert budget.promised == 30 * PAGE
    driver.fill("b", 34 - BESIDE, keep=True)
    assert budget.unassigned == budget.promised == 30 * PAGE
    session, context = b"b m", driver.context_of("b")
    assert driver.refusal(session, alloc(context, reserve=2)) is AllLeased
    # But the one that it is promised to does, whatever others lease.
    driver.fill("a", 30 - BESIDE, keep=True)
    assert (budget.unassigned, budget.promised) == (0, 0)
    assert driver.cache.budget.tenants["a"].share.held == 30 * PAGE


def test_what_is_cached_of_a_minimum_is_not_evicted_for_others() -> None:
    driver = Sharing(TenantRule("a", minimum=20 * PAGE))
    driver.fill("a", 30)  # holds 39 pages, 19 of them beyond
    driver.fill("b", 64 - 20 - BESIDE)
    assert driver.cached("a") == 11
    assert driver.cache.budget.tenants["a"].share.held == 20 * PAGE
    driver.fill("b", 10)
    assert (driver.cached("a"), driver.cached("b")) == (11, 35), "its own went"
    # What it stores itself takes the place of the oldest of all, be that its own.
    driver.fill("a", 5)
    assert (driver.cached("a"), driver.cached("b")) == (11, 35)


def test_what_goes_below_the_minimum_is_promised_again() -> None:
    driver = Sharing(TenantRule("a", minimum=20 * PAGE))
    driver.fill("a", 11)
    budget = driver.cache.budget
    assert budget.promised == 0
    driver.ask(b"a m", Evict("m", 4))
    assert (budget.promised, budget.unassigned) == (4 * PAGE, BUDGET - 16 * PAGE)
    driver.fill("b", 44 - BESIDE, keep=True)
    assert budget.promised == budget.unassigned == 4 * PAGE


def test_a_model_has_its_minimum_beside_that_of_its_tenant() -> None:
    driver = Sharing(TenantRule("a", minimum=20 * PAGE), ModelRule("kept", minimum=15 * PAGE))
    driver.fill("a", 10, "kept")
    tenant, kept = driver.cache.budget.tenants["a"], driver.cache.budget.models["kept"]
    held = (tenant.held, tenant.share.held, kept.share.held)
    assert held == (19 * PAGE, STAGING * PAGE, 17 * PAGE)
    assert driver.cache.budget.promised == (20 - STAGING) * PAGE
    driver.fill("a", 64 - 15 - STAGING - BESIDE, "other")
    assert kept.share.held == 15 * PAGE
    assert kept.arenas[0].cached == 8
    driver.fill("a", 20, "other")
    assert kept.arenas[0].cached == 8, "its tenant's other models are others, too"


def test_a_minimum_stands_against_the_own_tenants_quota() -> None:
    driver = Sharing(TenantRule("a", quota=40 * PAGE), ModelRule("kept", minimum=15 * PAGE))
    driver.fill("a", 6, "kept")
    driver.fill("a", 40 - 6 - 2 * BESIDE, "other")
    assert driver.cache.budget.tenants["a"].headroom == 0
    driver.fill("a", 10, "other")
    assert driver.cache.budget.models["kept"].arenas[0].cached == 6
    session, context = b"a other", driver.context_of("a", "other")
    assert driver.refusal(session, alloc(context, reserve=2 * 19)) is OverQuota


def test_a_model_at_its_cap_evicts_its_own_whosever_they_are() -> None:
    driver = Sharing(ModelRule("m", cap=40 * PAGE))
    driver.fill("a", 10)
    driver.fill("b", 40 - 10 - 2 * DIRECTORY)
    capped = driver.cache.budget.models["m"]
    assert capped.held == 40 * PAGE
    driver.fill("c", 8, "free")  # there is room beside
    assert (driver.cached("a"), driver.cached("b"), driver.cached("c")) == (10, 16, 8)
    driver.fill("b", 4)
    assert (driver.cached("a"), driver.cached("b")) == (6, 20)
    assert capped.held == 40 * PAGE
    assert driver.refusal(b"b m", alloc(driver.context_of("b"), reserve=2 * 40)) is OverQuota
    reply = driver.replies[driver.asked]
    assert reply.details["cap_bytes"] == 40 * PAGE


def test_a_model_that_can_never_fit_its_cap_is_refused() -> None:
    driver = Sharing(ModelRule("m", cap=PAGE))
    driver.connect("a", "a", staging=0)
    assert driver.refusal(b"a", model()) is ModelTooLarge


def test_what_can_never_be_for_others_minima_is_said() -> None:
    driver = Sharing(TenantRule("a", minimum=50 * PAGE))
    context = driver.context_of("b")
    assert driver.refusal(b"b m", alloc(context, reserve=2 * 20)) is BudgetTooSmall
    assert driver.replies[driver.asked].details["minima_bytes"] == 50 * PAGE


def test_a_model_with_a_minimum_does_not_give_way_to_another_model() -> None:
    driver = Sharing(ModelRule("kept", minimum=15 * PAGE))
    driver.limits = driver.limits.__class__(BUDGET, models=driver.limits.models, max_models=1)
    driver.core = driver.core.__class__(driver.limits)
    driver.connect("s", "a", staging=0)
    driver.register(b"s", "kept")
    driver.disconnect(b"s")
    driver.connect("t", "a", staging=0)
    assert driver.refusal(b"t", model("other")).code == "too_many"


def test_strides_that_differ_never_go_below_the_minimum() -> None:
    driver = Sharing(TenantRule("a", minimum=30 * PAGE))
    driver.connect("s", "a", staging=4 * PAGE)
    for name, pages in (("small", 1), ("large", 3)):
        number = driver.register(b"s", name, pages=pages)
        handle = driver.alloc(b"s", driver.context(b"s", number))
        driver.append(handle, 0, *range(number * 100, number * 100 + 12))
        driver.work()
        driver.ask(b"s", Release(*handle.fields, COMPLETED))
    share = driver.cache.budget.tenants["a"].share
    before = share.held
    assert driver.fits("b")
    assert before > share.held >= 30 * PAGE


@pytest.mark.parametrize(
    ("held", "loses", "may"), [(10, 5, True), (10, 6, False), (5, 0, True), (4, 1, False)]
)
def test_who_may_lose_what(held: int, loses: int, may: bool) -> None:
    loser, taker = Share(5, held), Share(0)
    assert may_lose(loser, taker, loses) is may
    assert may_lose(loser, loser, loses), "to itself"
    assert may_lose(loser, None, loses), "by command"
    assert may_lose(Share(0, held), taker, loses), "without a minimum"
    assert loser.promised == max(0, 5 - held)


def test_an_eviction_looks_at_no_more_than_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is kept within a minimum, and is older."""
    driver = Sharing(TenantRule("a", minimum=30 * PAGE), ModelRule("kept", minimum=11 * PAGE))
    driver.fill("a", 20)
    driver.fill("c", 4, "kept")
    driver.fill("b", 4)
    looked_at = []

    def counting(loser: Share, taker: Share | None, n_bytes: int) -> bool:
        looked_at.append(loser)
        return may_lose(loser, taker, n_bytes)

    monkeypatch.setattr(dropping, "may_lose", counting)
    taker = driver.cache.budget.tenants["b"].share
    whole = driver.cache.budget
    (block,) = whole.pop_oldest(whole.policies, [], Reason.ROOM, taker)
    assert block.arena.tenant.name == "b", "the others' are older, and stay"
    assert len(looked_at) == 3
