"""Storing blocks: what an append adds to the tree, who waits for whose copy, sealing and failing.

    append ──► new blocks are FILLING ──Back──► reply ──Copy──► each is sealed, or fails
                  │
                  └─ a block that another commit fills already is joined: this staged copy stands by

A filling block lists its sources, first come first. The first is copied; when that copy is not
accepted the next takes over; when none is left, the block goes, with everything below it. No
staging is read before its append was answered: if there is no memory, the append never was, and its
staging is the client's again. Who drives this: storing.py.
"""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from kvd.core.budget import Budget
from kvd.core.events import NO_SLOT, CopyItem, Effect, WriteRecord
from kvd.core.reasons import Reason
from kvd.core.sequences import Sequence, Session
from kvd.core.tree import FILLING, GONE, SEALED, Block
from kvd_proto.errors import KvdError
from kvd_proto.happenings import Kind
from kvd_proto.keys import block_key


@dataclass(slots=True, eq=False)
class Commit:
    """One append of a session, until all of its blocks are sealed or have failed."""

    session: Session
    number: int
    pending: set[Block] = field(default_factory=set)
    failure: KvdError | None = None
    answered: bool = False
    """Its reply has been sent: it may be copied, and reported as finished, from then on."""

    @property
    def unfinished(self) -> list[Block]:
        """The pending blocks, parents first."""
        return sorted(self.pending, key=attrgetter("start"))


class Source(NamedTuple):
    """A staged copy of a filling block: in whose staging, where, and for which commit."""

    commit: Commit
    offset: int


class Plan(NamedTuple):
    """What an append would do: blocks that exist already, in order, and the chunks to store."""

    existing: list[Block]
    missing: list[bytes]


class Begun(NamedTuple):
    """An append in the tree: the blocks to fill, and how many were there or are filled by
    another."""

    new: list[Block]
    present: int
    joined: int


def plan_append(tip: Block, tokens: bytes, block_bytes: int) -> Plan:
    """Split `tokens` after `tip` into blocks and find those that exist. Mutates nothing."""
    chunks = [tokens[at : at + block_bytes] for at in range(0, len(tokens), block_bytes)]
    existing: list[Block] = []
    node = tip
    for chunk in chunks:
        child = node.child(chunk)
        if child is None and len(chunk) < block_bytes:
            # An open tail is there already if a sealed block goes on from it.
            child = node.extension(chunk)
        if child is None:
            break
        existing.append(child)
        node = child
    return Plan(existing, chunks[len(existing) :])


def begin(
    plan: Plan,
    sequence: Sequence,
    slots: list[int],
    offsets: list[int],
    commit: Commit,
    budget: Budget,
) -> Begun:
    """Put the missing blocks into the tree as FILLING and join those that others fill.

    `slots` are set aside, one for each missing block; `offsets` are the staged copies of all blocks
    of the plan. The new blocks hold themselves and, through that, their ancestors.
    """
    arena = sequence.context.arena
    joined = 0
    for block, offset in zip(plan.existing, offsets, strict=False):
        if block.state is FILLING:
            assert block.sources is not None
            block.sources[commit] = Source(commit, offset)
            commit.pending.add(block)
            joined += 1
    parent = plan.existing[-1] if plan.existing else sequence.tip
    new_offsets = offsets[len(plan.existing) :]
    new: list[Block] = []
    for chunk, slot, offset in zip(plan.missing, slots, new_offsets, strict=True):
        block = Block(arena, parent, chunk, block_key(parent.key, chunk), slot)
        block.holds = 1
        block.sources = {commit: Source(commit, offset)}
        arena.blocks[slot] = block
        parent.add(block)
        budget.hold(parent)
        commit.pending.add(block)
        new.append(block)
        parent = block
    if new:
        n_tokens = parent.end - new[0].start
        arena.filling_blocks += len(new)
        arena.filling_tokens += n_tokens
        commit.session.filling.add(len(new), n_tokens, arena.stride)
    return Begun(new, len(plan.existing) - joined, joined)


def copy_item(block: Block) -> CopyItem:
    """The copy of the block's first source; until it has ended, the slot is the shell's."""
    block.in_flight = True
    source = block.first_source
    source.commit.session.in_flight += 1
    n_bytes = block.arena.format.size(block.n_tokens)
    return CopyItem(block.slot, source.offset, n_bytes, block.start, block.n_tokens)


