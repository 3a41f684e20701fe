"""Standard output of kvctl: whoever reads it may have seen enough before the end, and a disk may be
full.
"""

import os
import sys


class NobodyReads(Exception):
    """The reader of our output has gone: there is nothing left to do, and nothing wrong."""


class CannotWrite(Exception):
    """The text says why."""


def write(text: str) -> None:
    """Print a line or several, at once. Raises NobodyReads and CannotWrite."""
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard()
        raise NobodyReads from None
    except OSError as error:
        _discard()
        raise CannotWrite(f"cannot write: {error.strerror}") from error


def _discard() -> None:
    """Python flushes once more at exit, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
