"""Workers, and the daemon, in containers of their own: namespaces of each kind, real ones.

The machine is the booted container; what is made in it are the namespaces that container engines
make. A table of what works is in systemd/README.md.
"""

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.container import MEMBER, Container, User, until, worker
from tests.system.worker import TOKENS

KVD = "kvd.service"
KVCTL = "/opt/kvd/bin/kvctl"
ALL = len(TOKENS)

# Everything but users: what most engines do when root runs them. What they mount besides is little:
# a /dev/shm of its own, and processes of its own.
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--ipc", "--uts", "--net")
OWN_SHM = "mount -t tmpfs -o size=64k none /dev/shm"
# A /run of its own in which nothing is but the directory that is handed in, as with
# `--volume /run/kvd:/run/kvd`.
OWN_RUN = (
    "mkdir -p /tmp/mounted && mount --bind /run/kvd /tmp/mounted && "
    "mount -t tmpfs -o mode=755 none /run && "
    "mkdir /run/kvd && mount --bind /tmp/mounted /run/kvd"
)


def inside(*preparations: str, namespaces: tuple[str, ...] = NAMESPACES) -> tuple[str, ...]:
    """What starts a command in new namespaces, after having prepared them."""
    return (*namespaces, "sh", "-c", " && ".join([*preparations, 'exec "$@"']), "sh")


@pytest.fixture
def service(container: Container) -> Iterator[Container]:
    """The container with the service running, an empty cache, and no clients left afterwards."""
    container.do("systemctl", "start", KVD)
    container.do(KVCTL, "evict", "--all", "--yes")
    yield container
    until(lambda: len(clients(container)) == 1)
    assert json.loads(container.do(KVCTL, "--json", "verify"))["ok"]


def clients(container: Container, *options: str) -> list[dict[str, Any]]:
    """Who is connected, with kvctl itself."""
    rows: list[dict[str, Any]] = json.loads(container.do(KVCTL, *options, "--json", "clients"))[
        "clients"
    ]
    return rows


def others(container: Container, *options: str) -> list[int]:
    """The process ids of all but kvctl, as the daemon knows them."""
    return [row["pid"] for row in clients(container, *options) if row["client"] != "kvctl"]


def test_workers_in_containers_share_with_one_outside(service: Container) -> None:
    """Each has its own processes, mounts, /dev/shm (of 64 KiB), network, and sees no segment."""
    with (
        worker(service) as outside,
        worker(service, inside=inside(OWN_SHM, OWN_RUN)) as one,
        worker(service, inside=inside(OWN_SHM, OWN_RUN)) as two,
    ):
        assert one.ask("use") == {"shared": True, "matched": 0, "right": True}
        for each in (outside, one, two):
            assert each.ask("use") == {"shared": True, "matched": ALL, "right": True}
        assert outside.ask("who")["segments"] != []
        for each in (one, two):
            seen = each.ask("who")
            assert seen["segments"] == []
            assert (seen["uid"], seen["pid"]) == (MEMBER.uid, 1)
        # The daemon knows them by the process ids of its own machine.
        pids = others(service)
        assert len(set(pids)) == 3
        assert 1 not in pids
        for pid in pids:
            assert "tests.system.worker" in service.do("cat", f"/proc/{pid}/cmdline")


def test_the_death_of_a_container_is_noticed(service: Container) -> None:
    with worker(service) as outside, worker(service, inside=inside(OWN_SHM)) as doomed:
        doomed.ask("use")
        known = set(others(service))
        assert len(known) == 2
        inner = next(pid for pid in known if nested(service, pid))
        service.do("kill", f"-{signal.SIGKILL.value}", str(inner))
        until(lambda: others(service) == [*(known - {inner})])
        assert outside.ask("use")["matched"] == ALL


def nested(container: Container, pid: int) -> bool:
    """Whether a process has a process namespace of its own."""
    own, first = (container.do("readlink", f"/proc/{each}/ns/pid") for each in (pid, 1))
    return own != first


