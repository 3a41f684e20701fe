"""Token ids, as callers have them and as the protocol wants them."""

import numpy as np
import numpy.typing as npt

from kvd_client.errors import BadMessage
from kvd_proto.keys import TOKEN_BYTES

Tokens = npt.ArrayLike | bytes
"""Token ids: a flat sequence of integers, or packed little-endian u32."""


def pack_tokens(tokens: Tokens) -> bytes:
    """Token ids as the protocol wants them: little-endian u32. Bytes are taken as they are."""
    if isinstance(tokens, bytes | bytearray):
        return bytes(tokens)
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise BadMessage(f"tokens are a flat sequence of integers: {error}") from None
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BadMessage(
            "tokens are a flat sequence of integers", shape=str(array.shape), type=str(array.dtype)
        )
    if array.dtype.kind == "i" and int(array.min()) < 0:
        raise BadMessage("a token id is not negative", got=int(array.min()))
    if array.dtype.itemsize > TOKEN_BYTES and int(array.max()) >= 1 << 32:
        raise BadMessage("a token id is below 2**32", got=int(array.max()))
    return array.astype("<u4", copy=False).tobytes()
