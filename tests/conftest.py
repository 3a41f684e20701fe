"""What holds for a whole test run: it leaves no process and no shared memory behind.

Does not cover: fixtures of one room, which live in that room's own conftest.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

# No test is timed: the machine may have something else to do. pytest's timeout ends what hangs.
settings.register_profile("kvd", deadline=None)
settings.load_profile("kvd")

SHARED_MEMORY = Path("/dev/shm")

# Set in our environment, and so in that of all our descendants, also of one whose parent has gone.
# Not KVD_*, which would be configuration.
MARK = "TEST_RUN_OF_KVD"

# A process that was told to end, or killed, needs a moment until the kernel has cleared it away.
GRACE_SECONDS = 5.0


@pytest.fixture(scope="session", autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    run = uuid.uuid4().hex
    os.environ[MARK] = run
    before = segments()
    yield
    processes = what_stays(lambda: living_descendants(run))
    assert not processes, f"processes left behind: {sorted(processes)}"
    # A segment that somebody holds belongs to another run, since ours has no process any more.
    orphans = what_stays(lambda: without_holder(segments() - before))
    assert not orphans, f"segments left behind in {SHARED_MEMORY}: {sorted(orphans)}"


def what_stays(look: Callable[[], set[str]]) -> set[str]:
    """What `look` still finds at the end of the grace period; empty as soon as it finds nothing."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def living_descendants(run: str) -> set[str]:
    """Pid and command line of every process but this one that carries the mark of `run`."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.environ().get(MARK) != run:
                continue
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue  # gone, a zombie, or another user's
        if "multiprocessing.resource_tracker" in command:
            continue  # Python's own helper, which ends with this process
        found.add(f"{process.pid} {command}")
    return found


def segments() -> set[str]:
    """The names of all shared memory segments of kvd on this machine."""
    return {path.name for path in SHARED_MEMORY.glob("kvd-*")}


def without_holder(names: set[str]) -> set[str]:
    """Those of `names` that no living process has open or mapped."""
    if not names:
        return names
    held = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held |= {os.readlink(descriptor) for descriptor in (process / "fd").iterdir()}
            held |= {line.split()[-1] for line in (process / "maps").read_text().splitlines()}
        except OSError:
            continue  # gone, or another user's
    return {name for name in names if str(SHARED_MEMORY / name) not in held}
