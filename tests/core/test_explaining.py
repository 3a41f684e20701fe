"""Why is it not cached? Each answer, from a story in which it is the truth; and what must stay
secret, and as it was.

That it says what a reference says after any story: world.py.
"""

from typing import Any

import pytest

from kvd.core import explaining
from kvd.core.cache import Limits
from kvd.core.events import Connected
from kvd.core.machine import Core
from kvd.core.tenants import TenantRule
from kvd_proto.errors import BadMessage, Forbidden, TooMany
from kvd_proto.keys import arena_fingerprint
from kvd_proto.messages import COMPLETED, Evict, Explain, Release, Reported
from tests.core.driver import PAGE, STAGING, Driver, Handle, append, model, packed
from tests.core.test_complexity import Counter


class Bench(Driver):
    """Blocks of two tokens. Session s has model m registered, with context 1."""

    def __init__(self, budget: int = 1 << 20, **limits: Any) -> None:
        super().__init__(budget, **limits)
        self.connect("s")
        self.register(b"s")
        self.context(b"s")

    def put(self, *tokens: int, session: bytes = b"s", context: int = 1) -> None:
        """Store these tokens, and let go."""
        handle = self.alloc(session, context)
        self.store(handle, 0, *tokens)
        self.let_go(handle)

    def let_go(self, handle: Handle) -> None:
        self.ask(handle.session, Release(*handle.fields, COMPLETED))

    def explain(self, *tokens: int, session: bytes = b"s", **other: Any) -> dict[str, Any]:
        self.ask(session, question(*tokens, **other))
        correlation = self.asked
        self.settle()
        reply = self.replies[correlation]
        assert isinstance(reply, Reported), reply
        return reply.report

    def missing(self, *tokens: int, **other: Any) -> dict[str, Any]:
        """The first block that does not match."""
        found = self.explain(*tokens, **other)["missing"]
        assert found is not None
        return found


def question(*tokens: int, name: str = "m", tenant: str = "", traits: Any = ()) -> Explain:
    fingerprint = arena_fingerprint(name.encode().ljust(32), "array", 2)
    return Explain(fingerprint, packed(*tokens), tenant, [list(each) for each in traits])


@pytest.fixture
def bench() -> Bench:
    """(1, 2, 3, 4) is cached."""
    made = Bench()
    made.put(1, 2, 3, 4)
    return made


# --- what matches


def test_all_of_it_is_cached(bench: Bench) -> None:
    report = bench.explain(1, 2, 3, 4)
    assert (report["matched_tokens"], report["matched_blocks"], report["missing"]) == (4, 2, None)
    assert (report["model"], report["tenant"], report["block_tokens"]) == ("m", "t", 2)
    assert bench.explain(1, 2, 3)["missing"] is None, "a longer block has it"
    assert bench.explain()["missing"] is None


def test_a_match_is_exact_to_the_token_and_the_block_that_ends_it_is_named(bench: Bench) -> None:
    report = bench.explain(1, 2, 3, 9, 9)
    assert (report["asked_tokens"], report["matched_tokens"], report["matched_blocks"]) == (5, 3, 2)
    assert report["missing"] == {
        "block": 1, "start": 2, "end": 4, "why": "not_known",
        "tokens": 0, "reason": None, "seconds_ago": None,
    }  # fmt: skip


# --- why not


def test_it_was_never_stored(bench: Bench) -> None:
    assert bench.missing(7, 8)["why"] == "not_known"
    assert bench.explain(7, 8)["memory_seconds"] is None, "nothing was forgotten since the start"


def test_it_was_evicted_by_command_so_many_seconds_ago(bench: Bench) -> None:
    bench.ask(b"s", Evict("", 1))
    bench.pass_time(2.5)
    missing = bench.missing(1, 2, 3, 4)
    assert (missing["block"], missing["why"], missing["tokens"]) == (1, "evicted", 2)
    assert (missing["reason"], missing["seconds_ago"]) == ("command", 2.5)


def test_it_was_evicted_for_want_of_room() -> None:
    bench = Bench(STAGING + 10 * PAGE)
    bench.put(1, 2)
    bench.put(*range(10, 18))
    assert bench.missing(1, 2)["reason"] == "room"


