"""How many cells of a context are used, where sequences share the cells of a common prefix."""

from collections.abc import Hashable


class Cells:
    """Counts what llama.cpp does with the cells of a unified context; it moves nothing.

    A token of a sequence is in one cell. A copied prefix is in the cells of the sequence that it
    was copied from, and a cell is free again when the last sequence that uses it has gone.
    """

    def __init__(self) -> None:
        self._users: list[int] = []
        """For each cell that was ever used, how many sequences use it."""
        self._free: list[int] = []
        self._of: dict[Hashable, list[int]] = {}

    @property
    def used(self) -> int:
        """Cells that some sequence uses."""
        return len(self._users) - len(self._free)

    def share(self, source: Hashable, target: Hashable, n: int) -> None:
        """The new sequence `target` uses the first n cells of `source`, which has that many."""
        cells = self._of[target] = self._of[source][:n]
        assert len(cells) == n, f"{n} cells shared of {len(cells)}"
        for cell in cells:
            self._users[cell] += 1

    def extend(self, sequence: Hashable, n: int) -> None:
        """The sequence, which may be new, has n more tokens in cells of its own."""
        cells = self._of.setdefault(sequence, [])
        for _ in range(n):
            if self._free:
                cell = self._free.pop()
                self._users[cell] = 1
            else:
                cell = len(self._users)
                self._users.append(1)
            cells.append(cell)

    def remove(self, sequence: Hashable) -> None:
        """The sequence has gone, if it was there."""
        for cell in self._of.pop(sequence, ()):
            self._users[cell] -= 1
            if not self._users[cell]:
                self._free.append(cell)
