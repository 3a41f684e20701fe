"""Long walks over the core's state, in steps between which the loop serves requests.

Who asks while a walk is under way shares the next one with all who ask meanwhile, so that each gets
what was true after it had asked, and many who ask at once are no burden.
"""

from collections.abc import Callable, Generator
from typing import Generic, TypeVar

A = TypeVar("A")
T = TypeVar("T")


class SharedWalk(Generic[A, T]):
    """A walk that many may ask for. `begin` makes its steps; at the end `give` gets those who asked
    and what it has found, or what was raised."""

    def __init__(
        self,
        begin: Callable[[], Generator[None, None, T]],
        give: Callable[[list[A], T | Exception], None],
    ) -> None:
        self._begin = begin
        self._give = give
        self._waiting: list[A] = []
        self._asked: list[A] = []
        """Those for whom one is under way."""
        self._steps: Generator[None, None, T] | None = None

    @property
    def is_walking(self) -> bool:
        """Whether there is a step to do."""
        return self._steps is not None

    def ask(self, asked: A) -> None:
        """Let `give` have this, after a walk that begins later."""
        self._waiting.append(asked)
        self._start()

    def step(self) -> None:
        """Do one step, if there is one."""
        if self._steps is None:
            return
        found: T | Exception
        try:
            next(self._steps)
            return
        except StopIteration as stop:
            found = stop.value
        except Exception as error:
            found = error
        given, self._asked, self._steps = self._asked, [], None
        self._give(given, found)
        self._start()

    def _start(self) -> None:
        if self._steps is None and self._waiting:
            self._asked, self._waiting = self._waiting, []
            self._steps = self._begin()
