"""Structured logs: one line an event on standard error, `level event key=value ...`.

systemd's journal adds the time; elsewhere it is in front. Values are quoted when they need to be,
so a line stays one line and can be split again.
"""

import json
import logging
import os
import sys
import time
from typing import Any

_logger = logging.getLogger("kvd")


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


def set_up(level: str) -> None:
    """Log to standard error from `level` on. A full disk or a closed pipe never stops the daemon;
    a pipe that is open and never read does, once it is full."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(with_time="JOURNAL_STREAM" not in os.environ))
    logging.raiseExceptions = False
    _logger.handlers = [handler]
    _logger.propagate = False
    _logger.setLevel(level.upper())


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
