"""Clients whose process is stopped: by SIGSTOP, a terminal, a debugger or a frozen cgroup; or is
ending.

Such a client lives, and what it holds stays its own; but it holds it for nobody, perhaps for ever.
So reports say so, and the log does once. Nothing is freed here, and there are no heartbeats: the
kernel knows. Where /proc hides other processes (ProtectProc=invisible, another pid namespace) we do
not.
"""

import os
from collections.abc import Collection, Iterable, Mapping

from kvd import log
from kvd.core.events import SessionId
from kvd.core.sequences import Session

Stopped = Mapping[SessionId, bool | None]
"""Whether each session's process is stopped; None: /proc does not say."""

_FLAGS = 6
_PF_EXITING = 0x4
"""Of include/linux/sched.h; shown since ever, and as good as part of the interface."""


class StoppedClients:
    """Remembers what the log has been told."""

    def __init__(self) -> None:
        self._told: set[SessionId] = set()

    def look(self, sessions: Collection[Session]) -> dict[SessionId, bool | None]:
        """For each session whether its process is stopped; None: /proc does not say. Costs some
        10 us each."""
        found = {session.id: is_stopped(session.pid) for session in sessions}
        self.note(sessions, found)
        return found

    def note(self, sessions: Iterable[Session], found: Stopped) -> None:
        """Tell the log what has been found, of those that it has not been told of."""
        for session in sessions:
            stopped = bool(found.get(session.id))
            if stopped != (session.id in self._told):
                self._tell(session, stopped)
        self._told &= found.keys()

    def _tell(self, session: Session, stopped: bool) -> None:
        name = session.id.hex()[:8]
        if stopped:
            self._told.add(session.id)
            log.warning("client is stopped", session=name, pid=session.pid, client=session.client)
        else:
            self._told.remove(session.id)
            log.info("client goes on", session=name, pid=session.pid, client=session.client)


def is_stopped(pid: int) -> bool | None:
    """Whether the process is stopped; None if /proc does not show it."""
    fields = _stat(pid)
    return fields[0] in (b"T", b"t") if fields else None  # by a signal, by a tracer


def is_ending(pid: int) -> bool:
    """Whether the process has ended, or is about to: its descriptors are closed before it counts as
    dead. Where /proc does not show it, that looks the same."""
    fields = _stat(pid)
    return not fields or bool(int(fields[_FLAGS]) & _PF_EXITING)


def _stat(pid: int) -> list[bytes]:
    """The fields of proc_pid_stat(5) from the state on; none if /proc does not show it."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        line = os.read(fd, 512)
    except OSError:  # it has just ended
        return []
    finally:
        os.close(fd)
    # The name before the state is its owner's choice, brackets and spaces included.
    return line[line.rfind(b")") + 2 :].split()
