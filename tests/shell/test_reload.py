"""A running daemon reads its configuration again: by SIGHUP and by request; what changes does so
while clients go on, and what is wrong changes nothing."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvd.tenants import KINDS
from kvd_proto.errors import OverQuota, SequenceLimit
from kvd_proto.messages import Config, Evict, Reload
from tests.proto.protocol_doc import report_keys
from tests.shell.raw import BLOCK_TOKENS, STRIDE, Raw, make_alloc, many_tokens, raw_client, until
from tests.shell.test_cli import Manager
from tests.support import Daemon, parse_size, running_daemon

MIB = 1 << 20
N_BLOCKS = 100


class Running(NamedTuple):
    """A daemon, and the file that it reads."""

    daemon: Daemon
    file: Path

    def write(self, text: str) -> None:
        self.file.write_text(text)

    @property
    def log(self) -> str:
        return self.daemon.log.read_text()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    file = tmp_path / "kvd.toml"
    file.write_text("max_memory = '16MiB'\n")
    with running_daemon("--config", str(file), runtime_dir=tmp_path / "rt") as daemon:
        yield Running(daemon, file)


@pytest.fixture
def client(running: Running) -> Iterator[Raw]:
    with raw_client(running.daemon, staging_bytes=MIB) as opened:
        opened.contexts = [opened.open()]
        yield opened


def fill(client: Raw, n_blocks: int = N_BLOCKS) -> None:
    """Cached blocks, each of a prompt of its own."""
    (context,) = client.contexts
    for number in range(n_blocks):
        tokens = many_tokens(number * BLOCK_TOKENS, BLOCK_TOKENS)
        client.release(context, client.store(context, tokens))


def reload(client: Raw) -> dict[str, Any]:
    return dict(client.call(Reload()).report)


def outcomes(report: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    return {
        row["name"]: (row["outcome"], row["before"], row["after"])
        for row in report["settings"]
        if row["outcome"] != "unchanged"
    }


def budget_of(client: Raw) -> int:
    return int(client.status()["accounting"]["budget_bytes"])


def check(client: Raw) -> None:
    report = client.verify()
    assert report["ok"], report["differences"]


def test_config_tells_what_the_daemon_uses(running: Running, client: Raw) -> None:
    report = client.call(Config()).report
    rows = {row["name"]: row for row in report["settings"]}
    memory = rows["max_memory"]
    assert (memory["value"], memory["text"], memory["restart"]) == (16 * MIB, "16MiB", "")
    assert (memory["origin"], memory["where"]) == ("file", str(running.file))
    assert rows["instance"]["where"] == "--instance"
    assert rows["instance"]["restart"]
    assert report["beyond"] == []
    # What the file says is not what the daemon uses, before it has been read.
    running.write("max_memory = '32MiB'\n")
    assert client.call(Config()).report == report
    reload(client)
    rows = {row["name"]: row for row in client.call(Config()).report["settings"]}
    assert rows["max_memory"]["text"] == "32MiB"


def test_the_reports_have_the_keys_that_the_protocol_says(running: Running, client: Raw) -> None:
    fill(client, 30)
    (context,) = client.contexts
    client.alloc(context, many_tokens(0, BLOCK_TOKENS))
    running.write("max_memory = '1MiB'\n")
    report = reload(client)
    assert _keys(report) == report_keys("reload")
    assert _keys(client.call(Config()).report) == report_keys("config")


def test_a_larger_budget_is_used_at_once_by_the_arena_that_is_there(
    running: Running, client: Raw
) -> None:
    fill(client)
    full = client.status()["counters"]["evicted_blocks"]
    running.write("max_memory = '1MiB'\n")
    reload(client)
    running.write("max_memory = '32MiB'\n")
    assert outcomes(reload(client))["max_memory"] == ("changed", "1MiB", "32MiB")
    assert budget_of(client) == 32 * MIB
    before = client.status()["counters"]["evicted_blocks"]
    fill(client, 2 * N_BLOCKS)
    assert client.status()["counters"]["evicted_blocks"] == before > full
    check(client)


def test_a_smaller_budget_evicts_and_gives_memory_back(running: Running, client: Raw) -> None:
    fill(client)
    before = client.status()["accounting"]
    wanted = before["os_bytes"] - 20 * STRIDE
    running.write(f"max_memory = {wanted}\n")
    report = reload(client)
    assert report["ok"]
    until(lambda: budget_of(client) == wanted)
    after = client.status()
    assert after["accounting"]["os_bytes"] <= wanted
    assert after["counters"]["evicted_blocks"] == 20
    assert client.call(Config()).report["beyond"] == []
    check(client)


def test_what_is_leased_is_not_taken_and_is_told(running: Running, client: Raw) -> None:
    (context,) = client.contexts
    tokens = many_tokens(0, 40 * BLOCK_TOKENS)
    sequence = client.store(context, tokens)
    held = client.status()["accounting"]["os_bytes"]
    running.write("max_memory = '1MiB'\n")
    (beyond,) = reload(client)["beyond"]
    assert beyond == {
        "name": "max_memory",
        "wanted_bytes": MIB,
        "held_bytes": held,
        "beyond_bytes": held - MIB,
        "evictable_bytes": 0,
    }
    assert len(client.read(context, sequence)) == 40, "all is there still"
    assert budget_of(client) == held
    check(client)
    client.release(context, sequence)
    until(lambda: client.call(Config()).report["beyond"][0]["held_bytes"] < held)
    client.close()
    with raw_client(running.daemon, staging_bytes=0) as other:
        until(lambda: budget_of(other) == MIB)
        check(other)
    until(lambda: "smaller budget reached" in running.log)


def test_an_error_leaves_everything_as_it_was(running: Running, client: Raw) -> None:
    before = client.call(Config()).report
    running.write("max_memory = '32MiB'\nmax_pinz = 5\nn_seq_max = 0\n")
    report = reload(client)
    assert not report["ok"]
    first, second = report["errors"]
    assert "max_pinz: there is no setting 'max_pinz'; did you mean max_pins?" in first
    assert "n_seq_max = 0: it is a whole number from 1 to 255" in second
    assert client.call(Config()).report == before
    assert budget_of(client) == 16 * MIB
    until(lambda: "not reloaded" in running.log)
    running.write("max_memory = '32MiB'\n")
    assert reload(client)["ok"]
    assert budget_of(client) == 32 * MIB


def test_what_needs_a_restart_says_why(running: Running, client: Raw) -> None:
    running.write("max_memory = '16MiB'\nsocket_group = 0\n[tenants.a]\nuids = [5]\n")
    report = reload(client)
    rows = {row["name"]: row for row in report["settings"] if row["outcome"] == "needs_restart"}
    assert set(rows) == {"socket_group", "tenants", *(f"tenants.a.{each}" for each in KINDS)}
    assert "sockets were opened to the group" in rows["socket_group"]["reason"]
    until(lambda: "setting needs a restart name=socket_group" in running.log)


def test_session_limits_change_for_those_who_are_there(running: Running, client: Raw) -> None:
    (context,) = client.contexts
    for number in range(3):
        client.alloc(context, many_tokens(number, 4))
    running.write("max_memory = '16MiB'\nmax_sequences = 2\nn_seq_max = 2\n")
    assert outcomes(reload(client))["max_sequences"] == ("changed", "100", "2")
    refused = client.ask(make_alloc(context, many_tokens(9, 4)))
    assert type(refused) is SequenceLimit
    assert client.status()["sequences"] == {"max": 2, "in_use": 3, "free": 0, "waiting": 0}
    running.write("max_memory = '16MiB'\n")
    reload(client)
    client.alloc(context, many_tokens(9, 4))


def test_the_log_level_changes(running: Running, client: Raw) -> None:
    running.write("max_memory = '16MiB'\nlog_level = 'error'\n")
    reload(client)
    with raw_client(running.daemon) as unheard:
        pass
    running.write("max_memory = '16MiB'\n")
    reload(client)
    with raw_client(running.daemon) as heard:
        until(lambda: f"client connected session={heard.session.hex()[:8]}" in running.log)
    assert unheard.session.hex()[:8] not in running.log


def test_linger_can_be_set_while_it_runs(running: Running) -> None:
    running.write("max_memory = '16MiB'\nlinger_seconds = '300ms'\n")
    with raw_client(running.daemon) as client:
        reload(client)
        assert running.daemon.process.poll() is None
    assert running.daemon.process.wait(20) == 0
    assert "no client for linger_seconds" in running.log, "it has ended: all is written"


def test_sighup_reloads_and_does_not_end_it(running: Running, client: Raw) -> None:
    running.write("max_memory = '32MiB'\n")
    running.daemon.process.send_signal(signal.SIGHUP)
    until(lambda: budget_of(client) == 32 * MIB)
    assert running.daemon.stop() == 0
    assert "setting changed name=max_memory before=16MiB after=32MiB" in running.log


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    try:
        manager.wait_for("READY=1")
        manager.process.send_signal(signal.SIGHUP)
        said = manager.wait_for("RELOADING=1")
        assert int(said.partition("MONOTONIC_USEC=")[2]) > 0
        manager.wait_for("READY=1")
    finally:
        manager.close()
    assert manager.process.returncode == 0


def test_a_terminal_that_goes_ends_it(tmp_path: Path) -> None:
    """SIGHUP is what the kernel sends then."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "kvd", "serve", "--instance", "test-reload-tty"]
    command += ["--runtime-dir", str(tmp_path / "rt"), "--no-keep-on-stop"]

    def own_terminal() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(terminal), os.O_RDWR))  # it becomes the controlling one

    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=own_terminal
    )
    os.close(terminal)
    try:
        said = b""
        while b"ready" not in said:
            said += os.read(controller, 4096)
        process.send_signal(signal.SIGHUP)  # the terminal is there: it reloads
        while b"reloaded" not in said:
            said += os.read(controller, 4096)
        assert process.poll() is None
    finally:
        os.close(controller)
    assert process.wait(20) == 0


