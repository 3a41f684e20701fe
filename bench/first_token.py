"""Time to first token in a second worker: a shared prefix and a one-token suffix.

The first worker, a process of its own, computes and stores the prefix. This process is the second:
it fetches the prefix and decodes one token, beside its floor, which is one copy of the whole state
into the context and one decode of one token. Hits and floors are measured in turn.
"""

import ctypes
import multiprocessing
import time
from collections.abc import Callable

import llama_cpp.llama_cpp as bindings
import numpy as np

from bench.daemon import running_daemon
from bench.model import find_model
from bench.report import Row, row
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.worker import LlamaWorker

PREFIX = 1024
N_CTX = 2048


def measure(n_hits: int) -> list[Row]:
    """Rows in milliseconds."""
    prefix = _tokens(PREFIX)
    prompt = np.append(prefix, np.int32(100))
    with running_daemon("512MiB") as runtime_dir:
        spawn = multiprocessing.get_context("spawn")
        first = spawn.Process(target=_store, args=(runtime_dir, prompt))
        first.start()
        first.join()
        with LlamaWorker(find_model(), runtime_dir=runtime_dir, n_ctx=N_CTX) as worker:
            engine = worker.engine
            cold = [_milliseconds(lambda: engine.prefill(0, prompt, 0))]
            state = whole_state(engine, PREFIX)
            hits, copies, decodes = [], [], []
            for _ in range(n_hits):
                hits.append(_hit(worker, prompt))
                copies.append(_milliseconds(lambda: set_state(engine, state)))
                decodes.append(_milliseconds(lambda: engine.prefill(0, prompt[-1:], PREFIX)))
                engine.clear(0)
            cold += [_cold(engine, prompt) for _ in range(2)]
    floors = [copy + decode for copy, decode in zip(copies, decodes, strict=True)]
    return [
        row(
            "first token on a hit of 1,024 tokens",
            hits,
            "ms",
            floors,
            "one whole-state copy and one one-token decode",
        ),
        row("computing the 1,024 tokens instead", cold, "ms", hits, "the hit"),
        row("one whole-state copy", copies, "ms", decodes, "one one-token decode"),
    ]


def _store(runtime_dir: str, prompt: np.ndarray) -> None:
    with (
        LlamaWorker(find_model(), runtime_dir=runtime_dir, n_ctx=N_CTX) as worker,
        worker.open(prompt) as sequence,
    ):
        sequence.prefill()


def _hit(worker: LlamaWorker, prompt: np.ndarray) -> float:
    started = time.perf_counter()
    sequence = worker.open(prompt)
    sequence.prefill()
    taken = (time.perf_counter() - started) * 1e3
    if sequence.matched_tokens != PREFIX:
        raise SystemExit(f"{sequence.matched_tokens} tokens were cached, not {PREFIX}")
    sequence.close(store=False)
    return taken


def _cold(engine: LlamaEngine, prompt: np.ndarray) -> float:
    taken = _milliseconds(lambda: engine.prefill(0, prompt, 0))
    engine.clear(0)
    return taken


def whole_state(engine: LlamaEngine, n_tokens: int) -> "ctypes.Array[ctypes.c_uint8]":
    """The state of the first tokens of sequence 0, which is emptied."""
    engine.truncate(0, n_tokens)
    size = bindings.llama_state_seq_get_size(engine._context, 0)
    state = (ctypes.c_uint8 * size)()
    bindings.llama_state_seq_get_data(engine._context, state, size, 0)
    engine.clear(0)
    return state


def set_state(engine: LlamaEngine, state: "ctypes.Array[ctypes.c_uint8]") -> None:
    bindings.llama_state_seq_set_data(engine._context, state, len(state), 0)


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _tokens(count: int) -> np.ndarray:
    """Arbitrary ordinary tokens of the model's vocabulary."""
    return np.random.default_rng(7).integers(1000, 40_000, count).astype(np.int32)
