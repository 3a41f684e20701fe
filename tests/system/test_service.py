"""The service under a real systemd: readiness, the watchdog, restarts, who gets in, the fence.

One container for all; each test uses an instance of its own, or leaves the one that it uses
running. Workers in containers of their own: test_containers.py.
"""

import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.system.container import MEMBER, ROOT, STRANGER, Container, Worker, until, worker
from tests.system.worker import TOKENS

KVD = "kvd.service"
KVCTL = "/opt/kvd/bin/kvctl"


@pytest.fixture
def service(container: Container) -> Container:
    """The container, with the service running."""
    container.do("systemctl", "start", KVD)
    return container


def instance(container: Container, name: str, settings: str = 'max_memory = "64MiB"\n') -> str:
    """Configure another instance; its unit."""
    (container.etc / f"{name}.toml").write_text(settings)
    return f"kvd@{name}.service"


@pytest.fixture
def second(container: Container) -> Iterator[str]:
    """Another instance, running."""
    unit = instance(container, "second")
    container.do("systemctl", "start", unit)
    yield unit
    container.do("systemctl", "stop", unit)


def assert_cache_after_restart(matched: int) -> None:
    """The daemon adopts what its predecessor left."""
    assert matched == len(TOKENS)


# --- readiness, and the end


def test_start_returns_when_it_is_ready_and_says_how_it_is(container: Container) -> None:
    container.do("systemctl", "start", KVD)
    # No waiting: that is what Type=notify is for.
    pong = json.loads(container.do(KVCTL, "--json", "ping", user=MEMBER))
    assert (pong["instance"], pong["pid"]) == ("default", container.pid(KVD))
    assert container.show(KVD, "ActiveState") == "active"
    assert "0 clients, 0 sequences, 0 of 4096 MiB" in container.show(KVD, "StatusText")
    with worker(container) as client:
        assert client.ask("use")["shared"]
        until(lambda: "1 clients" in container.show(KVD, "StatusText"))
    assert "info ready" in container.journal(KVD)


def test_its_memory_is_the_slices(service: Container) -> None:
    assert service.show(KVD, "ControlGroup") == "/kvd.slice/kvd.service"
    assert int(service.show("kvd.slice", "MemoryMax")) == 4608 << 20
    assert service.show("kvd.slice", "MemorySwapMax") == "0"


def test_stop_is_clean_and_final(container: Container) -> None:
    unit = instance(container, "stopped")
    container.do("systemctl", "start", unit)
    container.do("systemctl", "stop", unit)
    assert container.show(unit, "ActiveState") == "inactive"
    assert container.show(unit, "Result") == "success"
    assert container.show(unit, "ExecMainStatus") == "0"
    assert "info stopped" in container.journal(unit)
    # The directory stays for those who have it mounted; its sockets are gone.
    assert container.do("ls", "-A", "/run/kvd-stopped") == ""


def test_a_daemon_that_was_ended_by_hand_is_started_again(
    second: str, container: Container
) -> None:
    pid = container.pid(second)
    container.do("kill", "-TERM", str(pid))
    until(lambda: container.started_again(second, pid))


def test_a_wrong_setting_is_said_and_not_tried_again(container: Container) -> None:
    for name, settings, reason in (
        ("wrong", "max_sequences = 0\n", "max_sequences = 0: it is a whole number from 1"),
        ("unknown", "max_memroy = 1\n", "there is no setting 'max_memroy'"),
    ):
        unit = instance(container, name, settings)
        assert container.run("systemctl", "start", unit).returncode != 0
        until(lambda unit=unit: container.show(unit, "ActiveState") == "failed")
        assert container.show(unit, "ExecMainStatus") == "2"
        assert container.show(unit, "NRestarts") == "0"
        assert reason in container.journal(unit)
    # An instance without a configuration has no budget that anybody chose.
    assert container.run("systemctl", "start", "kvd@nobody.service").returncode != 0
    assert "/etc/kvd/nobody.toml" in container.journal("kvd@nobody.service")