def test_the_part_of_it_that_was_stored_as_an_open_tail_was_evicted(bench: Bench) -> None:
    bench.put(1, 2, 3, 4, 5)
    bench.ask(b"s", Evict("", 1))
    missing = bench.missing(1, 2, 3, 4, 5, 6)
    assert (missing["why"], missing["tokens"], missing["end"]) == ("evicted", 1, 6)
    assert bench.missing(1, 2, 3, 4, 6)["why"] == "too_short"


def test_a_part_that_matches_still_is_not_called_evicted(bench: Bench) -> None:
    """(5,) has gone for the longer (5, 6): what does not match of (5, 7) was never there."""
    bench.put(1, 2, 3, 4, 5)
    bench.put(1, 2, 3, 4, 5, 6)
    assert bench.evicted() == {"superseded": 1}
    missing = bench.missing(1, 2, 3, 4, 5, 7)
    assert missing["why"] == "not_known"


def test_the_end_of_a_prompt_is_shorter_than_a_block(bench: Bench) -> None:
    missing = bench.missing(1, 2, 3, 4, 5)
    assert (missing["why"], missing["start"], missing["end"]) == ("too_short", 4, 5)


def test_it_is_being_stored(bench: Bench) -> None:
    handle = bench.alloc(b"s", 1)
    bench.append(handle, 0, 5, 6, 7)
    assert bench.missing(5, 6, 7)["why"] == "filling"
    bench.back()
    bench.copy(1)
    assert bench.explain(5, 6, 7)["matched_tokens"] == 2


def test_it_is_not_checked_yet(bench: Bench) -> None:
    bench.restart()
    bench.connect("s")
    bench.register(b"s")
    missing = bench.missing(1, 2, 3, 4)
    assert (missing["block"], missing["why"]) == (0, "unchecked")
    assert bench.missing(1)["why"] == "unchecked"
    bench.check()
    assert bench.explain(1, 2, 3, 4)["missing"] is None


def test_it_was_damaged(bench: Bench) -> None:
    bench.restart()
    bench.check(1)
    bench.connect("s")
    assert bench.missing(1, 2, 3, 4)["reason"] == "damaged"


def test_after_a_restart_nothing_is_known_of_before(bench: Bench) -> None:
    bench.ask(b"s", Evict("", 1))
    bench.restart()
    bench.work()
    bench.connect("s")
    assert bench.missing(1, 2, 3, 4)["why"] == "not_known"


def test_the_model_is_not_registered(bench: Bench) -> None:
    report = bench.explain(1, 2, name="another")
    assert (report["model"], report["matched_tokens"], report["missing"]) == (None, 0, None)
    assert report["model_dropped_seconds"] is None


def test_the_model_gave_way_to_another() -> None:
    bench = Bench(max_models=1)
    bench.put(1, 2)
    bench.disconnect(b"s")
    bench.connect("s")
    bench.register(b"s", "another")
    bench.pass_time(3)
    report = bench.explain(1, 2)
    assert (report["model"], report["model_dropped_seconds"]) == (None, 3.0)


def test_how_many_asked_that_nothing_is_stored(bench: Bench) -> None:
    assert bench.explain(7)["sequences_not_stored"] == 0
    bench.alloc(b"s", 1, 7, store=0)
    assert bench.explain(7)["sequences_not_stored"] == 1


# --- another model has it


def test_another_model_has_more_and_it_is_said_what_differs(bench: Bench) -> None:
    bench.register(b"s", traits=[["type_k", "q8_0"], ["lora", ""]])
    other = bench.ask(b"s", model("n", traits=[["type_k", "f16"], ["rope", "x"], ["lora", ""]]))
    bench.put(1, 2, 3, 4, 5, 6, context=bench.context(b"s", other.model))
    (row,) = bench.explain(1, 2, 3, 4, 5, 6)["others"]
    assert (row["model"], row["tokens"], row["traits_known"]) == ("n", 6, True)
    assert row["differs"] == [
        {"name": "rope", "here": None, "there": "x"},
        {"name": "type_k", "here": "q8_0", "there": "f16"},
    ]
    assert bench.explain(1, 2, 3, 4)["others"] == [], "it has no more than this one"


