"""Ordinary Llamas of the tests of sharing, and what is compared."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from kvd_client.integrations.llama import share
from kvd_client.integrations.llama.attached.llama_params import CLOCK_TICK
from kvd_client.integrations.llama.attached.sharing import LlamaShare
from tests.support import Daemon

PATIENT = 10.0
"""Seconds: tests that are not about outages must not see one on a busy machine."""
BLOCK = 32


def settled(path: Path) -> Path:
    """The file, once it is so old that it cannot have changed after it is loaded."""
    while time.time() <= path.stat().st_ctime + 2 * CLOCK_TICK:
        pass
    return path


def open_llama(path: Path, **options: Any) -> llama_cpp.Llama:
    """A plain one, as its user makes it. One thread: see workers.py."""
    defaults = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True}
    return llama_cpp.Llama(str(path), verbose=False, **{**defaults, **options})


def shared(llama: llama_cpp.Llama, daemon: Daemon, **options: Any) -> LlamaShare:
    return share(llama, **{"runtime_dir": daemon.runtime_dir, "timeout": PATIENT, **options})


def run(llama: llama_cpp.Llama, prompt: Iterable[int], n_tokens: int = 8) -> list[int]:
    """The greedy continuation; all but its last token are decoded."""
    found: list[int] = []
    for token in llama.generate(list(prompt), temp=0.0):
        found.append(token)
        if len(found) == n_tokens:
            break
    return found


def first_logits(llama: llama_cpp.Llama, prompt: Iterable[int]) -> np.ndarray:
    """The logits of which the first token is chosen."""
    generator = llama.generate(list(prompt), temp=0.0)
    next(generator)
    found = logits(llama)
    generator.close()
    return found


def logits(llama: llama_cpp.Llama) -> np.ndarray:
    """Those of the last token that was decoded."""
    address = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return np.ctypeslib.as_array(address, (llama.n_vocab(),)).copy()
