"""The policy by itself: what it answers after it was told of chains, whatever their order."""

from random import Random

import pytest

from kvd.core.arenas import Arena
from kvd.core.eviction import LRU
from kvd.core.tenants import Tenant, TenantRule
from kvd.core.tree import Block
from kvd_proto.geometry import Geometry
from tests.core.driver import BLOCK_TOKENS, BUDGET, PAGE, array_format, packed


def above(block: Block) -> Block:
    assert block.parent is not None
    return block.parent


@pytest.fixture
def arena() -> Arena:
    layout = array_format()
    tenant = Tenant(TenantRule("t"), BUDGET)
    return Arena(
        1,
        tenant,
        "m",
        b"",
        Geometry.from_wire([["f16", PAGE, "f16", PAGE]]),
        layout,
        BLOCK_TOKENS,
        100,
        b"",
    )


def chain(arena: Arena, *numbers: int) -> list[Block]:
    """Blocks below each other, from the root's child down."""
    blocks = [arena.root]
    for number in numbers:
        blocks.append(Block(arena, blocks[-1], packed(number), b"", number))
        blocks[-2].add(blocks[-1])
    return blocks[1:]


def test_nothing_is_listed_at_first(arena: Arena) -> None:
    (block,) = chain(arena, 1)
    policy = LRU()
    assert policy.oldest() is None
    assert list(policy) == []
    assert not block.is_listed


def test_a_chain_goes_from_its_tail_up(arena: Arena) -> None:
    a, b, c = chain(arena, 1, 2, 3)
    policy = LRU()
    policy.add(c, arena.root, 7)
    assert list(policy) == [c, b, a]
    assert [block.used for block in (a, b, c)] == [7, 7, 7]
    assert policy.oldest() is c
    assert policy.oldest() is c, "to be asked changes nothing"


def test_a_chain_is_listed_and_struck_out_up_to_what_stays(arena: Arena) -> None:
    a, b, c = chain(arena, 1, 2, 3)
    policy = LRU()
    policy.add(c, a, 1)
    assert list(policy) == [c, b]
    assert not a.is_listed
    policy.add(a, arena.root, 2)
    policy.remove(c, b)
    assert list(policy) == [b, a]
    policy.remove(b, b)
    assert list(policy) == [b, a], "an empty chain"
    policy.remove(b, arena.root)
    assert policy.oldest() is None
    assert not any(block.is_listed for block in (a, b, c))


def test_what_is_used_again_goes_last(arena: Arena) -> None:
    a, b, c = (chain(arena, number)[0] for number in (1, 2, 3))
    policy = LRU()
    for used, block in enumerate((a, b, c)):
        policy.add(block, arena.root, used)
    policy.remove(a, arena.root)
    policy.add(a, arena.root, 3)
    assert [(block, block.used) for block in policy] == [(b, 1), (c, 2), (a, 3)]


def test_what_is_struck_out_keeps_no_other_block_alive(arena: Arena) -> None:
    a, b, c = (chain(arena, number)[0] for number in (1, 2, 3))
    policy = LRU()
    for block in (a, b, c):
        policy.add(block, arena.root, 0)
    policy.remove(b, arena.root)
    assert b.older is b.younger
    assert b.older not in (a, c)


@pytest.mark.parametrize("seed", range(50))
def test_the_order_is_that_of_a_list(arena: Arena, seed: int) -> None:
    """Of each chain the blocks from some depth on are listed, as nobody leases them."""
    random = Random(seed)
    chains = [chain(arena, *range(10 * n, 10 * n + random.randint(1, 6))) for n in range(8)]
    depths = [len(blocks) for blocks in chains]
    policy = LRU()
    expected: list[Block] = []
    for clock in range(200):
        number = random.randrange(len(chains))
        blocks, depth = chains[number], depths[number]
        if random.random() < 0.5 and depth:
            top = depths[number] = random.randrange(depth)
            policy.add(blocks[depth - 1], above(blocks[top]), clock)
            expected += reversed(blocks[top:depth])
        elif depth < len(blocks):
            leased = random.randrange(depth, len(blocks))
            depths[number] = leased + 1
            policy.remove(blocks[leased], above(blocks[depth]))
            expected = [each for each in expected if each not in blocks[depth : leased + 1]]
        assert list(policy) == expected
        assert policy.oldest() is (expected[0] if expected else None)


def test_those_that_go_next_go_together_as_long_as_they_are_alike(arena: Arena) -> None:
    a, b, c = chain(arena, 1, 2, 3)
    (d,) = chain(arena, 4)
    policy = LRU()
    policy.add(c, arena.root, 7)
    policy.add(d, arena.root, 8)
    assert policy.pop(2, arena, 8) == [c, b], "no more than are asked for"
    assert list(policy) == [a, d]
    assert not any(block.is_listed for block in (b, c))
    assert policy.pop(9, arena, 8) == [a], "used before 8"
    assert policy.pop(9, arena, 8) == [d], "the first one in any case"
    assert policy.oldest() is None


def test_those_of_another_arena_stay(arena: Arena) -> None:
    other = Arena(2, arena.tenant, "n", b"", arena.geometry, arena.format, BLOCK_TOKENS, 100, b"")
    (a,), (b,) = chain(arena, 1), chain(other, 2)
    policy = LRU()
    for block in (a, b):
        policy.add(block, block.arena.root, 1)
    assert policy.pop(9, arena, 9) == [a]
    assert list(policy) == [b]
