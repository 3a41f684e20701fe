"""Writes what a daemon with a large cache would leave when it is killed: arena and directory, real
segments with real records, without the hours of prompts that fill one."""

from collections.abc import Iterator
from pathlib import Path

import xxhash

from kvd.adoption import ARENA, DIRECTORY, boot_id
from kvd.arena import Segment
from kvd.core.events import CreateArena, WriteRecord
from kvd.directory import Directory
from kvd.instance import InstanceLock
from kvd_proto.geometry import Geometry, round_up
from kvd_proto.keys import arena_fingerprint, block_key, root_key
from kvd_proto.layout import directory_bytes_for
from kvd_proto.payload import make_format
from tests.shell.raw import FINGERPRINT, many_tokens

BLOCK_TOKENS = 32
LAYERS = [["f16", 384, "f16", 384]] * 30
"""SmolLM2-135M's: 738 KB a block, as llama.cpp stores it."""


def prompt(number: int, n_blocks: int) -> bytes:
    """The tokens of chain `number`."""
    return many_tokens(number << 16, n_blocks * BLOCK_TOKENS)


def leave_behind(
    runtime_dir: Path, instance: str, budget: int, n_blocks: int, blocks_a_chain: int
) -> CreateArena:
    """An arena with `n_blocks` sealed blocks, in chains, all of zeros: real memory, given and
    touched."""
    geometry = Geometry.from_wire(LAYERS)
    form = make_format("array", geometry, BLOCK_TOKENS)
    stride = round_up(form.max_bytes)
    slots = budget // stride
    fingerprint = arena_fingerprint(FINGERPRINT, "array", BLOCK_TOKENS)
    arena = CreateArena(
        1, "default", "large", fingerprint, "array", BLOCK_TOKENS, geometry.layers,
        form.max_bytes, stride, slots, directory_bytes_for(n_blocks, BLOCK_TOKENS), b"",
    )  # fmt: skip
    checksum = xxhash.xxh3_64_intdigest(bytes(form.max_bytes))
    with InstanceLock(runtime_dir, instance) as lock:
        directory = Directory.create(lock.segment_name(f"{DIRECTORY}large"), arena, boot_id())
        segment = Segment.create(lock.segment_name(f"{ARENA}large"), slots * stride)
        segment.back(0, n_blocks * stride)
        for record in _records(fingerprint, n_blocks, blocks_a_chain, checksum):
            directory.write(record)
        directory.close(unlink=False)
        segment.close(unlink=False)
    return arena


def _records(
    fingerprint: bytes, n_blocks: int, blocks_a_chain: int, checksum: int
) -> Iterator[WriteRecord]:
    n_bytes = 4 * BLOCK_TOKENS
    for slot in range(n_blocks):
        number, depth = divmod(slot, blocks_a_chain)
        if depth == 0:
            tokens, parent = prompt(number, blocks_a_chain), root_key(fingerprint)
        block = tokens[depth * n_bytes : (depth + 1) * n_bytes]
        key = block_key(parent, block)
        start = depth * BLOCK_TOKENS
        yield WriteRecord(1, slot, key, parent, start, block, slot + 1, checksum)
        parent = key
