"""A worker that lives through the deaths of its daemon, and checks every byte that it reads.

    python -m tests.soak.survivors RUNTIME_DIR SEED

It fails open, as workers do: without a daemon it goes on by itself. On standard output it tells, a
JSON line each, what it has stored for certain, and at its end what it has lived through. The end of
standard input is its end.
"""

import json
import random
import select
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np

import kvd_client
from kvd_client.errors import BadPosition, KvdError, ResourceError, ServiceError
from tests.soak.content import BLOCK_BYTES, BLOCK_TOKENS, MODEL, block_rows, blocks, prompt, rows

N_SEQ_MAX = 4
STAGING = 128 * 1024


class Survivor:
    """`told` are the prompts that it has told of already."""

    def __init__(self, runtime_dir: str, seed: int) -> None:
        self.chance = random.Random(seed)
        self.client = kvd_client.connect(
            runtime_dir, name=f"survivor {seed}", staging_bytes=STAGING, fail_open=True
        )
        self.context = self.client.open_context(MODEL.model, N_SEQ_MAX)
        self.buffer = np.empty(BLOCK_BYTES, np.uint8)
        self.told: set[tuple[int, ...]] = set()
        self.lived: dict[str, Any] = dict.fromkeys(
            ("requests", "shared", "alone", "hits", "rows", "stored", "errors"), 0
        )
        self.longest_alloc = 0.0
        """Seconds: how long a request was held up at most by a daemon that is not there."""

    def serve(self) -> None:
        """One request: match, read what matched, store the rest."""
        tokens = prompt(self.chance)
        self.lived["requests"] += 1
        begin = time.monotonic()
        sequence = self.context.alloc(tokens)
        self.longest_alloc = max(self.longest_alloc, time.monotonic() - begin)
        try:
            self.lived["shared" if sequence.shared else "alone"] += 1
            if not sequence.shared:
                time.sleep(0.05)  # it computes by itself
            self.check(sequence, tokens)
            self.store(sequence, tokens)
        except ServiceError:
            self.lived["errors"] += 1  # it died under us
        finally:
            with suppress(ServiceError):
                sequence.release()

    def check(self, sequence: Any, tokens: list[int]) -> None:
        """Every row that matched, also when the daemon has died since."""
        matched = sequence.matched_tokens
        if not matched:
            return
        if self.chance.random() < 0.3:
            time.sleep(
                self.chance.random() * 0.2
            )  # a slow reader: the daemon may be another by now
        expected = rows(tokens[:matched])
        for index, start in enumerate(range(0, matched, BLOCK_TOKENS)):
            sequence.read_into(index, self.buffer)
            wanted = expected[:, :, start : start + BLOCK_TOKENS]
            found = block_rows(self.buffer)[:, :, : wanted.shape[2]]
            assert np.array_equal(found, wanted), f"wrong bytes in block {index} of {tokens}"
        self.lived["hits"] += 1
        self.lived["rows"] += matched

    def store(self, sequence: Any, tokens: list[int]) -> None:
        start = sequence.full_tokens
        if not sequence.shared or start >= len(tokens):
            return
        try:
            commit = sequence.append(tokens[start:], blocks(tokens, start))
            flushed = self.client.flush(commit)
        except (ResourceError, BadPosition):
            return  # all leased, or an id was taken over by another life
        if flushed.failures or commit.error is not None:
            return
        self.lived["stored"] += 1
        if tuple(tokens) not in self.told:
            self.told.add(tuple(tokens))
            print(json.dumps({"stored": tokens}), flush=True)


def main(runtime_dir: str, seed: int) -> None:
    survivor = Survivor(runtime_dir, seed)
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            survivor.serve()
        except KvdError as error:
            if not isinstance(error, ServiceError | ResourceError):
                raise
            survivor.lived["errors"] += 1
    lived = {**survivor.lived, "longest_alloc": survivor.longest_alloc}
    print(json.dumps({"lived": lived}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
