"""Belady's optimum: how many references to blocks a cache could hit that knows the future.

Of all caches that hold so many blocks, and take in or leave out what they like, none has more hits
than the one that gives up the block whose next use is furthest away. That is of blocks one by one,
in the order in which the requests name them: it need not keep prefixes whole, nor all blocks of a
request at once. So no cache of prefixes reaches more, and perhaps none as much.
"""

from collections.abc import Sequence
from heapq import heappop, heappush


def most_hits(references: Sequence[int], n_blocks: int) -> int:
    """The most hits among `references`, the numbers of blocks, in a cache for `n_blocks` blocks.

    Work: O(n log n) for n references; memory: O(n).
    """
    never = len(references)
    next_use = [never] * len(references)
    following: dict[int, int] = {}
    for index in range(len(references) - 1, -1, -1):
        next_use[index] = following.get(references[index], never)
        following[references[index]] = index
    cached: dict[int, int] = {}
    """What is in the cache, and when each is used next."""
    furthest: list[tuple[int, int]] = []
    """A heap of (-next use, block), also of uses that are over."""
    hits = 0
    for block, due in zip(references, next_use, strict=True):
        if block in cached:
            hits += 1
        elif due == never:
            continue  # left out
        cached[block] = due
        heappush(furthest, (-due, block))
        while len(cached) > n_blocks:
            negative, candidate = heappop(furthest)
            if cached.get(candidate) == -negative:
                del cached[candidate]
    return hits
