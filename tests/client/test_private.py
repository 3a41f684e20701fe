"""Private daemons: started on demand, one for all who ask, and gone by themselves."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import kvd_client
from kvd_client import errors, private
from tests.client.blocks import MODEL, eventually, store
from tests.support import running_daemon

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def instance() -> Iterator[str]:
    """A name whose daemons are ended, and whose shared memory is gone, after the test."""
    name = f"priv-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    yield name
    for process in daemons_of(name):
        process.terminate()
    eventually(lambda: not daemons_of(name))
    assert [each for each in os.listdir("/dev/shm") if name in each] == []


def daemons_of(instance: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if "serve" in command and instance in command and process.status() != "zombie":
                found.append(process)
    return found


def test_two_processes_at_once_share_one_daemon(tmp_path: Path, instance: str) -> None:
    script = (
        "import sys, kvd_client\n"
        "sys.stdin.readline()\n"
        "with kvd_client.connect(sys.argv[1], instance=sys.argv[2], start_private=True,\n"
        "                        max_memory='64MiB', staging_bytes=0) as client:\n"
        "    print(client.ping().pid)\n"
        "    sys.stdin.readline()\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "run"), instance],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    pids = set()
    for worker in workers:
        assert worker.stdout is not None
        pids.add(int(worker.stdout.readline()))
    for worker in workers:
        worker.communicate("end\n", timeout=20)
        assert worker.returncode == 0
    assert len(pids) == 1
    assert [process.pid for process in daemons_of(instance)] == list(pids)


def test_a_daemon_that_runs_is_used(tmp_path: Path, instance: str) -> None:
    with (
        running_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run") as daemon,
        kvd_client.connect(
            daemon.runtime_dir, instance=instance, start_private=True, staging_bytes=0
        ) as client,
    ):
        assert client.ping().pid == daemon.process.pid
        assert daemons_of(instance) == []


def test_it_outlives_its_client_for_a_while_and_leaves_no_zombie(
    tmp_path: Path, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "LINGER_SECONDS", 1)
    options = {"instance": instance, "start_private": True, "max_memory": "64MiB"}
    with kvd_client.connect(tmp_path / "run", staging_bytes=1 << 20, **options) as client:
        pid = client.ping().pid
        with client.open_context(MODEL) as context:
            store(context, range(24))
    with kvd_client.connect(tmp_path / "run", staging_bytes=0, **options) as client:
        assert client.ping().pid == pid
        with client.open_context(MODEL) as context, context.alloc(range(24)) as sequence:
            assert sequence.matched_tokens == 24
    eventually(lambda: not psutil.pid_exists(pid))


def test_it_is_not_ended_by_ctrl_c_of_its_client(tmp_path: Path, instance: str) -> None:
    with kvd_client.connect(
        tmp_path / "run", instance=instance, start_private=True, staging_bytes=0
    ) as client:
        pid = client.ping().pid
        assert os.getsid(pid) == pid
        assert os.getpgid(pid) != os.getpgid(0)


def test_what_stands_in_its_way_is_said(tmp_path: Path, instance: str) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(errors.Unavailable, match="not a directory") as raised:
        kvd_client.connect(tmp_path / "run", instance=instance, start_private=True)
    assert raised.value.details["exit_code"] == 1
    with pytest.raises(errors.Unavailable, match="max_memory"):
        kvd_client.connect(
            tmp_path / "other", instance=instance, start_private=True, max_memory="much"
        )


def test_the_instance_runs_elsewhere(
    tmp_path: Path, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names in /dev/shm are taken, so that no second one can be started here."""
    monkeypatch.setattr(private, "_START_SECONDS", 3.0)
    with (
        running_daemon("--max-memory", "64MiB", runtime_dir=tmp_path / "run", instance=instance),
        pytest.raises(errors.Unavailable, match="already serves this instance"),
    ):
        kvd_client.connect(tmp_path / "other", instance=instance, start_private=True)


def test_code_in_the_working_directory_is_not_run(
    tmp_path: Path, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvd.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    with kvd_client.connect(
        "run", instance=instance, start_private=True, staging_bytes=0
    ) as client:
        assert client.ping().instance == instance


def test_where_a_private_daemon_goes(tmp_path: Path) -> None:
    mine, last = tmp_path / "user" / "kvd", Path("/tmp/kvd-last")
    somewhere = [Path("/run/kvd-of-nobody"), mine, last]
    assert private._place(somewhere) == last
    mine.parent.mkdir()
    assert private._place(somewhere) == mine
    assert private._place([mine]) == mine


def test_a_start_that_hangs_is_ended(
    tmp_path: Path, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "_START_SECONDS", 0.0)
    with pytest.raises(errors.Unavailable, match="did not start"):
        kvd_client.connect(tmp_path / "run", instance=instance, start_private=True)
    eventually(lambda: not daemons_of(instance))
