"""Storing what a sequence has in its llama.cpp context: full blocks as they come, at last the tail.

Covers export into the staging, the append, and what to do when one of them fails. When something is
stored is for the owner of the sequence to say: worker.py, attached/sharing.py.
"""

import logging
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvd_client.client import Context, Sequence
from kvd_client.context import Commit
from kvd_client.errors import KvdError, StagingFull
from kvd_client.integrations.llama.errors import NotExportable
from kvd_client.state import ContextState
from kvd_proto.messages import MAX_APPEND_BLOCKS

logger = logging.getLogger("kvd_client")

Tokens = npt.NDArray[np.int32]


class Exporter(Protocol):
    """What gives blocks out: a LlamaEngine, or a BlockMover."""

    def export_block(self, seq: int, start: int, n: int, dst_address: int, capacity: int) -> int:
        """See BlockMover.export_block."""


def blocks_at_once(context: Context | ContextState) -> int:
    """Blocks of one append: two of them fit the staging, so that one is filled while the daemon
    copies the other. At least 1."""
    room = context.client.staging_room // 2
    return max(1, min(room // context.payload.max_bytes, MAX_APPEND_BLOCKS))


class Storer:
    """Stores one leased sequence, which is `seq_id` in the exporter's context.

    `problem` says why nothing more of it is stored; `not_exportable`, if it was for want of the
    context, the same.
    """

    def __init__(self, leased: Sequence, exporter: Exporter, seq_id: int) -> None:
        self.leased = leased
        self.problem = ""
        self.posted_tokens = 0
        """Up to here it is in the cache, or on its way, by this hand."""
        self.not_exportable: str | None = None
        self._exporter = exporter
        self._seq_id = seq_id
        self._block_tokens = leased.context.model.block_tokens
        self._commit: Commit | None = None

    def store(
        self,
        tokens: Tokens,
        *,
        tail: bool = False,
        wait: float | None = None,
        most: int | None = None,
    ) -> int:
        """Export the full blocks that are new in `tokens`, and with `tail` the open one; `most`
        blocks at most (None: all). Returns how many were exported.

        `tokens` (int32 [n]) are those whose K/V the context has at positions 0 .. n-1; up to
        `leased.full_tokens` they are those that were matched or stored before. Waits up to `wait`
        seconds (None: the client's timeout) if the staging is full of earlier blocks, and leaves
        the rest for the next call then. Does nothing without a daemon, or if the sequence was
        opened with `store` False. After a commit that failed, nothing more is stored.
        """
        leased = self.leased
        if self._commit is not None and self._commit.error is not None:
            self._give_up(self._commit.error)
        exported = 0
        if self.problem or not leased.shared or not leased.stores:
            return exported
        block_tokens = self._block_tokens
        try:
            while leased.shared and (most is None or exported < most):
                new = len(tokens) - leased.full_tokens
                if new < block_tokens and not (tail and new > 0):
                    break
                n_blocks = blocks_at_once(leased.context)
                if most is not None:
                    n_blocks = min(n_blocks, most - exported)
                batch = min(new, n_blocks * block_tokens)
                if new >= block_tokens:
                    batch -= batch % block_tokens
                self._export(tokens, leased.full_tokens, batch, wait)
                exported += -(-batch // block_tokens)
                if batch < block_tokens:
                    break
        except StagingFull as error:
            context = leased.context
            if context.payload.max_bytes > context.client.staging_room:
                self._give_up(error)
            logger.debug("stored later, if at all: %s", error)
        except (KvdError, NotExportable) as error:
            if isinstance(error, NotExportable):
                self.not_exportable = str(error)
            self._give_up(error)
        return exported

    def _give_up(self, error: Exception) -> None:
        if not self.problem:
            self.problem = str(error)
            logger.warning("a sequence is not stored beyond %d: %s", self.leased.full_tokens, error)

    def _export(self, tokens: Tokens, start: int, n_tokens: int, wait: float | None) -> None:
        leased, block_tokens = self.leased, self._block_tokens
        staged = leased.stage(n_tokens, wait=wait)
        try:
            base = np.frombuffer(staged.buffer, np.uint8).ctypes.data
            for index, (offset, size) in enumerate(zip(staged.offsets, staged.sizes, strict=True)):
                first = start + index * block_tokens
                count = min(block_tokens, start + n_tokens - first)
                self._exporter.export_block(self._seq_id, first, count, base + offset, size)
        except BaseException:
            leased.unstage(staged)
            raise
        self._commit = leased.post_append(tokens[start : start + n_tokens], staged, start=start)
        self.posted_tokens = start + n_tokens
