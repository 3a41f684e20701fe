"""Tenants: a quota is kept by giving way oneself, pressure on the budget by whoever is oldest."""

import pytest

from kvd.core import accounting, recount
from kvd.core.cache import Limits
from kvd.core.events import DropRecord, Punch, RefuseSession, ShareArena
from kvd.core.machine import Core
from kvd.core.tenants import TenantRule
from kvd_proto import errors
from kvd_proto.index import memory_beside
from kvd_proto.keys import arena_fingerprint, block_key, root_key
from kvd_proto.messages import COMPLETED, CloseContext, Evict, Evicted, Flush, Get, Release
from tests.core.driver import (
    BLOCK_TOKENS,
    PAGE,
    STAGING,
    Driver,
    alloc,
    append,
    model,
    packed,
    sealed_blocks,
    siblings_in_runs_of,
)
from tests.core.test_complexity import Counter

SALTS = {"a": b"salt of tenant a", "b": b"salt of tenant b"}


class Tenants(Driver):
    """Sessions "a" and "b" of tenants of these names, each with a model "m" and a context."""

    def __init__(self, quota_a: int | None, quota_b: int | None, pages: int = 20) -> None:
        directory = 5 * PAGE
        while directory < memory_beside(
            slots := 2 * (directory + STAGING) // PAGE + pages, slots, 2
        ):
            directory += PAGE
        self.fixed = directory + STAGING
        """What a tenant with one session and one full model holds before it stores anything."""
        super().__init__(
            2 * self.fixed + pages * PAGE,
            tenants=(
                TenantRule("a", SALTS["a"], quota_a and self.fixed + quota_a * PAGE),
                TenantRule("b", SALTS["b"], quota_b and self.fixed + quota_b * PAGE),
            ),
        )
        self.contexts = {}
        for name in ("a", "b"):
            session = self.connect(name, tenant=name)
            self.contexts[name] = self.context(session, self.register(session))

    def put(self, name: str, *numbers: int) -> None:
        """Blocks of one token each, cached."""
        for number in numbers:
            handle = self.alloc(name.encode(), self.contexts[name])
            self.store(handle, 0, number)
            self.ask(name.encode(), Release(*handle.fields, COMPLETED))

    def cached(self, name: str) -> list[int]:
        """The first tokens of what the tenant has cached, oldest first."""
        evictable = self.cache.budget.tenants[name].evictable
        return [int.from_bytes(block.tokens[:4], "little") for block in evictable]

    def hold(self, name: str, first: int, n_blocks: int):
        handle = self.alloc(name.encode(), self.contexts[name])
        self.store(handle, 0, *range(first, first + BLOCK_TOKENS * n_blocks))
        return handle


def test_at_its_quota_a_tenant_evicts_its_own_oldest_and_nobody_elses() -> None:
    driver = Tenants(4, None)
    driver.put("b", 100, 101, 102)
    driver.put("a", 1, 2, 3, 4)
    assert driver.cached("a") == [1, 2, 3, 4]
    driver.put("a", 5, 6)
    assert driver.cached("a") == [3, 4, 5, 6]
    assert driver.cached("b") == [100, 101, 102], "older than all, and another's"
    assert driver.cache.budget.unassigned == 13 * PAGE, "there was room in the budget"
    assert (driver.evicted("a"), driver.evicted("b")) == ({"quota": 2}, {})
    assert driver.cache.budget.tenants["a"].held == driver.cache.budget.tenants["a"].quota


def test_what_it_used_again_stays() -> None:
    driver = Tenants(3, None)
    driver.put("a", 1, 2, 3)
    handle = driver.alloc(b"a", driver.contexts["a"], 1)
    driver.ask(b"a", Release(*handle.fields, COMPLETED))
    driver.put("a", 4)
    assert driver.cached("a") == [3, 1, 4]


def test_in_a_full_budget_the_oldest_goes_whosever_it_is() -> None:
    driver = Tenants(None, None, pages=4)
    driver.put("a", 1)
    driver.put("b", 2)
    driver.put("a", 3, 4)
    driver.put("b", 5)
    assert (driver.cached("a"), driver.cached("b")) == ([3, 4], [2, 5])
    driver.put("b", 6)
    assert (driver.cached("a"), driver.cached("b")) == ([3, 4], [5, 6])
    driver.put("b", 7)
    assert (driver.cached("a"), driver.cached("b")) == ([4], [5, 6, 7])
    assert [block.tokens for block in list(driver.cache.budget.oldest_first())] == [
        packed(number) for number in (4, 5, 6, 7)
    ]