def test_what_a_model_that_is_not_registered_is_like_comes_with_the_question(bench: Bench) -> None:
    bench.register(b"s", traits=[["type_k", "f16"]])
    asked = {"name": "another", "traits": [("type_k", "q8_0"), ("block_tokens", "2")]}
    (row,) = bench.explain(1, 2, **asked)["others"]
    assert row["traits_known"]
    assert row["differs"] == [
        {"name": "payload_format", "here": None, "there": "array"},
        {"name": "type_k", "here": "q8_0", "there": "f16"},
    ]


def test_of_models_that_told_nothing_only_the_shape_is_compared(bench: Bench) -> None:
    other = bench.ask(b"s", model("n", traits=[["type_k", "f16"]], block_tokens=1))
    context = bench.context(b"s", other.model)
    handle = bench.alloc(b"s", context)
    for at, token in enumerate((1, 2, 3, 4, 5)):
        bench.ask(b"s", append(handle, at, token, staged=[PAGE]))
        bench.work()
    (row,) = bench.explain(1, 2, 3, 4, 5)["others"]
    assert (row["tokens"], row["traits_known"]) == (5, False)
    assert row["differs"] == [{"name": "block_tokens", "here": "2", "there": "1"}]


def test_those_that_have_most_are_told(bench: Bench) -> None:
    for number in range(1, 12):
        other = bench.ask(b"s", model(f"n{number}"))
        context = bench.context(b"s", other.model)
        bench.put(*range(100, 100 + 2 * number), context=context)
    others = bench.explain(*range(100, 122))["others"]
    assert [row["tokens"] for row in others] == [22, 20, 18, 16, 14, 12, 10, 8]


# --- another tenant has it


class Tenants(Bench):
    """Tenant t, of session s, and u; both have model m. Session a is t's too, and administers."""

    def __init__(self) -> None:
        super().__init__()
        rules = (TenantRule("t"), TenantRule("u"))  # no salts: equal tokens have equal keys
        self.limits = Limits(1 << 20, first_context=1, tenants=rules)
        self.core = Core(self.limits)
        self.handle(Connected(b"s", "s", 1, 1000, "t", STAGING, administrator=False))
        self.handle(Connected(b"a", "a", 1, 0, "t", STAGING, administrator=True))
        self.connect("u", tenant="u")
        for name in (b"s", b"u"):
            self.context(name, self.register(name))


def test_an_administrator_is_told_that_another_tenant_has_it_and_nothing_more() -> None:
    bench = Tenants()
    assert bench.explain(1, 2, 3, session=b"a")["another_tenant"] is False
    bench.put(1, 2, session=b"u", context=2)
    report = bench.explain(1, 2, 3, session=b"a")
    assert report["another_tenant"] is True
    assert (report["matched_tokens"], report["missing"]["why"]) == (0, "not_known")
    bench.put(1, 2)
    assert bench.explain(1, 2, 3, session=b"a")["another_tenant"] is False, "no more than this one"


def test_an_administrator_may_ask_in_the_name_of_any_tenant() -> None:
    bench = Tenants()
    bench.put(1, 2, session=b"u", context=2)
    report = bench.explain(1, 2, session=b"a", tenant="u")
    assert (report["tenant"], report["matched_tokens"], report["another_tenant"]) == ("u", 2, False)
    assert bench.refusal(b"a", question(1, tenant="nobody")) is BadMessage


def test_others_may_name_no_tenant_but_their_own() -> None:
    bench = Tenants()
    assert bench.explain(1, session=b"s", tenant="t")["tenant"] == "t"
    # Whether there is one or not.
    replies = [bench.ask(b"s", question(1, tenant=name)) for name in ("u", "x")]
    assert [type(reply) for reply in replies] == [Forbidden, Forbidden]
    assert replies[0].message == replies[1].message


