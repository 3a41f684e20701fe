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
    raise AssertionError(f"p99 under load in quiet ones: {ratios}")
