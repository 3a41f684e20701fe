"""What a daemon takes of what an earlier one left, and in which order it will be evicted.

When adopted blocks are checked and served: test_checking.py.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvd.core.events import ArenaAdopted, ArenaRefused, Check, DropRecord, FoundRecord, Punch
from kvd.core.tree import ADOPTED
from kvd_proto.errors import AllLeased
from kvd_proto.geometry import Geometry
from kvd_proto.keys import block_key
from kvd_proto.messages import COMPLETED, Evict, Release
from tests.core.driver import (
    BUDGET,
    FULL_DIRECTORY,
    INDEX,
    PAGE,
    Driver,
    Handle,
    alloc,
    append,
    packed,
)

HUGE = Geometry.from_wire([["f16", 1 << 20, "f16", 1 << 20]]).layers
A, B, C = (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6)


@pytest.fixture
def driver() -> Driver:
    """A session `a` with a context for a model, and one for a second model."""
    driver = Driver()
    driver.connect("a")
    for number, name in enumerate(("m", "n"), 1):
        driver.register(b"a", name)
        driver.context(b"a", number)
    return driver


@pytest.fixture
def chain(driver: Driver) -> Driver:
    """A, B and C are recorded in the slots 0, 1 and 2."""
    keep(driver, 1, *C)
    assert driver.blocks() == {A: 0, B: 1, C: 2}
    return driver


def keep(driver: Driver, context: int, *tokens: int) -> None:
    """Store and let go."""
    handle = driver.alloc(b"a", context, *tokens)
    start = handle.matched // 2 * 2
    driver.store(handle, start, *tokens[start:])
    release(driver, handle)


def use(driver: Driver, context: int, *tokens: int) -> None:
    release(driver, driver.alloc(b"a", context, *tokens))


def release(driver: Driver, handle: Handle) -> None:
    driver.ask(handle.session, Release(*handle.fields, COMPLETED))


# --- the order of eviction


def use_again(driver: Driver) -> list[Any]:
    for path in ((1, 2), (3, 4), (5, 6)):
        keep(driver, 1, *path)
    use(driver, 1, 3, 4)
    use(driver, 1, 1, 2)
    return [(1, (5, 6)), (1, (3, 4)), (1, (1, 2))]


def share_a_prefix(driver: Driver) -> list[Any]:
    keep(driver, 1, 1, 2, 3, 4)
    keep(driver, 1, 1, 2, 5, 6)
    keep(driver, 1, 7, 8)
    use(driver, 1, 1, 2, 3, 4)
    return [(1, (1, 2, 5, 6)), (1, (7, 8)), (1, (1, 2, 3, 4)), (1, (1, 2))]


def take_turns(driver: Driver) -> list[Any]:
    keep(driver, 1, 1, 2)
    keep(driver, 2, 3, 4)
    keep(driver, 1, 5, 6)
    use(driver, 2, 3, 4)
    return [(1, (1, 2)), (1, (5, 6)), (2, (3, 4))]


def move_the_lease_off_a_partial_match(driver: Driver) -> list[Any]:
    keep(driver, 1, 1, 2)
    keep(driver, 1, 5, 6)
    handle = driver.alloc(b"a", 1, 1, 9)
    assert handle.matched == 1
    driver.store(handle, 0, 1, 9)
    release(driver, handle)
    return [(1, (5, 6)), (1, (1, 2)), (1, (1, 9))]


def let_go_before_it_is_sealed(driver: Driver) -> list[Any]:
    handle = driver.alloc(b"a", 1)
    driver.append(handle, 0, 1, 2)
    release(driver, handle)
    keep_first = driver.alloc(b"a", 2)
    driver.append(keep_first, 0, 3, 4)
    driver.work()
    release(driver, keep_first)
    return [(1, (1, 2)), (2, (3, 4))]


def evict_one_model(driver: Driver) -> list[Any]:
    """The tail of the first model goes, and its prefix is still younger than what stays."""
    keep(driver, 1, 1, 2)
    keep(driver, 2, 5, 6)
    keep(driver, 1, 1, 2, 3, 4)
    driver.ask(b"a", Evict("m", 1))
    return [(2, (5, 6)), (1, (1, 2))]


def replace_a_tail(driver: Driver) -> list[Any]:
    """The shorter tail goes when it is let go, and takes its last use along."""
    keep(driver, 1, 1, 2)
    writer, reader = driver.alloc(b"a", 1, 1, 2), driver.alloc(b"a", 1, 1, 2)
    driver.store(reader, 2, 3)
    driver.store(writer, 2, 3, 4)
    release(driver, writer)
    keep(driver, 1, 5, 6)
    release(driver, reader)
    return [(1, (1, 2, 3, 4)), (1, (5, 6)), (1, (1, 2))]


def refuse_an_append(driver: Driver) -> list[Any]:
    """What it named counts as used."""
    keep(driver, 1, 1, 2)
    keep(driver, 1, 3, 4)
    handle = driver.alloc(b"a", 1)
    leased = driver.alloc(b"a", 1, 3, 4)
    n_slots = driver.cache.budget.unassigned // PAGE
    driver.ask(b"a", alloc(1, reserve=2 * n_slots))
    driver.work()
    assert driver.refusal(b"a", append(handle, 0, 1, 2, 5, 6)) is AllLeased
    release(driver, leased)
    use(driver, 1, 1, 2)
    assert driver.refusal(b"a", append(handle, 0, 3, 4, 5, 6, 7, 8)) is AllLeased
    return [(1, (1, 2)), (1, (3, 4))]


@pytest.mark.parametrize(
    "story",
    [
        use_again, share_a_prefix, take_turns, move_the_lease_off_a_partial_match,
        let_go_before_it_is_sealed, evict_one_model, replace_a_tail, refuse_an_append,
    ],
)  # fmt: skip
def test_the_order_of_eviction_outlives_a_crash(
    driver: Driver, story: Callable[[Driver], list[Any]]
) -> None:
    order = story(driver)
    assert driver.lru() == order
    driver.restart()
    assert driver.lru() == order
    driver.work()
    assert driver.lru() == order, "checking is no use"


def test_what_was_leased_at_the_crash_has_the_place_of_its_last_known_use(driver: Driver) -> None:
    keep(driver, 1, 1, 2)
    first, second = driver.alloc(b"a", 1, 1, 2), driver.alloc(b"a", 1, 1, 2)
    keep(driver, 1, 3, 4)
    release(driver, first)  # the second holds it still
    keep(driver, 1, 5, 6)
    assert driver.lru() == [(1, (3, 4)), (1, (5, 6))]
    assert second.slots == [0]
    driver.restart()
    assert driver.lru() == [(1, (3, 4)), (1, (1, 2)), (1, (5, 6))]


@pytest.mark.parametrize("garbage", [1 << 62, (1 << 63) - 1, (1 << 64) - 1])
def test_a_last_use_that_no_clock_wrote_costs_its_place_and_no_more(
    driver: Driver, garbage: int
) -> None:
    for path in ((1, 2), (3, 4)):
        keep(driver, 1, *path)
    driver.records[1][1] = driver.records[1][1]._replace(last_use=garbage)
    driver.restart()
    assert driver.lru() == [(1, (3, 4)), (1, (1, 2))]
    assert driver.cache.budget.clock < 10


def test_the_clock_goes_on_from_the_latest_use_and_what_it_seals_is_taken_again(
    driver: Driver,
) -> None:
    keep(driver, 1, 1, 2)
    latest = (1 << 62) - 1
    driver.records[1][0] = driver.records[1][0]._replace(last_use=latest)
    driver.restart()
    assert driver.cache.budget.clock == latest
    driver.connect("a")
    driver.register(b"a")
    driver.context(b"a")
    driver.work()
    keep(driver, 1, 3, 4)
    assert driver.records[1][1].generation > latest
    driver.restart()
    assert driver.blocks() == {(1, 2): 0, (3, 4): 1}


# --- what is taken


def test_all_records_are_adopted_where_they_are(chain: Driver) -> None:
    chain.restart(chain.found())
    assert chain.blocks() == {A: 0, B: 1, C: 2}
    assert [block.state for block in chain.cache.budget.oldest_first()] == [ADOPTED] * 3
    assert chain.effects[0] == ArenaAdopted(
        1, 3, FULL_DIRECTORY - INDEX, 0, chain.cache.budget.arenas[1].root.key
    )
    assert [type(effect) for effect in chain.effects] == [ArenaAdopted, Check]
    assert chain.counts() == {"cached": 3}
    assert chain.cache.counters.adopted_blocks == 3


def test_an_arena_without_a_block_is_adopted(driver: Driver) -> None:
    driver.restart(driver.found(2, arena=1))
    assert driver.effects == [
        ArenaAdopted(1, 0, 4 * PAGE, 0, driver.cache.budget.arenas[1].root.key)
    ]
    assert driver.jobs == []
    driver.connect("b")
    assert driver.register(b"b", "n") == 1
    assert driver.register(b"b", "m") == 2, "numbers go on behind it"


@pytest.mark.parametrize(("torn", "left"), [(0, []), (1, [A]), (2, [A, B])])
def test_below_a_record_that_is_lost_everything_goes(
    chain: Driver, torn: int, left: list[Any]
) -> None:
    del chain.records[1][torn]
    chain.restart(chain.found())
    assert sorted(chain.blocks()) == left
    lost = list(range(torn + 1, 3))
    assert chain.of_kind(DropRecord) == [DropRecord(1, slot) for slot in lost]
    assert chain.of_kind(Punch) == ([Punch(1, lost)] if lost else [])
    used = [slot for slot in range(len(left)) if slot not in lost]
    assert chain.cache.budget.arenas[1].high_water == len(used)


def reject(**fields: Any) -> Any:
    return pytest.param(fields, id=next(iter(fields)))


@pytest.mark.parametrize(
    "other",
    [
        reject(key=bytes(16)),
        reject(parent_key=bytes(16)),
        reject(start=1),
        reject(generation=0),
        reject(generation=1 << 63),
        reject(slot=1000),
        reject(tokens=packed(9, 9)),
    ],
)
def test_a_record_that_does_not_fit_is_not_taken(chain: Driver, other: dict[str, Any]) -> None:
    record = chain.records[1].pop(2)._replace(**other)
    chain.records[1][record.slot] = record
    chain.restart(chain.found())
    assert sorted(chain.blocks()) == [A, B]
    assert chain.of_kind(DropRecord) == [DropRecord(1, record.slot)]


@pytest.mark.parametrize("tokens", [(), (5, 6, 7)])
def test_a_block_has_tokens_and_not_too_many(chain: Driver, tokens: tuple[int, ...]) -> None:
    record = chain.records[1][2]
    key = block_key(record.parent_key, packed(*tokens))
    chain.records[1][2] = record._replace(tokens=packed(*tokens), key=key)
    chain.restart(chain.found())
    assert sorted(chain.blocks()) == [A, B]


def test_nothing_is_taken_below_an_open_tail(chain: Driver) -> None:
    record = chain.records[1][2]
    tail = block_key(chain.records[1][0].key, packed(3))
    chain.records[1][1] = chain.records[1][1]._replace(tokens=packed(3), key=tail)
    chain.records[1][2] = record._replace(
        parent_key=tail, start=3, key=block_key(tail, record.tokens)
    )
    chain.restart(chain.found())
    assert sorted(chain.blocks()) == [A, (1, 2, 3)]


def test_of_two_records_of_one_block_the_newer_one_is_taken(chain: Driver) -> None:
    older = chain.records[1][1]
    chain.records[1][5] = older._replace(slot=5, generation=older.generation + 100)
    chain.restart(chain.found())
    assert chain.blocks() == {A: 0, B: 5, C: 2}
    assert chain.of_kind(DropRecord) == [DropRecord(1, 1)]
    assert chain.cache.budget.arenas[1].punched == [1, 3, 4]
    assert chain.cache.budget.clock >= older.generation + 100


# --- what is refused


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"stride_bytes": 2 * PAGE}, f"its slots have {2 * PAGE} bytes, not {PAGE}"),
        ({"payload_format": "unknown"}, "unknown"),
        ({"layers": HUGE}, "not even one block of this model fits the budget"),
    ],
)
def test_why_an_arena_is_refused(chain: Driver, other: dict[str, Any], reason: str) -> None:
    chain.restart(chain.found(**other))
    (refused,) = chain.effects
    assert isinstance(refused, ArenaRefused)
    assert reason in refused.reason
    assert not chain.cache.budget.arenas
    assert chain.cache.budget.unassigned == chain.cache.budget.n_bytes


def test_of_two_arenas_of_one_model_the_first_is_taken(chain: Driver) -> None:
    chain.restart(chain.found(), chain.found(arena=2))
    assert chain.effects == [ArenaRefused(2, "there is another arena of the same model and tenant")]
    chain.restart(chain.found(), chain.found(arena=2, tenant="other"))
    assert isinstance(chain.effects[0], ArenaAdopted)


def test_what_does_not_fit_beside_the_others_is_evicted(driver: Driver) -> None:
    """Also what came first, if it was used before. In steps, and nothing of it is given out."""
    keep(driver, 1, 1, 2)
    many = 240
    records = []
    parent = driver.records[1][0].parent_key
    for slot in range(many):
        tokens = packed(slot, 7)
        key = block_key(parent, tokens)
        records.append(FoundRecord(slot, key, parent, 0, tokens, slot + 1, slot, slot + 1))
    driver.records[1] = {record.slot: record for record in records}
    aside = list(range(30))
    driver.restart(
        driver.found(1, records=records), driver.found(2, unrecorded=aside, has_readers=True)
    )
    budget = driver.cache.budget
    held = sum(each.held for each in budget.tenants.values())
    assert budget.wanted == BUDGET < held == budget.n_bytes
    driver.settle()
    assert budget.n_bytes == BUDGET
    assert driver.counts(2) == {"filling": len(aside)}, "it may be read still"
    left = driver.blocks()
    assert 0 < len(left) < many
    assert set(left.values()) == set(range(many - len(left), many)), "the oldest went"


def test_a_directory_that_does_not_fit_is_refused(driver: Driver) -> None:
    keep(driver, 1, 1, 2)
    keep(driver, 2, 1, 2)
    driver.limits = replace(driver.limits, max_memory=FULL_DIRECTORY + 3 * PAGE)
    driver.restart()
    assert driver.effects == [ArenaRefused(2, "its directory does not fit the budget")]
    assert list(driver.cache.budget.arenas) == [1]
    assert driver.cache.next_arena == 3, "its number is not given again"


# --- readers of a former life


def test_what_they_may_read_is_leased_to_them(chain: Driver) -> None:
    chain.restart(chain.found(has_readers=True))
    chain.work()
    assert chain.counts() == {"active": 3}
    chain.connect("b")
    assert chain.ask(b"b", Evict("", 0)).blocks == 0
    chain.readers_gone()
    assert chain.counts() == {"cached": 3}
    assert chain.lru() == [(1, C), (1, B), (1, A)]


def test_what_was_used_meanwhile_takes_the_place_of_that_use(driver: Driver) -> None:
    for path in ((1, 2), (3, 4), (5, 6)):
        keep(driver, 1, *path)
    driver.restart(driver.found(has_readers=True))
    driver.work()
    driver.connect("a")
    driver.register(b"a")
    driver.context(b"a")
    keep(driver, 1, 7, 8)
    use(driver, 1, 1, 2)
    leased = driver.alloc(b"a", 1, 3, 4)
    driver.readers_gone()
    assert driver.lru() == [(1, (5, 6)), (1, (7, 8)), (1, (1, 2))]
    release(driver, leased)
    assert driver.lru()[-1] == (1, (3, 4))


@pytest.mark.parametrize("has_readers", [False, True])
def test_slots_without_a_record_are_kept_for_readers_alone(
    chain: Driver, has_readers: bool
) -> None:
    del chain.records[1][1]  # so C, in slot 2, is lost too
    chain.restart(chain.found(has_readers=has_readers, unrecorded=[1, 4]))
    assert chain.of_kind(DropRecord) == [DropRecord(1, 2)]
    arena = chain.cache.budget.arenas[1]
    if not has_readers:
        assert chain.of_kind(Punch) == [Punch(1, [2, 1, 4])]
        assert (chain.counts(), arena.high_water) == ({"cached": 1}, 1)
        return
    assert chain.of_kind(Punch) == []
    assert (chain.counts(), arena.punched) == ({"active": 1, "filling": 3}, [3])
    chain.work()
    chain.readers_gone()
    assert (chain.counts(), sorted(arena.free)) == ({"cached": 1, "free": 3}, [1, 2, 4])


def test_a_damaged_slot_is_set_aside_while_they_may_read_it(chain: Driver) -> None:
    chain.restart(chain.found(has_readers=True))
    chain.check(1)
    assert chain.blocks() == {A: 0}
    assert [effect.slot for effect in chain.of_kind(DropRecord)] == [2, 1]
    assert chain.counts() == {"active": 1, "filling": 2}
    # And after one more crash.
    chain.restart(chain.found(has_readers=True, unrecorded=[1, 2]))
    chain.work()
    assert chain.counts() == {"active": 1, "filling": 2}
    chain.readers_gone()
    assert chain.counts() == {"cached": 1, "free": 2}


def test_a_shorter_tail_that_they_may_read_goes_with_them(driver: Driver) -> None:
    handle = driver.alloc(b"a", 1)
    reader = driver.alloc(b"a", 1)
    driver.store(handle, 0, 1)
    driver.append(reader, 0, 1)  # present: it leases the tail
    driver.store(handle, 0, 1, 2)
    assert driver.blocks() == {(1,): 0, (1, 2): 1}
    driver.restart(driver.found(has_readers=True))
    driver.work()
    assert driver.blocks() == {(1,): 0, (1, 2): 1}
    driver.readers_gone()
    assert driver.blocks() == {(1, 2): 1}
    assert driver.of_kind(DropRecord) == [DropRecord(1, 0)]
