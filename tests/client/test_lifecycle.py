"""The client and its daemon's life: restart, absence, a hang, fork, interrupts; and what is left
behind of each."""

import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import kvd_client
from kvd_client import errors
from kvd_client.handshake import Handshake
from kvd_client.operations import WAITED_PART, Wait
from tests.client.blocks import (
    MODEL,
    eventually,
    holds,
    mappings,
    open_files,
    payloads,
    store,
)
from tests.support import Daemon, running_daemon, start_daemon

PROMPT = list(range(24))
SMALL = ("--max-memory", "64MiB")
STAGING = 1 << 20


@contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """The daemon hangs."""
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def restart(daemon: Daemon, *, kill: bool) -> Daemon:
    """Another daemon in the place of this one."""
    if kill:
        daemon.kill()
    else:
        assert daemon.stop() == 0
    return start_daemon(*SMALL, runtime_dir=daemon.runtime_dir, instance=daemon.instance)


def timed(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


# --- restart


@pytest.fixture
def mortal(own_daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that the test kills; another one then sweeps what it left."""
    yield own_daemon
    if own_daemon.process.poll() is not None and own_daemon.segments():
        flags = {"runtime_dir": own_daemon.runtime_dir, "instance": own_daemon.instance}
        start_daemon(*SMALL, **flags).stop()


@pytest.fixture
def worker(mortal: Daemon) -> Iterator[kvd_client.Client]:
    with kvd_client.connect(mortal.runtime_dir, staging_bytes=STAGING) as connected:
        yield connected


@pytest.mark.parametrize("kill", [False, True])
def test_after_a_restart_everything_old_is_stale_and_everything_new_works(
    mortal: Daemon, worker: kvd_client.Client, kill: bool
) -> None:
    client, context = worker, worker.open_context(MODEL, n_seq_max=4)
    store(context, PROMPT)
    old, older = context.alloc(PROMPT), context.alloc(PROMPT[:8])
    staged = old.stage(8)
    second = restart(mortal, kill=kill)
    try:
        assert client.ping().pid == second.process.pid
        assert not old.shared
        uses = (
            lambda: old.block(0),
            lambda: old.stage(8),
            lambda: old.append(PROMPT, payloads(PROMPT)),
            lambda: old.post_append(PROMPT[:8], staged),
            old.refresh,
        )
        for use in uses:
            with pytest.raises(errors.StaleHandle):
                use()
        staged.block(0)[:1] = b"x"  # nobody's memory, and no fault
        old.unstage(staged)
        # One is released before the context opens again, and one after: both ids come back.
        old.release()
        store(context, PROMPT)
        with context.alloc(PROMPT) as sequence:
            assert sequence.seq_id != older.seq_id
            assert holds(sequence, PROMPT)
            assert sorted(row["seq_id"] for row in client.sequences()) == sorted(
                [sequence.seq_id, older.seq_id]
            )
        older.release()
        assert client.sequences() == []
        held = [context.alloc([]) for _ in range(4)]
        assert sorted(each.seq_id for each in held) == [0, 1, 2, 3]
        assert client.verify()["ok"]
    finally:
        client.close()
        second.stop()


def test_the_first_to_notice_that_the_daemon_has_gone_is_told_so(
    mortal: Daemon, worker: kvd_client.Client
) -> None:
    context = worker.open_context(MODEL, n_seq_max=4)
    sequence = context.alloc([])
    mortal.kill()
    with pytest.raises(errors.Unavailable):
        sequence.append(PROMPT, payloads(PROMPT))
    with pytest.raises(errors.StaleHandle):
        sequence.append(PROMPT, payloads(PROMPT))
    with pytest.raises(errors.StaleHandle):
        sequence.keep_alive()
    assert context.keep_alive() == []
    with pytest.raises(errors.Unavailable):
        context.alloc([])
    sequence.release()
    context.close()


def test_an_alloc_that_waits_is_told_at_once_when_the_daemon_dies(
    mortal: Daemon, worker: kvd_client.Client
) -> None:
    with worker.open_context(MODEL, n_seq_max=1) as context, context.alloc([]):
        killer = threading.Timer(0.1, mortal.kill)
        killer.start()

        def wait() -> None:
            with pytest.raises(errors.Unavailable):
                context.alloc([], wait=60)

        assert timed(wait) < 5
        killer.join()


# --- fail open


def test_without_a_daemon_alloc_goes_on_and_comes_back_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvd_client")
    runtime_dir = tmp_path / "run"
    with kvd_client.connect(runtime_dir, fail_open=True, staging_bytes=STAGING) as client:
        context = client.open_context(MODEL, n_seq_max=4)

        def use() -> None:
            for _ in range(500):
                with context.alloc(PROMPT) as sequence:
                    assert not sequence.shared
                    assert (sequence.matched_tokens, sequence.n_blocks) == (0, 0)
                    with pytest.raises(errors.StaleHandle):
                        sequence.stage(8)

        assert timed(use) < 0.5
        held = [context.alloc([]) for _ in range(4)]
        assert [sequence.seq_id for sequence in held] == [0, 1, 2, 3]
        with pytest.raises(errors.NoSequenceFree):
            context.alloc([])
        held.pop().release()
        with pytest.raises(errors.Unavailable):
            client.status()
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1

        with running_daemon(*SMALL, runtime_dir=runtime_dir):

            def came_back() -> bool:
                with context.alloc(PROMPT) as sequence:
                    assert sequence.seq_id == 3  # the only one that is not in use
                    return sequence.shared

            eventually(came_back)
            assert len(client.sequences()) == 3
            for sequence in held:
                assert not sequence.shared
                sequence.release()
            assert client.sequences() == []
            store(context, PROMPT)
            with context.alloc(PROMPT) as sequence:
                assert holds(sequence, PROMPT)
        assert sum("is back" in record.message for record in caplog.records) == 1
        # And the next outage is warned of again.
        context.alloc([]).release()
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 2


def test_a_hung_daemon_costs_one_timeout_and_then_nothing(
    daemon: Daemon, other: kvd_client.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with kvd_client.connect(
        daemon.runtime_dir, fail_open=True, staging_bytes=STAGING, name="worker"
    ) as client:
        context = client.open_context(MODEL, n_seq_max=4)
        before = context.alloc(PROMPT)
        assert before.shared
        with stopped(daemon):
            first = timed(lambda: context.alloc(PROMPT).release())
            assert 0.03 < first < 0.5
            second = timed(lambda: [context.alloc(PROMPT).release() for _ in range(100)])
            assert second < 0.1
            assert not before.shared
            after = context.alloc(PROMPT)
            assert after.seq_id != before.seq_id
            assert context.keep_alive() == []
        assert len(caplog.records) == 1

        def came_back() -> bool:
            with context.alloc(PROMPT) as sequence:
                assert sequence.seq_id not in (before.seq_id, after.seq_id)
                return sequence.shared

        eventually(came_back)
        before.release()
        after.release()
        eventually(lambda: [row["client"] for row in other.clients()] == ["other", "worker"])
        assert other.sequences() == []


def test_the_way_back_to_a_daemon_takes_no_longer_than_one_timeout(
    mortal: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Welcome, context and answer together; and the welcome leaves time for the others."""
    timeout = 10.0
    with kvd_client.connect(
        mortal.runtime_dir, fail_open=True, staging_bytes=STAGING, timeout=timeout
    ) as client:
        context = client.open_context(MODEL, n_seq_max=4)
        until: list[tuple[type, float]] = []
        plain_wait = client._wait

        def wait(what: Wait) -> None:
            until.append((type(what.source), time.monotonic() + what.timeout))
            plain_wait(what)
            if isinstance(what.source, Handshake):
                time.sleep(0.2)  # a welcome that takes its time

        monkeypatch.setattr(client, "_wait", wait)
        again = restart(mortal, kill=True)
        try:
            begun = time.monotonic()
            with context.alloc(PROMPT) as sequence:
                assert sequence.shared
            assert [source for source, _ in until].count(Handshake) == 1
            for source, deadline in until[:-1]:  # the last one is the release's
                part = 0.5 if source is Handshake else 1.0
                assert deadline - begun < part * WAITED_PART * timeout + 0.1
        finally:
            client.close()
            again.stop()


def test_the_way_back_to_a_slow_daemon_is_gone_in_parts(
    mortal: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it takes longer than a request may lose. So the first goes on alone; the next finds
    the session, and its own id is not that of the first."""
    with kvd_client.connect(
        mortal.runtime_dir, fail_open=True, staging_bytes=STAGING, timeout=1.25
    ) as client:
        context = client.open_context(MODEL, n_seq_max=2)
        plain_wait = client._wait

        def wait(what: Wait) -> None:
            begun = time.monotonic()
            if what.timeout > 0:
                time.sleep(min(0.36, what.timeout))  # each answer takes its time
            plain_wait(what._replace(timeout=what.timeout - (time.monotonic() - begun)))

        again = restart(mortal, kill=True)
        monkeypatch.setattr(client, "_wait", wait)
        try:
            with context.alloc(PROMPT) as alone, context.alloc(PROMPT) as sequence:
                assert not alone.shared
                assert sequence.shared
                assert alone.seq_id != sequence.seq_id
                with pytest.raises(errors.NoSequenceFree):
                    context.alloc(PROMPT)
        finally:
            client.close()
            again.stop()


@pytest.mark.parametrize("fail_open", [True, False])
def test_who_has_no_room_to_map_the_arena_goes_on_without(mortal: Daemon, fail_open: bool) -> None:
    """As under `ulimit -v`: an arena is as long as /dev/shm."""
    with kvd_client.connect(mortal.runtime_dir, staging_bytes=STAGING) as other:
        store(other.open_context(MODEL), PROMPT)
        with kvd_client.connect(
            mortal.runtime_dir, fail_open=fail_open, staging_bytes=STAGING, timeout=10.0
        ) as client:
            context = client.open_context(MODEL)
            before = resource.getrlimit(resource.RLIMIT_AS)
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + (32 << 20), before[1]))
            try:
                if fail_open:
                    with context.alloc(PROMPT) as sequence:
                        assert not sequence.shared
                else:
                    with pytest.raises(errors.Unavailable, match="the arena cannot be mapped"):
                        context.alloc(PROMPT)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
            eventually(lambda: other.status()["sequences"]["in_use"] == 0)
            with context.alloc(PROMPT) as sequence:
                assert sequence.shared
                assert holds(sequence, PROMPT)


def test_to_keep_alive_costs_one_timeout_and_is_no_error(
    daemon: Daemon, other: kvd_client.Client
) -> None:
    with kvd_client.connect(daemon.runtime_dir, fail_open=True, staging_bytes=0) as client:
        context = client.open_context(MODEL, n_seq_max=4)
        sequence = context.alloc(PROMPT, idle_timeout=60)
        with stopped(daemon):
            assert context.keep_alive() == []
            assert not sequence.shared
        sequence.release()
    with kvd_client.connect(daemon.runtime_dir, timeout=0.05, staging_bytes=0) as client:
        context = client.open_context(MODEL, n_seq_max=4)
        with stopped(daemon), pytest.raises(errors.DeadlineExceeded):
            context.keep_alive()


def test_a_hung_daemon_does_not_hold_up_whoever_begins(daemon: Daemon) -> None:
    with stopped(daemon):
        started = time.monotonic()
        client = kvd_client.connect(daemon.runtime_dir, fail_open=True, staging_bytes=STAGING)
        context = client.open_context(MODEL)
        assert not context.alloc([]).shared
        assert time.monotonic() - started < 2
    eventually(lambda: context.alloc([]).shared or context.sequences.clear())
    client.close()


def test_release_and_append_are_bounded_too(daemon: Daemon) -> None:
    client = kvd_client.connect(daemon.runtime_dir, fail_open=True, staging_bytes=STAGING)
    context = client.open_context(MODEL, n_seq_max=4)
    sequences = [context.alloc([]) for _ in range(4)]
    with stopped(daemon):
        with pytest.raises(errors.DeadlineExceeded):
            sequences[0].append(PROMPT, payloads(PROMPT))
        assert timed(lambda: [sequence.release() for sequence in sequences]) < 0.1
        assert timed(client.close) < 0.5


def test_a_full_daemon_is_no_reason_to_stop_working(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused is as good as absent: it has no memory for our staging."""
    path, n_bytes = daemon.runtime_dir, 1 << 30
    with full_of_stagings(daemon):
        with kvd_client.connect(path, fail_open=True, staging_bytes=n_bytes) as client:
            context = client.open_context(MODEL)
            assert not context.alloc([]).shared
        assert len(caplog.records) == 1
        with pytest.raises(errors.AllLeased):
            kvd_client.connect(path, staging_bytes=n_bytes)


@contextmanager
def full_of_stagings(daemon: Daemon) -> Iterator[None]:
    """Three clients have a quarter of the budget each, and their header pages leave less than the
    fourth."""
    with ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(
                kvd_client.connect(daemon.runtime_dir, staging_bytes=1 << 30, timeout=60)
            )
        yield


def test_a_wrong_request_is_an_error_with_fail_open_too(daemon: Daemon) -> None:
    with kvd_client.connect(daemon.runtime_dir, fail_open=True, staging_bytes=0) as client:
        with pytest.raises(errors.BadMessage):
            client.open_context(MODEL, n_seq_max=99)
        context = client.open_context(MODEL, n_seq_max=1)
        with context.alloc([]) as sequence:
            with pytest.raises(errors.NoSequenceFree):
                context.alloc([])
            with pytest.raises(errors.BadMessage):
                context.alloc([], request="x" * 300)
            assert sequence.shared


# --- deadlines


def test_a_deadline_ends_the_session_and_the_next_call_opens_another(
    daemon: Daemon, other: kvd_client.Client
) -> None:
    with kvd_client.connect(daemon.runtime_dir, timeout=0.2, staging_bytes=STAGING) as client:
        context = client.open_context(MODEL)
        sequence = context.alloc([])
        with stopped(daemon):
            with pytest.raises(errors.DeadlineExceeded) as late:
                context.alloc([])
            assert late.value.details["waited_seconds"] == pytest.approx(0.2)
            with pytest.raises(errors.DeadlineExceeded):
                client.ping()
        assert not sequence.shared
        sequence.release()
        context.alloc([]).release()
        eventually(lambda: len(other.clients()) == 2)
        assert other.sequences() == []


def test_a_flush_that_takes_too_long_costs_nothing_else(
    daemon: Daemon, client: kvd_client.Client, context: kvd_client.Context
) -> None:
    with context.alloc([]) as sequence:
        commit = sequence.append(PROMPT, payloads(PROMPT))
        with stopped(daemon), pytest.raises(errors.DeadlineExceeded):
            client.flush(commit, timeout=0.05)
        assert sequence.shared
        client.flush(commit)
        assert sequence.refresh() == len(PROMPT)


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable, match="No such file"):
        kvd_client.connect(tmp_path)
    stale = start_daemon(*SMALL, runtime_dir=tmp_path / "run")
    stale.kill()
    with pytest.raises(errors.Unavailable, match="refused"):
        kvd_client.connect(stale.runtime_dir)
    start_daemon(*SMALL, runtime_dir=stale.runtime_dir, instance=stale.instance).stop()


def test_the_daemon_is_found_wherever_it_comes_to_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a runtime directory every place is looked at, each time."""
    monkeypatch.delenv("KVD_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    name = f"find-{os.getpid()}"
    with kvd_client.connect(instance=name, fail_open=True, staging_bytes=0) as client:
        context = client.open_context(MODEL)
        assert not context.alloc([]).shared
        with running_daemon(*SMALL, runtime_dir=tmp_path / f"kvd-{name}", instance=name):
            eventually(lambda: context.alloc([]).shared or context.sequences.clear())
            assert client.ping().instance == name


# --- interrupts


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """KeyboardInterrupt, as Ctrl-C would raise it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupted_alloc_is_released_when_its_answer_comes(
    client: kvd_client.Client,
) -> None:
    with client.open_context(MODEL, n_seq_max=1) as context:
        holder = context.alloc([])
        with interrupted_after(0.1):
            context.alloc(PROMPT, wait=60)
        assert [row["state"] for row in client.sequences()] == ["PROCESSING", "PENDING"]
        holder.release()  # the daemon hands the id to the alloc that nobody waits for
        with context.alloc([], wait=5) as sequence:
            assert sequence.seq_id == 0
            assert sequence.generation > holder.generation + 1
        assert client.sequences() == []


def test_an_interrupted_call_leaves_the_session_in_order(
    daemon: Daemon, client: kvd_client.Client, context: kvd_client.Context
) -> None:
    with context.alloc([]) as sequence:
        with stopped(daemon):
            with interrupted_after(0.05):
                client.ping()
            with interrupted_after(0.05):
                sequence.append(PROMPT, payloads(PROMPT))
            with interrupted_after(0.05):
                context.alloc([])
            with interrupted_after(0.05):
                client.open_context(MODEL)
        assert client.ping().pid == daemon.process.pid
        client.flush()
        assert sequence.shared
        assert sequence.refresh() == len(PROMPT)
        eventually(lambda: len(client.sequences()) == 1)
        eventually(lambda: client.clients()[0]["contexts"] == 1)
    assert client.contexts == {context}


# --- fork


def in_a_child(work: Callable[[], object]) -> int:
    """Fork, do `work` in the child, and return its exit code: 0, or 1 if it raised."""
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_is_refused_and_the_parent_goes_on(
    client: kvd_client.Client, context: kvd_client.Context
) -> None:
    store(context, PROMPT)
    with context.alloc(PROMPT) as sequence:

        def refused() -> None:
            for use in (
                client.ping,
                lambda: context.alloc([]),
                lambda: sequence.block(0),
                lambda: sequence.append(PROMPT, payloads(PROMPT)),
                sequence.release,
                context.close,
            ):
                with pytest.raises(errors.Forked):
                    use()

        assert in_a_child(refused) == 0

        def leaves_all_blocks() -> None:
            with client, context, sequence:
                pass
            client.close()

        assert in_a_child(leaves_all_blocks) == 0
        assert sequence.shared
        assert holds(sequence, PROMPT)
        assert client.ping()


def test_a_child_is_refused_even_while_a_thread_of_the_parent_has_the_lock(
    client: kvd_client.Client,
) -> None:
    with client.open_context(MODEL, n_seq_max=1) as context, context.alloc([]):
        begun = threading.Event()

        def wait() -> None:
            begun.set()
            with pytest.raises(errors.NoSequenceFree):
                context.alloc([], wait=0.5)

        thread = threading.Thread(target=wait)
        thread.start()
        begun.wait()

        def refused() -> None:
            signal.alarm(5)
            with pytest.raises(errors.Forked):
                client.ping()

        assert in_a_child(refused) == 0
        thread.join()


def test_closing_ends_the_session_although_a_child_lives(
    daemon: Daemon, other: kvd_client.Client
) -> None:
    """The child has a copy of the lifeline."""
    client = kvd_client.connect(daemon.runtime_dir, staging_bytes=STAGING)
    client.open_context(MODEL).alloc([])
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        client.close()
        eventually(lambda: len(other.clients()) == 1)
        assert other.sequences() == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- nothing is left behind


def test_sessions_leave_no_descriptors_and_no_mappings(daemon: Daemon) -> None:
    def use() -> None:
        with kvd_client.connect(daemon.runtime_dir, staging_bytes=STAGING) as client:
            context = client.open_context(MODEL)
            store(context, PROMPT)
            sequence = context.alloc(PROMPT)
            sequence.block(0)
            sequence.stage(8)
        assert sequence.released

    use()
    before = open_files()
    for _ in range(20):
        use()
    eventually(lambda: open_files() <= before)
    assert mappings() == []


def test_lost_sessions_leave_no_descriptors_and_no_mappings(daemon: Daemon) -> None:
    """What was opened in them is still referred to: only the client has let go."""
    with kvd_client.connect(daemon.runtime_dir, timeout=0.05, staging_bytes=STAGING) as client:
        context = client.open_context(MODEL, n_seq_max=8)
        client.flush(context.alloc([]).append(PROMPT, payloads(PROMPT)), timeout=5)
        before = open_files()
        held = []
        for _ in range(6):
            eventually(lambda: client.ping() if daemon else None)
            sequence = context.alloc(PROMPT)
            sequence.block(0)
            staged = sequence.stage(8)
            held.append((sequence, client.session))
            del staged
            with stopped(daemon), pytest.raises(errors.DeadlineExceeded):
                client.ping()
            assert mappings() == []
            sequence.release()
        eventually(lambda: client.ping().pid)
        eventually(lambda: open_files() <= before)


def test_attempts_to_connect_leave_no_descriptors(daemon: Daemon, tmp_path: Path) -> None:
    def attempts() -> None:
        for _ in range(20):
            with pytest.raises(errors.Unavailable):
                kvd_client.connect(tmp_path / "none")
            with pytest.raises(errors.AllLeased):
                kvd_client.connect(daemon.runtime_dir, staging_bytes=1 << 30)

    with full_of_stagings(daemon):
        attempts()
        before = open_files()
        attempts()
        eventually(lambda: open_files() <= before)


@pytest.fixture
def descriptors_of_others() -> set[int]:
    """What this process had before the test's own client was there."""
    return set(map(int, os.listdir("/proc/self/fd")))


def test_descriptors_are_not_inherited_by_other_programs(
    daemon: Daemon,
    descriptors_of_others: set[int],
    client: kvd_client.Client,
    context: kvd_client.Context,
) -> None:
    assert daemon
    store(context, PROMPT)
    with context.alloc(PROMPT) as sequence:
        sequence.block(0)
        kept = [
            fd
            for fd in set(map(int, os.listdir("/proc/self/fd"))) - descriptors_of_others
            if _points_to_the_daemon(fd) and os.get_inheritable(fd)
        ]
        assert any(map(_points_to_the_daemon, range(1024))), "nothing to look at"
        assert kept == []


def _points_to_the_daemon(fd: int) -> bool:
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False
    return "/dev/shm/kvd-" in target or "kvd-staging" in target
