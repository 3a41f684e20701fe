"""Blocks of an array sequence that were posted to the daemon, until they are read in the arena.

Covers when such an append is finished, waiting for that, and what becomes of its staging if the
sequence ends before. Posting, and moving to the arena: array_storage.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvd_client.errors import ServiceError
from kvd_client.operations import ClientState, Operation, Wait, call
from kvd_client.session import Commit
from kvd_client.staging import Staged, StagingArea
from kvd_proto.messages import Flush


@dataclass(slots=True, eq=False)
class Posted:
    """An append on its way: blocks number `first` to `end`-1, read in the staging until sealed.

    `lent` is that staging as the commit knows it: `kept`, so that the commit's end frees nothing.
    """

    commit: Commit
    first: int
    end: int
    lent: Staged

    def is_finished(self, completed: int) -> bool:
        """Whether its copies are sealed, or have failed."""
        commit = self.commit
        return commit.answered and commit.number <= completed

    def let_go(self, area: StagingArea) -> None:
        """The sequence reads it no more: its staging is free when the commit has no use for it."""
        commit, lent = self.commit, self.lent
        if commit.number:
            area.committed(Staged(lent.offsets, lent.sizes, lent.buffer), commit.number)
            return
        lent.kept = False  # from now on the reply, if it is still to come, does the rest
        if commit.answered:
            area.give_back(lent)


def wait_for_a_seal(client: ClientState, appends: Iterable[Posted]) -> Operation[bool]:
    """Wait for the oldest of these appends, of one session, that is on its way.

    False if there is none, or if it takes too long.
    """
    waiting = [
        posted.commit
        for posted in appends
        if posted.commit.error is None and not _is_finished(posted)
    ]
    if not waiting:
        return False
    # Those that are not answered yet have no number, and are the youngest.
    first = min(waiting, key=lambda commit: (not commit.answered, commit.number))
    timeout = client.timeout_for(first.n_bytes)
    try:
        if first.answered:
            yield from call(first.session, Flush(first.number), timeout, may_fail=True)
        else:
            yield Wait(first.session, first.is_answered, timeout, may_fail=True)
    except ServiceError:
        return False
    return True


def _is_finished(posted: Posted) -> bool:
    area = posted.commit.session.staging
    return area is None or posted.is_finished(area.completed)
