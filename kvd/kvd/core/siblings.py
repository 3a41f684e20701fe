"""The children of a block that has thousands, as the root of an arena may.

Sorted by their tokens, in runs: one more or less moves a run of pointers, and not all of them,
which for a million children would be megabytes.

    bounds       b"..."          b"..."          b"..."       the second run has what is not less
    runs     [c0 c1 .. c9]   [c10 .. c17]    [c18 .. c29]     than its bound, but than the third's

Few children are a plain list: tree.py.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from operator import attrgetter
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from kvd.core.tree import Block

RUN = 64
"""A run is split when it has twice as many. A search looks at bounds faster than at blocks, and a
million siblings have bounds of 100 KiB, which are moved once for so many that come."""

by_tokens = attrgetter("tokens")


class Siblings(Sequence["Block"]):
    """Blocks with the same parent, no two with the same tokens. By index, it is a walk of runs."""

    __slots__ = ("_bounds", "_tokens", "runs")

    def __init__(self, blocks: list["Block"]) -> None:
        """Of a sorted list."""
        self.runs = [blocks[at : at + RUN] for at in range(0, len(blocks), RUN)]
        self._tokens = [[block.tokens for block in run] for run in self.runs]
        """Of each run: a bisection of these looks at half as many places in memory."""
        self._bounds = [tokens[0] for tokens in self._tokens]

    def find(self, tokens: bytes) -> "Block | None":
        """The one with exactly these tokens."""
        number, index = self._place_of(tokens)
        there = self._tokens[number]
        if index < len(there) and there[index] == tokens:
            return self.runs[number][index]
        return None

    def add(self, block: "Block") -> None:
        number, index = self._place_of(block.tokens)
        run, tokens = self.runs[number], self._tokens[number]
        run.insert(index, block)
        tokens.insert(index, block.tokens)
        if len(run) == 2 * RUN:
            self.runs[number : number + 1] = [run[:RUN], run[RUN:]]
            self._tokens[number : number + 1] = [tokens[:RUN], tokens[RUN:]]
            self._bounds.insert(number + 1, tokens[RUN])

    def remove(self, block: "Block") -> None:
        tokens = block.tokens
        number = bisect_right(self._bounds, tokens, 1) - 1
        index = bisect_left(self._tokens[number], tokens)
        run = self.runs[number]
        assert run[index] is block, "the tree lost a child"
        del run[index], self._tokens[number][index]
        if not run:
            del self.runs[number], self._tokens[number], self._bounds[number]

    def before(self, tokens: bytes) -> Iterator["Block"]:
        """Those that sort before these tokens, the nearest first."""
        number, index = self._place_of(tokens)
        yield from reversed(self.runs[number][:index])
        for before in range(number - 1, -1, -1):
            yield from reversed(self.runs[before])

    def since(self, tokens: bytes) -> Iterator["Block"]:
        """Those that do not sort before these tokens, the nearest first."""
        number, index = self._place_of(tokens)
        yield from self.runs[number][index:]
        for since in range(number + 1, len(self.runs)):
            yield from self.runs[since]

    def __bool__(self) -> bool:
        return bool(self.runs)  # without counting them

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def __iter__(self) -> Iterator["Block"]:
        return chain.from_iterable(self.runs)

    @overload
    def __getitem__(self, index: int) -> "Block": ...
    @overload
    def __getitem__(self, index: slice) -> list["Block"]: ...
    def __getitem__(self, index: int | slice) -> "Block | list[Block]":
        if isinstance(index, int):
            index = range(len(self))[index]
            (block,) = self[index : index + 1]
            return block
        start, stop, step = index.indices(len(self))
        n_skipped = 0
        for number, run in enumerate(self.runs):
            if n_skipped + len(run) > start:
                rest = chain.from_iterable(self.runs[number:])
                return list(islice(rest, start - n_skipped, max(start, stop) - n_skipped, step))
            n_skipped += len(run)
        return []

    def _place_of(self, tokens: bytes) -> tuple[int, int]:
        """In which run a block with these tokens is, or would be, and where in it."""
        number = bisect_right(self._bounds, tokens, 1) - 1
        return number, bisect_left(self._tokens[number], tokens)
