"""Traces of requests: which blocks of their prompts are the same, and nothing of what is in them.

A file of lines, each a JSON object with `hash_ids`: a list with an id (a number or a text) for each
block of the prompt, in order. Other keys are left alone. That is the format of the traces published
with Mooncake, whose blocks are of 512 tokens; the last one of a prompt may have fewer there, and
counts as one. A block is its id and all ids before it, as K/V depends on all tokens before it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kvd_proto.messages import MAX_TOKENS

_NO_BLOCK = -1


class BadTrace(Exception):
    """The file, which line, and what is wrong with it."""


class Trace(NamedTuple):
    """Each request's blocks, numbered from 0 to `n_blocks` - 1."""

    requests: list[list[int]]
    n_blocks: int

    @property
    def references(self) -> list[int]:
        """All blocks of all requests, in order."""
        return [block for request in self.requests for block in request]


def read(path: Path) -> Trace:
    """Raises BadTrace."""
    try:
        with path.open("rb") as lines:
            return parse(lines, str(path))
    except OSError as error:
        raise BadTrace(f"{path} cannot be read: {error.strerror}") from None


def parse(lines: Iterable[bytes], name: str) -> Trace:
    """The trace in these lines; empty ones are left out. Raises BadTrace."""
    requests: list[list[int]] = []
    numbers: dict[tuple[int, int | str], int] = {}
    """Of each block: by that of the one before it, and its id."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            ids = _ids_of(line)
        except ValueError as error:
            raise BadTrace(f"{name}, line {number}: {error}") from None
        request: list[int] = []
        block = _NO_BLOCK
        for each in ids:
            block = numbers.setdefault((block, each), len(numbers))
            request.append(block)
        requests.append(request)
    if not numbers:
        raise BadTrace(f"{name}: there are no blocks in it")
    return Trace(requests, len(numbers))


def _ids_of(line: bytes) -> list[int | str]:
    """Raises ValueError."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    ids = found.get("hash_ids") if isinstance(found, dict) else None
    if not isinstance(ids, list) or not all(type(each) in (int, str) for each in ids):
        raise ValueError('it is not an object with "hash_ids", a list of numbers or texts')
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"it has {len(ids):,} blocks; {MAX_TOKENS:,} are the most")
    return ids
