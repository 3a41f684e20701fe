"""What the metrics' thread asks the loop. A question goes to the loop with a wake-up, and the
answer comes back into the asker's thread; neither ever waits for the other.
"""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any, NamedTuple


class Kind(Enum):
    """What can be asked."""

    ARE_YOU_THERE = "are you there"
    """Answered with None, by the loop itself."""
    HOW_ARE_THINGS = "how are things"
    """Answered with a Snapshot, or with the exception that was in the way."""


class Question(NamedTuple):
    """`give` takes the answer, in the loop's thread, and must not take long."""

    kind: Kind
    give: Callable[[Any], None]


class Questions:
    """From one thread to the loop. `fd` is for the poll loop, level-triggered."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waiting: deque[Question] = deque()

    def ask(self, kind: Kind, give: Callable[[Any], None]) -> None:
        """From the asker's thread."""
        self._waiting.append(Question(kind, give))
        os.eventfd_write(self.fd, 1)

    def take(self) -> list[Question]:
        """All that wait. From the loop."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def close(self) -> None:
        """Nobody may ask any more."""
        os.close(self.fd)
