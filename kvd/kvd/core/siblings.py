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

    __slots__ = ("_bounds", "runs")

    def __init__(self, blocks: list["Block"]) -> None:
        """Of a sorted list."""
        self.runs = [blocks[at : at + RUN] for at in range(0, len(blocks), RUN)]
        self._bounds = [run[0].tokens for run in self.runs]

    def find(self, tokens: bytes) -> "Block | None":
        """The one with exactly these tokens."""
        run = self.runs[self._run_of(tokens)]
        index = bisect_left(run, tokens, key=by_tokens)
        if index < len(run) and run[index].tokens == tokens:
            return run[index]
        return None

    def add(self, block: "Block") -> None:
        number = self._run_of(block.tokens)
        run = self.runs[number]
        run.insert(bisect_left(run, block.tokens, key=by_tokens), block)
        if len(run) == 2 * RUN:
            self.runs[number : number + 1] = [run[:RUN], run[RUN:]]
            self._bounds.insert(number + 1, run[RUN].tokens)

    def remove(self, block: "Block") -> None:
        number = self._run_of(block.tokens)
        run = self.runs[number]
        index = bisect_left(run, block.tokens, key=by_tokens)
        assert run[index] is block, "the tree lost a child"
        del run[index]
        if not run:
            del self.runs[number]
            del self._bounds[number]

    def before(self, tokens: bytes) -> Iterator["Block"]:
        """Those that sort before these tokens, the nearest first."""
        number = self._run_of(tokens)
        index = bisect_left(self.runs[number], tokens, key=by_tokens)
        yield from reversed(self.runs[number][:index])
        for before in range(number - 1, -1, -1):
            yield from reversed(self.runs[before])

    def since(self, tokens: bytes) -> Iterator["Block"]:
        """Those that do not sort before these tokens, the nearest first."""
        number = self._run_of(tokens)
        index = bisect_left(self.runs[number], tokens, key=by_tokens)
        yield from self.runs[number][index:]
        for since in range(number + 1, len(self.runs)):
            yield from self.runs[since]

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

    def _run_of(self, tokens: bytes) -> int:
        """Where a block with these tokens is, or would be."""
        return max(bisect_right(self._bounds, tokens) - 1, 0)
