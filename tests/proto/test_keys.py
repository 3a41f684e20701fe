"""Block keys: chained, salted, and the same everywhere."""

import hashlib
import os
import struct
import subprocess
import sys

import pytest

from kvd_proto.keys import arena_fingerprint, block_key, root_key

FINGERPRINT = bytes(range(32))
TOKENS = struct.pack("<3I", 1, 2, 3)


def test_keys_are_what_the_protocol_says() -> None:
    """The formulas once more, in the words of PROTOCOL.md."""

    def blake2b(message: bytes, size: int, person: bytes) -> bytes:
        return hashlib.blake2b(
            message, digest_size=size, person=person.ljust(16, b"\0")
        ).digest()  # fmt: skip

    arena = blake2b(FINGERPRINT + b"\x20\0\0\0" + b"llama-state", 32, b"kvd-arena-1")
    assert arena_fingerprint(FINGERPRINT, "llama-state", 32) == arena
    root = blake2b(b"\x04\0\0\0" + b"salt" + arena, 16, b"kvd-root-1")
    assert root_key(arena, b"salt") == root
    assert block_key(root, TOKENS) == blake2b(root + TOKENS, 16, b"kvd-block-1")


def test_a_key_stands_for_all_that_is_before_it() -> None:
    root = root_key(FINGERPRINT)
    chunks = [struct.pack("<2I", first, first + 1) for first in (10, 20, 30)]

    def chain(parts: list[bytes]) -> bytes:
        key = root
        for part in parts:
            key = block_key(key, part)
        return key

    keys = {chain(chunks[:n]) for n in range(4)}
    assert len(keys) == 4
    assert chain(list(reversed(chunks))) not in keys
    assert chain([b"".join(chunks)]) not in keys, "where blocks begin is part of the key"
    assert chain(chunks) == chain(list(chunks))


def test_whatever_goes_in_changes_the_key() -> None:
    roots = {
        root_key(arena_fingerprint(model, form, size), salt)
        for model in (FINGERPRINT, bytes(32))
        for form in ("llama-state", "array")
        for size in (32, 64)
        for salt in (b"", b"\0", b"a", b"ab")
    }
    assert len(roots) == 2 * 2 * 2 * 4
    assert {len(root) for root in roots} == {16}


def test_salt_and_fingerprint_cannot_be_shifted_into_each_other() -> None:
    moved = FINGERPRINT[1:] + b"x"
    assert root_key(FINGERPRINT, b"") != root_key(moved, FINGERPRINT[:1])


@pytest.mark.parametrize("fingerprint", [b"", bytes(31), bytes(33)])
def test_fingerprints_have_one_length(fingerprint: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        root_key(fingerprint)


def test_keys_do_not_depend_on_the_process() -> None:
    """A peer's keys did, through hash(), which is random in each process."""
    program = (
        "from kvd_proto.keys import *;"
        "root = root_key(arena_fingerprint(bytes(range(32)), 'llama-state', 32), b'salt');"
        "print(hash('x'), block_key(root, bytes(12)).hex())"
    )
    outputs = set()
    for seed in ("0", "1", "4242", "random"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True
        )
        outputs.add(tuple(run.stdout.decode().split()))
    assert len({hashed for hashed, _ in outputs}) > 1, "the seeds made no difference"
    root = root_key(arena_fingerprint(FINGERPRINT, "llama-state", 32), b"salt")
    assert {key for _, key in outputs} == {block_key(root, bytes(12)).hex()}
