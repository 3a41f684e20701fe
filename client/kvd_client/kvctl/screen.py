"""The terminal while kvctl top has it: the other screen, single keys, and everything put back.

It is put back at every end that a process can see: a return, an exception, Ctrl-C, SIGTERM, SIGHUP;
and for as long as Ctrl-Z stops it. Plain ANSI sequences, which every terminal of today knows.
"""

import os
import re
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import NamedTuple, Self

_ENTER = "\x1b[?1049h\x1b[?25l"
"""Another screen, so that what was there comes back; no cursor."""
_LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
_SEQUENCE = re.compile("\x1b(\\[[0-9;]*[A-Za-z~]|O.)?")
"""What arrows and their like send: no key of ours."""
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Size(NamedTuple):
    columns: int
    lines: int


class Screen:
    """A context manager; standard input and output are a terminal."""

    def __init__(self) -> None:
        self._in = sys.stdin.fileno()
        self._before = termios.tcgetattr(self._in)
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handlers: dict[int, object] = {}
        self._wakeup_fd = -1
        self._typed = ""
        """Keys that nobody has asked for yet."""

    def __enter__(self) -> Self:
        # A signal that comes while we wait ends the wait.
        self._wakeup_fd = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number in _ENDING:
            self._handlers[number] = signal.signal(number, _end)
        self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._stop)
        self._handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)
        self._take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup_fd)

    def close(self) -> None:
        """When nobody will `wake` it any more."""
        os.close(self._wake)
        os.close(self._waker)

    @property
    def size(self) -> Size:
        """As it is at this moment."""
        found = os.get_terminal_size(sys.stdout.fileno())
        return Size(found.columns or 80, found.lines or 24)

    def wake(self) -> None:
        """End a wait, from whatever thread."""
        with suppress(BlockingIOError):
            os.write(self._waker, b"\0")

    def draw(self, lines: Sequence[str]) -> None:
        """Show lines, none of them longer and no more of them than the screen has room for."""
        text = "\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J"
        sys.stdout.write(text)
        sys.stdout.flush()

    def key(self, seconds: float) -> str:
        """The next key; "" if none comes, or something else has happened, before. Raises EOFError
        when the terminal has gone."""
        if not self._typed:
            self._wait(seconds)
        key, self._typed = self._typed[:1], self._typed[1:]
        return key

    def _wait(self, seconds: float) -> None:
        ready, _, _ = select.select([self._in, self._wake], [], [], max(0.0, seconds))
        if self._wake in ready:
            with suppress(BlockingIOError):
                os.read(self._wake, 4096)
        if self._in in ready:
            data = os.read(self._in, 64)
            if not data:
                raise EOFError
            self._typed += _SEQUENCE.sub("", data.decode(errors="replace"))

    def _take(self) -> None:
        tty.setcbreak(self._in)  # Ctrl-C and Ctrl-Z stay signals
        sys.stdout.write(_ENTER)
        sys.stdout.flush()

    def _give_back(self) -> None:
        with suppress(OSError, termios.error):  # of a terminal that has gone
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._before)

    def _stop(self, *_: object) -> None:
        """Ctrl-Z; goes on with SIGCONT."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
