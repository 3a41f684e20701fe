"""Where a daemon and its clients meet: the names of the sockets and the directories to look in."""

import os
from collections.abc import Mapping
from pathlib import Path

LIFELINE_SOCKET = "lifeline.sock"
REQUESTS_SOCKET = "requests.sock"
DEFAULT_INSTANCE = "default"


def runtime_dirs(
    instance: str = DEFAULT_INSTANCE, environ: Mapping[str, str] = os.environ
) -> list[Path]:
    """Directories in which `instance` may live, the preferred one first.

    $KVD_RUNTIME_DIR alone if it is set; else `kvd` (for another instance than the default one
    `kvd-<instance>`) in /run, in $XDG_RUNTIME_DIR, and in /tmp with the user's number.
    """
    if environ.get("KVD_RUNTIME_DIR"):
        return [Path(environ["KVD_RUNTIME_DIR"])]
    ending = "" if instance == DEFAULT_INSTANCE else f"-{instance}"
    found = [Path(f"/run/kvd{ending}")]
    if environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(environ["XDG_RUNTIME_DIR"]) / f"kvd{ending}")
    found.append(Path(f"/tmp/kvd-{os.geteuid()}{ending}"))
    return found
