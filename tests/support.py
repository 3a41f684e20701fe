"""Real daemons for tests: started as anybody would start them, and gone without a trace
afterwards."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvd.kinds import Size

START_SECONDS = 30.0
STOP_SECONDS = 20.0


@dataclass
class Daemon:
    """A running `kvd serve`, with an instance name and a runtime directory of its own."""

    process: subprocess.Popen[bytes]
    runtime_dir: Path
    instance: str
    log: Path

    def stop(self) -> int:
        """SIGTERM, and wait for its end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def segments(self) -> list[str]:
        """Names in /dev/shm that belong to this instance, lock files included."""
        prefix = f"kvd-{os.geteuid()}-{self.instance}."
        return sorted(name for name in os.listdir("/dev/shm") if name.startswith(prefix))


def start_daemon(
    *flags: str,
    runtime_dir: Path,
    instance: str | None = None,
    prefix: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
) -> Daemon:
    """Start a daemon and wait until it says READY, as systemd would. `prefix` runs it under a
    command."""
    name = instance or f"test-{uuid.uuid4().hex[:12]}"
    log = runtime_dir.parent / f"{runtime_dir.name}.log"
    with (
        tempfile.TemporaryDirectory(prefix="kvd-ready-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        log.open("ab") as sink,
    ):
        address = os.path.join(directory, "ready")
        ready.bind(address)
        ready.settimeout(0.1)
        command = [*prefix, sys.executable, "-m", "kvd", "serve", "--instance", name]
        command += ["--runtime-dir", str(runtime_dir), "--no-keep-on-stop", *flags]
        env = {**os.environ, "NOTIFY_SOCKET": address, **(environ or {})}
        process = subprocess.Popen(command, env=env, stderr=sink)
        for _ in range(int(START_SECONDS / 0.1)):
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in ready.recv(4096):
                    return Daemon(process, runtime_dir, name, log)
            if process.poll() is not None:
                raise AssertionError(f"the daemon did not start:\n{log.read_text()}")
        process.kill()
        process.wait()
        raise AssertionError(f"the daemon was not ready in time:\n{log.read_text()}")


@contextlib.contextmanager
def running_daemon(
    *flags: str,
    runtime_dir: Path,
    instance: str | None = None,
    prefix: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
) -> Iterator[Daemon]:
    """A daemon for a test; afterwards nothing of it is left in /dev/shm."""
    daemon = start_daemon(
        *flags, runtime_dir=runtime_dir, instance=instance, prefix=prefix, environ=environ
    )
    try:
        yield daemon
    finally:
        daemon.stop()
    left = daemon.segments()
    assert not left, f"segments left behind: {left}"


def is_listening(runtime_dir: Path) -> bool:
    """Whether a daemon accepts connections there: its socket has a name a moment before it does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(runtime_dir / "lifeline.sock"))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def parse_size(text: str | int) -> int:
    """Bytes, as the settings read them. Raises ValueError."""
    return Size(0, 1 << 62).read(text)
