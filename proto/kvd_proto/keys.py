"""Block keys: a chained 128-bit blake2b that names a block by all that determines its K/V.

    root  = blake2b-128(person "kvd-root-1",  len32(salt) || salt || fingerprint)
    key   = blake2b-128(person "kvd-block-1", parent_key || tokens)

The parent's key stands for everything before the block, so equal keys mean equal prefixes. Nothing
here depends on the process (no `hash()`): keys are equal across processes, machines and restarts.
"""

import struct
from hashlib import blake2b

KEY_BYTES = 16
FINGERPRINT_BYTES = 32
TOKEN_BYTES = 4
"""A token id is a little-endian unsigned 32-bit integer, on the wire, in keys and in records."""


def root_key(fingerprint: bytes, salt: bytes = b"") -> bytes:
    """The parent of a chain's first block.

    `fingerprint` is the 32-byte identity of the model, its payload format and its block size;
    `salt` is the tenant's, empty for none. Returns 16 bytes.
    """
    if len(fingerprint) != FINGERPRINT_BYTES:
        raise ValueError(f"a fingerprint has {FINGERPRINT_BYTES} bytes, not {len(fingerprint)}")
    message = struct.pack("<I", len(salt)) + salt + fingerprint
    return blake2b(message, digest_size=KEY_BYTES, person=b"kvd-root-1").digest()


def block_key(parent: bytes, tokens: bytes) -> bytes:
    """The key of the block that holds `tokens` (little-endian u32 each) after `parent`."""
    return blake2b(parent + tokens, digest_size=KEY_BYTES, person=b"kvd-block-1").digest()


def arena_fingerprint(model_fingerprint: bytes, payload_format: str, block_tokens: int) -> bytes:
    """Fold what decides a payload's shape into the model's fingerprint. Returns 32 bytes."""
    message = model_fingerprint + struct.pack("<I", block_tokens) + payload_format.encode()
    return blake2b(message, digest_size=FINGERPRINT_BYTES, person=b"kvd-arena-1").digest()