def test_a_quota_moves_memory_between_the_tenants_own_models_only() -> None:
    """Of two arenas of one tenant, the other one's free slots go, then its oldest block."""
    driver = Tenants(None, None, pages=30)
    tenant = driver.cache.budget.tenants["a"]
    other = driver.context(b"a", driver.register(b"a", "other", pages=2))
    driver.put("b", 100)
    driver.put("a", 1, 2, 3, 4)
    growth = tenant.arenas[1].directory_limit - tenant.arenas[1].directory_bytes
    tenant.limit = tenant.held + growth + PAGE
    tenant.settle(driver.cache.budget.n_bytes)
    recount.check(driver.cache)
    handle = driver.alloc(b"a", other)
    driver.append(handle, 0, 1, 2)
    assert driver.of_kind(DropRecord) == [DropRecord(1, 0)]
    assert driver.of_kind(Punch) == [Punch(1, [0])]
    driver.work()
    driver.append(handle, 2, 3, 4)
    assert driver.of_kind(DropRecord) == [DropRecord(1, 1), DropRecord(1, 2)]
    assert driver.cached("b") == [100]


def test_over_quota_is_an_answer_of_its_own_and_changes_nothing() -> None:
    driver = Tenants(4, None)
    held = driver.hold("a", 10, 3)
    driver.put("a", 1)
    before = (driver.cached("a"), driver.cache.budget.unassigned)
    handle = driver.alloc(b"a", driver.contexts["a"])
    for message in (append(handle, 0, 21, 22, 23, 24), alloc(driver.contexts["a"], reserve=4)):
        error = driver.ask(b"a", message)
        assert type(error) is errors.OverQuota
        quota = driver.fixed + 4 * PAGE
        assert error.details == {
            "tenant": "a",
            "quota_bytes": quota,
            "held_bytes": quota,
            "asked_bytes": PAGE,
            "available_bytes": 0,
        }
        assert (driver.cached("a"), driver.cache.budget.unassigned) == before
    driver.ask(b"a", Release(*held.fields, COMPLETED))
    driver.store(handle, 0, 21, 22, 23, 24)


def test_the_quota_is_named_even_if_the_budget_has_no_room_either() -> None:
    driver = Tenants(2, None, pages=4)
    driver.hold("b", 50, 2)
    driver.hold("a", 10, 2)
    handle = driver.alloc(b"a", driver.contexts["a"])
    assert driver.refusal(b"a", append(handle, 0, 1)) is errors.OverQuota
    other = driver.alloc(b"b", driver.contexts["b"])
    assert driver.refusal(b"b", append(other, 0, 1)) is errors.AllLeased
    assert driver.refusal(b"b", alloc(driver.contexts["b"], reserve=2000)) is errors.BudgetTooSmall
    assert driver.refusal(b"a", alloc(driver.contexts["a"], reserve=2000)) is errors.OverQuota


def test_stagings_and_directories_count() -> None:
    driver = Tenants(18, None, pages=40)
    driver.put("a", 1, 2, 3, 4)
    driver.connect("a2", tenant="a", staging=14 * PAGE)
    assert driver.cached("a") == [1, 2, 3, 4]
    driver.connect("a3", tenant="a", staging=2 * PAGE)
    assert driver.cached("a") == [3, 4]
    driver.connect("a4", tenant="a", staging=3 * PAGE)
    (refused,) = driver.of_kind(RefuseSession)
    assert type(refused.error) is errors.OverQuota
    assert refused.error.details["asked_bytes"] == 3 * PAGE
    assert driver.refusal(b"a", model("other")) is errors.OverQuota
    driver.connect("b2", tenant="b", staging=14 * PAGE)
    assert not driver.of_kind(RefuseSession)
    driver.disconnect(b"a2")
    assert driver.register(b"a", "other") == 3


def test_a_model_that_does_not_fit_the_quota_is_too_large() -> None:
    driver = Tenants(2, None, pages=40)
    error = driver.ask(b"a", model("large", pages=30))
    assert type(error) is errors.ModelTooLarge
    assert error.details["quota_bytes"] == driver.fixed + 2 * PAGE
    assert driver.register(b"b", "large", pages=30) == 3


def test_a_quota_beyond_the_budget_is_none() -> None:
    core = Core(Limits(1 << 20, tenants=(TenantRule("a", b"", 2 << 20),)))
    tenant = core.cache.budget.tenants["a"]
    assert (tenant.quota, tenant.has_quota) == (1 << 20, False)


