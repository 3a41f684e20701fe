"""Exact and token-exact matches, each beside a search that looks at every block."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.core.tree import FILLING, SEALED, Block, common_tokens, match
from tests.core.driver import packed, path_of
from tests.core.reference import Path, common

BLOCK_TOKENS = 3
ARENA: Any = SimpleNamespace(token_bytes=len(packed(*range(BLOCK_TOKENS))))
# 256 sorts before 1 as bytes do, and 1 << 24 differs from 0 only in the last byte.
tokens = st.sampled_from((0, 1, 256, 1 << 24))
paths = st.lists(tokens, min_size=1, max_size=BLOCK_TOKENS).map(tuple)
families = st.dictionaries(paths, st.sampled_from((SEALED, FILLING)), max_size=10)


def block(path: Path, state: str = SEALED, parent: Block | None = None) -> Block:
    made = Block(ARENA, parent, packed(*path), b"", 0)
    made.state = state
    if parent is not None:
        parent.add(made)
    return made


def family(children: dict[Path, str]) -> Block:
    root = block(())
    for path, state in children.items():
        block(path, state, root)
    return root


@given(families)
def test_children_are_sorted_whatever_came_first(children: dict[Path, str]) -> None:
    root = family(children)
    assert [child.tokens for child in root.children] == sorted(packed(*path) for path in children)


@given(families, paths)
def test_child_is_the_one_with_exactly_these_tokens(children: dict[Path, str], asked: Path) -> None:
    found = family(children).child(packed(*asked))
    assert (found is not None) == (asked in children)
    assert found is None or path_of(found) == asked


@given(families, paths)
def test_longest_agreeing_child(children: dict[Path, str], asked: Path) -> None:
    agreed = {path: common(path, asked) for path, state in children.items() if state is SEALED}
    best = max(agreed.values(), default=0)
    found = family(children).longest_agreeing(packed(*asked))
    if best == 0:
        assert found is None
    else:
        assert found is not None
        assert found.n_tokens == best == agreed[path_of(found.block)]


@given(families, paths)
def test_prefixes_longest_first(children: dict[Path, str], asked: Path) -> None:
    expected = [asked[:length] for length in range(len(asked) - 1, 0, -1)]
    found = family(children).prefixes(packed(*asked))
    assert [path_of(child) for child in found] == [each for each in expected if each in children]


@given(families, paths)
def test_extension_is_sealed_and_longer(children: dict[Path, str], asked: Path) -> None:
    longer = {
        path
        for path, state in children.items()
        if state is SEALED and len(path) > len(asked) and path[: len(asked)] == asked
    }
    found = family(children).extension(packed(*asked))
    assert path_of(found) in longer if longer else found is None


@given(families)
def test_superseded_is_whoever_has_a_longer_sealed_sibling(children: dict[Path, str]) -> None:
    for child in family(children).children:
        path = path_of(child)
        assert child.is_superseded == any(
            state is SEALED and len(other) > len(path) and other[: len(path)] == path
            for other, state in children.items()
        )


@given(families)
def test_remove_takes_out_that_child_alone(children: dict[Path, str]) -> None:
    root = family(children)
    for child in list(root.children):
        before = [each for each in root.children if each is not child]
        root.remove(child)
        assert list(root.children) == before


@given(paths, paths)
def test_common_tokens(a: Path, b: Path) -> None:
    assert common_tokens(packed(*a), packed(*b)) == common(a, b)


trees = st.dictionaries(
    st.lists(tokens, min_size=1, max_size=8).map(tuple),
    st.sampled_from((SEALED, SEALED, FILLING)),
    max_size=12,
)


def grow(leaves: dict[Path, str]) -> tuple[Block, dict[Path, Block]]:
    """A tree with all of the leaves' ancestors."""
    root, blocks = block(()), {}
    for leaf, state in leaves.items():
        node = root
        for start in range(0, len(leaf), BLOCK_TOKENS):
            path = leaf[: start + BLOCK_TOKENS]
            if path not in blocks:
                blocks[path] = block(path[start:], state, node)
            node = blocks[path]
    return root, blocks


@given(trees, st.lists(tokens, max_size=9).map(tuple))
def test_match_is_as_long_as_any_block_agrees(leaves: dict[Path, str], prompt: Path) -> None:
    root, blocks = grow(leaves)
    visible = [path for path, each in blocks.items() if is_visible(each)]
    found = match(root, packed(*prompt), 4 * BLOCK_TOKENS, 1000)
    assert found.n_tokens == max((common(path, prompt) for path in visible), default=0)
    assert [path_of(each) for each in found.full] == [
        prompt[:end] for end in range(BLOCK_TOKENS, found.n_tokens + 1, BLOCK_TOKENS)
    ]
    if found.n_tokens % BLOCK_TOKENS:
        assert found.partial is not None
        assert found.partial.parent is (found.full[-1] if found.full else root)
        assert common(path_of(found.partial), prompt) == found.n_tokens
    else:
        assert found.partial is None


def is_visible(each: Block) -> bool:
    return each.parent is None or (each.state is SEALED and is_visible(each.parent))


@given(trees)
def test_below_is_everything_and_parents_come_first(leaves: dict[Path, str]) -> None:
    root, blocks = grow(leaves)
    below = root.below()
    assert sorted(map(path_of, below)) == sorted(blocks)
    seen = {root}
    for each in below:
        assert each.parent in seen
        seen.add(each)


def test_an_unlucky_neighbour_does_not_hide_the_best() -> None:
    """The nearest on either side is filling or agrees less; the best is further away."""
    children = dict.fromkeys(product((1, 2, 3), repeat=3), FILLING)
    children[1, 2, 3] = children[2, 1, 1] = SEALED
    found = family(children).longest_agreeing(packed(1, 2, 1))
    assert found is not None
    assert (path_of(found.block), found.n_tokens) == ((1, 2, 3), 2)


def test_positions() -> None:
    root = block(())
    first = block((7, 8, 9), parent=root)
    second = block((7,), parent=first)
    assert (root.start, root.end, root.n_tokens) == (0, 0, 0)
    assert (first.start, first.end, first.n_tokens) == (0, 3, 3)
    assert (second.start, second.end, second.n_tokens) == (3, 4, 1)


def test_remove_says_when_the_tree_has_lost_a_child() -> None:
    root = block(())
    block((1,), parent=root)
    with pytest.raises(AssertionError, match="lost a child"):
        root.remove(block((1,)))
