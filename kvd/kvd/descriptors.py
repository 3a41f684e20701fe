"""Descriptors of this process: how many it may have, and how many it keeps in reserve.

libzmq accepts connections to the request socket by itself, and aborts the process when there is no
descriptor for one (4.3.5, ipc_listener.cpp). So the limit is raised as far as it goes, and what the
daemon itself opens for clients (lifelines, stagings, arenas) ends before the limit does.

Does not cover peers that open connections to the request socket until the limit is reached: only
that limit, and who may connect at all, stand against that.
"""

import os
import resource

from kvd import log
from kvd.settings import Settings
from kvd_proto import errors

RESERVED = 80
"""For connections that libzmq has yet to accept from clients with a session, and for files that are
open for a moment. A client connects at once, so it is one for each handshake under way."""
_OWN = 72
"""Half of it for those who ask for metrics."""
_OF_A_SESSION = 5
"""Its lifeline, its pidfd, its staging (mmap has one of its own), and its connection."""
_OF_A_MODEL = 6
"""One for the arena, one for its directory, one for its index, and mmap has its own of each."""


def raise_limit(settings: Settings) -> None:
    """Allow as many as the system does. The usual soft limit of 1,024 is for programs that use
    select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (
        RESERVED
        + _OWN
        + _OF_A_MODEL * settings.max_models * max(1, len(settings.tenants))
        + _OF_A_SESSION * settings.max_sessions
    )
    if hard < wanted:
        log.warning("few descriptors", allowed=hard, wanted=wanted)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def are_short() -> bool:
    """Whether only the reserve is left. Costs 1 us."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        lowest_free = os.dup(_ANY)
    except OSError:
        return True
    os.close(lowest_free)
    # All below it are in use.
    return lowest_free >= limit - RESERVED


def check() -> None:
    """Raise NoSpace of kvd_proto.errors if only the reserve is left."""
    if are_short():
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise errors.NoSpace("the daemon has too few descriptors left", limit=limit)


_ANY = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
