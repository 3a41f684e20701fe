"""Measure everything and write bench/report.json.

make bench          or: python -m bench [--quick]
"""

import argparse
import multiprocessing

from bench import (
    eviction,
    first_token,
    integrations,
    report,
    roundtrip,
    servers,
    stall,
    threshold,
    throughput,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run at all?")
    quick = parser.parse_args().quick
    n_requests, n_hits = (200, 3) if quick else (5000, 25)
    print("round trips ...", flush=True)
    rows = roundtrip.measure(n_requests)
    print("requests of many clients ...", flush=True)
    rows += throughput.measure(*((2, 0.1) if quick else (20, 0.5)))
    print("first tokens ...", flush=True)
    rows += first_token.measure(n_hits)
    print("first tokens of each integration ...", flush=True)
    rows += integrations.measure(*((2, 2) if quick else (9, 25)))
    print("short prompts ...", flush=True)
    rows += threshold.measure(2 if quick else 20)
    print("first tokens of second server processes ...", flush=True)
    rows += servers.measure(2 if quick else 4)
    print("what one client's load costs another ...", flush=True)
    rows += stall.measure(0.125 if quick else 1.0)
    print("evictions ...", flush=True)
    # In a process of its own, as the daemon is: no heap of before.
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        rows += fresh.apply(eviction.measure, (100_000 if quick else 1_000_000,))
    report.write(rows, n_requests, n_hits)


if __name__ == "__main__":
    main()
