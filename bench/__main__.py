"""Measure everything and write bench/report.md and bench/report.json.

make bench          or: python -m bench [--quick] [--large]
"""

import argparse
import multiprocessing

from bench import (
    bulk,
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
    parser.add_argument("--large", action="store_true", help="payloads of 2 GiB, too")
    arguments = parser.parse_args()
    quick = arguments.quick
    n_requests, n_hits = (200, 3) if quick else (5000, 25)
    print("round trips ...", flush=True)
    parts = {"Round trips": roundtrip.measure(n_requests)}
    print("requests of many clients ...", flush=True)
    parts["Requests of many clients"] = throughput.measure(*((2, 0.1) if quick else (20, 0.5)))
    print("store and fetch, beside peers ...", flush=True)
    sizes = [*bulk.SIZES, bulk.LARGE] if arguments.large else list(bulk.SIZES)
    found = bulk.measure(2 if quick else 12, sizes)
    parts["Store and fetch"] = found.rows
    print("first tokens ...", flush=True)
    parts["First tokens"] = first_token.measure(n_hits)
    print("first tokens of each integration ...", flush=True)
    parts["First tokens of each integration"] = integrations.measure(
        *((2, 2) if quick else (9, 25))
    )
    print("short prompts ...", flush=True)
    parts["Short prompts"] = threshold.measure(2 if quick else 20)
    print("first tokens of second server processes ...", flush=True)
    parts["Second server processes"] = servers.measure(2 if quick else 4)
    print("what one client's load costs another ...", flush=True)
    parts["What load costs others"] = stall.measure(0.125 if quick else 1.0)
    print("evictions ...", flush=True)
    # In a process of its own, as the daemon is: no heap of before.
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        size = 100_000 if quick else 1_000_000
        parts["Evictions and memory"] = fresh.apply(eviction.measure, (size,))
    report.write(parts, found.remarks, n_requests, n_hits)


if __name__ == "__main__":
    main()
