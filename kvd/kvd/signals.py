"""The signals that tell the daemon to stop, as a descriptor for its loop.

Caught from before the daemon leaves a trace until it has removed the last one, so that neither a
signal at start nor an impatient second one at the end leaves sockets and segments behind.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """A context in which `fd` is readable once one of them has come, and they do nothing else. In
    the main thread only."""

    def __enter__(self) -> Self:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _nothing) for number in STOP_SIGNALS}
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


def _nothing(number: int, frame: FrameType | None) -> None:
    """Python writes the number into the pipe by itself, if the signal has a handler."""
