"""Warm lists: prompts that are computed, stored and pinned when a daemon starts cold.

Covers the tables [warm.NAME] of the configuration, and the processes that do it: `kvctl warm`, one
list after the other, each with the pins of an owner of its own, "warm-NAME". A list whose owner has
pins already, since a daemon before has left them, is not computed again. It is done as any client
would do it, by this daemon's user, behind all others: at the lowest priority of the processor, and
first in line when memory is short.
"""

import os
import re
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from kvd import log
from kvd.kinds import Count, Duration, FileList, Kind, Text, Unusable, read_table

MAX_LISTS = 64
STOP_SECONDS = 5.0
_NAME = re.compile(r"[a-z0-9-]{1,32}")
_TYPE = re.compile(r"[a-z0-9_]{1,16}")
_SAID_BYTES = 2000
_NICE = 19
_OOM_SCORE = 1000


def _check_path(text: str) -> None:
    if not text.startswith("/") or "\0" in text:
        raise ValueError


def _check_type(text: str) -> None:
    if not _TYPE.fullmatch(text):
        raise ValueError


_KV_TYPE = Text("a K/V type of llama.cpp, such as f16 or q8_0", _check_type)
KINDS: Mapping[str, Kind] = {
    "model": Text("an absolute path of a GGUF file", _check_path),
    "files": FileList(),
    "lora": FileList(),
    "type_k": _KV_TYPE,
    "type_v": _KV_TYPE,
    "n_ctx": Count(1, (1 << 31) - 1),
    "n_batch": Count(1, (1 << 31) - 1),
    "block_tokens": Count(1, 1024),
    "threads": Count(1, 4096),
    "ttl": Duration(1, 366 * 86400),
}
"""What a table may say; all but `ttl` are options of `kvctl warm`."""


@dataclass(frozen=True, slots=True)
class WarmList:
    """One [warm.NAME] of the configuration: what its table says."""

    name: str
    values: tuple[tuple[str, Any], ...]

    @property
    def owner(self) -> str:
        """Of its pins."""
        return f"warm-{self.name}"

    def arguments(self) -> list[str]:
        """Those of `kvctl warm`."""
        values, found = dict(self.values), ["--owner", self.owner]
        files = values.pop("files")
        for adapter in values.pop("lora", ()):
            found += ["--lora", adapter]
        if "ttl" in values:
            found += ["--for", str(values.pop("ttl"))]
        for name, value in values.items():
            found += [f"--{name.replace('_', '-')}", str(value)]
        return [*found, "--", *files]


@dataclass(frozen=True, slots=True)
class WarmLists(Kind):
    """The tables of all lists."""

    metavar: ClassVar[str] = "TABLES"
    is_table: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return "tables of the configuration file: [warm.NAME]"

    def read(self, value: Any) -> tuple[WarmList, ...]:
        """Raises Unusable with all that is wrong."""
        if not isinstance(value, dict):
            raise Unusable([f"warm: it is {self.allowed}"])
        errors: list[str] = []
        if len(value) > MAX_LISTS:
            errors.append(f"warm: there may be {MAX_LISTS}, not {len(value)}")
        lists = []
        for name, table in value.items():
            where = f"warm.{name}"
            if not _NAME.fullmatch(name):
                errors.append(f"{where}: a list's name is 1 to 32 of a-z, 0-9 and '-'")
            try:
                values = read_table(where, table, KINDS)
            except Unusable as error:
                errors += error.errors
                continue
            missing = [each for each in ("model", "files") if not values.get(each)]
            errors += [f"{where}: it has no {each}" for each in missing]
            lists.append(WarmList(name, tuple(values.items())))
        if errors:
            raise Unusable(errors)
        return tuple(lists)

    def show(self, value: Any) -> str:
        return ", ".join(each.name for each in value) or "none"

    def plain(self, value: Any) -> list[str]:
        return [each.name for each in value]


class _Running(NamedTuple):
    of: WarmList
    process: "subprocess.Popen[bytes]"
    pidfd: int
    began: float


class Warming:
    """Does the lists of which nothing is pinned, one after the other.

    `watch` and `unwatch` are the loop's, which calls what they were given when a list is done.
    """

    def __init__(
        self,
        lists: Iterable[WarmList],
        pinned: "frozenset[str]",
        instance: str,
        runtime_dir: Path,
        watch: Callable[[int, int, Callable[[int], None]], None],
        unwatch: Callable[[int], None],
    ) -> None:
        self._left = deque(each for each in lists if each.owner not in pinned)
        self._daemon = ["--instance", instance, "--runtime-dir", str(runtime_dir)]
        self._watch = watch
        self._unwatch = unwatch
        self._running: _Running | None = None
        self._said = b""
        self._is_heard = False

    def begin_next(self) -> None:
        """Begin with the next list, if there is one. The daemon answers from here on."""
        while self._left and self._running is None:
            of = self._left.popleft()
            try:
                self._begin(of)
            except OSError as error:
                log.error("not warmed", error, list=of.name)

    def close(self) -> None:
        """End what is under way; it says so itself if it was not done."""
        self._left.clear()
        if self._running is None:
            return
        process = self._running.process
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._end()

    def _begin(self, of: WarmList) -> None:
        command = [sys.executable, "-m", "kvd_client.kvctl", "warm", *self._daemon]
        # What the service manager has to say is for the daemon.
        environ = {
            name: value
            for name, value in os.environ.items()
            if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        }
        process = subprocess.Popen(
            [*command, *of.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environ,
        )
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        with suppress(OSError):  # it may have ended already; and none of it must be
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)
            Path(f"/proc/{process.pid}/oom_score_adj").write_text(str(_OOM_SCORE))
        self._running = _Running(of, process, os.pidfd_open(process.pid), time.monotonic())
        self._said, self._is_heard = b"", True
        self._watch(process.stderr.fileno(), select.EPOLLIN, lambda _: self._listen())
        self._watch(self._running.pidfd, select.EPOLLIN, lambda _: self._ended())
        log.info("warming", list=of.name, pid=process.pid)

    def _listen(self) -> None:
        """Keep the last of what it says, until it has said all."""
        assert self._running is not None
        stderr = self._running.process.stderr
        assert stderr is not None
        with suppress(BlockingIOError):
            said = os.read(stderr.fileno(), 1 << 16)
            self._said = (self._said + said)[-_SAID_BYTES:]
            if not said:
                self._unwatch(stderr.fileno())
                self._is_heard = False

    def _ended(self) -> None:
        assert self._running is not None
        self._running.process.wait()
        self._end()
        self.begin_next()

    def _end(self) -> None:
        """It has been waited for: tell how it went."""
        assert self._running is not None
        of, process, pidfd, began = self._running
        assert process.stderr is not None
        if self._is_heard:
            self._listen()
        if self._is_heard:  # who has ended may have a child that has not
            self._unwatch(process.stderr.fileno())
        self._unwatch(pidfd)
        process.stderr.close()
        os.close(pidfd)
        self._running = None
        seconds = round(time.monotonic() - began, 1)
        if process.returncode == 0:
            log.info("warmed", list=of.name, seconds=seconds)
        else:
            said = self._said.decode("utf-8", "replace").strip()
            log.warning("not warmed", list=of.name, code=process.returncode, said=said)
