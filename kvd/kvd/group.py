"""The group whose members may connect, beside the daemon's own user and root (`socket_group`).

Covers finding the group, and opening the runtime directory and the two sockets to it.
Does not cover who owns them (instance.py), nor what a member may then do, which is what any client
may. Shared memory is never opened to anybody: clients get descriptors.

What is opened is made for the daemon's user alone, and only then given to the group and, last, made
accessible. So there is no moment at which another group, or the world, has access.
"""

import errno
import grp
import os
import stat

DIRECTORY_MODE = 0o750
SOCKET_MODE = 0o660
_NO_ID = (1 << 32) - 1
"""(gid_t)-1, which chown(2) takes for "leave it"."""


def group_id(group: str | int) -> int | None:
    """The gid of a group that is given by name or number; None for "". Raises ValueError."""
    if group == "":
        return None
    if type(group) is int or (isinstance(group, str) and group.isdecimal()):
        gid = int(group)
        if not 0 <= gid < _NO_ID:
            raise ValueError("there is no group with this number")
        return gid
    if not isinstance(group, str):
        raise ValueError("it is a group's name or number")
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ValueError("there is no group of this name") from None


def admit(path: str | os.PathLike[str], gid: int, mode: int) -> None:
    """Give what this user owns at `path` to the group, with `mode`. Nothing is done that is done
    already, so that it works where chown(2) is forbidden. PermissionError if this user may not give
    files to that group; then `path` is what it was."""
    found = os.stat(path, follow_symlinks=False)
    if found.st_gid != gid:
        try:
            os.chown(path, -1, gid, follow_symlinks=False)
        except PermissionError as error:
            reason = f"the daemon's user cannot open this to group {gid}, of which it is no member"
            raise PermissionError(errno.EPERM, reason, os.fspath(path)) from error
    if stat.S_IMODE(found.st_mode) != mode:
        os.chmod(path, mode)
