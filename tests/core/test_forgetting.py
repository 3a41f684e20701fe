"""Forget a prompt: what goes with it, and what stays since others share it, lease it or pin it."""

from typing import Any

import pytest

from kvd.core import forgetting
from kvd.core.cache import Limits
from kvd.core.events import Connected, DropRecord, Punch
from kvd.core.machine import Core
from kvd.core.tenants import TenantRule
from kvd_proto.errors import BadMessage, Forbidden, TooMany, UnknownModel
from kvd_proto.keys import arena_fingerprint
from kvd_proto.messages import COMPLETED, Evict, Evicted, Forget, Forgotten, Release
from tests.core.driver import PAGE, STAGING, Driver, packed, walk_in_steps_of

SYSTEM = (1, 2)
DOCUMENT = (*SYSTEM, 3, 4, 5, 6)
QUESTION = (*DOCUMENT, 7, 8)
OTHER_QUESTION = (*DOCUMENT, 9)
ELSEWHERE = (*SYSTEM, 11, 12)


class Bench(Driver):
    """Session s with a model of blocks of two tokens, and context 1; `paths` are cached."""

    def __init__(self, *paths: tuple[int, ...]) -> None:
        super().__init__()
        self.connect("s")
        self.register(b"s")
        self.context(b"s", n_ids=8)
        for path in paths:
            self.put(*path)

    def put(self, *tokens: int) -> None:
        handle = self.alloc(b"s", 1)
        self.store(handle, 0, *tokens)
        self.ask(b"s", Release(*handle.fields, COMPLETED))

    def forget(self, *tokens: int, session: bytes = b"s", **other: Any) -> Forgotten:
        self.ask(session, request(*tokens, **other))
        correlation = self.asked
        self.settle()
        reply = self.replies[correlation]
        assert isinstance(reply, Forgotten), reply
        return reply

    @property
    def paths(self) -> set[tuple[int, ...]]:
        return set(self.blocks())


def request(*tokens: int, name: str = "m", tenant: str = "") -> Forget:
    fingerprint = arena_fingerprint(name.encode().ljust(32), "array", 2)
    return Forget(fingerprint, packed(*tokens), tenant)


@pytest.fixture
def bench() -> Bench:
    """A system prompt with a document and two questions on it, and with something else."""
    return Bench(QUESTION, OTHER_QUESTION, ELSEWHERE)


# --- what goes


def test_a_document_goes_with_all_that_goes_on_from_it_and_not_what_others_share(
    bench: Bench,
) -> None:
    assert bench.forget(*DOCUMENT) == Forgotten(6, 4, 0, 4 * PAGE)
    assert bench.paths == {SYSTEM, ELSEWHERE}
    assert bench.evicted() == {"command": 4}


def test_a_conversation_goes_and_its_siblings_stay(bench: Bench) -> None:
    assert bench.forget(*QUESTION) == Forgotten(8, 1, 0, PAGE)
    assert bench.paths == {SYSTEM, DOCUMENT[:4], DOCUMENT, OTHER_QUESTION, ELSEWHERE}


def test_what_only_that_prompt_needed_goes_up_to_where_others_go_on(bench: Bench) -> None:
    bench.forget(*QUESTION)
    assert bench.forget(*OTHER_QUESTION) == Forgotten(7, 3, 0, 3 * PAGE)
    assert bench.paths == {SYSTEM, ELSEWHERE}
    assert bench.forget(*ELSEWHERE).blocks == 2
    assert bench.paths == set()


def test_a_prompt_that_ends_within_a_block_takes_what_goes_on_from_there() -> None:
    bench = Bench((1, 2, 3, 4, 5), (1, 2, 3, 6), (1, 2, 9))
    assert bench.forget(1, 2, 3) == Forgotten(3, 3, 0, 3 * PAGE)
    assert bench.paths == {(1, 2), (1, 2, 9)}


def test_a_shorter_tail_of_it_is_a_part_of_it() -> None:
    bench = Bench((1, 2, 3))
    assert bench.forget(1, 2, 3, 4, 5, 6) == Forgotten(3, 2, 0, 2 * PAGE)
    assert bench.paths == set()


def test_if_only_its_beginning_is_cached_nobody_elses_is_dropped(bench: Bench) -> None:
    before = bench.paths
    assert bench.forget(*DOCUMENT, 20, 21, 22) == Forgotten(6, 0, 0, 0)
    assert bench.forget(*SYSTEM, 3, 30) == Forgotten(3, 0, 0, 0), "a block that agrees in part"
    assert bench.forget(40) == Forgotten(0, 0, 0, 0)
    assert bench.paths == before


