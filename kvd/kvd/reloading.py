"""The running configuration: who may see it, and reading it anew on SIGHUP or `kvctl reload`.

Covers the requests `config` and `reload`, their permission, reading the sources in a thread of its
own (a disk or a directory of groups may take its time), and what is reported of it. What can
change: changes.py. How it is carried out: server.py, kvd.core.resizing.

    reload ──► thread: load, plan ──► apply ──► log, systemd, replies
       └─ who asks meanwhile is answered by another one, which begins then
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from kvd import log
from kvd.changes import CHANGED, NEEDS_RESTART, Plan, plan
from kvd.configuration import BadSetting, Configuration, rows
from kvd.core.budget import Budget
from kvd.core.events import SessionId
from kvd.core.resizing import evictable
from kvd.core.shares import ModelShare
from kvd.core.tenants import Tenant
from kvd.notify import Notifier
from kvd.requests import Incoming
from kvd.settings import Settings
from kvd_proto.errors import Forbidden, KvdError, TooMany
from kvd_proto.messages import Config, Reload, Reported

MAX_WAITING = 64
"""Requests for a reload that wait, of all clients."""


class Reloading:
    """Holds the configuration in effect. `fd` is readable when one has been read: call
    `finish`."""

    def __init__(
        self,
        configuration: Configuration,
        load: Callable[[], Configuration],
        apply: Callable[[Settings], None],
        budget: Callable[[], Budget],
        may_see_all: Callable[[SessionId], bool],
        reply: Callable[[SessionId, int, Any], None],
        notifier: Notifier,
    ) -> None:
        """`load` reads the sources again, and raises BadSetting; `apply` lets settings be in
        effect; `may_see_all` tells whether a session may, and raises KvdError."""
        self._running = configuration
        self._load = load
        self._apply = apply
        self._budget = budget
        self._may_see_all = may_see_all
        self._reply = reply
        self._notifier = notifier
        self._asked: list[Incoming | None] = []
        """None: a signal."""
        self._served: list[Incoming | None] = []
        """Those for whom the sources are being read."""
        self._thread: threading.Thread | None = None
        self._found: Plan | Exception | None = None
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def answer(self, incoming: Incoming) -> None:
        """Answer a `Config` or a `Reload`, now or when it is done."""
        session, correlation, message = incoming
        try:
            if not self._may_see_all(session):
                raise Forbidden("the configuration is for the daemon's own user and root")
            if isinstance(message, Config):
                self._reply(session, correlation, Reported(self._report()))
                return
            assert isinstance(message, Reload)
            if len(self._asked) >= MAX_WAITING:
                raise TooMany("as many clients as may wait for a reload", most=MAX_WAITING)
        except KvdError as error:
            self._reply(session, correlation, error)
        else:
            self.begin(incoming)

    def begin(self, asked: Incoming | None = None) -> None:
        """Read the sources again, for a client or (None) for a signal."""
        self._asked.append(asked)
        self._start()

    def finish(self) -> None:
        """What has been read is in effect, as far as it can be; or all is as it was."""
        os.eventfd_read(self.fd)
        assert self._thread is not None
        self._thread.join()
        found, served = self._found, self._served
        self._thread, self._found, self._served = None, None, []
        report = self._take(found) if isinstance(found, Plan) else _refused(found)
        self._notifier.ready()
        for asked in served:
            if asked is not None:
                self._reply(asked.session, asked.correlation, Reported(report))
        self._start()

    def close(self) -> None:
        """A thread that still reads is left alone."""
        if self._thread is None:
            os.close(self.fd)

    def _start(self) -> None:
        if self._thread is not None or not self._asked:
            return
        self._served, self._asked = self._asked, []
        self._notifier.reloading()
        self._thread = threading.Thread(target=self._read, name="kvd-reload", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        # Signals are the main thread's.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            # The running one changes only when this has ended.
            self._found = plan(self._running, self._load())
        except Exception as error:
            self._found = error
        os.eventfd_write(self.fd, 1)

    def _take(self, found: Plan) -> dict[str, Any]:
        started = time.monotonic()
        self._running, changes = found
        self._apply(self._running.settings)
        for name, outcome, before, after, reason in changes:
            if outcome == CHANGED:
                log.info("setting changed", name=name, before=before, after=after)
            elif outcome == NEEDS_RESTART:
                log.warning("setting needs a restart", name=name, wanted=after, reason=reason)
        warnings = self._running.warnings
        for warning in warnings:
            log.warning("settings", reason=warning)
        n_changed = sum(each.outcome == CHANGED for each in changes)
        took_ms = round((time.monotonic() - started) * 1000, 2)
        log.info("reloaded", changed=n_changed, took_ms=took_ms)
        return {
            "ok": True,
            "errors": [],
            "warnings": list(warnings),
            "settings": [each._asdict() for each in changes],
            "beyond": beyond(self._budget()),
        }

    def _report(self) -> dict[str, Any]:
        return {
            "settings": [row._asdict() for row in rows(self._running)],
            "beyond": beyond(self._budget()),
        }


def beyond(budget: Budget) -> list[dict[str, Any]]:
    """The budget, quotas and caps that were made smaller than what is held, as long as they are:
    how much is held, how much of that is too much, and how much can go."""
    held = budget.n_bytes - budget.unassigned
    tenants, models = budget.tenants.values(), budget.models.values()
    found = [
        ("max_memory", budget.wanted, held, evictable(budget, None)),
        *((f"tenants.{each.name}.quota", *_limits(budget, each)) for each in tenants),
        *((f"models.{each.name}.cap", *_limits(budget, each)) for each in models),
    ]
    return [
        {
            "name": name,
            "wanted_bytes": wanted,
            "held_bytes": held,
            "beyond_bytes": held - wanted,
            "evictable_bytes": min(held - wanted, can_go),
        }
        for name, wanted, held, can_go in found
        if held > wanted
    ]


def _limits(budget: Budget, whose: Tenant | ModelShare) -> tuple[int, int, int]:
    """What it is to hold at most, what it holds, and what of that can go."""
    return whose.held - whose.excess, whose.held, evictable(budget, whose)


def _refused(error: Exception | None) -> dict[str, Any]:
    """All stays as it was."""
    if isinstance(error, BadSetting):
        errors = list(error.errors)
        for each in errors:
            log.error("not reloaded", reason=each)
    else:
        errors = [f"{type(error).__name__}: {error}"]
        log.error("not reloaded", error)
    return {"ok": False, "errors": errors, "warnings": [], "settings": [], "beyond": []}
