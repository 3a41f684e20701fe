"""The signals that tell the daemon to stop, or to read its configuration again, as a descriptor for
its loop.

Caught from before the daemon leaves a trace until it has removed the last one, so that neither a
signal at start nor an impatient second one at the end leaves sockets and segments behind.

SIGHUP is also what a process gets whose terminal has gone: then it means to stop.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
CAUGHT = (*STOP_SIGNALS, signal.SIGHUP)
_STANDARD = (0, 1, 2)


class Signals:
    """A context in which `fd` is readable once one of them has come, and they do nothing else. In
    the main thread only."""

    def __enter__(self) -> Self:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._has_terminal = _is_on_a_terminal()
        self._previous_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _nothing) for number in CAUGHT}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self.fd)
        os.close(self._write_fd)

    def take(self) -> bool:
        """Take what has come; whether it tells to stop, and not only to reload."""
        come = os.read(self.fd, 4096)
        if any(number in come for number in STOP_SIGNALS):
            return True
        return self._has_terminal and not _is_on_a_terminal()


def _is_on_a_terminal() -> bool:
    """No more if it has hung up."""
    return any(os.isatty(fd) for fd in _STANDARD)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Python writes the number into the pipe by itself, if the signal has a handler."""