def seal(
    block: Block, checksum: int, generation: int, budget: Budget, effects: list[Effect]
) -> None:
    """The block's bytes are in the arena: everybody may see it."""
    assert block.parent is not None
    block.state = SEALED
    block.checksum = checksum
    block.generation = block.last_use = generation
    block.arena.filling -= 1
    block.arena.active += 1
    _fills_no_longer(block)
    if len(block.tokens) < block.arena.token_bytes:
        block.arena.active_lacks += block.arena.lack_of(block)
    _count(block, -1)
    effects.append(
        WriteRecord(
            block.arena.number,
            block.slot,
            block.key,
            block.parent.key,
            block.start,
            block.tokens,
            generation,
            checksum,
        )
    )
    if budget.journal.is_followed:
        session = block.first_source.commit.session
        values = (session.client, session.pid, block.start, block.n_tokens, block.slot)
        budget.journal.note_frequent(Kind.SEAL, session.tenant.name, block.arena.name, *values)
    for commit in block.sources or ():
        commit.pending.discard(block)
    block.sources = None
    supersede(block, budget, effects)
    budget.unhold(block, effects)


def drop_source(block: Block, commit: Commit) -> None:
    """The block is this commit's to fill no longer."""
    assert block.sources is not None
    was_first = block.first_source.commit is commit
    if was_first:
        _count(block, -1)
    del block.sources[commit]
    if was_first and block.sources:
        _count(block, 1)
    commit.pending.discard(block)


def withdraw(commit: Commit) -> None:
    """A dead session's staged copies stand by no longer; those being copied are still good."""
    for block in list(commit.pending):
        if block.first_source.commit is not commit:
            drop_source(block, commit)


def remove_failed(
    block: Block, error: KvdError, reason: Reason, budget: Budget, effects: list[Effect]
) -> None:
    """Take a block that no source can fill out of the tree, with everything below it.

    A slot is free at once, or when the job that the shell has for it has ended (`in_flight`).
    Sequences that rest on a removed block must be moved off first. Those that were sealed, or left
    by an earlier daemon, are dropped for this reason.
    """
    for failed in reversed([block, *block.below()]):
        if failed.state is not FILLING:
            # Its copy was sealed while its parent still waited for one, or both were adopted. No
            # sequence leases it any more.
            budget.drop_unleased(failed, reason, effects)
            continue
        if failed.sources:
            _count(failed, -1)
            for commit in failed.sources:
                commit.pending.discard(failed)
                commit.failure = error
        failed.sources = None
        if not failed.in_flight and failed.slot != NO_SLOT:
            budget.give_back(failed.arena, failed.slot)
        _detach(failed, budget, effects)


def sequences_below(block: Block, sequences: list[Sequence]) -> list[Sequence]:
    """Those of `sequences` that lease `block` or a block below it. A walk of what is below, not of
    what each sequence leases, which may be much more."""
    below = {block, *block.below()}
    return [sequence for sequence in sequences if sequence.leased in below]


def _detach(block: Block, budget: Budget, effects: list[Effect]) -> None:
    """Out of the tree; its hold on the parent ends."""
    parent = block.parent
    assert parent is not None
    parent.remove(block)
    block.state = GONE
    _fills_no_longer(block)
    budget.unhold(parent, effects)


def _fills_no_longer(block: Block) -> None:
    block.arena.filling_blocks -= 1
    block.arena.filling_tokens -= block.n_tokens


def _count(block: Block, blocks: int) -> None:
    """A filling block counts for the session whose staged copy is its first source: one more (1),
    or one less (-1)."""
    session = block.first_source.commit.session
    session.filling.add(blocks, blocks * block.n_tokens, block.arena.stride)


def supersede(block: Block, budget: Budget, effects: list[Effect]) -> None:
    """A longer block replaces shorter siblings that are its prefix: now, or when they are let go
    (`Budget.unhold`)."""
    parent = block.parent
    assert parent is not None
    for shorter in parent.prefixes(block.tokens):
        if shorter.state is not FILLING and not shorter.is_kept:
            budget.drop(shorter, Reason.SUPERSEDED, effects)