def test_if_only_its_beginning_is_cached_and_is_nobody_elses_it_goes() -> None:
    bench = Bench(DOCUMENT)
    assert bench.forget(*QUESTION) == Forgotten(6, 3, 0, 3 * PAGE)


def test_again_there_is_nothing_left(bench: Bench) -> None:
    bench.forget(*DOCUMENT)
    assert bench.forget(*DOCUMENT) == Forgotten(2, 0, 0, 0)


def test_its_memory_goes_back_to_the_system(bench: Bench) -> None:
    slot = bench.blocks()[QUESTION]
    bench.ask(b"s", request(*QUESTION))
    bench.settle()
    # In the step that drops it, and no other's.
    assert bench.cache.budget.arenas[1].free == []
    assert bench.cache.budget.arenas[1].punched == [slot]


def test_of_one_model_only(bench: Bench) -> None:
    assert bench.refusal(b"s", request(1, name="another")) is UnknownModel


# --- what stays


def test_what_is_leased_stays_with_all_above_it(bench: Bench) -> None:
    reader = bench.alloc(b"s", 1, *QUESTION)
    assert bench.forget(*DOCUMENT) == Forgotten(6, 1, 3 - 1, PAGE)
    assert bench.paths == {SYSTEM, DOCUMENT[:4], DOCUMENT, QUESTION, ELSEWHERE}
    bench.ask(b"s", Release(*reader.fields, COMPLETED))
    assert bench.forget(*DOCUMENT).blocks == 3


def test_what_is_pinned_stays(bench: Bench) -> None:
    bench.pin(b"s", *DOCUMENT)
    assert bench.forget(*SYSTEM) == Forgotten(2, 3, 3, 3 * PAGE)
    assert bench.paths == {SYSTEM, DOCUMENT[:4], DOCUMENT}


def test_a_beginning_that_is_leased_is_counted_as_kept() -> None:
    bench = Bench(SYSTEM)
    bench.alloc(b"s", 1, *SYSTEM)
    assert bench.forget(*DOCUMENT) == Forgotten(2, 0, 1, 0)
    assert bench.forget(*SYSTEM) == Forgotten(2, 0, 1, 0)


def test_what_is_being_stored_stays() -> None:
    bench = Bench(SYSTEM)
    handle = bench.alloc(b"s", 1, *SYSTEM)
    bench.append(handle, 2, 3, 4)
    assert bench.forget(*SYSTEM) == Forgotten(2, 0, 2, 0)
    bench.work()
    assert bench.paths == {SYSTEM, DOCUMENT[:4]}