def test_a_mounted_directory_is_good_after_the_daemon_was_restarted(service: Container) -> None:
    """Stopped and started, too: the directory is the same one, and the sockets in it are new."""
    with worker(service, inside=inside(OWN_SHM, OWN_RUN)) as mounted:
        assert mounted.ask("use")["shared"]
        for way in (["restart"], ["stop", "start"]):
            for verb in way:
                service.do("systemctl", verb, KVD)
            until(lambda: mounted.ask("use")["shared"])
        pid = service.pid(KVD)
        service.do("kill", "-KILL", str(pid))
        until(lambda: service.started_again(KVD, pid))
        until(lambda: mounted.ask("use")["shared"])


# User namespaces, as rootless engines make them: the process is root there and nobody else exists.
ROOTLESS = ("unshare", "--user", "--map-root-user", *NAMESPACES[1:])


def rootless(user: User, *preparations: str) -> tuple[str, ...]:
    """Like `inside`, but made by the user itself, with its groups."""
    return (*user.command(), *inside(*preparations, namespaces=ROOTLESS))


def test_a_rootless_container_works_if_it_keeps_the_group(service: Container) -> None:
    with rootless_worker(service, MEMBER, OWN_SHM, OWN_RUN) as one:
        assert one.ask("use") == {"shared": True, "matched": 0, "right": True}
        assert one.ask("use")["matched"] == ALL
        assert one.ask("who") == {"pid": 1, "uid": 0, "segments": []}
        # The daemon knows who it is: the user that it is outside.
        rows = [row for row in clients(service) if row["client"] != "kvctl"]
        assert [row["uid"] for row in rows] == [MEMBER.uid]


def test_a_rootless_container_without_the_group_is_refused(service: Container) -> None:
    with rootless_worker(service, User(60_003), OWN_SHM, OWN_RUN) as one:
        assert one.ask("use") == {"shared": False, "matched": 0, "right": True}
        assert "/run/kvd: Permission denied" in one.ask("why")


def test_where_run_is_nobodys_the_client_believes_nobody(service: Container) -> None:
    """A user namespace in the machine's own file system: /run belongs to a user that is not
    mapped, so anybody could have made /run/kvd."""
    with rootless_worker(service, MEMBER, OWN_SHM) as one:
        assert one.ask("use") == {"shared": False, "matched": 0, "right": True}
        assert "/run/kvd: it belongs to user 65534, and need not be there by" in one.ask("why")


def rootless_worker(container: Container, user: User, *preparations: str) -> Any:
    return worker(container, user=None, inside=rootless(user, *preparations))


def test_the_daemon_in_a_container_and_a_worker_outside(service: Container) -> None:
    """From in there the worker has no process id; it is told apart by what the kernel hands over,
    and its death is noticed."""
    name = "boxed"
    box = service.do("systemd-run", "--unit=kvd-boxed", "--property=Type=exec", *boxed(name))
    assert box == ""
    options = ("--instance", name)
    until(lambda: service.run(KVCTL, *options, "ping").returncode == 0)
    try:
        with worker(service, name, user=User(0)) as outside:
            outside.ask("use")
            assert outside.ask("use") == {"shared": True, "matched": ALL, "right": True}
            assert others(service, *options) == [0]
            pid = outside.ask("who")["pid"]
            service.do("kill", "-KILL", str(pid))
            until(lambda: others(service, *options) == [])
    finally:
        service.do("systemctl", "stop", "kvd-boxed")
        service.do("sh", "-c", "rm -rf /dev/shm/kvd-0-boxed.* /run/kvd-boxed")


def boxed(name: str) -> list[str]:
    """A daemon in namespaces of its own, with /run/kvd-NAME."""
    command = "mkdir -p -m 700 /run/kvd-boxed && exec /opt/kvd/bin/kvd serve --instance " + name
    return [*NAMESPACES, "sh", "-c", command]
