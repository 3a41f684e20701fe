"""`kvd serve`, killed with SIGKILL at a chosen point of its own doing.

    python -m tests.shell.crashing_daemon POINT NTH serve ...

POINT is one of POINTS, and it dies when it comes there for the NTH time. The daemon's code has no
hook for this: what it calls at that point is wrapped here.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from kvd import adoption, arena, cli, copier, directory, requests, staging, store
from kvd_proto import layout

DAMAGED_HALF = 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


class Countdown:
    """Dies when it is called for the nth time."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            die()


Installer = Callable[[Countdown], None]


def around(owner: Any, name: str, *, before: bool) -> Installer:
    """Die just before or just after a function of the daemon's."""

    def install(count: Countdown) -> None:
        original = getattr(owner, name)
        function = getattr(original, "__func__", original)

        def wrapped(*args: Any, **options: Any) -> Any:
            if before:
                count()
            result = function(*args, **options)
            if not before:
                count()
            return result

        is_class_method = isinstance(owner.__dict__.get(name), classmethod)
        setattr(owner, name, classmethod(wrapped) if is_class_method else wrapped)

    return install


def in_a_copy(count: Countdown) -> None:
    """Half of the slice is in the arena."""

    class Numpy:
        def __getattr__(self, name: str) -> Any:
            return getattr(numpy, name)

        def copyto(self, target: Any, source: Any) -> None:
            half = len(target) // DAMAGED_HALF
            numpy.copyto(target[:half], source[:half])
            count()
            numpy.copyto(target[half:], source[half:])

    numpy = copier.np
    copier.np = Numpy()  # type: ignore[assignment]


def in_a_write(name: str, writes: float) -> Installer:
    """After so many of the assignments of a function of the layout; a half one is torn in its
    middle."""

    class Torn:
        def __init__(self, memory: memoryview, count: Countdown) -> None:
            self.memory, self.count, self.done = memory, count, 0.0

        def __setitem__(self, where: slice, content: bytes) -> None:
            if self.done + 0.5 == writes:
                half = len(content) // DAMAGED_HALF
                self.memory[where.start : where.start + half] = content[:half]
                self.count()
            self.memory[where] = content
            self.done += 1
            if self.done == writes:
                self.count()

    def install(count: Countdown) -> None:
        original = getattr(layout, name)

        def wrapped(memory: memoryview, *args: Any) -> None:
            torn: Any = Torn(memory, count)
            original(torn, *args)

        setattr(layout, name, wrapped)

    return install


def between_giving_and_touching(count: Countdown) -> None:
    """Memory has been given, and never been written: the kernel calls that a hole."""
    original = arena._call

    def wrapped(function: Any, *args: Any) -> None:
        if isinstance(function, ctypes._CFuncPtr) and function is arena._libc.madvise:
            count()
        original(function, *args)

    arena._call = wrapped


POINTS: dict[str, Installer] = {
    # commit
    "before a reply": around(requests.Requests, "reply", before=True),
    "after a reply": around(requests.Requests, "reply", before=False),
    "in a copy": in_a_copy,
    "staging made": around(staging.Staging, "__init__", before=False),
    # seal
    "before a record": around(directory.Directory, "write", before=True),
    "in a record: cleared": in_a_write("write_record", 1),
    "in a record: half a body": in_a_write("write_record", 1.5),
    "in a record: no checksum": in_a_write("write_record", 2),
    "in a record: half a checksum": in_a_write("write_record", 2.5),
    "after a record": around(directory.Directory, "write", before=False),
    "before a use": around(directory.Directory, "use", before=True),
    # pin
    "before a pin": around(directory.Directory, "write_pin", before=True),
    "in a pin: cleared": in_a_write("write_pin", 1),
    "in a pin: half a body": in_a_write("write_pin", 1.5),
    "in a pin: no checksum": in_a_write("write_pin", 2),
    "in a pin: half a checksum": in_a_write("write_pin", 2.5),
    "after a pin": around(directory.Directory, "write_pin", before=False),
    "before a pin is renewed": around(directory.Directory, "renew_pin", before=True),
    "after a pin was renewed": around(directory.Directory, "renew_pin", before=False),
    "before a pin is dropped": around(directory.Directory, "drop_pin", before=True),
    "after a pin was dropped": around(directory.Directory, "drop_pin", before=False),
    "before pins get memory": around(directory.Directory, "ensure_pins", before=True),
    "after pins got memory": around(directory.Directory, "ensure_pins", before=False),
    # back
    "before memory is given": around(arena.Segment, "back", before=True),
    "before memory is touched": between_giving_and_touching,
    "after memory was given": around(arena.Segment, "back", before=False),
    "a directory before it grows": around(directory.Directory, "ensure", before=True),
    "a directory after it grew": around(directory.Directory, "ensure", before=False),
    "a directory without an arena": around(directory.Directory, "create", before=False),
    "an arena that nobody knows": around(arena.Segment, "create", before=False),
    # evict, punch
    "before a record is dropped": around(directory.Directory, "drop", before=True),
    "after a record was dropped": around(directory.Directory, "drop", before=False),
    "before memory is punched": around(arena.Segment, "punch", before=True),
    "after memory was punched": around(arena.Segment, "punch", before=False),
    # adoption
    "a directory was opened": around(directory.Directory, "adopt", before=False),
    "an arena was opened": around(arena.Segment, "adopt", before=False),
    "everything was found": around(adoption, "find", before=False),
    "before the core adopts": around(store.Store, "find_arena", before=False),
    "before a directory shrinks": around(directory.Directory, "shrink", before=True),
    "after a directory shrank": around(directory.Directory, "shrink", before=False),
    "before a new life": around(directory.Directory, "begin_life", before=True),
    "after a new life began": around(directory.Directory, "begin_life", before=False),
    "before a check": around(copier, "checksum", before=True),
    "after a check": around(copier, "checksum", before=False),
    # stop
    "before the end": around(store.Store, "close", before=True),
    "after the end": around(store.Store, "close", before=False),
}
ADOPTION = list(POINTS)[list(POINTS).index("a directory was opened") : -2]
"""Reached only by a daemon that finds what another one has left."""
STOP = list(POINTS)[-2:]
ONCE = [
    "staging made", "a directory without an arena", "an arena that nobody knows",
    "before pins get memory", "after pins got memory",
]  # fmt: skip
"""A client comes there once, when it connects, registers its model, or pins for the first time."""


if __name__ == "__main__":
    POINTS[sys.argv[1]](Countdown(int(sys.argv[2])))
    sys.exit(cli.main(sys.argv[3:]))