def test_many_who_ask_at_once_are_all_answered(running: Running) -> None:
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(raw_client(running.daemon)) for _ in range(8)]
        for number, client in enumerate(clients):
            running.write(f"max_memory = '{16 + number}MiB'\n")
            client.post(Reload())
        for client in clients:
            assert client.receive().body.report["ok"]
        assert budget_of(clients[0]) == 23 * MIB, "the last one read what was there when it asked"


# --- with tenants

TENANTS = """
max_memory = '32MiB'
[tenants.default]
[tenants.a]
uids = [{uid}]
quota = '{quota}'
"""


def test_quotas_change(tmp_path: Path) -> None:
    file = tmp_path / "kvd.toml"
    file.write_text(TENANTS.format(uid=os.geteuid(), quota="16MiB"))
    flags = ("--config", str(file))
    with (
        running_daemon(*flags, runtime_dir=tmp_path / "rt") as daemon,
        raw_client(daemon, staging_bytes=MIB) as client,
    ):
        client.contexts = [client.open()]
        fill(client)
        file.write_text(TENANTS.format(uid=os.geteuid(), quota="3MiB"))
        report = reload(client)
        assert outcomes(report) == {"tenants.a.quota": ("changed", "16MiB", "3MiB")}

        def quota() -> int:
            (row,) = [each for each in client.status()["tenants"] if each["name"] == "a"]
            assert row["held_bytes"] <= row["quota_bytes"]
            return int(row["quota_bytes"])

        until(lambda: quota() == parse_size("3MiB"))
        refused = client.ask(make_alloc(client.contexts[0], b"", reserve=BLOCK_TOKENS * 900))
        assert isinstance(refused, OverQuota)
        client.call(Evict("", 0))
        check(client)


def _keys(report: dict[str, Any]) -> set[str]:
    """As PROTOCOL.md names them."""
    found = set()
    for key, value in report.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found |= {f"{key}[].{inner}" for inner in value[0]}
        else:
            found.add(key)
    return found
