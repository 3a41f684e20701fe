"""A terminal for tests: a program runs on it, and what is to be seen can be read."""

import errno
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable

import pyte

SECONDS = 30
ENTERED, LEFT = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"
"""What a program says that takes the whole screen, and gives it back."""


class Terminal:
    """A terminal with a program on it; `lines` is what is to be seen."""

    def __init__(self, command: list[str], columns: int = 80, lines: int = 24) -> None:
        self._ours, self._theirs = pty.openpty()
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._set_size(columns, lines)
        self.before = termios.tcgetattr(self._theirs)
        self.said = b""
        environ = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        self.process = subprocess.Popen(
            command,
            stdin=self._theirs, stdout=self._theirs, stderr=self._theirs,
            env={**environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
            preexec_fn=self._own,
        )  # fmt: skip

    def _own(self) -> None:
        """Its own session, with this as its terminal: so Ctrl-C is a signal, and so is a resize."""
        os.setsid()
        fcntl.ioctl(self._theirs, termios.TIOCSCTTY, 0)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    @property
    def lines(self) -> list[str]:
        while select.select([self._ours], [], [], 0)[0]:
            try:
                part = os.read(self._ours, 65536)
            except OSError as error:
                if error.errno != errno.EIO:  # that is how a terminal ends
                    raise
                break
            self.said += part
            self._stream.feed(part)
        return [line.rstrip() for line in self.screen.display]

    def until(self, condition: Callable[[str], object], seconds: float = SECONDS) -> list[str]:
        """The lines as soon as they fulfil this."""
        deadline = time.monotonic() + seconds
        while not condition("\n".join(self.lines)):
            assert time.monotonic() < deadline, "\n".join(self.lines)
            time.sleep(0.02)
        return self.lines

    def shows(self, pattern: str) -> list[str]:
        return self.until(lambda text: re.search(pattern, text, re.MULTILINE))

    def is_restored(self) -> bool:
        assert self.lines is not None
        return self.said.endswith(LEFT) and termios.tcgetattr(self._theirs) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)
