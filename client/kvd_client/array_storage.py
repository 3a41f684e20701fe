"""The blocks of one sequence of arrays, and their way into the arena.

    own memory ──commit──► posted ──sealed, and nobody looks──► arena
    (staging, or the process's when there is none)

A block that is posted is read where it lies until the daemon has sealed its copy; then it moves to
the arena, and its staging is free. Nothing here fails for want of the daemon or of room: storing
stops (`error` says why), and the sequence goes on in memory of its own.

Appends on their way: array_posted.py. Rows, layers and what an engine calls: array_sequence.py.
"""

import gc
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable

from kvd_client import context as ops
from kvd_client.appending import not_stored, post_append, wait_for_room
from kvd_client.array_block import Block
from kvd_client.array_model import ArrayModel
from kvd_client.array_posted import Posted, wait_for_a_seal
from kvd_client.errors import KvdError, ResourceError, ServiceError, StagingFull, ViewsAlive
from kvd_client.operations import Operation, call
from kvd_client.session import Commit, Session
from kvd_client.staging import Staged
from kvd_client.state import SequenceState
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import MAX_APPEND_BLOCKS, Flush

logger = logging.getLogger("kvd_client")


class Storage:
    """Blocks number 0 .. sealed-1 are in the arena, up to committed-1 posted, the others open.

    The operations are run by the client (`Client.run`); one thread at a time.
    """

    def __init__(
        self, model: ArrayModel, sequence: SequenceState, peers: "list[Storage]", tokens: bytes
    ) -> None:
        """`peers` are all storages that share the staging; `tokens` those that were matched."""
        self._model = model
        self._sequence = sequence
        self._client = sequence.context.client
        self._peers = peers
        self._tokens = bytearray(tokens)
        self._posted: deque[Posted] = deque()
        self._block_token_bytes = model.block_tokens * TOKEN_BYTES
        self.blocks: list[Block] = []
        self.sealed = 0
        self.committed = 0
        self.error: KvdError | None = not_stored(sequence)
        # The daemon gives our leases back when the lifeline ends, and so it must not end before we
        # stop reading: a session that we give up because the daemon hangs closes only its own copy.
        self._let_go: Callable[[], object] = lambda: None
        if sequence.session is not None and sequence.shared:
            lifeline = os.dup(sequence.session.lifeline_fd)
            self._let_go = weakref.finalize(self, os.close, lifeline)
        peers.append(self)
        self._client.shown.add(self)

    def take_match(self) -> Operation[None]:
        """Begin with the blocks that alloc matched. Of one that goes on otherwise, the rows that
        agree are copied into an open block of our own."""
        sequence = self._sequence
        n_full = sequence.full_tokens // self._model.block_tokens
        self.blocks = [Block(self._model, self._sealed_memory(index)) for index in range(n_full)]
        self.sealed = self.committed = n_full
        n_rows = sequence.matched_tokens - sequence.full_tokens
        if not n_rows:
            return
        sibling = Block(self._model, self._sealed_memory(n_full))
        yield from self.grow(1)
        for layer in range(len(self._model.layers)):
            own, found = self.blocks[-1].rows(layer), sibling.show(layer)
            own.k[:n_rows] = found.k[:n_rows]
            own.v[:n_rows] = found.v[:n_rows]
        sibling.close()

    def add_tokens(self, tokens: bytes) -> None:
        """The sequence goes on with `tokens`; what `commit` counts."""
        self._tokens += tokens

    def grow(self, n_blocks: int) -> Operation[None]:
        """Add open blocks. Waits for room in the staging while blocks are being sealed."""
        yield from self.collect()
        patient = True
        for _ in range(n_blocks):
            staged = yield from self._take(patient)
            if staged is None:
                patient = False
                memory = memoryview(bytearray(self._model.block_bytes))
            else:
                memory = staged.block(0)
            self.blocks.append(Block(self._model, memory, staged))

    def commit(self, n_tokens: int) -> Operation[Commit | None]:
        """Post all blocks that are not posted, up to position `n_tokens`; the last may be shorter.

        Waits only when a block has no staging yet. None if there was nothing to post, or storing
        has stopped.
        """
        end = -(-n_tokens // self._model.block_tokens)
        for index in range(self.committed, end):
            block = self.blocks[index]
            if block.staged is None and self.error is None:
                self._post(index, n_tokens)  # so that what comes before it can make room
                staged = yield from self._take(patient=True)
                if staged is None:
                    self._stop(StagingFull("the staging has no room, and got none in time"))
                    break
                memory = staged.block(0)
                memory[:] = block.memory
                # Arrays that users hold keep the memory before, which nobody will write again.
                block.move(memory, staged)
        return self._post(end, n_tokens)

    def seal_tail(self, n_tokens: int) -> Operation[Commit | None]:
        """Post the open block as a shorter one, if it has tokens that were not matched."""
        rest = n_tokens % self._model.block_tokens
        if not rest or n_tokens == self._sequence.matched_tokens or self.error is not None:
            return None
        self.blocks[n_tokens // self._model.block_tokens].clear_rows(rest)
        return (yield from self.commit(n_tokens))

    def collect(self) -> Operation[bool]:
        """Move blocks that are sealed by now into the arena; returns whether some were.

        Never waits for a copy. Blocks at which somebody still looks stay where they are.
        """
        session = self._sequence.session
        if not self._posted or session is None:
            return False
        session.receive()
        session.receive_lifeline()
        if session.lost is not None:
            self._stop(session.lost)
            return False
        assert session.staging is not None
        ready = self._ready(session.staging.completed)
        if not ready:
            return False
        try:
            reply = yield from ops.refresh(self._sequence, self.sealed)
            for posted in ready:
                if reply.sealed_tokens < posted.end * self._model.block_tokens:
                    # It was accepted and failed later. A flush brings the reason.
                    yield from call(session, Flush(posted.commit.number), self._client.timeout)
                    self._stop(posted.commit.error or ResourceError("a block was not stored"))
                    break
                for index in range(posted.first, posted.end):
                    block = self.blocks[index]
                    staged = block.staged
                    assert staged is not None
                    block.move(self._sealed_memory(index))
                    session.staging.give_back(staged)
                self._posted.popleft()
                self.sealed = posted.end
        except KvdError as error:
            self._stop(error)
            return False
        return True

    def flush(self) -> Operation[None]:
        """Wait until what is posted is sealed, at most the client's timeout without progress."""
        yield from self.collect()
        while self.sealed < self.committed:
            waited = yield from wait_for_a_seal(self._client, self._posted)
            # Also when there was nothing to wait for: it may have been sealed meanwhile.
            moved = yield from self.collect()
            if not waited and not moved:
                return

    def hide(self) -> None:
        """Raises ViewsAlive, and changes nothing, while somebody looks at a block."""
        if not self._is_hidden(0, len(self.blocks)):
            gc.collect()  # perhaps they live only in a cycle, of an exception's frames for instance
            if not self._is_hidden(0, len(self.blocks)):
                raise ViewsAlive(
                    "arrays over this sequence's blocks are still alive: drop them first",
                    seq_id=self._sequence.seq_id,
                )

    def close(self) -> None:
        """Let go of all blocks; call `hide` first. What is posted is stored nevertheless."""
        session = self._sequence.session
        if session is not None and session.lost is None and session.staging is not None:
            for posted in self._posted:
                posted.let_go(session.staging)
            for block in self.blocks[self.committed :]:
                if block.staged is not None:
                    session.staging.give_back(block.staged)
        for block in self.blocks:
            block.close()
        self._peers.remove(self)
        self._client.shown.discard(self)
        self._let_go()

    def _ready(self, completed: int) -> list[Posted]:
        """The leading posted appends that are finished, and at whose blocks nobody looks."""
        ready: list[Posted] = []
        for posted in self._posted:
            if posted.commit.error is not None:
                self._stop(posted.commit.error)
                break
            if not posted.is_finished(completed) or not self._is_hidden(posted.first, posted.end):
                break
            ready.append(posted)
        return ready

    def _sealed_memory(self, index: int) -> memoryview:
        """The bytes of a block that is leased. They keep the mapping when the session is lost."""
        return self._sequence.payload_of(index).data

    def _is_hidden(self, first: int, end: int) -> bool:
        """Whether nobody looks at these blocks."""
        return all(block.hide() for block in self.blocks[first:end])

    def _post(self, end: int, n_tokens: int) -> Commit | None:
        """Post blocks committed .. end-1, which are all in the staging, in as many appends as it
        takes; the last one."""
        commit: Commit | None = None
        while self.committed < end:
            commit = self._post_one(min(end, self.committed + MAX_APPEND_BLOCKS), n_tokens)
            if commit is None:
                break
        return commit

    def _post_one(self, end: int, n_tokens: int) -> Commit | None:
        blocks = [block.staged for block in self.blocks[self.committed : end]]
        staged = [each for each in blocks if each is not None]
        if not staged or self.error is not None:
            return None
        assert len(staged) == len(blocks)
        size = self._block_token_bytes
        tokens = self._tokens[self.committed * size : min(end * size, n_tokens * TOKEN_BYTES)]
        lent = Staged(
            [each.offsets[0] for each in staged],
            [each.sizes[0] for each in staged],
            staged[0].buffer,
            kept=True,
        )
        try:
            # With the start, because an append that was refused moves the sequence back unseen.
            start = self.committed * self._model.block_tokens
            commit = post_append(self._sequence, bytes(tokens), lent, start)
        except KvdError as error:
            refusals = [each.commit.error for each in self._posted if each.commit.error]
            self._stop(refusals[0] if refusals else error)
            return None
        self._posted.append(Posted(commit, self.committed, end, lent))
        self.committed = end
        return commit

    def _take(self, patient: bool) -> Operation[Staged | None]:
        """Room for one block in the staging. None if there is none, or, if `patient`, if nothing
        that is on its way makes room in time."""
        deadline = time.monotonic() + self._client.timeout
        while self.error is None and self._sequence.shared:
            session = self._sequence.session
            if session is None or session.staging is None:
                return None
            try:
                staged = session.staging.take([self._model.block_bytes])
            except StagingFull:
                return None  # not even one block fits
            if staged is not None:
                return staged
            peers = [peer for peer in self._peers if peer._sequence.session is session]
            if (yield from _collect_all(peers)):
                continue
            if not patient:
                return None
            on_their_way = [posted for peer in peers for posted in peer._posted]
            waited = yield from wait_for_a_seal(self._client, on_their_way)
            # Also when there was nothing to wait for: it may have been sealed meanwhile.
            moved = yield from _collect_all(peers)
            if (
                not moved
                and not waited
                and not (yield from self._wait_for_others(session, deadline))
            ):
                return None
        return None

    def _wait_for_others(self, session: Session, deadline: float) -> Operation[bool]:
        """Wait for an append of a sequence that has ended, or of none of ours. False if there is
        none on its way, or if it takes too long."""
        area, left = session.staging, deadline - time.monotonic()
        if area is None or left <= 0 or not (session.in_flight or area.has_commits()):
            return False
        try:
            yield from wait_for_room(session, area, left)
        except ServiceError:
            return False
        return True

    def _stop(self, error: KvdError) -> None:
        """Store no more of this sequence."""
        if self.error is None:
            self.error = error
            logger.info("sequence %d is not stored any further: %s", self._sequence.seq_id, error)


def _collect_all(storages: list[Storage]) -> Operation[bool]:
    """`collect` of each; whether any block was moved."""
    moved = False
    for storage in storages:
        moved |= yield from storage.collect()
    return moved
