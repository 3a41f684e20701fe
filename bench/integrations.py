"""Time to first token in each integration: of a prompt that is cached nowhere beside no cache, and
of one that is cached beside its floor.

A miss and the same without kvd are measured in turn, in one context: that of the same Llama, or of
the same engine, on prompts that nobody has asked before. The floor of a hit is that of
first_token.py: one copy of the whole state into a context, and one decode of one token.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import llama_cpp
import numpy as np

from bench.daemon import running_daemon
from bench.first_token import set_state, whole_state
from bench.model import find_model
from bench.report import Row, paired_row
from bench.serving import PATIENT
from kvd_client.client import DEFAULT_STAGING, Client
from kvd_client.integrations.llama import share
from kvd_client.integrations.llama.batching.worker import BatchingWorker
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.worker import LlamaWorker

PREFIX = 1024
SHORT = 128
N_CTX = 2048
THREADS = 2

Prompt = list[int]


@dataclass(frozen=True)
class Integration:
    """`with_kvd` and `without` give the seconds to the first token of a prompt; afterwards all that
    is to be stored has been stored. `hit` is `with_kvd`, and says how many tokens were cached."""

    name: str
    with_kvd: Callable[[Prompt], float]
    without: Callable[[Prompt], float]
    matched: Callable[[], int]


def measure(n_misses: int, n_hits: int) -> list[Row]:
    """Rows in milliseconds: `n_misses` of long prompts, four times as many of short ones."""
    rows: list[Row] = []
    with (
        running_daemon("2GiB") as runtime_dir,
        LlamaEngine(model_path=find_model(), n_ctx=N_CTX, n_threads=THREADS) as engine,
    ):
        for opened in (_llama, _worker, _batching):
            with opened(runtime_dir, engine) as integration:
                rows += _misses(integration, PREFIX, n_misses)
                rows += _misses(integration, SHORT, 4 * n_misses)
                # LlamaWorker's is in first_token.py.
                if opened is not _worker:
                    rows += _hits(integration, engine, n_hits)
    return rows


def _misses(integration: Integration, n_tokens: int, repeats: int) -> list[Row]:
    asked: list[float] = []
    alone: list[float] = []
    integration.with_kvd(_prompt(n_tokens))
    for number in range(repeats):
        for values in (asked, alone) if number % 2 else (alone, asked):
            call = integration.with_kvd if values is asked else integration.without
            values.append(call(_prompt(n_tokens)) * 1e3)
            if values is asked and integration.matched():
                raise SystemExit(f"{integration.matched()} tokens of a new prompt were cached")
    what = f"first token on a miss of {n_tokens:,} tokens, {integration.name}"
    return [paired_row(what, asked, "ms", alone, "without kvd")]


def _hits(integration: Integration, engine: LlamaEngine, repeats: int) -> list[Row]:
    prompt = _prompt(PREFIX + 1)
    integration.with_kvd(prompt)
    engine.prefill(0, np.array(prompt, np.int32), 0)
    state = whole_state(engine, PREFIX)
    last = np.array(prompt[-1:], np.int32)
    hits: list[float] = []
    floors: list[float] = []
    for _ in range(repeats):
        hits.append(integration.with_kvd(prompt) * 1e3)
        if integration.matched() != PREFIX:
            raise SystemExit(f"{integration.matched()} tokens were cached, not {PREFIX}")
        began = time.perf_counter()
        set_state(engine, state)
        engine.prefill(0, last, PREFIX)
        floors.append((time.perf_counter() - began) * 1e3)
        engine.clear(0)
    what = f"first token on a hit of {PREFIX:,} tokens, {integration.name}"
    floor = "one whole-state copy and one one-token decode"
    return [paired_row(what, hits, "ms", floors, floor)]


@contextmanager
def _llama(runtime_dir: str, engine: LlamaEngine) -> Iterator[Integration]:
    """An ordinary Llama; without kvd it is not shared."""
    llama = llama_cpp.Llama(
        str(find_model()),
        n_ctx=N_CTX,
        n_threads=THREADS,
        n_threads_batch=THREADS,
        flash_attn=True,
        verbose=False,
    )
    matched = 0

    def first_token(prompt: Prompt) -> float:
        llama.reset()  # so that nothing is in the context already
        began = time.perf_counter()
        tokens = llama.generate(prompt, temp=0.0)
        next(tokens)
        taken = time.perf_counter() - began
        tokens.close()
        return taken

    def shared(prompt: Prompt) -> float:
        nonlocal matched
        with share(llama, client=client) as handle:
            taken = first_token(prompt)
            matched = handle.matched_tokens
        client.flush()
        return taken

    with Client(
        runtime_dir, fail_open=True, staging_bytes=DEFAULT_STAGING, timeout=PATIENT
    ) as client:
        try:
            yield Integration("share(llama)", shared, first_token, lambda: matched)
        finally:
            llama.close()


@contextmanager
def _worker(runtime_dir: str, engine: LlamaEngine) -> Iterator[Integration]:
    matched = 0

    def first_token(prompt: Prompt) -> float:
        nonlocal matched
        began = time.perf_counter()
        sequence = worker.open(np.array(prompt))
        int(sequence.prefill().argmax())
        taken = time.perf_counter() - began
        matched = sequence.matched_tokens
        sequence.close()
        worker.client.flush()
        return taken

    with LlamaWorker(engine=engine, runtime_dir=runtime_dir, timeout=PATIENT) as worker:
        yield Integration("LlamaWorker", first_token, _alone(engine), lambda: matched)


@contextmanager
def _batching(runtime_dir: str, engine: LlamaEngine) -> Iterator[Integration]:
    matched = 0

    def first_token(prompt: Prompt) -> float:
        nonlocal matched
        told: list[float] = []
        began = time.perf_counter()
        request = worker.submit(
            np.array(prompt), 1, on_token=lambda _: told.append(time.perf_counter())
        )
        while worker.step():
            pass
        matched = request.result().matched_tokens
        worker.llama.client.flush()
        return told[0] - began

    with BatchingWorker(engine=engine, runtime_dir=runtime_dir, timeout=PATIENT) as worker:
        yield Integration("BatchingWorker", first_token, _alone(engine), lambda: matched)


def _alone(engine: LlamaEngine) -> Callable[[Prompt], float]:
    """What both workers are made of: the engine, without a daemon."""

    def first_token(prompt: Prompt) -> float:
        began = time.perf_counter()
        engine.prefill(0, np.array(prompt, np.int32), 0)
        int(engine.logits().argmax())
        taken = time.perf_counter() - began
        engine.clear(0)
        return taken

    return first_token


_random = np.random.default_rng(5)


def _prompt(n_tokens: int) -> Prompt:
    """Arbitrary ordinary tokens that nobody has asked for."""
    prompt: Prompt = _random.integers(1000, 40_000, n_tokens).tolist()
    return prompt
