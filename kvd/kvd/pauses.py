"""What the Python interpreter itself would let a request wait for, and how that is bounded.

The collector of cycles walks all objects that have lived for a while, again and again: with 32,000
blocks it stopped the loop for 50 ms at a time, and it found nothing, since references alone free
what the core lets go. So only the young are looked at, which costs a fraction of a millisecond:
there die the cycles that exceptions make. What is kept for longer must have no cycles when it is
dropped.

A thread that wants the interpreter waits until the other one does something slow, or for the switch
interval. The copier's thread does much for each small block, and the loop should not wait for long.
"""

import gc
import sys

YOUNG, MIDDLE = 700, 10
"""Python's own defaults."""
NEVER = (1 << 31) - 1
SWITCH_SECONDS = 0.0005
"""Python's default is ten times as long. To switch costs about 10 us."""


def bound() -> None:
    """Bound both, for the life of this process."""
    gc.set_threshold(YOUNG, MIDDLE, NEVER)
    sys.setswitchinterval(SWITCH_SECONDS)