def test_systemctl_reload_changes_what_can_change(container: Container) -> None:
    unit = instance(container, "reloaded")
    container.do("systemctl", "start", unit)
    pid = container.pid(unit)
    with worker(container, "reloaded") as client:
        client.ask("use")
        (container.etc / "reloaded.toml").write_text('max_memory = "32MiB"\nmax_pins = 7\n')
        container.do("systemctl", "reload", unit)
        # No waiting: it returns when it is done.
        config = json.loads(container.do(KVCTL, "--instance=reloaded", "--json", "config"))
        told = {row["name"]: (row["text"], row["where"]) for row in config["settings"]}
        assert told["max_memory"] == ("32MiB", "/etc/kvd/reloaded.toml")
        assert told["max_pins"] == ("7", "/etc/kvd/reloaded.toml")
        assert client.ask("use") == {"shared": True, "matched": len(TOKENS), "right": True}
    assert (container.show(unit, "ActiveState"), container.pid(unit)) == ("active", pid)
    assert "setting changed name=max_memory before=64MiB after=32MiB" in container.journal(unit)
    container.do("systemctl", "stop", unit)


def test_a_reload_of_a_wrong_file_fails_and_changes_nothing(
    second: str, container: Container
) -> None:
    pid = container.pid(second)
    (container.etc / "second.toml").write_text("max_memroy = 1\n")
    assert container.run("systemctl", "reload", second).returncode != 0
    assert (container.show(second, "ActiveState"), container.pid(second)) == ("active", pid)
    assert "did you mean max_memory?" in container.journal(second)
    status = json.loads(container.do(KVCTL, "--instance=second", "--json", "status"))
    assert status["accounting"]["budget_bytes"] == 64 << 20


def test_sighup_is_a_reload_too(second: str, container: Container) -> None:
    pid = container.pid(second)
    (container.etc / "second.toml").write_text('max_memory = "48MiB"\n')
    container.do("kill", "-HUP", str(pid))
    until(lambda: "after=48MiB" in container.journal(second))
    until(lambda: container.show(second, "ActiveState") == "active")
    assert container.pid(second) == pid


# --- hanging and dying


def test_a_hanging_daemon_is_killed_by_the_watchdog_and_started_again(container: Container) -> None:
    unit = instance(container, "hangs")
    container.drop_in(unit, "[Service]\nWatchdogSec=2\n")
    container.do("systemctl", "start", unit)
    pid = container.pid(unit)
    container.do("kill", "-STOP", str(pid))
    until(lambda: container.started_again(unit, pid))
    assert int(container.show(unit, "NRestarts")) == 1
    said = container.journal(unit)
    assert "Watchdog timeout" in said
    # Where it hung, from PYTHONFAULTHANDLER.
    assert "Fatal Python error: Aborted" in said
    assert "server.py" in said
    container.do("systemctl", "stop", unit)


def test_an_idle_daemon_tells_the_watchdog_that_it_lives(service: Container) -> None:
    assert service.show(KVD, "WatchdogUSec") == "30s"

    def signed() -> int:
        return int(service.show(KVD, "WatchdogTimestampMonotonic"))

    first = signed()
    until(lambda: signed() > first)


def use_until_shared(client: Worker) -> dict[str, object]:
    """A worker goes on while there is no daemon, and comes back to the next one by itself."""

    def look() -> dict[str, object] | None:
        answer: dict[str, object] = client.ask("use")
        assert answer["right"]
        return answer if answer["shared"] else None

    found = until(look)
    assert found is not None
    return found


