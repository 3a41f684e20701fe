"""The request to pin a prefix, from what callers have: a model, tokens, seconds.

Pins are no session's, so there is nothing here to keep: client.py and aio.py ask, and that is all.
"""

import math

from kvd_client.errors import BadMessage
from kvd_client.state import Model, Tokens, pack_tokens
from kvd_proto.messages import MAX_TTL_MS, Pin


def pin_message(model: Model | bytes, tokens: Tokens, owner: str, ttl: float) -> Pin:
    """`model` is one that is registered, or its arena fingerprint (32 bytes; in hex it is in the
    status). Raises BadMessage for tokens or a `ttl` (seconds; 0: for ever) that cannot be."""
    if not 0 <= ttl <= MAX_TTL_MS / 1000:
        raise BadMessage(f"ttl is from 0 to {MAX_TTL_MS // 1000} seconds", got=str(ttl))
    fingerprint = model.arena_fingerprint if isinstance(model, Model) else model
    # Rounded up, so that a short time does not become for ever.
    return Pin(fingerprint, pack_tokens(tokens), owner, math.ceil(ttl * 1000))
