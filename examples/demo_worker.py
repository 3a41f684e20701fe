"""A worker process of demo.py: an ordinary program that answers questions with llama-cpp-python.

Everything that concerns the shared cache is in the lines marked `kvd`; the rest loads a model,
talks to the demo, and computes the same answer without the cache, to compare.
"""

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.worker import LlamaWorker

N_CTX = 2048
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """What a worker tells of one question. Times are seconds to the first token."""

    text: str
    prompt_tokens: int
    matched_tokens: int
    shared_seconds: float
    alone_seconds: float
    logits_difference: float
    """Against a private context that computed the same tokens in the same batches."""


def run(model_path: str, runtime_dir: str, name: str, pipe: Connection) -> None:
    """Answer questions until the pipe closes: ("ask", prompt, first_prompt) or ("hold", prompt)."""
    with (
        LlamaWorker(
            model_path, runtime_dir=runtime_dir, n_ctx=N_CTX, n_seq_max=4, name=name
        ) as worker,  # kvd
        LlamaEngine(model=worker.engine.model, n_ctx=N_CTX, n_seq_max=1) as alone,
    ):
        pipe.send("ready")
        while True:
            try:
                command, prompt, first_prompt = pipe.recv()
            except EOFError:
                return
            if command == "ask":
                pipe.send(_answer(worker, alone, prompt, first_prompt))
            else:
                held = worker.open(_tokenize(worker, prompt))
                held.prefill()
                pipe.send(held.matched_tokens)


def _answer(worker: LlamaWorker, alone: LlamaEngine, prompt: str, first_prompt: str) -> Answer:
    tokens = _tokenize(worker, prompt)
    started = time.perf_counter()
    with worker.open(tokens) as sequence:  # kvd: the cached prefix comes from shared memory
        logits = sequence.prefill()
        shared_seconds = time.perf_counter() - started
        words = list(sequence.generate(ANSWER_TOKENS))
        matched = sequence.matched_tokens
    # kvd: the end of the block has stored what was new, for the other workers

    started = time.perf_counter()
    alone.prefill(0, tokens, 0)
    alone_seconds = time.perf_counter() - started
    alone.clear(0)

    # The last bits of llama.cpp's results depend on how a prompt is split into batches. So the
    # reference computes what the first worker computed, cuts it where the match ended, and goes on.
    if matched:
        alone.prefill(0, _tokenize(worker, first_prompt), 0)
        alone.truncate(0, matched)
    alone.prefill(0, tokens[matched:], matched)
    difference = float(np.abs(alone.logits() - logits).max())
    alone.clear(0)
    text = worker.engine.model.detokenize(np.array(words, np.int32))
    return Answer(text, len(tokens), matched, shared_seconds, alone_seconds, difference)


def _tokenize(worker: LlamaWorker, prompt: str) -> np.ndarray:
    return worker.engine.model.tokenize(prompt, parse_special=True)
