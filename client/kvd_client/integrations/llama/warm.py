"""Warming: compute prompts with a real worker, store them, and pin them.

What is cached already is not computed again, so warming twice costs next to nothing. Reading the
prompts: prompts.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kvd_client.client import Client
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.prompts import BadPrompt, Tokens, read_prompt
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.worker import LlamaWorker

_SHORTEST_CONTEXT = 256
"""llama.cpp rounds up to a multiple of it."""


class Opened(NamedTuple):
    """A worker whose context has room for each of the prompts."""

    worker: LlamaWorker
    prompts: dict[Path, Tokens]


class Warmed(NamedTuple):
    """What became of one prompt, in tokens: how many it has, were cached before, were computed, and
    are cached and pinned now. `problem` says why that is not all of them."""

    tokens: int
    found: int
    computed: int
    cached: int
    problem: str


@contextmanager
def open_worker(
    model_path: Path,
    files: Iterable[Path],
    client: Client,
    *,
    n_ctx: int | None = None,
    block_tokens: int = 32,
    **engine_options: Any,
) -> Iterator[Opened]:
    """Load the model, read the prompts in `files`, and make a context that is `n_ctx` tokens long
    (None: as long as they need). Raises BadPrompt, and what LlamaEngine raises."""
    with LlamaModel(model_path) as model:
        prompts = {path: read_prompt(path, model) for path in files}
        needed = max(len(tokens) for tokens in prompts.values())
        if n_ctx is not None and needed > n_ctx:
            path = max(prompts, key=lambda each: len(prompts[each]))
            raise BadPrompt(f"{path}: it has {needed} tokens, and the context {n_ctx}")
        with (
            LlamaEngine(
                model=model,
                n_ctx=n_ctx or max(_SHORTEST_CONTEXT, needed),
                n_seq_max=1,
                **engine_options,
            ) as engine,
            LlamaWorker(engine=engine, client=client, block_tokens=block_tokens) as worker,
        ):
            yield Opened(worker, prompts)


def warm(
    worker: LlamaWorker,
    tokens: Tokens,
    owner: str,
    ttl: float = 0.0,
    progress: Callable[[int], None] = lambda _: None,
) -> Warmed:
    """Have all of `tokens` (int32 [n], n >= 1) cached, and pinned in the name of `owner` for `ttl`
    seconds (0: until it is unpinned).

    `progress` is told how many are in the context, batch after batch. Raises KvdError, and
    LlamaEngineError if they do not fit the worker's context. What another worker stores of them
    meanwhile is not stored twice.
    """
    with worker.context.alloc(tokens) as leased:
        found = leased.matched_tokens
    computed, problem = 0, ""
    if found < len(tokens):
        with worker.open(tokens) as sequence:
            found = sequence.matched_tokens
            computed = len(tokens) - found
            progress(sequence.length)
            while sequence.prefill_some():
                sequence.store()
                progress(sequence.length)
            progress(sequence.length)
            sequence.store(tail=True)
            failures = worker.client.flush().failures
            problem = sequence.problem or "; ".join(text for _, _, text in failures)
    cached = worker.client.pin(worker.context.model, tokens, owner=owner, ttl=ttl)
    if cached < len(tokens) and not problem:
        problem = "it was evicted at once: there is no room for all of it"
    return Warmed(len(tokens), found, computed, cached, problem)
