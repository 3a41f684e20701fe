"""Forget a prompt: drop its blocks, and all that goes on from it.

                root
                 |                 forget(s s d d d)                 drops
         [s s]  system prompt      | what goes on from the prompt:   [d q], [d r r], [d a]
         /    \\                    | then up, as far as nothing
     [d d]    [e e]                | else goes on from there:        [d d], and not [s s]
      / | \\
  [d q][d r][d a]
          |
        [r]

If the prompt is cached only in part, nobody's blocks go on from all of it, and only the second step
is taken: what others share of it stays. Blocks that are not checked yet are forgotten, too. What is
leased or pinned stays, and with it what is above.

What would go is collected first, parents before children, and then dropped from the end.
"""

from collections.abc import Generator
from itertools import islice, takewhile
from typing import NamedTuple

from kvd.core.arenas import Arena
from kvd.core.cache import Cache
from kvd.core.events import Effect
from kvd.core.holds import WALK_BLOCKS
from kvd.core.sequences import Session
from kvd.core.tasks import Steps, alive, find_tenant
from kvd.core.tree import GONE, Block
from kvd_proto.errors import UnknownModel
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import Forget, Forgotten

DROP_BLOCKS = 128
"""Dropped at once, in about a millisecond, before others get their turn."""


class End(NamedTuple):
    """Where a prompt ends in a tree: at its deepest full block, whatever state that is in, and with
    the tokens that follow it, of at most one block. If they are as many, no block has them all."""

    node: Block
    rest: bytes


def forget(cache: Cache, session: Session, message: Forget) -> Steps:
    """Drop what belongs to the prompt; see the module."""
    budget = cache.budget
    tenant = find_tenant(budget, session, message.tenant)
    arena = tenant.arena_of(message.model)
    if arena is None:
        raise UnknownModel(
            "no model of this fingerprint is registered for this tenant",
            tenant=tenant.name,
            fingerprint=message.model.hex(),
        )
    effects = yield
    end = yield from _find_end(arena, message.tokens)
    agreed = end.node.longest_agreeing(end.rest, adopted=True) if end.rest else None
    n_tokens = end.node.end + (agreed.n_tokens if agreed else 0)
    going_on = yield from _collect(end)
    n_dropped = n_kept = 0
    while going_on:
        effects = yield
        some = [going_on.pop() for _ in range(min(len(going_on), DROP_BLOCKS))]
        n_kept += sum(block.is_kept for block in some)
        n_dropped += budget.drop_some(arena, some, effects)
        del some  # what is gone keeps all that was above it in memory
    node = end.node
    was_counted = not end.rest and node.is_kept
    del end  # too: it is a long way up, and what was there should go step by step
    while True:
        effects = yield
        node = alive(node)
        path = _alone(node)
        if not path:
            break
        n_dropped += budget.drop_some(arena, path, effects)
        node = path[-1]
    n_kept += node.is_kept and not node.children and not was_counted
    return Forgotten(n_tokens, n_dropped, n_kept, n_dropped * arena.stride)


def _find_end(arena: Arena, tokens: bytes) -> Generator[None, list[Effect], End]:
    node = arena.root
    block_bytes = arena.block_tokens * TOKEN_BYTES
    while True:
        begin = node.end * TOKEN_BYTES
        for at in range(begin, begin + WALK_BLOCKS * block_bytes, block_bytes):
            chunk = tokens[at : at + block_bytes]
            child = node.child(chunk) if len(chunk) == block_bytes else None
            if child is None or child.state is GONE:  # with its whole arena
                return End(node, chunk)
            node = child
        yield
        node = alive(node)


def _collect(end: End) -> Generator[None, list[Effect], list[Block]]:
    """What goes on from the prompt's end, or is a part of that: parents before children."""
    node, rest = end
    if rest:
        stack = node.prefixes(rest)
        stack += yield from _beginning_with(node, rest)
    else:
        stack = [node]
    found: list[Block] = []
    while stack:
        for _ in range(min(len(stack), WALK_BLOCKS)):
            block = stack.pop()
            found.append(block)
            stack.extend(block.children)
        yield
    return found


def _beginning_with(node: Block, rest: bytes) -> Generator[None, list[Effect], list[Block]]:
    """The children that begin with these tokens: there may be any number."""
    found: list[Block] = []
    after = rest
    while True:
        siblings = takewhile(lambda each: each.tokens.startswith(rest), node.since(after))
        some = list(islice(siblings, WALK_BLOCKS))
        found += some
        if len(some) < WALK_BLOCKS:
            return found
        yield
        after = some[-1].tokens + b"\0"  # what sorts next


def _alone(node: Block) -> list[Block]:
    """From this block up those from which nothing else goes on, and that nobody keeps: DROP_BLOCKS
    at the most."""
    path: list[Block] = []
    while (
        (parent := node.parent) is not None
        and len(node.children) == bool(path)
        and not node.is_kept
        and len(path) < DROP_BLOCKS
    ):
        path.append(node)
        node = parent
    return path
