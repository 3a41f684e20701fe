"""LMCache's server without a GPU, and a worker of it: both in LMCache's own environment.

The server listens on loopback, keeps payloads in shared memory, and reports to nobody. What the
worker does and times: lmcache_worker.py.
"""

import json
import mmap
import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.peer import ENVIRONMENTS, Bytes, LeftOut, end

ENVIRONMENT = ENVIRONMENTS / "lmcache"
_WORKER = Path(__file__).with_name("lmcache_worker.py")
_QUIET = {
    "DO_NOT_TRACK": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "HF_HUB_OFFLINE": "1",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
}


class LMCache:
    name = "LMCache"

    def start(self, largest: int) -> None:
        python = ENVIRONMENT / "bin" / "python"
        if not (ENVIRONMENT / "complete").exists():
            raise LeftOut("LMCache is not installed")
        self.name = f"LMCache {(ENVIRONMENT / 'complete').read_text().strip()}"
        # None of what this process imports from.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= _QUIET
        self._directory = tempfile.TemporaryDirectory(prefix="kvd-bench-lmcache-")
        self._log = (Path(self._directory.name) / "log").open("w+")
        self._segment = f"kvd-bench-lmcache-{os.getpid()}"
        port = _free_port()
        gigabytes = 1 + (3 * largest >> 31)
        command = [str(python), "-m", "lmcache.v1.multiprocess.server"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--supported-transfer-mode", "engine_driven", "--shm-name", self._segment]
        command += ["--l1-size-gb", str(gigabytes), "--no-l1-use-lazy", "--eviction-policy", "LRU"]
        command += ["--disable-observability", "--disable-metrics", "--disable-logging"]
        self._processes: list[subprocess.Popen[Any]] = []
        self._run(command, environment, stdin=subprocess.DEVNULL, stdout=self._log)
        fd = os.memfd_create("kvd-bench-lmcache")
        try:
            os.ftruncate(fd, largest)
            self._shared = np.frombuffer(mmap.mmap(fd, largest), np.uint8)
            command = [str(python), "-P", str(_WORKER), str(port), str(fd), str(largest)]
            self._worker = self._run(
                command, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd]
            )
        finally:
            os.close(fd)
        if self._answer() != {"ready": True}:
            raise LeftOut("it did not start")

    def store(self, key: str, payload: Bytes) -> float:
        np.copyto(self._shared[: payload.size], payload)
        return self._ask("store", key, payload.size)

    def fetch(self, key: str, into: Bytes) -> float:
        seconds = self._ask("fetch", key, into.size)
        np.copyto(into, self._shared[: into.size])
        return seconds

    def stop(self) -> None:
        for process in reversed(getattr(self, "_processes", [])):
            end(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if hasattr(self, "_log"):
            self._log.close()
            self._directory.cleanup()
            # Its server leaves it behind when it is asked to end.
            Path("/dev/shm", self._segment).unlink(missing_ok=True)

    def _run(self, command: list[str], environment: dict[str, str], **more: Any) -> Any:
        process = subprocess.Popen(
            command, env=environment, cwd=self._directory.name, stderr=self._log, text=True, **more
        )
        self._processes.append(process)
        return process

    def _ask(self, what: str, key: str, size: int) -> float:
        order = json.dumps({"do": what, "key": key, "bytes": size})
        print(order, file=self._worker.stdin, flush=True)
        answer = self._answer()
        if "seconds" not in answer:
            raise ValueError(f"LMCache: {answer}")
        return float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        line = self._worker.stdout.readline()
        if line:
            return dict(json.loads(line))
        self._log.seek(0)
        said = self._log.read().splitlines()[-1:]
        raise LeftOut(f"it has ended: {' '.join(said)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