def test_an_eviction_costs_the_same_however_much_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the quota, and at the budget, of several tenants."""
    siblings_in_runs_of(8, monkeypatch)

    def cost(n_blocks: int, quota: int | None, whose: str) -> int:
        driver = Tenants(quota, None, pages=n_blocks)
        driver.checked = False
        for name in ("a", "b"):
            arena = driver.cache.budget.tenants[name].arenas[0]
            growth = arena.directory_limit - arena.directory_bytes
            driver.cache.budget.spend(arena.tenant, growth)
            arena.directory_bytes += growth
        driver.put(whose, *range(1, 1 + (quota or n_blocks)))
        handle = driver.alloc(b"a", driver.contexts["a"])
        counter = Counter()
        counter.watch(driver)
        steps = counter.of(lambda: driver.append(handle, 0, 1 << 20))
        assert sum(driver.evicted(whose).values()) == 1
        return steps

    assert cost(100, None, "b") == cost(1000, None, "b") > 0
    assert cost(100, 99, "a") == cost(1000, 999, "a") > 0


# --- apart


def test_equal_tokens_of_two_tenants_are_two_blocks_with_two_keys() -> None:
    driver = Tenants(None, None)
    driver.hold("a", 1, 1)
    assert driver.alloc(b"b", driver.contexts["b"], 1, 2).matched == 0
    driver.hold("b", 1, 1)
    fingerprint = arena_fingerprint(model().fingerprint, "array", BLOCK_TOKENS)
    for name, number in (("a", 1), ("b", 2)):
        (block,) = sealed_blocks(driver.cache.budget.arenas[number])
        assert block.key == block_key(root_key(fingerprint, SALTS[name]), packed(1, 2))


def test_a_descriptor_goes_to_sessions_of_its_tenant_only() -> None:
    driver = Tenants(None, None)
    for tenant, arena in (("a", 1), ("b", 2)):
        driver.connect(f"{tenant}2", tenant=tenant, staging=PAGE)
        driver.register(f"{tenant}2".encode())
        assert driver.of_kind(ShareArena) == [ShareArena(f"{tenant}2".encode(), arena)]


def test_anothers_context_is_as_if_it_were_not_there() -> None:
    driver = Tenants(None, None)
    handle = driver.hold("a", 1, 1)
    driver.connect("a2", tenant="a")
    for message in (
        Get(*handle.fields, 0),
        Release(*handle.fields, COMPLETED),
        append(handle, 2, 3),
        alloc(handle.context, 1, 2, wait_ms=10),
        CloseContext(handle.context),
    ):
        assert driver.refusal(b"b", message) is errors.UnknownContext
        assert driver.refusal(b"a2", message) is errors.ForeignHandle
    assert driver.refusal(b"b", Flush(1)) is errors.BadMessage


def test_evict_is_for_ones_own_unless_one_administers() -> None:
    driver = Tenants(None, None)
    driver.put("a", 1, 2)
    driver.put("b", 3, 4)
    driver.cache.sessions[b"a"].administrator = False
    assert driver.ask(b"a", Evict("m", 0)) == Evicted(2, 2 * PAGE)
    assert (driver.cached("a"), driver.cached("b")) == ([], [3, 4])
    driver.put("a", 5)
    assert driver.ask(b"b", Evict("m", 2)) == Evicted(2, 2 * PAGE)
    assert (driver.cached("a"), driver.cached("b")) == ([5], [])


def test_the_account_of_each_tenant_adds_up_to_its_quota() -> None:
    driver = Tenants(8, None)
    driver.put("a", 1, 2)
    driver.hold("a", 3, 2)
    driver.ask(b"a", alloc(driver.contexts["a"], reserve=2))
    found = accounting.totals(driver.cache, driver.cache.budget.tenants["a"])
    found.check()
    assert (found.budget, found.unassigned) == (driver.fixed + 8 * PAGE, 3 * PAGE)
    assert (found.cached, found.active, found.filling) == (2 * PAGE, 2 * PAGE, PAGE)
    assert (found.directory, found.staging) == (driver.fixed - STAGING, STAGING)
    assert len(accounting.report_of_sequences(driver.cache, 0.0)) == 2
    (other,) = (driver.cache.budget.tenants[name] for name in "b")
    assert accounting.report_of_sequences(driver.cache, 0.0, other) == []


def test_what_is_done_is_counted_for_its_tenant() -> None:
    driver = Tenants(None, None)
    driver.put("a", 1, 2)
    driver.refusal(b"b", Flush(9))
    driver.ask(b"nobody", Flush(0))
    a, b = driver.cache.counters_of["a"], driver.cache.counters_of["b"]
    assert (a.stored_blocks, a.errors, b.stored_blocks, b.errors) == (2, 0, 0, 1)
    assert driver.cache.counters.errors == 1
    assert (driver.counters.errors, driver.counters.sessions_opened) == (2, 2)


@pytest.mark.parametrize("shown", [repr, str])
def test_a_rule_does_not_show_its_salt(shown) -> None:
    rule = TenantRule("a", b"a secret nobody knows")
    assert "secret" not in shown(rule)
    assert "secret" not in shown(Limits(1 << 20, tenants=(rule,)))
