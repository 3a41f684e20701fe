"""Which tokens a context is known to have: those that were seen going in, at their positions.

    position   0 ........ known ........ end of the context
               seen going in  | anything: embeddings of images, a restored state, a shifted part

Only they are stored, and only they stay when a prefix is imported. What comes after something
unknown is unknown too, until the context has been cut back to what is known.
"""

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


def common_prefix(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """How many tokens two prompts (int32 [n], [m]) begin with alike."""
    n = min(len(one), len(other))
    differing = np.flatnonzero(one[:n] != other[:n])
    return int(differing[0]) if differing.size else n


class KnownTokens:
    """The known tokens of sequence 0, in room for `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._buffer = np.empty(capacity, np.int32)
        self.length = 0

    @property
    def tokens(self) -> Tokens:
        """int32 [length], a read-only view, valid until the next change."""
        view = self._buffer[: self.length]
        view.flags.writeable = False
        return view

    def cut(self, length: int) -> None:
        """Of what was known, what is at `length` and beyond is so no more."""
        self.length = min(self.length, max(0, length))

    def append(self, start: int, tokens: npt.ArrayLike) -> None:
        """Tokens have gone in from position `start` on. Not known if what is before them is not."""
        self.cut(start)
        new = np.asarray(tokens, np.int32)
        if self.length == start and start + new.size <= self.capacity:
            self._buffer[start : start + new.size] = new
            self.length = start + new.size
