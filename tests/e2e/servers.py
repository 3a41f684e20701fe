"""Server processes for tests: each on a free port of the loopback, and gone at the end, come what
may."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 100.0
STOP_SECONDS = 100.0
"""Both are long: a server that computes may have to wait for the machine."""
_ADDRESS = re.compile(r"Uvicorn running on (http://\S+)")


class Server:
    """A server of ours, or the plain one. `url` is known once it listens."""

    def __init__(self, command: list[str], environ: dict[str, str], directory: Path) -> None:
        self.process = subprocess.Popen(
            command,
            env=environ,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def said(self) -> str:
        """All that it has written so far."""
        with self._changed:
            return "".join(self._lines)

    def wait_for(
        self, pattern: str | re.Pattern[str], times: int = 1, seconds: float = 30.0
    ) -> list[re.Match[str]]:
        """Wait until lines of it match so many times; returns the matches."""

        def found() -> list[re.Match[str]]:
            return [match for line in self._lines if (match := re.search(pattern, line))]

        with self._changed:
            self._changed.wait_for(lambda: len(found()) >= times or self._ended, seconds)
            matches = found()
        assert len(matches) >= times, f"{pattern!r} came {len(matches)} times in:\n{self.said}"
        return matches

    def stop(self) -> int:
        """SIGTERM, and wait; SIGKILL if that does not help. The exit code."""
        self.process.terminate()
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            raise AssertionError(f"it did not end by SIGTERM:\n{self.said}") from None
        self._reader.join()
        return code


@contextlib.contextmanager
def running_server(
    module: str,
    *flags: str,
    directory: Path,
    environ: dict[str, str] | None = None,
    measured: Path | None = None,
) -> Iterator[Server]:
    """`python -m MODULE --host 127.0.0.1 --port 0 FLAGS`, once it listens. `measured` is the file
    of added_time.py."""
    environ = {**os.environ, **(environ or {})}
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", "0", *flags]
    if measured is not None:
        command[2:2] = ["tests.e2e.added_time", str(measured)]
        environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")])
    server = Server(command, environ, directory)
    try:
        server.url = server.wait_for(_ADDRESS, seconds=START_SECONDS)[0][1]
        yield server
    finally:
        server.stop()