def test_what_was_let_go_just_now_goes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if that lease ends in steps."""
    reader = bench.alloc(b"s", 1, *QUESTION)
    walk_in_steps_of(1, monkeypatch)
    bench.ask(b"s", Release(*reader.fields, COMPLETED))
    assert bench.cache.budget.letting_go
    assert bench.forget(*SYSTEM).kept == 0
    assert bench.paths == set()


def test_what_is_not_checked_yet_goes_too(bench: Bench) -> None:
    bench.restart()
    bench.connect("s")
    bench.register(b"s")
    assert bench.forget(*DOCUMENT) == Forgotten(6, 4, 0, 4 * PAGE)
    bench.work()
    assert bench.paths == {SYSTEM, ELSEWHERE}
    assert bench.counters.damaged_blocks == 0


# --- in steps


@pytest.mark.parametrize("together", [1, 2, 3])
def test_it_goes_in_steps(bench: Bench, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "WALK_BLOCKS", together)
    monkeypatch.setattr(forgetting, "DROP_BLOCKS", together)
    assert bench.ask(b"s", request(*DOCUMENT)) is None
    asked = bench.asked
    most = 0
    while asked not in bench.replies:
        bench.pass_time(0)
        dropped, punched = bench.of_kind(DropRecord), bench.of_kind(Punch)
        assert sorted(each.slot for each in dropped) == sorted(
            slot for each in punched for slot in each.slots
        )
        most = max(most, len(dropped))
    assert most == together
    assert bench.replies[asked] == Forgotten(6, 4, 0, 4 * PAGE)
    assert bench.paths == {SYSTEM, ELSEWHERE}


@pytest.mark.parametrize("together", [1, 2, 5])
def test_those_that_go_on_from_within_a_block_are_looked_for_in_steps_too(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "WALK_BLOCKS", together)
    going = [(*SYSTEM, 3, token) for token in range(7)]
    bench = Bench(*going, (*SYSTEM, 2), (*SYSTEM, 4, 0))
    bench.ask(b"s", request(*SYSTEM, 3))
    asked = bench.asked
    n_steps = 0
    while asked not in bench.replies:
        bench.pass_time(0)
        n_steps += 1
    assert n_steps >= 7 // together
    assert bench.replies[asked].blocks == 7
    assert bench.paths == {SYSTEM, (*SYSTEM, 2), (*SYSTEM, 4, 0)}


@pytest.mark.parametrize("n_steps", range(8))
@pytest.mark.parametrize("n_evicted", [1, 3, 6])
def test_whatever_is_evicted_meanwhile(
    bench: Bench, n_steps: int, n_evicted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "WALK_BLOCKS", 1)
    monkeypatch.setattr(forgetting, "DROP_BLOCKS", 1)
    bench.ask(b"s", request(*DOCUMENT))
    for _ in range(n_steps):
        bench.pass_time(0)
    bench.ask(b"s", Evict("", n_evicted))
    bench.settle()
    assert not bench.paths & {DOCUMENT, QUESTION, OTHER_QUESTION}
    assert not bench.cache.tasks


@pytest.mark.parametrize("n_steps", range(8))
def test_what_is_stored_or_leased_meanwhile_stays(
    bench: Bench, n_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "WALK_BLOCKS", 1)
    monkeypatch.setattr(forgetting, "DROP_BLOCKS", 1)
    bench.ask(b"s", request(*DOCUMENT))
    asked = bench.asked
    for _ in range(n_steps):
        bench.pass_time(0)
    reader = bench.alloc(b"s", 1, *QUESTION)
    bench.append(reader, reader.matched, 50, 51)
    leased = (*QUESTION[: reader.matched], 50, 51)
    bench.settle()
    bench.work()
    assert leased in bench.paths
    assert bench.replies[asked].blocks <= 4


def test_a_model_that_gives_way_meanwhile_is_no_harm(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "WALK_BLOCKS", 1)
    bench.ask(b"s", request(*DOCUMENT))
    asked = bench.asked
    bench.checked = False
    bench.cache.budget.give_up(bench.cache.budget.arenas[1], [])
    bench.settle()
    assert bench.replies[asked].blocks == 0


def test_who_dies_meanwhile_has_it_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "WALK_BLOCKS", 1)
    bench.connect("other")
    for _ in range(4):
        bench.ask(b"other", request(*DOCUMENT))
    assert bench.refusal(b"other", request(*DOCUMENT)) is TooMany
    bench.disconnect(b"other")
    bench.settle()
    assert DOCUMENT in bench.paths
    assert not bench.cache.tasks


# --- whose


@pytest.fixture
def tenants() -> Bench:
    """Tenant t of session s, and u; both have the same cached. Session a is t's too, and
    administers."""
    made = Bench()
    made.limits = Limits(1 << 20, first_context=1, tenants=(TenantRule("t"), TenantRule("u")))
    made.core = Core(made.limits)
    made.handle(Connected(b"s", "s", 1, 1000, "t", STAGING, administrator=False))
    made.handle(Connected(b"a", "a", 1, 0, "t", STAGING, administrator=True))
    made.connect("u", tenant="u")
    for session in (b"s", b"u"):
        handle = made.alloc(session, made.context(session, made.register(session)))
        made.store(handle, 0, *SYSTEM)
        made.ask(session, Release(*handle.fields, COMPLETED))
    return made


def test_each_forgets_its_own(tenants: Bench) -> None:
    assert tenants.forget(*SYSTEM).blocks == 1
    assert (tenants.blocks(1), tenants.blocks(2)) == ({}, {SYSTEM: 0})
    assert tenants.forget(*SYSTEM, session=b"a").blocks == 0, "nor an administrator another's"


def test_only_an_administrator_names_a_tenant(tenants: Bench) -> None:
    assert tenants.refusal(b"s", request(*SYSTEM, tenant="u")) is Forbidden
    assert tenants.refusal(b"s", Evict("", 0, "u")) is Forbidden
    assert tenants.refusal(b"s", Evict("", 0, "nobody")) is Forbidden
    assert tenants.refusal(b"a", request(*SYSTEM, tenant="nobody")) is BadMessage
    assert tenants.refusal(b"a", Evict("", 0, "nobody")) is BadMessage
    assert tenants.forget(*SYSTEM, session=b"a", tenant="u").blocks == 1
    assert (tenants.blocks(1), tenants.blocks(2)) == ({SYSTEM: 0}, {})


def test_eviction_by_tenant(tenants: Bench) -> None:
    assert tenants.ask(b"a", Evict("", 0, "u")) == Evicted(1, PAGE)
    assert (tenants.blocks(1), tenants.blocks(2)) == ({SYSTEM: 0}, {})
    assert tenants.ask(b"s", Evict("m", 0, "t")) == Evicted(1, PAGE)
