"""What is allowed and will probably not do: settings beside what the machine and the models need.

Covers warnings, in words, each with what to do. None of them keeps a daemon from starting: memory
is given block by block, and what is not there is an error when it is asked for (limits.py). What
cannot be at all: configuration.py.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from kvd.arena import SHM_DIR, list_segments
from kvd.instance import segment_prefix
from kvd.kinds import show_size
from kvd.limits import RESERVE_BYTES, SYSTEM, Sources, ceilings, memory_headroom
from kvd.settings import Settings
from kvd_proto import layout


class Needs(NamedTuple):
    """A model, and what its blocks take."""

    name: str
    block_tokens: int
    stride_bytes: int


def of_machine(settings: Settings, sources: Sources = SYSTEM) -> list[str]:
    """Where the budget is more than the machine can give. What this instance has already counts as
    there: it is the budget's."""
    found = []
    budget, most = settings.max_memory, ceilings(sources)
    if most.shm is not None and budget > most.shm:
        found.append(
            f"max_memory ({show_size(budget)}) is more than {sources.shm} has "
            f"({_about(most.shm)}): lower it, or mount -o remount,size=... {sources.shm}"
        )
    if most.cgroup is not None and budget + RESERVE_BYTES > most.cgroup:
        found.append(
            f"max_memory ({show_size(budget)}), with {show_size(RESERVE_BYTES)} beside it, is more "
            f"than the limit of {most.cgroup_path} ({_about(most.cgroup)}): lower it, or raise "
            "that limit (MemoryMax=)"
        )
    available = memory_headroom(sources=sources).machine + _memory_of(settings.instance)
    if budget + RESERVE_BYTES > available:
        found.append(
            f"max_memory ({show_size(budget)}), with {show_size(RESERVE_BYTES)} beside it, is more "
            f"than this machine has available ({_about(available)}): lower it, or let others use "
            "less"
        )
    return found


def of_model(settings: Settings, model: Needs, quota: int) -> str | None:
    """A warning if n_seq_max sequences of max_context tokens do not fit what a tenant of this
    `quota` may have."""
    tokens = settings.n_seq_max * settings.max_context
    per_sequence = -(-settings.max_context // model.block_tokens)
    needed = settings.n_seq_max * per_sequence * model.stride_bytes
    if needed <= quota:
        return None
    fits = quota // model.stride_bytes * model.block_tokens
    return (
        f"{settings.n_seq_max} sequences (n_seq_max) of {settings.max_context} tokens "
        f"(max_context) of model {model.name} take {_about(needed)}, and the budget is "
        f"{_about(quota)}: {fits} of {tokens} tokens fit. Raise max_memory (or the tenant's "
        "quota), or set max_context to what you need"
    )


def known_models(instance: str) -> Iterator[Needs]:
    """The models of which this user's instance has arenas in shared memory, be there a daemon or
    not. What cannot be read is left out."""
    seen = set()
    for name in list_segments(f"{segment_prefix(instance)}.dir-"):
        try:
            fd = os.open(f"{SHM_DIR}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                # Not a mapping: reading a hole through one would give it memory.
                head = os.pread(fd, layout.DIRECTORY_HEADER_BYTES, 0)
            finally:
                os.close(fd)
            header = layout.read_header(memoryview(head))
            if header is None:
                continue
            model = Needs(header.registration["name"], header.block_tokens, header.stride_bytes)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if model not in seen:
            seen.add(model)
            yield model


def _memory_of(instance: str) -> int:
    """Bytes of shared memory that the instance has."""
    found = 0
    for name in list_segments(f"{segment_prefix(instance)}."):
        try:
            found += os.stat(f"{SHM_DIR}/{name}").st_blocks * 512
        except FileNotFoundError:
            continue
    return found


def _about(n_bytes: int) -> str:
    """Rounded down to MiB, where that is not too little to be said."""
    return show_size(n_bytes >> 20 << 20 if n_bytes >> 20 else n_bytes)
