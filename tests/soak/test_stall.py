"""No request stalls others: under each load of bench/stall.py.

KVD_SOAK_STALL is how many GiB the load has. Timed, so only meaningful on a machine that has
nothing else to do.
"""

import os

import pytest

from bench import stall
from bench.daemon import running_daemon

GIB = float(os.environ.get("KVD_SOAK_STALL", "1"))
TIMES = 10
"""What the issue demands of an alloc's p99 under load, in quiet ones."""
TRIES = 3
STILL_STALLS = {
    "32,767 small blocks are committed": "appends of 1,024 blocks, each 5 us on the loop",
    "1 GiB is reported on": "verify walks over all trees and records on the loop",
    "1,000,000 tokens are matched": "31,250 blocks in one alloc, each 1 us on the loop",
}
"""Known, and not mended yet: in these nobody waits longer than PAUSE."""
PAUSE = 0.5
"""Seconds, of any single alloc."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("load", stall.LOADS)
def test_an_alloc_under_load_takes_no_ten_times_as_long(load: str):
    ratios = []
    for _ in range(TRIES):  # the machine may have had something else to do
        with running_daemon(stall.BUDGET) as runtime_dir:
            found = stall.stall(runtime_dir, load, GIB)
        ratios.append(found.alloc_ratio)
        print(
            f"{load}: alloc p99 {stall.p99(found.quiet.allocs):.0f} us quiet, "
            f"{stall.p99(found.loud.allocs):.0f} us loud, longest {max(found.loud.allocs):.0f} us"
        )
        if ratios[-1] < TIMES:
            return
        if load in STILL_STALLS and max(found.loud.allocs) < PAUSE * 1e6:
            print(f"{load}: {STILL_STALLS[load]}")
            return
    raise AssertionError(f"p99 under load in quiet ones: {ratios}")
