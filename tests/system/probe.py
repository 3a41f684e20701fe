"""Run by systemd in the daemon's place, behind the same fence: what can be done from there.

Prints one JSON object: for each thing that a daemon which was taken over might try, the name of the
error that it ends with, or "it worked".
"""

import ctypes
import errno
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWUSER = 0x10000000


def outcome(attempt: Callable[[], Any]) -> str:
    """The name of an error, or "it worked"."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "it worked"


def libc(name: str, *arguments: Any) -> None:
    """A call of the C library; raises its errno."""
    if getattr(_LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def write(path: str) -> None:
    """Open a file for writing, making it if it is not there."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


ATTEMPTS: dict[str, Callable[[], Any]] = {
    "write in its runtime directory": lambda: write(f"{os.environ['KVD_RUNTIME_DIR']}/probe"),
    "write in /dev/shm": lambda: write("/dev/shm/kvd-probe"),
    "write in /etc": lambda: write("/etc/kvd-probe"),
    "write its configuration": lambda: write("/etc/kvd/kvd.toml"),
    "write its program": lambda: write("/opt/kvd/bin/kvd"),
    "write in /var": lambda: write("/var/kvd-probe"),
    "write in /run": lambda: write("/run/probe"),
    "look into /root": lambda: os.listdir("/root"),
    "look into /home": lambda: os.listdir("/home"),
    "see the first process": lambda: os.stat("/proc/1"),
    "open a network socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "open a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "memory to write and execute": lambda: mmap.mmap(
        -1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    ),
    "mount": lambda: libc("mount", b"none", b"/run/lock", b"tmpfs", 0, None),
    "be traced": lambda: libc("ptrace", 0, 0, None, None),
    "become root": lambda: os.setuid(0),
    "a set-user-id file": lambda: os.chmod(f"{os.environ['KVD_RUNTIME_DIR']}/probe", 0o4755),
    "change a file's owner": lambda: os.chown("/dev/shm/kvd-probe", -1, os.getegid()),
    "a namespace": lambda: libc("unshare", _CLONE_NEWUSER),  # last: it changes who we are
}

if __name__ == "__main__":
    found = {name: outcome(attempt) for name, attempt in ATTEMPTS.items()}
    for left in ("/dev/shm/kvd-probe", f"{os.environ['KVD_RUNTIME_DIR']}/probe"):
        os.unlink(left)
    with open("/proc/self/status") as lines:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in lines)
    json.dump({"attempts": found, "status": status}, sys.stdout)
    sys.stdout.flush()
