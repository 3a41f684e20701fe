"""No daemon answers: what to do. It is down, or it hangs, or it is another's; each is something
else to do, so each is told apart.
"""

from contextlib import suppress
from pathlib import Path

from kvd_client.errors import DeadlineExceeded, KvdError

_LOCK = "kvd.lock"
"""In the runtime directory: the daemon's process id."""


def what_to_do(error: KvdError) -> str:
    """Advice for Unavailable and DeadlineExceeded."""
    if isinstance(error, DeadlineExceeded):
        path = error.details.get("path")
        return _hangs(Path(str(path)), error.details.get("pid")) if path else _LATE
    if "Permission denied" in error.message:
        return (
            "only the daemon's own user, root, and members of its socket_group may talk to it: run "
            "kvctl as one of them"
        )
    died = "Connection refused" in error.message
    return (
        ("it is down, and a socket is left of one that has died: " if died else "it is down: ")
        + "start one with `kvd serve`, or say where it is with --runtime-dir (KVD_RUNTIME_DIR) or "
        "--instance (KVD_INSTANCE)"
    )


_LATE = "it hangs, or is busy: look at its log, or wait longer with --timeout"


def _hangs(runtime_dir: Path, pid: object) -> str:
    """It takes who connects, or used to, and says nothing."""
    if not pid:
        with suppress(OSError):
            pid = (runtime_dir / _LOCK).read_text().strip()
    if not pid:
        return "it hangs, or is busy: look at its log"
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "Tt":
            return f"process {pid} is stopped: it goes on with `kill -CONT {pid}`"
    return f"process {pid} hangs, or is busy: look at its log, or restart it"