def test_a_killed_daemon_is_started_again_and_its_clients_go_on(service: Container) -> None:
    with worker(service) as client, worker(service) as other:
        client.ask("use")
        for each in (client, other):
            assert each.ask("use") == {"shared": True, "matched": len(TOKENS), "right": True}
        for killed in range(3):
            pid = service.pid(KVD)
            service.do("kill", "-KILL", str(pid))
            until(lambda pid=pid: service.started_again(KVD, pid))
            first = use_until_shared(client)
            assert isinstance(first["matched"], int)
            assert_cache_after_restart(first["matched"])
            # What one stores the other finds: both are back.
            assert use_until_shared(other)["matched"] == len(TOKENS), killed
    assert json.loads(service.do(KVCTL, "--json", "verify"))["ok"]


def test_a_restart_for_an_upgrade_is_no_more_than_a_pause(service: Container) -> None:
    with worker(service) as client:
        client.ask("use")
        pid = service.pid(KVD)
        service.do("systemctl", "restart", KVD)
        assert service.started_again(KVD, pid)
        assert use_until_shared(client)["right"]


# --- instances, and who gets in


def test_two_instances_side_by_side(service: Container, second: str) -> None:
    with worker(service) as one, worker(service, "second") as two:
        one.ask("use")
        assert one.ask("use")["matched"] == len(TOKENS)
        assert two.ask("use") == {"shared": True, "matched": 0, "right": True}
        for name, unit in (("default", KVD), ("second", second)):
            pong = json.loads(service.do(KVCTL, "--instance", name, "--json", "ping", user=MEMBER))
            assert (pong["instance"], pong["pid"]) == (name, service.pid(unit))
        pid = service.pid(KVD)
        service.do("kill", "-KILL", str(service.pid(second)))
        assert one.ask("use") == {"shared": True, "matched": len(TOKENS), "right": True}
        assert service.pid(KVD) == pid
        use_until_shared(two)
    status = json.loads(service.do(KVCTL, "--instance=second", "--json", "status", user=MEMBER))
    assert status["accounting"]["budget_bytes"] == 64 << 20


def test_members_of_the_group_get_in_and_nobody_else(service: Container) -> None:
    assert service.run(KVCTL, "ping", user=MEMBER).returncode == 0
    refused = service.run(KVCTL, "ping", user=STRANGER)
    assert refused.returncode == 3
    assert "/run/kvd: Permission denied" in refused.stderr
    assert service.run("ls", "/run/kvd", user=STRANGER).returncode != 0
    listing = service.do("stat", "--format=%A %U %G %n", "/run/kvd", "-L").splitlines()
    assert listing == ["drwxr-x--- kvd kvd /run/kvd"]
    sockets = service.do("sh", "-c", "stat --format='%A %U %G %n' /run/kvd/*.sock").splitlines()
    assert sockets == [
        "srw-rw---- kvd kvd /run/kvd/lifeline.sock",
        "srw-rw---- kvd kvd /run/kvd/requests.sock",
    ]
    ours = f"/dev/shm/kvd-{service.do('id', '-u', 'kvd').strip()}-default.*"
    segments = service.do("sh", "-c", f"stat --format='%A %U %n' {ours}").splitlines()
    assert segments
    assert all(line.startswith("-rw------- kvd ") for line in segments), segments


# --- the fence


def test_the_fence_is_in_force(service: Container) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in service.do("cat", f"/proc/{service.pid(KVD)}/status").splitlines()
    )
    uid = service.do("id", "-u", "kvd").strip()
    assert status["Uid"].split() == [uid] * 4
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    proc = f"/proc/{service.pid(KVD)}"
    for space in ("net", "mnt", "ipc"):
        own = service.do("readlink", f"{proc}/ns/{space}")
        assert own != service.do("readlink", f"/proc/1/ns/{space}"), space
    # Only asked for: systemd cannot lower it in a container.
    assert service.show(KVD, "OOMScoreAdjust") == "-500"
    limits = service.do("cat", f"{proc}/limits").splitlines()
    core, files = (next(line for line in limits if name in line) for name in ("core", "open files"))
    assert core.split()[4:6] == ["0", "0"]
    assert files.split()[3:5] == ["8192", "8192"]


