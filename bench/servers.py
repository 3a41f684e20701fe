"""Time to first token in a second server process, of llama-cpp-python's two servers.

A first process has served a prompt. The second is asked, by streaming, for one that shares 900
tokens with it and ends in 16 others, and for one that is identical to another of the first's: with
kvd, with the server's own disk cache, and, where that is another thing, without a cache.

What is fair to whom: each kind has two processes and a folder of its own, and is asked the same
prompts in turn. The example server reads the index of its disk cache only when it starts, so second
processes are started anew in each round, behind the first ones' answers. Each is warmed by a prompt
that it can find, too. One that is not asked has nothing to do.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.daemon import running_daemon
from bench.model import find_model
from bench.report import Row, paired_row
from bench.serving import Server, example_command, listening, module_command
from kvd_client.integrations.llama.runtime.model import LlamaModel

SHARED, OTHER, WARM = 900, 16, 200
"""Tokens of a prompt that two have in common, that follow them, and of what warms a process."""
THREADS = 2
N_CTX = 4096
KVD, DISK, NOTHING = "kvd", "its own disk cache", "no cache"
_WORDS = " river stone window paper garden metal letter music road forest engine summer market"
_MATCHED = re.compile(r"matched (\d+) of (\d+) tokens")


def measure(n_rounds: int) -> list[Row]:
    """Rows in milliseconds."""
    model = find_model()
    with LlamaModel(model) as words:
        prompts = Prompts(words)
        example, plain = (
            Kind("examples/server/server.py", (KVD, DISK)),
            Kind("llama_cpp.server", (KVD, NOTHING, DISK)),
        )
        return [
            row for kind in (example, plain) for row in _measure(kind, model, prompts, n_rounds)
        ]


class Kind(NamedTuple):
    """A server, and with what it is tried."""

    name: str
    sides: tuple[str, ...]


class Prompts:
    """Texts of so many tokens that no two have their beginnings in common."""

    def __init__(self, words: LlamaModel) -> None:
        self._random = np.random.default_rng(11)
        self._words = words
        self._each = [f" {word}" for word in _WORDS.split()]

    def text(self, n_tokens: int, first: str = "") -> str:
        """One token a word, `first` among them: checked."""
        n_words = n_tokens - len(first.split())
        text = first + "".join(self._random.choice(self._each, n_words))
        found = len(self._words.tokenize(text))
        if found != n_tokens:
            raise SystemExit(f"a text of {n_tokens} words has {found} tokens")
        return text


class Round(NamedTuple):
    """What one round asks. The first processes are asked for `served` and `identical`, the second
    ones for `shares` and `identical`."""

    warm: str
    served: str
    shares: str
    identical: str


def _round(prompts: Prompts) -> Round:
    shared = prompts.text(SHARED)
    served, shares = (shared + prompts.text(OTHER, first) for first in (" question", " answer"))
    return Round(prompts.text(WARM), served, shares, prompts.text(SHARED + OTHER))


def _measure(kind: Kind, model: Path, prompts: Prompts, n_rounds: int) -> list[Row]:
    shares: dict[str, list[float]] = {side: [] for side in kind.sides}
    identical: dict[str, list[float]] = {side: [] for side in kind.sides}
    with contextlib.ExitStack() as opened:
        runtime_dir = opened.enter_context(running_daemon("1GiB"))
        folders = {
            side: Path(opened.enter_context(tempfile.TemporaryDirectory())) for side in kind.sides
        }

        def start(side: str) -> contextlib.AbstractContextManager[Server]:
            return _start(kind, side, folders[side], model, runtime_dir)

        # Without a cache nothing that another process does is of any use.
        firsts = [opened.enter_context(start(side)) for side in kind.sides if side != NOTHING]
        for number in range(n_rounds):
            asked = _round(prompts)
            for first in firsts:
                for prompt in (asked.warm, asked.served, asked.identical):
                    first.complete(prompt, 1)
            with contextlib.ExitStack() as seconds:
                second = {side: seconds.enter_context(start(side)) for side in kind.sides}
                for server in second.values():
                    server.complete(asked.warm, 4)
                for values, prompt in ((shares, asked.shares), (identical, asked.identical)):
                    for index in range(len(kind.sides)):  # in another order each time
                        side = kind.sides[(index + number) % len(kind.sides)]
                        values[side].append(second[side].first_token_seconds(prompt) * 1e3)
                _check(kind, second[KVD])
    what = f"first token in a second {kind.name}"
    return [
        paired_row(f"{what}, {shown}, kvd", values[KVD], "ms", values[side], side, peer=kind.name)
        for shown, values in (
            (f"{SHARED} + {OTHER} tokens", shares),
            ("identical prompt", identical),
        )
        for side in kind.sides[1:]
    ]


@contextlib.contextmanager
def _start(kind: Kind, side: str, folder: Path, model: Path, runtime_dir: str) -> Iterator[Server]:
    if kind.name == "llama_cpp.server":
        flags = ["--model", str(model), "--n_ctx", str(N_CTX), "--flash_attn", "true"]
        flags += ["--n_threads", str(THREADS), "--n_threads_batch", str(THREADS)]
        # With it a saved state has 4 bytes a token and word, which takes seconds to write.
        flags += ["--logits_all", "false", "--verbose", "false"]
        module = "llama_cpp.server"
        if side == KVD:
            module = "kvd_client.integrations.llama_cpp_server"
            flags += ["--kvd-runtime-dir", runtime_dir, "--kvd-timeout", "10"]
        elif side == DISK:
            flags += ["--cache", "true", "--cache_type", "disk"]
        command = module_command(module, *flags)
    else:
        command = example_command(
            folder / "config.json",
            model,
            runtime_dir if side == KVD else None,
            disk_cache=folder / "cache" if side == DISK else None,
            n_ctx=N_CTX,
            n_seq_max=4,
            flash_attn=True,
            threads=THREADS,
            threads_batch=THREADS,
        )
    with listening(Server(command, folder)) as server:
        yield server


def _check(kind: Kind, server: Server) -> None:
    """That a second process with kvd has found all that there was to find."""
    expected = [WARM - 1, SHARED, SHARED + OTHER - 1]
    if kind.name == "llama_cpp.server":
        found = [int(match[1]) for match in server.wait_for(_MATCHED, 3)]
        ok = found == expected
    else:
        found = [int(server.metrics()["batch_server:sequence_cache_tokens_loaded_total"])]
        ok = sum(found) == sum(expected)
    if not ok:
        raise SystemExit(f"{kind.name} with kvd has matched {found} tokens, not {expected}")
