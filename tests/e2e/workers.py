"""Worker processes of the end-to-end tests: each runs a function of this module, in a new
process."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from kvd_client.integrations.llama.worker import LlamaWorker

# One thread: the last bits of one-token decodes depend on their number, and two wait for each
# other on a busy machine.
OPTIONS: dict[str, Any] = {"n_ctx": 2048, "n_threads": 1, "n_seq_max": 4}
TINY_OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_seq_max": 4}


@contextlib.contextmanager
def worker_process(function: Any, *arguments: Any) -> Iterator[Connection]:
    """Run `function(pipe, *arguments)` in a new process; yields the other end of the pipe."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(60)
        alive = process.is_alive()
        if alive:
            process.kill()
            process.join()
        process.close()
        assert not alive, "the worker did not end when its pipe was closed"


def store_prompts(pipe: Connection, model: Path, runtime_dir: Path, kv_type: str) -> None:
    """For each prompt (int32 tokens) that comes: compute it, store it, answer with its logits."""
    options = {**OPTIONS, "type_k": kv_type, "type_v": kv_type}
    with LlamaWorker(
        model, runtime_dir=runtime_dir, name="storer", timeout=10, **options
    ) as worker:
        pipe.send("ready")
        with contextlib.suppress(EOFError):
            while True:
                prompt: np.ndarray = pipe.recv()
                with worker.open(prompt) as sequence:
                    logits = sequence.prefill()
                    matched = sequence.matched_tokens
                worker.client.flush()
                pipe.send((matched, logits))


def store_at_once(pipe: Connection, model: Path, runtime_dir: Path) -> None:
    """Compute a prompt, wait for the word, store it; answer with how the append was taken."""
    with LlamaWorker(model, runtime_dir=runtime_dir, timeout=10, **TINY_OPTIONS) as worker:
        prompt: np.ndarray = pipe.recv()
        with worker.open(prompt) as sequence:
            sequence.prefill()
            pipe.send(sequence.matched_tokens)
            pipe.recv()
        pipe.send(worker.client.flush().failures)
        with contextlib.suppress(EOFError):
            pipe.recv()
