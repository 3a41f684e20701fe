"""From how many tokens on kvd pays: a short prompt that is found, beside computing it; what it
costs to ask in vain; and what it costs to store it, which comes after the first token.

    python -m bench.threshold [--repeats N]

A prompt of n tokens is found but for its last, which is always decoded. Each length is asked for in
turn with the others, through a LlamaWorker in one context. In milliseconds, medians.
"""

import argparse
import os
import statistics
import time
from typing import NamedTuple

import numpy as np

from bench.daemon import running_daemon
from bench.model import find_model
from bench.report import Row, paired_row
from kvd_client.integrations.llama.worker import LlamaWorker

LENGTHS = (1, 2, 4, 8, 16, 32, 48, 64, 128)
N_CTX = 512
THREADS = 2


class Costs(NamedTuple):
    """Milliseconds, one for each repeat, of prompts of one length. `found`, `computed` and `missed`
    are to the first logits; `stored` is what the worker does for it afterwards."""

    computed: list[float]
    found: list[float]
    missed: list[float]
    stored: list[float]


def measure(repeats: int) -> list[Row]:
    """Rows in milliseconds: a found prompt beside computing it."""
    return [
        paired_row(
            f"first token of a prompt of {n} tokens that is cached but for its last",
            costs.found,
            "ms",
            costs.computed,
            "computing it without kvd",
        )
        for n, costs in sweep(repeats).items()
    ]


def sweep(repeats: int) -> dict[int, Costs]:
    """What prompts of each length cost."""
    costs = {n: Costs([], [], [], []) for n in LENGTHS}
    with (
        running_daemon("2GiB") as runtime_dir,
        LlamaWorker(
            find_model(), runtime_dir=runtime_dir, timeout=10, n_ctx=N_CTX, n_threads=THREADS
        ) as worker,
    ):
        for number in range(repeats + 1):
            for n, each in costs.items():
                values = _once(worker, n)
                if number:  # the first is to warm up
                    for before, value in zip(each, values, strict=True):
                        before.append(value * 1e3)
    return costs


def _once(worker: LlamaWorker, n: int) -> tuple[float, float, float, float]:
    """Seconds: see Costs."""
    prompt = _random.integers(1000, 40_000, n).astype(np.int32)
    engine = worker.engine
    began = time.perf_counter()
    engine.prefill(0, prompt, 0)
    engine.logits()
    computed = time.perf_counter() - began
    engine.clear(0)

    began = time.perf_counter()
    sequence = worker.open(prompt)
    sequence.prefill()
    missed = time.perf_counter() - began
    began = time.perf_counter()
    sequence.close()
    stored = time.perf_counter() - began
    worker.client.flush()

    began = time.perf_counter()
    sequence = worker.open(prompt)
    sequence.prefill()
    found = time.perf_counter() - began
    if sequence.matched_tokens != n - 1:
        raise SystemExit(f"{sequence.matched_tokens} of {n} tokens were cached")
    sequence.close(store=False)
    return computed, found, missed, stored


_random = np.random.default_rng(9)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.threshold", description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    repeats = parser.parse_args().repeats
    print(f"load average before: {os.getloadavg()[0]:.2f}")
    print("tokens  computed     found    missed  to store     saved")
    for n, costs in sweep(repeats).items():
        computed, found, missed, stored = (statistics.median(each) for each in costs)
        pairs = zip(costs.computed, costs.found, strict=True)
        saved = statistics.median(computed - found for computed, found in pairs)
        print(f"{n:6} {computed:9.2f} {found:9.2f} {missed:9.2f} {stored:9.2f} {saved:9.2f}")


if __name__ == "__main__":
    main()
