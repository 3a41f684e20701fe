"""Blocks and the prefix tree of an arena. What a block may cost and who holds it: budget.py.

A block's children are sorted by their token bytes, so that one bisection finds the exact child, and
the child that agrees longest with a continuation is a neighbour of where that would be inserted:
strings with the longest common prefix are adjacent in lexicographic order. Tokens are compared, not
keys: a match can never rest on a hash.

A block is FILLING until its bytes are in the arena, or ADOPTED until those that an earlier daemon
left there have been checked; then it is SEALED, and only then can it be matched.

                      root (no tokens)
                     /    \\
         [t0 .. t31]        [u0 .. u31]         full blocks: may have children
             /      \\
    [t32 .. t63]   [t32 .. t40]                 the shorter one is open-ended: never a parent
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvd.core.eviction import NOWHERE, Place
from kvd.core.siblings import RUN, Siblings, by_tokens
from kvd_proto.keys import TOKEN_BYTES

if TYPE_CHECKING:
    from kvd.core.arenas import Arena
    from kvd.core.commits import Commit, Source

FILLING, ADOPTED, SEALED, GONE = "filling", "adopted", "sealed", "gone"

_CHECKSUM_BYTES = 8

_STARTS: dict[int, int] = {}
"""Each position at which a block starts, once: there are as many as a prompt may have blocks, and
any number of blocks at each."""


class Block(Place):
    """A node of the tree: `tokens` from position `start`, stored in `slot` of its arena.

    `holds` counts the leases on this block, its children that are held themselves, and 1 while it
    is filling; `pins` counts the pins on it and its children that are kept by one themselves. A
    block with either is never evicted. The root of an arena is a block without parent.
    """

    __slots__ = (
        "arena",
        "family",
        "generation",
        "holds",
        "in_flight",
        "key_and_checksum",
        "last_use",
        "parent",
        "pins",
        "slot",
        "sources",
        "start",
        "state",
        "tokens",
    )

    def __init__(
        self, arena: "Arena", parent: "Block | None", tokens: bytes, key: bytes, slot: int
    ) -> None:
        self.older = self.younger = NOWHERE
        self.used = 0
        self.arena = arena
        self.parent = parent
        self.tokens = tokens
        self.key_and_checksum = key + bytes(_CHECKSUM_BYTES)
        """Together they take as much memory as the key would alone."""
        self.slot = slot
        start = parent.end if parent else 0
        self.start = _STARTS.setdefault(start, start)
        self.state = FILLING
        self.family: Block | list[Block] | Siblings | None = None
        """A list if there are several, `Siblings` if there are many: most have one, or none."""
        self.holds = 0
        self.pins = 0
        self.generation = 0
        self.last_use = 0
        """As its record says: the moment when a lease on this very block ended last, or it was
        sealed. What is above it was used no earlier."""
        self.in_flight = False
        """A job of the shell backs or writes the slot: it is not free before that has ended."""
        self.sources: dict[Commit, Source] | None = None
        """While filling: whose staged copies could fill it; the first one is copied. By commit, for
        a client may have thousands that wait for the same block, and die."""

    @property
    def key(self) -> bytes:
        return self.key_and_checksum[:-_CHECKSUM_BYTES]

    @property
    def checksum(self) -> int:
        """Of its bytes in the arena: once it is sealed, or adopted."""
        return int.from_bytes(self.key_and_checksum[-_CHECKSUM_BYTES:], "little")

    @checksum.setter
    def checksum(self, checksum: int) -> None:
        self.key_and_checksum = self.key + checksum.to_bytes(_CHECKSUM_BYTES, "little")

    @property
    def children(self) -> "Sequence[Block]":
        """Sorted by their tokens. To look at, until one comes or goes."""
        children = self.family
        if children is None:
            return ()
        return (children,) if isinstance(children, Block) else children

    @property
    def n_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    @property
    def end(self) -> int:
        """The position after the block's last token."""
        return self.start + len(self.tokens) // TOKEN_BYTES

    @property
    def first_source(self) -> "Source":
        """Whose staged copy fills it. Only while it is filling."""
        assert self.sources
        return next(iter(self.sources.values()))

    @property
    def is_kept(self) -> bool:
        """Whether anybody holds or pins it, or a block below it."""
        return bool(self.holds or self.pins)

    @property
    def is_superseded(self) -> bool:
        """Whether a longer sibling, sealed, has all of its tokens: never of a full block."""
        if len(self.tokens) == self.arena.token_bytes:
            return False
        assert self.parent is not None
        return self.parent.extension(self.tokens) is not None

    def child(self, tokens: bytes) -> "Block | None":
        """The child with exactly these tokens, filling or sealed."""
        children = self.family
        if children is None:
            return None
        if isinstance(children, Block):
            # The usual case within a prompt.
            return children if children.tokens == tokens else None
        if isinstance(children, Siblings):
            return children.find(tokens)
        index = bisect_left(children, tokens, key=by_tokens)
        if index < len(children) and children[index].tokens == tokens:
            return children[index]
        return None

    def add(self, block: "Block") -> None:
        """Insert a child; there is none with the same tokens."""
        children = self.family
        if children is None:
            self.family = block
            return
        if isinstance(children, Siblings):
            children.add(block)
            return
        if isinstance(children, Block):
            self.family = children = [children]
        children.insert(bisect_left(children, block.tokens, key=by_tokens), block)
        if len(children) == 2 * RUN:
            self.family = Siblings(children)

    def remove(self, block: "Block") -> None:
        """Take a child out."""
        children = self.family
        if children is block:
            self.family = None
            return
        if isinstance(children, Siblings):
            children.remove(block)
            if len(children.runs) == 1:
                self.family = children.runs[0]
            return
        assert isinstance(children, list), "the tree lost a child"
        index = bisect_left(children, block.tokens, key=by_tokens)
        assert children[index] is block, "the tree lost a child"
        del children[index]
        if len(children) == 1:
            self.family = children[0]

    def longest_agreeing(self, tokens: bytes, *, adopted: bool = False) -> "Agreement | None":
        """The sealed child (with `adopted` also one that is not checked yet) that agrees with
        `tokens` longest, and for how many tokens (> 0)."""
        best: Agreement | None = None
        for nearest in (self.before(tokens), self.since(tokens)):
            for candidate in nearest:
                agreed = common_tokens(candidate.tokens, tokens)
                if agreed <= (best.n_tokens if best else 0):
                    break  # further neighbours agree no longer
                state = candidate.state
                if state is SEALED or (adopted and state is ADOPTED):
                    best = Agreement(candidate, agreed)
                    break
        return best

    def prefixes(self, tokens: bytes) -> "list[Block]":
        """The children whose tokens are a proper prefix of `tokens`, longest first."""
        found: list[Block] = []
        below = tokens
        while below:
            candidate = next(self.before(below), None)
            if candidate is None:
                break
            agreed = common_tokens(candidate.tokens, tokens) * TOKEN_BYTES
            if agreed == len(candidate.tokens):
                found.append(candidate)
                below = candidate.tokens
            else:
                # What sorts between a prefix and `below` begins with that prefix, so no prefix is
                # longer than what the nearest smaller neighbour agrees with.
                below = tokens[:agreed]
                exact = self.child(below) if below else None
                if exact is not None:
                    found.append(exact)
        return found

    def extension(self, tokens: bytes) -> "Block | None":
        """A sealed child that begins with `tokens` and goes on."""
        for candidate in self.since(tokens):
            if not candidate.tokens.startswith(tokens):
                return None
            if candidate.state is SEALED and len(candidate.tokens) > len(tokens):
                return candidate
        return None

    def before(self, tokens: bytes) -> "Iterator[Block]":
        """The children that sort before these tokens, the nearest first."""
        children = self.children
        if isinstance(children, Siblings):
            return children.before(tokens)
        return reversed(children[: bisect_left(children, tokens, key=by_tokens)])

    def since(self, tokens: bytes) -> "Iterator[Block]":
        """The children that do not sort before these tokens, the nearest first."""
        children = self.children
        if isinstance(children, Siblings):
            return children.since(tokens)
        return iter(children[bisect_left(children, tokens, key=by_tokens) :])

    def below(self) -> "list[Block]":
        """Every block below this one, parents before children. A walk of the whole subtree."""
        found: list[Block] = []
        stack = list(self.children)
        while stack:
            block = stack.pop()
            found.append(block)
            stack.extend(block.children)
        return found


