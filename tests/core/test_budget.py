"""Who may use which bytes: order of eviction, memory that moves, answers when there is no room."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.core.arenas import Arena
from kvd.core.budget import Budget
from kvd.core.events import DropRecord, Effect, Punch
from kvd.core.reasons import Reason
from kvd.core.tree import FILLING, SEALED, Block
from kvd_proto.errors import AllLeased, BudgetTooSmall
from kvd_proto.geometry import Geometry
from kvd_proto.index import index_length
from kvd_proto.layout import DIRECTORY_CHUNK, directory_bytes_for, record_bytes
from tests.core.driver import BLOCK_TOKENS, PAGE, SMALL_DIRECTORY, array_format, packed

FIRST_DIRECTORY = 5 * PAGE


class Bench:
    """A budget with arenas, and blocks made by hand."""

    def __init__(self, n_bytes: int, *strides: int) -> None:
        self.budget = Budget(n_bytes)
        self.effects: list[Effect] = []
        self.arenas = [self.arena(number, pages) for number, pages in enumerate(strides, 1)]

    def arena(self, number: int, pages: int) -> Arena:
        slots = self.budget.n_bytes // (pages * PAGE)
        layers = Geometry.from_wire([["f16", 1, "f16", 1]])
        arena = Arena(
            number,
            self.budget.tenant("t"),
            f"m{number}",
            b"",
            layers,
            array_format(pages),
            BLOCK_TOKENS,
            slots,
            b"",
        )
        self.budget.charge_directory(arena, self.effects)
        arena.sessions = 1  # somebody has registered it
        return arena

    def take(self, arena: Arena, n_slots: int) -> list[int]:
        return self.budget.take(arena, n_slots, self.effects).slots

    def store(self, parent: Block, *tokens: int) -> Block:
        """A sealed block that nobody holds."""
        arena = parent.arena
        (slot,) = self.take(arena, 1)
        block = Block(arena, parent, packed(*tokens), b"", slot)
        parent.add(block)
        block.holds = 1
        self.budget.hold(parent)
        block.state = SEALED
        arena.filling -= 1
        arena.active += 1
        block.last_use = self.budget.tick()
        self.budget.unhold(block, self.effects)
        return block

    def chain(self, arena: Arena, *tokens: int) -> list[Block]:
        """One block under the other."""
        blocks = [arena.root]
        for token in tokens:
            blocks.append(self.store(blocks[-1], token, token))
        return blocks[1:]

    def evict(self, n_blocks: int = 1) -> list[int]:
        budget, gone = self.budget, list[int]()
        for _ in range(n_blocks):
            gone += [each.slot for each in budget.pop_oldest(budget.policies, self.effects)]
        return gone

    def happened(self, kind: type) -> list[Any]:
        found = [effect for effect in self.effects if isinstance(effect, kind)]
        self.effects.clear()
        return found

    @property
    def sum(self) -> int:
        budget = self.budget
        backed = sum(arena.backed * arena.stride for arena in budget.arenas.values())
        return budget.unassigned + budget.staging + budget.directories + backed


# --- the order of eviction


def test_of_one_sequence_the_last_block_goes_first() -> None:
    bench = Bench(1 << 20, 1)
    a, b, c = bench.chain(bench.arenas[0], 1, 2, 3)
    assert bench.evict(3) == [c.slot, b.slot, a.slot]
    assert [each.slot for each in bench.happened(DropRecord)] == [c.slot, b.slot, a.slot]


def test_what_was_used_last_goes_last() -> None:
    bench = Bench(1 << 20, 1)
    first = bench.chain(bench.arenas[0], 1, 2)
    second = bench.chain(bench.arenas[0], 3, 4)
    bench.budget.hold(first[1])
    bench.budget.unhold(first[1], bench.effects)
    assert bench.evict(4) == [each.slot for each in (second[1], second[0], first[1], first[0])]


def test_a_prefix_is_as_young_as_its_last_use() -> None:
    """Two continuations of one prefix: the older tail goes, the prefix after the younger one."""
    bench = Bench(1 << 20, 1)
    prefix, older = bench.chain(bench.arenas[0], 1, 2)
    younger = bench.store(prefix, 3, 3)
    assert bench.evict(3) == [older.slot, younger.slot, prefix.slot]


def test_a_held_block_keeps_its_ancestors() -> None:
    bench = Bench(1 << 20, 1)
    a, b, c = bench.chain(bench.arenas[0], 1, 2, 3)
    bench.budget.hold(b)
    assert (a.holds, b.holds, c.holds) == (1, 1, 0)
    assert (bench.arenas[0].active, bench.arenas[0].cached) == (2, 1)
    assert bench.evict() == [c.slot]
    assert not list(bench.budget.oldest_first())
    bench.budget.unhold(b, bench.effects)
    assert list(bench.budget.oldest_first()) == [b, a]


def test_holding_twice_takes_letting_go_twice() -> None:
    bench = Bench(1 << 20, 1)
    a, b = bench.chain(bench.arenas[0], 1, 2)
    for block in (a, b):
        bench.budget.hold(block)
    assert (a.holds, b.holds) == (2, 1)
    bench.budget.unhold(a, bench.effects)
    assert not list(bench.budget.oldest_first())
    bench.budget.unhold(b, bench.effects)
    assert list(bench.budget.oldest_first()) == [b, a]


def test_a_parent_never_goes_before_its_children() -> None:
    bench = Bench(1 << 20, 1)
    a, _ = bench.chain(bench.arenas[0], 1, 2)
    with pytest.raises(AssertionError, match="after its children"):
        bench.budget.drop(a, Reason.ROOM, bench.effects)


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=40))
def test_children_come_first_in_the_lru_whatever_is_held_and_let_go(
    moves: list[tuple[int, int]],
) -> None:
    bench = Bench(1 << 20, 1)
    blocks: list[Block] = []
    for start in (1, 4, 7):
        trunk = bench.chain(bench.arenas[0], start, start + 1)
        blocks += [*trunk, bench.store(trunk[0], start, 9), bench.store(trunk[1], start, 9)]
    held: list[Block] = []
    for hold, let_go in moves:
        bench.budget.hold(blocks[hold])
        held.append(blocks[hold])
        if let_go < len(held):
            bench.budget.unhold(held.pop(let_go), bench.effects)
    order = list(bench.budget.oldest_first())
    for block in order:
        assert not any(each in block.below() for each in held)
        for child in block.children:
            assert order.index(child) < order.index(block)


def test_an_open_tail_that_was_replaced_goes_when_it_is_let_go() -> None:
    bench = Bench(1 << 20, 1)
    root = bench.arenas[0].root
    tail = bench.store(root, 1)
    bench.budget.hold(tail)
    longer = bench.store(root, 1, 2)
    assert tail.state is SEALED
    bench.budget.unhold(tail, bench.effects)
    assert bench.happened(DropRecord) == [DropRecord(1, tail.slot)]
    assert list(root.children) == [longer]


def test_an_open_tail_stays_if_the_longer_block_has_gone_before() -> None:
    bench = Bench(1 << 20, 1)
    root = bench.arenas[0].root
    tail = bench.store(root, 1)
    bench.budget.hold(tail)
    longer = bench.store(root, 1, 2)
    assert bench.evict() == [longer.slot]
    bench.budget.unhold(tail, bench.effects)
    assert list(bench.budget.oldest_first()) == [tail]


# --- slots


def test_slots_in_the_order_in_which_they_are_used() -> None:
    bench = Bench(1 << 20, 1)
    arena = bench.arenas[0]
    taken = bench.budget.take(arena, 3, bench.effects)
    assert taken.slots == taken.to_back == [0, 1, 2]
    bench.budget.give_back(arena, 1)
    taken = bench.budget.take(arena, 2, bench.effects)
    assert (taken.slots, taken.to_back) == ([1, 3], [3])
    assert (arena.filling, arena.high_water) == (4, 4)
    assert bench.sum == bench.budget.n_bytes


def test_slots_without_memory_are_used_again_and_backed_anew() -> None:
    bench = Bench(1 << 20, 1)
    arena = bench.arenas[0]
    bench.take(arena, 3)
    bench.budget.unback(arena, {1, 2})
    assert (arena.filling, arena.high_water) == (1, 3)
    assert bench.sum == bench.budget.n_bytes
    taken = bench.budget.take(arena, 2, bench.effects)
    assert sorted(taken.slots) == sorted(taken.to_back) == [1, 2]
    assert arena.high_water == 3


def test_no_slots_are_no_trouble() -> None:
    bench = Bench(SMALL_DIRECTORY, 1)
    taken = bench.budget.take(bench.arenas[0], 0, bench.effects)
    assert (taken.slots, taken.to_back, bench.effects) == ([], [], [])


# --- memory moves


def test_memory_moves_between_arenas_of_different_stride() -> None:
    bench = Bench(2 * SMALL_DIRECTORY + 6 * PAGE, 1, 3)
    small, large = bench.arenas
    blocks = [bench.store(small.root, token) for token in range(6)]
    assert (bench.budget.unassigned, small.cached) == (PAGE, 6)
    bench.effects.clear()
    assert bench.take(large, 1) == [0]
    # Three small blocks make room for a large one, the oldest ones.
    assert bench.happened(DropRecord) == [DropRecord(1, block.slot) for block in blocks[:3]]
    assert (small.cached, sorted(small.punched), small.free) == (3, [0, 1, 2], [])
    assert bench.sum == bench.budget.n_bytes
    # And back: the large one's memory is enough for three.
    bench.budget.give_back(large, 0)
    bench.take(small, 3)
    assert bench.happened(Punch) == [Punch(2, [0])]
    assert (small.cached, small.filling, small.punched) == (3, 3, [])
    assert bench.sum == bench.budget.n_bytes


def test_free_slots_of_others_go_before_anything_cached() -> None:
    bench = Bench(2 * SMALL_DIRECTORY + 2 * PAGE, 1, 1)
    one, other = bench.arenas
    cached = bench.store(one.root, 1)
    (slot,) = bench.take(other, 1)
    bench.budget.give_back(other, slot)
    bench.effects.clear()
    bench.take(one, 1)
    assert bench.effects == [Punch(2, [slot])]
    assert cached.state is SEALED


def test_nothing_is_evicted_while_something_is_unassigned() -> None:
    bench = Bench(SMALL_DIRECTORY + 3 * PAGE, 1)
    bench.store(bench.arenas[0].root, 1)
    bench.take(bench.arenas[0], 2)
    assert not bench.happened(DropRecord)
    bench.take(bench.arenas[0], 1)
    assert bench.happened(DropRecord) == [DropRecord(1, 0)]


def test_own_slots_are_used_again_as_they_are() -> None:
    """An evicted block's memory is its successor's, without the operating system."""
    bench = Bench(SMALL_DIRECTORY + PAGE, 1)
    bench.store(bench.arenas[0].root, 1)
    bench.effects.clear()
    taken = bench.budget.take(bench.arenas[0], 1, bench.effects)
    assert (taken.slots, taken.to_back) == ([0], [])
    assert bench.effects == [DropRecord(1, 0)]


# --- directories and stagings


def test_directories_are_charged_and_grow_in_chunks() -> None:
    bench = Bench(1 << 22, 1)
    arena = bench.arenas[0]
    assert arena.directory_bytes == FIRST_DIRECTORY
    assert bench.budget.unassigned == (1 << 22) - FIRST_DIRECTORY
    bench.take(arena, 1)
    fits = (DIRECTORY_CHUNK - directory_bytes_for(0, BLOCK_TOKENS)) // record_bytes(BLOCK_TOKENS)
    grown = DIRECTORY_CHUNK + index_length(fits)
    assert arena.directory_bytes == grown
    assert bench.budget.unassigned == (1 << 22) - grown - PAGE
    assert arena.records_bytes == DIRECTORY_CHUNK >= directory_bytes_for(1, BLOCK_TOKENS)
    bench.take(arena, fits - 1)
    assert (arena.high_water, arena.directory_bytes) == (fits, grown)
    # All slots have been used: the rest of the last chunk would never be.
    bench.take(arena, 1)
    assert arena.directory_bytes == arena.directory_limit == 98304 + index_length(arena.slots)
    assert bench.sum == 1 << 22


def test_growth_of_the_directory_can_be_what_does_not_fit() -> None:
    bench = Bench(SMALL_DIRECTORY + 2 * PAGE, 1)
    arena = bench.arenas[0]
    with pytest.raises(BudgetTooSmall):
        bench.take(arena, 3)
    assert (arena.directory_bytes, arena.high_water, arena.filling) == (FIRST_DIRECTORY, 0, 0)
    assert bench.take(arena, 2) == [0, 1]


def test_staging_and_a_new_directory_make_room_too() -> None:
    bench = Bench(2 * SMALL_DIRECTORY, 1)
    for token in range(6):
        bench.store(bench.arenas[0].root, token)
    bench.effects.clear()
    bench.budget.charge_staging(bench.budget.tenant("t"), 1, bench.effects)
    assert bench.happened(DropRecord) == [DropRecord(1, 0)]
    bench.arena(2, 1)
    assert bench.budget.unassigned == PAGE - 1
    bench.budget.return_staging(bench.budget.tenant("t"), 1)
    assert (bench.budget.staging, bench.sum) == (0, 2 * SMALL_DIRECTORY)


# --- no room


def test_all_leased_and_too_small_are_different_answers() -> None:
    bench = Bench(SMALL_DIRECTORY + 4 * PAGE, 1)
    arena = bench.arenas[0]
    a, b = bench.chain(arena, 1, 2)
    bench.budget.hold(a)
    before = list(bench.budget.oldest_first()), bench.budget.unassigned
    bench.effects.clear()
    with pytest.raises(AllLeased) as leased:
        bench.take(arena, 4)
    assert leased.value.details["blocks"] == 4
    assert leased.value.details["budget_bytes"] == SMALL_DIRECTORY + 4 * PAGE
    with pytest.raises(BudgetTooSmall):
        bench.take(arena, 5)
    assert (list(bench.budget.oldest_first()), bench.budget.unassigned) == before
    assert (bench.effects, b.state) == ([], SEALED)
    assert len(bench.take(arena, 3)) == 3


def test_directories_of_others_never_make_room() -> None:
    """What stands only in their way is not a matter of waiting."""
    bench = Bench(3 * FIRST_DIRECTORY, 1, 1)
    for arena in bench.arenas:
        with pytest.raises(BudgetTooSmall):
            bench.take(arena, 5)
        with pytest.raises(BudgetTooSmall):
            bench.budget.charge_staging(
                bench.budget.tenant("t"), FIRST_DIRECTORY + 1, bench.effects
            )
    bench.budget.charge_staging(bench.budget.tenant("t"), FIRST_DIRECTORY, bench.effects)
    with pytest.raises(AllLeased):
        bench.budget.charge_staging(bench.budget.tenant("t"), 1, bench.effects)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9), st.booleans()), max_size=30),
    st.integers(6, 30),
)
def test_room_that_was_promised_is_found(moves: list[tuple[int, int, bool]], pages: int) -> None:
    """take() refuses before it has changed anything, or succeeds; and the budget adds up."""
    bench = Bench(2 * FIRST_DIRECTORY + pages * PAGE, 1, 2)
    taken: list[tuple[Arena, int]] = []
    n_stored = 0
    for which, n_slots, give_back in moves:
        arena = bench.arenas[which]
        before = (bench.budget.unassigned, arena.filling, len(list(bench.budget.oldest_first())))
        try:
            taken += [(arena, slot) for slot in bench.take(arena, n_slots)]
        except (AllLeased, BudgetTooSmall):
            assert (
                bench.budget.unassigned,
                arena.filling,
                len(list(bench.budget.oldest_first())),
            ) == before
        while give_back and taken:
            held, slot = taken.pop()
            held.filling -= 1
            n_stored += 1
            block = Block(held, held.root, packed(n_stored), b"", slot)
            block.state = SEALED
            held.root.add(block)
            held.cached += 1
            block.last_use = bench.budget.tick()
            held.evictable.add(block, held.root, block.last_use)
        assert bench.sum == bench.budget.n_bytes
        assert bench.budget.unassigned >= 0


# --- the administrator


def test_evict_takes_the_oldest_of_one_model_and_gives_their_memory_back() -> None:
    bench = Bench(1 << 20, 1, 2)
    one, other = bench.arenas
    a, b = bench.chain(one, 1, 2)
    c = bench.store(other.root, 1)
    (free,) = bench.take(one, 1)
    bench.budget.give_back(one, free)
    bench.effects.clear()
    assert bench.budget.evict("m1", 1, bench.effects) == 1
    assert bench.effects == [
        DropRecord(1, b.slot, heir=a.slot, last_use=b.last_use),
        Punch(1, [b.slot, free]),
    ]
    assert list(bench.budget.oldest_first()) == [a, c]
    bench.effects.clear()
    assert bench.budget.evict("", 99, bench.effects) == 2
    assert bench.happened(DropRecord) == [DropRecord(1, a.slot), DropRecord(2, c.slot)]
    assert bench.budget.unassigned == bench.budget.n_bytes - bench.budget.directories
    assert bench.budget.tenants["t"].evicted[Reason.COMMAND] == 3
    assert bench.budget.evict("", 99, bench.effects) == 0


def test_evict_spares_what_is_held_or_filling() -> None:
    bench = Bench(1 << 20, 1)
    a, b = bench.chain(bench.arenas[0], 1, 2)
    bench.budget.hold(a)
    bench.take(bench.arenas[0], 1)
    assert bench.budget.evict("m1", 9, bench.effects) == 1
    assert (b.state is SEALED, a.state is SEALED) == (False, True)
    assert bench.arenas[0].filling == 1


def test_a_filling_block_is_not_in_the_lru() -> None:
    bench = Bench(1 << 20, 1)
    arena = bench.arenas[0]
    block = Block(arena, arena.root, packed(1), b"", bench.take(arena, 1)[0])
    assert block.state is FILLING
    arena.root.add(block)
    block.holds = 1
    bench.budget.hold(block)
    bench.budget.unhold(block, bench.effects)
    assert (block.holds, len(list(bench.budget.oldest_first())), arena.active) == (1, 0, 0)
