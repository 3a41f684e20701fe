"""A hint without the daemon: how many tokens of a prompt are cached, read from shared memory.

It takes no round trip, waits for nobody and holds nothing: by the time of an alloc more or less may
be there. What is read: kvd_proto.index. `Context.peek`: state.py.
"""

from kvd_client.packing import Tokens, pack_tokens
from kvd_proto.index import prefix_of
from kvd_proto.keys import TOKEN_BYTES, block_key


class PromptKeys:
    """The keys of a prompt's blocks, for who peeks at it more than once, or in several contexts.

    They are computed when a context first needs them, about a microsecond for each block, and
    remembered for each model. May be used from several threads, with several clients.
    """

    __slots__ = ("_chains", "_tokens")

    def __init__(self, tokens: Tokens) -> None:
        """Raises BadMessage for what is not a flat sequence of token ids."""
        self._tokens = pack_tokens(tokens)
        self._chains: dict[tuple[bytes, int], list[int]] = {}

    def prefixes(self, root_key: bytes, block_tokens: int) -> list[int]:
        """What stands in an index for the full blocks, in order. Not to be changed."""
        known = self._chains.get((root_key, block_tokens))
        if known is not None:
            return known
        tokens, size, key = self._tokens, block_tokens * TOKEN_BYTES, root_key
        chain = []
        for first in range(0, len(tokens) - size + 1, size):
            key = block_key(key, tokens[first : first + size])
            chain.append(prefix_of(key))
        self._chains[root_key, block_tokens] = chain
        return chain