class Agreement(NamedTuple):
    """A block whose first `n_tokens` tokens agree."""

    block: Block
    n_tokens: int


class Match(NamedTuple):
    """The cached prefix of a prompt: full blocks, then perhaps one that agrees in part. `n_tokens`
    match, those before the first of these blocks included. If it `is_cut`, there may be more."""

    full: list[Block]
    partial: Block | None
    n_tokens: int
    is_cut: bool = False


NOTHING = Match([], None, 0)


def match(node: Block, tokens: bytes, block_bytes: int, most: int) -> Match:
    """Match as many tokens as sealed blocks hold, exact to the token, from `node` on, whose end is
    where the match has come to: a full block, or the root. Mutates nothing.

    `block_bytes` is the length of a full block's tokens. Work: one bisection for each full block,
    of which there are `most` at the most, and one more at the end.
    """
    full: list[Block] = []
    begin = position = node.end * TOKEN_BYTES
    end = min(len(tokens), begin + most * block_bytes)
    for position in range(begin, end, block_bytes):
        chunk = tokens[position : position + block_bytes]
        child = node.child(chunk)
        if child is None or child.state is not SEALED or len(chunk) < block_bytes:
            break
        full.append(child)
        node = child
    else:
        return Match(full, None, node.end, end < len(tokens))
    agreement = node.longest_agreeing(chunk) if node.family is not None else None
    if agreement is None:
        return Match(full, None, position // TOKEN_BYTES)
    return Match(full, agreement.block, position // TOKEN_BYTES + agreement.n_tokens)


def unchecked(node: Block, tokens: bytes, block_bytes: int, most: int) -> list[Block]:
    """The adopted blocks that a `match` of the same arguments could use once they are checked,
    parents first. Mutates nothing."""
    found: list[Block] = []
    begin = node.end * TOKEN_BYTES
    end = min(len(tokens), begin + most * block_bytes)
    for position in range(begin, end, block_bytes):
        chunk = tokens[position : position + block_bytes]
        child = node.child(chunk)
        if child is None or child.state is FILLING or len(chunk) < block_bytes:
            agreement = node.longest_agreeing(chunk, adopted=True)
            if agreement is not None and agreement.block.state is ADOPTED:
                found.append(agreement.block)
            break
        if child.state is ADOPTED:
            found.append(child)
        node = child
    return found


def common_tokens(a: bytes, b: bytes) -> int:
    """How many leading tokens two byte strings of little-endian u32 share."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter // TOKEN_BYTES
    # Little-endian integers of the two: the lowest set bit of the difference is in the first token
    # that differs.
    difference = int.from_bytes(a[:shorter], "little") ^ int.from_bytes(b[:shorter], "little")
    return ((difference & -difference).bit_length() - 1) // (8 * TOKEN_BYTES)
