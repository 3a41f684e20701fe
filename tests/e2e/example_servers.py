"""Processes of llama-cpp-python's example server, with kvd or as it is: each on a free port of the
loopback, and gone at the end."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_SECONDS = 90.0
_ADDRESS = re.compile(r"Uvicorn running on (http://\S+)")


def script_path() -> Path:
    """Where `scripts/bootstrap.py test` has put it, or where LLAMA_EXAMPLE_SERVER says."""
    path = Path(os.environ.get("LLAMA_EXAMPLE_SERVER") or f"{sys.prefix}/example-server/server.py")
    assert path.is_file(), f"{path} is not there: run `python3 scripts/bootstrap.py test`"
    return path


class ExampleServer:
    """One process. `url` is known once it listens."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
            )
        self.url = ""

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            ended = self.process.poll() is not None
            if found := _ADDRESS.search(self.said):
                self.url = found[1]
                return
            assert not ended, f"it ended:\n{self.said[-3000:]}"
            assert time.monotonic() < deadline, f"it does not listen:\n{self.said[-3000:]}"
            time.sleep(0.05)

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """POST, and the whole answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=100) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def complete(self, prompt: str | list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        """The one choice of a greedy completion."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **more}
        found: dict[str, Any] = self.ask("/v1/completions", **body)["choices"][0]
        return found

    def metrics(self) -> dict[str, float]:
        """The server's own numbers, by name."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        rows = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def decoded(self) -> int:
        """Prompt tokens that it has computed so far."""
        return int(self.metrics()["llamacpp:prompt_tokens_total"])

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextlib.contextmanager
def example_server(
    directory: Path,
    model: Path,
    runtime_dir: Path | None,
    *,
    disk_cache: Path | None = None,
    flags: tuple[str, ...] = (),
    **model_options: Any,
) -> Iterator[ExampleServer]:
    """A process with kvd and our `flags`, or without `runtime_dir` the script as it is."""
    defaults = {"n_ctx": 2048, "n_seq_max": 4, "threads": 1, "threads_batch": 1}
    config: dict[str, Any] = {
        "server": {"host": "127.0.0.1", "port": 0},
        "model": {"path": str(model), **defaults, **model_options},
    }
    if disk_cache is not None:
        config["disk_cache"] = {"path": str(disk_cache), "max_bytes": 1 << 30}
    name = f"server-{time.monotonic_ns()}"
    path = directory / f"{name}.json"
    path.write_text(json.dumps(config))
    launcher = []
    if runtime_dir is not None:
        launcher = ["-m", "kvd_client.integrations.llama_example_server"]
        # Patient: a busy machine is no outage.
        launcher += ["--runtime-dir", str(runtime_dir), "--timeout", "10", *flags]
    command = [sys.executable, *launcher, str(script_path()), "-C", str(path)]
    server = ExampleServer(command, directory / f"{name}.log")
    try:
        server.wait_until_it_listens()
        yield server
    finally:
        server.stop()