def test_what_can_be_done_from_behind_it(container: Container) -> None:
    unit = instance(container, "probe")
    container.drop_in(
        unit,
        "[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nExecStart=\n"
        "ExecStart=/opt/kvd/bin/python -m tests.system.probe\n",
    )
    container.do("systemctl", "start", unit)
    report = json.loads(
        next(line for line in container.journal(unit).splitlines() if line.startswith("{"))
    )
    assert (report["status"]["NoNewPrivs"], report["status"]["Seccomp"]) == ("1", "2")
    behind = report["attempts"]
    assert behind == {
        "write in its runtime directory": "it worked",
        "write in /dev/shm": "it worked",
        "write in /etc": "EROFS",
        "write its configuration": "EACCES",
        "write its program": "EACCES",
        "write in /var": "EROFS",
        "write in /run": "EACCES",
        "look into /root": "EACCES",
        "look into /home": "EACCES",
        "see the first process": "ENOENT",
        "open a network socket": "EAFNOSUPPORT",
        "open a netlink socket": "EAFNOSUPPORT",
        "memory to write and execute": "EPERM",
        "mount": "EPERM",
        "be traced": "EPERM",
        "become root": "EPERM",
        "a set-user-id file": "EPERM",
        "change a file's owner": "EPERM",
        "a namespace": "EPERM",
    }
    # Without the fence, and as root, nearly all of it works: it is the fence that was tested.
    probe = ("/opt/kvd/bin/python", "-m", "tests.system.probe")
    without = json.loads(container.do("env", "KVD_RUNTIME_DIR=/tmp", *probe))["attempts"]
    assert {name: found for name, found in without.items() if found != "it worked"} == {
        # Both are mounted read-only in this container.
        "write its configuration": "EROFS",
        "write its program": "EROFS",
    }


# --- metrics

COMMANDS = re.findall(
    r"^    ((?:systemctl|curl) .*)$", (ROOT / "docs/monitoring.md").read_text(), re.MULTILINE
)
"""What the docs tell an administrator to do."""
SCRAPE = """
import sys, urllib.request
print(urllib.request.urlopen("http://127.0.0.1:9187" + sys.argv[1], timeout=20).read().decode())
"""
SOCKET = "kvd-metrics.socket"


def test_metrics_come_through_a_socket_of_systemds_and_the_service_has_no_network(
    container: Container,
) -> None:
    def scrape(path: str) -> "subprocess.CompletedProcess[str]":
        return container.run("/opt/kvd/bin/python", "-c", SCRAPE, path, user=STRANGER)

    *commands, ask = COMMANDS
    assert ask.split()[:2] == ["curl", "http://127.0.0.1:9187/healthz"]
    container.do("systemctl", "start", KVD)
    for command in commands:
        container.do(*command.split())
    try:
        assert scrape("/healthz").stdout == "ok\n\n"
        text = scrape("/metrics").stdout
        assert "kvd_accounting_drift_bytes 0.0" in text
        assert "process_open_fds" in text
        pid = container.pid(KVD)
        networks = {container.do("readlink", f"/proc/{each}/ns/net") for each in (1, pid)}
        assert len(networks) == 2
        assert container.show(KVD, "RestrictAddressFamilies") == "AF_UNIX"
        container.do("kill", "-KILL", str(pid))
        until(lambda: container.started_again(KVD, pid))
        assert until(lambda: scrape("/healthz").stdout) == "ok\n\n"
        # What was stopped is not started by who asks.
        container.do("systemctl", "stop", KVD)
        refused = scrape("/healthz")
        assert "Connection refused" in refused.stderr
        assert container.show(KVD, "ActiveState") == "inactive"
    finally:
        container.do("systemctl", "disable", "--now", SOCKET)
        container.do("systemctl", "start", KVD)
