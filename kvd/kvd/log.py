"""Structured logs: one line an event on standard error, `level event key=value ...`.

systemd's journal adds the time; elsewhere it is in front. Values are quoted when they need to be,
so a line stays one line and can be split again.

A thread of its own writes, because a write may block for ever: a pipe whose reader is stopped, a
terminal that is held, a disk that hangs. So neither that nor a full disk or a closed pipe can hold
up or end the daemon. Lines that cannot be written are dropped, and counted in the first one that
can.
"""

import json
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
from typing import Any

MAX_QUEUED = 1000
"""Lines that wait for a reader that does not read; some 100 KiB."""
CLOSE_SECONDS = 1.0
"""How long the end of the daemon waits for lines that are not written yet."""

_logger = logging.getLogger("kvd")
everything = False
"""Whether the level is debug: for who would have to do much to log something."""


class _Formatter(logging.Formatter):
    def __init__(self, with_time: bool) -> None:
        super().__init__()
        self._with_time = with_time

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        parts = [record.levelname.lower(), record.getMessage()]
        parts += [f"{name}={_show(value)}" for name, value in fields.items()]
        line = " ".join(parts)
        if self._with_time:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            line = f"{stamp}.{int(record.msecs):03d}Z {line}"
        if record.exc_info:
            line += " trace=" + json.dumps(self.formatException(record.exc_info))
        return line


class _Writer(logging.Handler):
    """Writes lines to a descriptor from a thread of its own; `emit` never blocks."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = self._failed = self._told = 0
        """Lines: by `emit`, by the thread, and how many of both it has told of."""
        self._torn = False
        self._thread = threading.Thread(target=self._work, name="kvd-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= MAX_QUEUED:
            self._dropped += 1
        else:
            self._lines.put(self.format(record))

    def finish(self, seconds: float) -> None:
        """Wait until all lines so far are written, but not for longer than `seconds`."""
        self._lines.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        # Signals are the main thread's.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (line := self._lines.get()) is not None:
            lost = self._dropped + self._failed - self._told
            if lost and self._write(self._notice(lost)):
                self._told += lost
                lost = 0
            if lost or not self._write(line):
                self._failed += 1

    def _notice(self, lost: int) -> str:
        extra = {"fields": {"lines": lost}}
        record = _logger.makeRecord(
            "kvd", logging.WARNING, "", 0, "log lost", (), None, None, extra
        )
        return self.format(record)

    def _write(self, line: str) -> bool:
        """Whether all of it was written. What follows a line that was cut begins a new one."""
        data = ("\n" * self._torn + line + "\n").encode(errors="backslashreplace")
        written = 0
        while written < len(data):
            try:
                written += os.write(self._fd, data[written:])
            except BlockingIOError:  # somebody else has made our standard error non-blocking
                select.select([], [self._fd], [])
            except OSError:
                self._torn = self._torn or written > 0
                return False
        self._torn = False
        return True


def set_up(level: str) -> None:
    """Log to standard error from `level` on; to nowhere if it is closed."""
    _logger.propagate = False
    set_level(level)
    logging.raiseExceptions = False
    if sys.stderr is None:  # its number may be another file's by now
        _logger.handlers = [logging.NullHandler()]
        return
    writer = _Writer(sys.stderr.fileno())
    writer.setFormatter(_Formatter(with_time="JOURNAL_STREAM" not in os.environ))
    _logger.handlers = [writer]


def set_level(level: str) -> None:
    """From now on, log from this level on."""
    global everything
    _logger.setLevel(level.upper())
    everything = _logger.isEnabledFor(logging.DEBUG)


def close() -> None:
    """Write what is not written yet, if that can be done in a second. Nothing is logged after
    it."""
    for handler in _logger.handlers:
        if isinstance(handler, _Writer):
            handler.finish(CLOSE_SECONDS)
    _logger.handlers = [logging.NullHandler()]


def log(level: int, event: str, **fields: Any) -> None:
    """Log one event with its fields."""
    if _logger.isEnabledFor(level):
        _logger.log(level, event, extra={"fields": fields})


def debug(event: str, **fields: Any) -> None:
    log(logging.DEBUG, event, **fields)


def info(event: str, **fields: Any) -> None:
    log(logging.INFO, event, **fields)


def warning(event: str, **fields: Any) -> None:
    log(logging.WARNING, event, **fields)


def error(event: str, cause: BaseException | None = None, **fields: Any) -> None:
    """Log a fault, with the trace of the exception that caused it if there is one."""
    _logger.error(event, exc_info=cause, extra={"fields": fields})


def _show(value: Any) -> str:
    text = str(value)
    if text and text.isprintable() and not any(special in text for special in ' "=\\'):
        return text
    return json.dumps(text).replace("\x7f", "\\u007f")  # the one control character JSON leaves