def test_nobody_else_learns_anything_of_another_tenant() -> None:
    """Neither from the answer, nor from how much there is to do for it: whatever that one stores,
    evicts, registers or has registered no more."""

    def ask(bench: Tenants) -> tuple[dict[str, Any], int]:
        counter = Counter()
        counter.watch(bench)
        bench.checked = False
        found: list[dict[str, Any]] = []
        steps = counter.of(lambda: found.append(bench.explain(1, 2, 3, 4)))
        return found[0], steps

    bench = Tenants()
    nothing = ask(bench)
    assert nothing[0]["another_tenant"] is None
    bench.put(1, 2, 3, 4, session=b"u", context=2)
    assert ask(bench) == nothing, "it is cached"
    bench.ask(b"u", Evict("", 0, "u"))
    assert ask(bench) == nothing, "it was evicted"
    other = bench.ask(b"u", model("n"))
    bench.put(1, 2, 3, 4, session=b"u", context=bench.context(b"u", other.model))
    assert ask(bench) == nothing, "another model has it"


# --- it leaves everything as it is


def test_it_leases_nothing_and_is_no_use_of_anything(bench: Bench) -> None:
    bench.put(5, 6)
    order, counts, clock = bench.lru(), bench.counts(), bench.cache.budget.clock
    before = bench.counters
    bench.explain(1, 2, 3, 4, 7)
    assert (bench.lru(), bench.counts(), bench.cache.budget.clock) == (order, counts, clock)
    after = bench.counters
    assert (after.queried_tokens, after.hit_tokens) == (before.queried_tokens, before.hit_tokens)
    assert [type(effect).__name__ for effect in bench.effects] == ["Reply"]


# --- in steps


@pytest.fixture
def stepping(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """(1, 2, 3, 4, 5, 6, 7, 8) is cached, and a step goes over one block."""
    monkeypatch.setattr(explaining, "WALK_BLOCKS", 1)
    bench.put(1, 2, 3, 4, 5, 6, 7, 8)
    return bench


PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)


def test_a_long_prompt_is_looked_at_in_steps(stepping: Bench) -> None:
    assert stepping.ask(b"s", question(*PROMPT)) is None
    asked = stepping.asked
    n_steps = 0
    while asked not in stepping.replies:
        stepping.pass_time(0)
        n_steps += 1
    assert n_steps == 3
    assert stepping.replies[asked].report["missing"] is None


@pytest.mark.parametrize("n_steps", range(4))
@pytest.mark.parametrize("n_evicted", range(1, 5))
def test_what_is_evicted_meanwhile_is_told_as_evicted(
    stepping: Bench, n_steps: int, n_evicted: int
) -> None:
    assert stepping.ask(b"s", question(*PROMPT)) is None
    asked = stepping.asked
    for _ in range(min(n_steps, 2)):
        stepping.pass_time(0)
    stepping.cache.budget.evict("", n_evicted, [])
    stepping.settle()
    report = stepping.replies[asked].report
    missing = report["missing"]
    # What it had found when a block went that it had passed is told as it was then.
    assert missing["block"] == 4 - n_evicted
    assert (missing["why"], missing["reason"]) == ("evicted", "command")


def test_a_model_that_gives_way_meanwhile_is_no_harm(stepping: Bench) -> None:
    assert stepping.ask(b"s", question(*PROMPT)) is None
    asked = stepping.asked
    arena = stepping.cache.budget.arenas[1]
    stepping.checked = False
    stepping.cache.budget.give_up(arena, [])
    stepping.settle()
    assert stepping.replies[asked].report["missing"]["block"] == 0


def test_who_asks_too_much_at_once_is_refused_and_who_dies_is_forgotten(stepping: Bench) -> None:
    for _ in range(4):
        assert stepping.ask(b"s", question(*PROMPT)) is None
    assert stepping.refusal(b"s", question(*PROMPT)) is TooMany
    stepping.connect("other")
    assert stepping.ask(b"other", question(*PROMPT)) is None
    last = stepping.asked
    stepping.disconnect(b"s")
    stepping.settle()
    assert stepping.replies[last].report["matched_tokens"] == 8
    assert not stepping.cache.tasks
