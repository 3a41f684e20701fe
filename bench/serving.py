"""Server processes of llama-cpp-python, with kvd or as they are: each on a free port of the
loopback, and gone at the end, come what may. For the benchmark and for the tests.
"""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

START_SECONDS = 100.0
STOP_SECONDS = 100.0
"""Both are long: a server that computes may have to wait for the machine."""
ANSWER_SECONDS = 300.0
PATIENT = 10.0
"""Seconds for kvd's answer: a busy machine is no outage."""
_ADDRESS = re.compile(r"Uvicorn running on (http://\S+)")


class ServerFailed(Exception):
    """A server did not do what was waited for. The message ends with what it has written."""


class Server:
    """One process. `url` is known once it listens."""

    def __init__(
        self, command: Sequence[str], directory: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **(environ or {})},
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
        """Wait until lines of it match so many times; returns the matches. Raises ServerFailed."""

        def found() -> list[re.Match[str]]:
            return [match for line in self._lines if (match := re.search(pattern, line))]

        with self._changed:
            self._changed.wait_for(lambda: len(found()) >= times or self._ended, seconds)
            matches = found()
        if len(matches) < times:
            raise ServerFailed(f"{pattern!r} came {len(matches)} times in:\n{self.said}")
        return matches

    def wait_until_it_listens(self) -> None:
        """Raises ServerFailed if it ends, or takes too long."""
        self.url = self.wait_for(_ADDRESS, seconds=START_SECONDS)[0][1]

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """POST, and the whole answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def complete(self, prompt: str | list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        """The one choice of a greedy completion."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **more}
        found: dict[str, Any] = self.ask("/v1/completions", **body)["choices"][0]
        return found

    def first_token_seconds(self, prompt: str) -> float:
        """From the request of a streamed completion to the first text of it, which is read to its
        end."""
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0.0, "stream": True}
        where = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(where.netloc), timeout=ANSWER_SECONDS)
        with contextlib.closing(connection):
            connection.connect()
            began = time.perf_counter()
            connection.request(
                "POST",
                "/v1/completions",
                json.dumps(body),
                {"Content-Type": "application/json"},
            )
            seconds = None
            with connection.getresponse() as answer:
                for line in answer:
                    if seconds is None and _has_text(line):
                        seconds = time.perf_counter() - began
        if seconds is None:
            raise ServerFailed(f"it answered without a token:\n{self.said}")
        return seconds

    def metrics(self) -> dict[str, float]:
        """The numbers of the example server, by name."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=ANSWER_SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        rows = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def stop(self) -> int:
        """SIGTERM, and wait; SIGKILL if that does not help. The exit code."""
        self.process.terminate()
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            raise ServerFailed(f"it did not end by SIGTERM:\n{self.said}") from None
        self._reader.join()
        return code


def _has_text(line: bytes) -> bool:
    """Whether a line of an event stream brings text of a completion."""
    head, _, data = line.partition(b": ")
    if head != b"data" or not data.startswith(b"{"):
        return False
    return bool(json.loads(data)["choices"][0]["text"])


AnyServer = TypeVar("AnyServer", bound=Server)


@contextlib.contextmanager
def listening(server: AnyServer) -> Iterator[AnyServer]:
    """The server, once it listens; it is stopped at the end."""
    try:
        server.wait_until_it_listens()
        yield server
    finally:
        server.stop()


def module_command(module: str, *flags: str) -> list[str]:
    """`python -m MODULE FLAGS`, on a free port."""
    return [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", "0", *flags]


def script_path() -> Path:
    """The example server of llama-cpp-python: where `scripts/bootstrap.py` has put it, or where
    LLAMA_EXAMPLE_SERVER says. Raises FileNotFoundError."""
    path = Path(os.environ.get("LLAMA_EXAMPLE_SERVER") or f"{sys.prefix}/example-server/server.py")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run `python3 scripts/bootstrap.py bench`")
    return path


def example_command(
    config_path: Path,
    model: Path,
    runtime_dir: str | os.PathLike[str] | None,
    *,
    disk_cache: Path | None = None,
    timeout: float | None = PATIENT,
    flags: Sequence[str] = (),
    **model_options: Any,
) -> list[str]:
    """The example server with a configuration that is written to `config_path`: with kvd, its
    `timeout` (None: what it has by itself) and other `flags`, or without `runtime_dir` the script
    as it is."""
    config: dict[str, Any] = {
        "server": {"host": "127.0.0.1", "port": 0},
        "model": {"path": str(model), **model_options},
    }
    if disk_cache is not None:
        config["disk_cache"] = {"path": str(disk_cache), "max_bytes": 1 << 30}
    config_path.write_text(json.dumps(config))
    launcher = []
    if runtime_dir is not None:
        launcher = ["-m", "kvd_client.integrations.llama_example_server"]
        launcher += ["--runtime-dir", str(runtime_dir)]
        if timeout is not None:
            launcher += ["--timeout", str(timeout)]
        launcher += flags
    return [sys.executable, *launcher, str(script_path()), "-C", str(config_path)]
