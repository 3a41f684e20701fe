"""What Python and its C library would let a request wait for, and how that is bounded.

The collector of cycles walks all objects that have lived for a while, again and again: with 32,000
blocks it stopped the loop for 50 ms at a time, and it found nothing, since references alone free
what the core lets go. So only the young are looked at, which costs a fraction of a millisecond:
there die the cycles that exceptions make. What is kept for longer must have no cycles when it is
dropped.

A thread that wants the interpreter waits until the other one does something slow, or for the switch
interval. The copier's thread does much for each small block, and the loop should not wait for long.

glibc gives the memory of every large message back to the system, and gets it again page by page: a
copy of 4 MiB, of which a long prompt takes two, then costs 2.1 ms instead of 0.4. So some is kept.
"""

import ctypes
import gc
import sys
from contextlib import suppress

YOUNG, MIDDLE = 700, 10
"""Python's own defaults."""
NEVER = (1 << 31) - 1
SWITCH_SECONDS = 0.0005
"""Python's default is ten times as long. To switch costs about 10 us."""
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 16 << 20
"""Of malloc.h; so much that is free may stay with the process."""
M_MMAP_THRESHOLD, HEAP_BYTES = -3, 8 << 20
"""What is smaller comes from the heap: the longest prompt does."""


def bound() -> None:
    """Bound all three, for the life of this process."""
    gc.set_threshold(YOUNG, MIDDLE, NEVER)
    sys.setswitchinterval(SWITCH_SECONDS)
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)
