"""How long the daemon waits when nothing happens."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from kvd_proto.keys import arena_fingerprint
from kvd_proto.messages import MAX_TTL_MS, Pin, Ping, Pinned, Pong
from tests.shell.raw import BLOCK_TOKENS, FINGERPRINT, SECONDS, many_tokens, raw_client, until
from tests.support import Daemon, is_listening


@pytest.mark.parametrize(("linger", "ttl_ms"), [(0, MAX_TTL_MS), (366 * 86400, 0)])
def test_what_is_further_off_than_a_poll_can_wait_does_not_end_it(
    tmp_path: Path, linger: int, ttl_ms: int
) -> None:
    """epoll takes an int of milliseconds: 24 days. A pin may last for a year, and a daemon without
    clients, too. Only without a service manager, for whom it wakes up every few seconds."""
    runtime_dir, instance = tmp_path / "rt", f"test-{uuid.uuid4().hex[:12]}"
    command = [sys.executable, "-m", "kvd", "serve", "--no-keep-on-stop", "--instance", instance]
    environ = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    environ["KVD_LINGER_SECONDS"] = str(linger)
    log = tmp_path / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--runtime-dir", str(runtime_dir)], env=environ, stderr=sink
        )
    try:
        until(lambda: is_listening(runtime_dir))
        daemon = Daemon(process, runtime_dir, instance, log)
        with raw_client(daemon) as client:
            context = client.open()
            client.store(context, many_tokens(0, BLOCK_TOKENS))
            model = arena_fingerprint(FINGERPRINT, "llama-state", BLOCK_TOKENS)
            pin = Pin(model, many_tokens(0, BLOCK_TOKENS), "owner", ttl_ms)
            assert client.call(pin) == Pinned(BLOCK_TOKENS)
            assert isinstance(client.call(Ping()), Pong)
        with raw_client(daemon) as client:
            until(lambda: client.status()["clients"] == 1)
            assert client.verify()["ok"]
        until(lambda: log.read_text().count("client gone") == 2)
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        assert process.wait(SECONDS) == 0, log.read_text()
