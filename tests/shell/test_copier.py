"""The worker thread, on real segments and stagings."""

import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Generator, Iterator
from operator import attrgetter

import numpy as np
import pytest
import xxhash

from kvd import copier as copier_module
from kvd.arena import PAGE, SHM_DIR, ByteRange, NoSpace, Segment
from kvd.copier import (
    BACK_STEP_BYTES,
    SLICE_BYTES,
    BackJob,
    CallJob,
    Copier,
    CopyItem,
    CopyJob,
    JobResult,
    PunchJob,
    TakeJob,
    checksum,
)
from kvd.staging import HEADER_BYTES, Staging
from kvd.turns import Order
from tests.shell.raw import until

PREFIX = f"kvdtest-copier-{os.getpid()}"
SIZE = 512 * PAGE
TIMEOUT = 30


@pytest.fixture(autouse=True)
def clean_shm() -> Iterator[None]:
    yield
    left = [name for name in os.listdir(SHM_DIR) if name.startswith(PREFIX)]
    for name in left:
        os.unlink(f"{SHM_DIR}/{name}")
    assert left == []


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(f"{PREFIX}.a", SIZE)
    yield made
    made.close(unlink=True)


@pytest.fixture
def staging() -> Iterator[Staging]:
    made = Staging.create(SIZE + HEADER_BYTES)
    noise = np.random.default_rng(7).integers(0, 256, SIZE, np.uint8)
    np.frombuffer(made.buffer, np.uint8)[HEADER_BYTES:] = noise
    yield made
    made.close()


@pytest.fixture
def copier() -> Iterator[Copier]:
    made = Copier()
    yield made
    made.stop()


def wait(copier: Copier, count: int = 1) -> list[JobResult]:
    results: list[JobResult] = []
    poller = select.poll()
    poller.register(copier.event_fd, select.POLLIN)
    while len(results) < count:
        assert poller.poll(TIMEOUT * 1000), "no result"
        results += copier.results()
    assert len(results) == count
    return results


def item(staging: Staging, segment: Segment, offset: int, length: int, check=None) -> CopyItem:
    """Copies from the place of the staging that corresponds to `offset`."""
    return CopyItem(staging.buffer, HEADER_BYTES + offset, segment, offset, length, check)


@pytest.mark.parametrize("length", [1, 1000, SLICE_BYTES, SLICE_BYTES + 1, 3 * SLICE_BYTES - 1])
def test_copy_and_its_checksum(copier: Copier, segment: Segment, staging: Staging, length: int):
    segment.back(0, SIZE)
    copier.submit(CopyJob(5, [item(staging, segment, 3, length)]))
    assert wait(copier) == [
        JobResult(5, None, (copier_module.ItemResult(expected(staging, 3, length), None),))
    ]
    copied = bytes(segment.buffer[: length + 5])
    original = bytes(staging.buffer[HEADER_BYTES + 3 : HEADER_BYTES + 3 + length])
    assert copied == b"\0\0\0" + original + b"\0\0"
    assert checksum(segment.buffer[3 : 3 + length]) == expected(staging, 3, length)


def expected(staging: Staging, offset: int, length: int) -> int:
    begin = HEADER_BYTES + offset
    return xxhash.xxh3_64_intdigest(bytes(staging.buffer[begin : begin + length]))


def test_back_and_punch(copier: Copier, segment: Segment):
    ranges = [ByteRange(0, PAGE), ByteRange(8 * PAGE, 4 * PAGE)]
    copier.submit(BackJob(1, segment, ranges))
    assert wait(copier) == [JobResult(1, None)]
    assert segment.backed_ranges() == ranges
    copier.submit(PunchJob(2, segment, ranges[1:]))
    assert wait(copier) == [JobResult(2, None)]
    assert segment.backed_ranges() == ranges[:1]


def test_backing_is_all_or_none(copier: Copier):
    shm = os.statvfs(SHM_DIR)
    if shm.f_blocks == 0:
        pytest.skip(f"{SHM_DIR} has no size limit here")
    too_much = (shm.f_blocks * shm.f_frsize // PAGE + 1) * PAGE
    segment = Segment.create(f"{PREFIX}.large", 100 * PAGE + too_much)
    segment.back(0, PAGE)
    ranges = [ByteRange(PAGE, PAGE), ByteRange(5 * PAGE, PAGE), ByteRange(100 * PAGE, too_much)]
    copier.submit(BackJob(1, segment, ranges))
    (result,) = wait(copier)
    assert isinstance(result.error, NoSpace)
    assert (result.error.offset, result.error.backed_bytes) == (100 * PAGE, 3 * PAGE)
    assert segment.backed_ranges() == [ByteRange(0, PAGE)]
    copier.submit(BackJob(2, segment, ranges[:2]))
    assert wait(copier) == [JobResult(2, None)]
    assert segment.backed_ranges() == [ByteRange(0, 2 * PAGE), ByteRange(5 * PAGE, PAGE)]
    segment.close(unlink=True)


def test_backing_is_all_or_none_when_shm_really_runs_full():
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("NOT TESTED: a full /dev/shm needs util-linux' unshare")
    begin = [unshare, "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    begin += ["sh", "-c", f'mount -t tmpfs -o size=1m none {SHM_DIR} && exec "$@"', "sh"]
    if subprocess.run([*begin, "true"], capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED: a full /dev/shm needs the right to mount one")
    code = """
    from kvd.arena import PAGE, ByteRange, Segment
    from kvd.copier import BackJob, Copier
    segment = Segment.create("full", 1024 * PAGE)
    copier = Copier()
    def tens(first, end):
        return [ByteRange(number * 10 * PAGE, 10 * PAGE) for number in range(first, end)]
    copier.submit(BackJob(1, segment, tens(0, 1)))
    copier.submit(BackJob(2, segment, tens(1, 30)))
    copier.submit(BackJob(3, segment, tens(40, 64)))
    for result in copier.stop():
        print(result.job_id, type(result.error).__name__)
    print([(start // PAGE, length // PAGE) for start, length in segment.backed_ranges()])
    segment.close(unlink=True)
    """
    done = subprocess.run(
        [*begin, sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "1 NoneType",
        "2 NoSpace",
        "3 NoneType",
        "[(0, 10), (400, 240)]",
    ]


def test_check_sees_the_copy_read_only_and_its_verdict_is_the_items(
    copier: Copier, segment: Segment, staging: Staging
):
    segment.back(0, SIZE)
    seen: list[bytes] = []

    def remember(view: memoryview) -> None:
        assert view.readonly
        assert threading.current_thread() is not threading.main_thread()
        # What the client does to the original now changes nothing any more.
        staging.buffer[HEADER_BYTES] ^= 0xFF
        seen.append(bytes(view))

    def refuse(view: memoryview) -> None:
        raise ValueError("wrong positions")

    original = bytes(staging.buffer[HEADER_BYTES : HEADER_BYTES + PAGE])
    copier.submit(
        CopyJob(
            1,
            [
                item(staging, segment, 0, PAGE, remember),
                item(staging, segment, PAGE, PAGE, refuse),
                item(staging, segment, 2 * PAGE, PAGE),
            ],
        )
    )
    (result,) = wait(copier)
    assert result.error is None
    good, bad, unchecked = result.items
    assert seen == [original]
    assert bytes(segment.buffer[:PAGE]) == original
    assert (good.checksum, good.error) == (xxhash.xxh3_64_intdigest(original), None)
    assert bad.checksum is None
    assert isinstance(bad.error, ValueError)
    assert str(bad.error) == "wrong positions"
    assert (unchecked.checksum, unchecked.error) == (expected(staging, 2 * PAGE, PAGE), None)


def test_checksum_is_the_copys_when_the_client_writes_between_copying_and_hashing(
    copier: Copier, segment: Segment, staging: Staging, monkeypatch: pytest.MonkeyPatch
):
    segment.back(0, SIZE)
    real_copyto = np.copyto
    original = bytes(staging.buffer[HEADER_BYTES:])

    def copyto(target: np.ndarray, source: np.ndarray) -> None:
        real_copyto(target, source)
        np.frombuffer(staging.buffer, np.uint8)[HEADER_BYTES:] ^= 0xFF

    monkeypatch.setattr(np, "copyto", copyto)
    copier.submit(CopyJob(1, [item(staging, segment, 0, SLICE_BYTES)]))
    (result,) = wait(copier)
    assert staging.buffer[HEADER_BYTES] == original[0] ^ 0xFF
    assert bytes(segment.buffer[:SLICE_BYTES]) == original[:SLICE_BYTES]
    assert result.items[0].checksum == xxhash.xxh3_64_intdigest(original[:SLICE_BYTES])


def test_unexpected_exception_is_a_result_and_the_thread_goes_on(
    copier: Copier, segment: Segment, staging: Staging
):
    segment.back(0, SIZE)

    def broken(view: memoryview) -> None:
        raise ZeroDivisionError("a fault of ours")

    class Odd:
        job_id = 3

    copier.submit(CopyJob(1, [item(staging, segment, 0, PAGE, broken)]))
    copier.submit(BackJob(2, segment, [ByteRange(1, PAGE)]))
    copier.submit(Odd())
    copier.submit(CopyJob(4, [item(staging, segment, 0, PAGE)]))
    results = sorted(wait(copier, 4), key=attrgetter("job_id"))
    first, second, third, fourth = results
    assert isinstance(first.items[0].error, ZeroDivisionError)
    # Where it was raised is still known, for the log.
    assert first.items[0].error.__traceback__ is not None
    assert isinstance(second.error, ValueError)
    assert isinstance(third.error, AttributeError)
    assert fourth.items[0].error is None


def test_buffers_can_be_closed_as_soon_as_the_result_is_there(copier: Copier):
    def refuse_with_views_at_hand(view: memoryview) -> None:
        array = np.frombuffer(view, np.uint8)
        try:
            raise KeyError(array[0])
        except KeyError as error:
            raise ValueError("bad") from error

    for round_number in range(50):
        segment = Segment.create(f"{PREFIX}.short", 4 * PAGE)
        staging = Staging.create(4 * PAGE)
        segment.back(0, 4 * PAGE)
        check = refuse_with_views_at_hand if round_number % 2 else None
        copier.submit(
            CopyJob(round_number, [CopyItem(staging.buffer[PAGE:], 0, segment, 0, PAGE, check)])
        )
        results = wait(copier)
        staging.close()
        segment.close(unlink=True)
        assert (results[0].items[0].error is None) == (check is None)


@pytest.mark.parametrize(
    ("source_offset", "offset", "length"),
    [
        (-1, 0, PAGE),
        (0, -1, PAGE),
        (0, 0, 0),
        (0, 0, -1),
        (SIZE + HEADER_BYTES - 10, 0, 11),
        (0, SIZE - 10, 11),
        (0, 0, 1 << 64),
    ],
)
def test_bytes_outside_of_source_or_segment_are_refused_at_once(
    segment: Segment, staging: Staging, source_offset: int, offset: int, length: int
):
    with pytest.raises(ValueError, match="not inside"):
        CopyItem(staging.buffer, source_offset, segment, offset, length)


def test_all_results_wait(copier: Copier, segment: Segment, staging: Staging):
    everything = [ByteRange(0, SIZE)]
    for round_number in range(20):
        copier.submit(BackJob(3 * round_number, segment, everything))
        until(lambda: segment.backed_bytes() == SIZE)
        copier.submit(CopyJob(3 * round_number + 1, [item(staging, segment, 0, SIZE)]))
        # A report comes behind everything that gives or takes memory.
        copier.submit(CallJob(3 * round_number + 2, segment.backed_bytes))
        copier.submit(PunchJob(100 + round_number, segment, everything))
        until(lambda: segment.backed_bytes() == 0)
    results = wait(copier, 80)
    assert sorted(result.job_id for result in results) == [*range(60), *range(100, 120)]
    assert {result.error for result in results} == {None}
    assert [result.value for result in results if result.value is not None] == [SIZE] * 20
    assert copier.results() == []
    assert not select.select([copier.event_fd], [], [], 0)[0]


def test_a_short_job_does_not_wait_for_the_long_one_of_another(copier: Copier):
    """Measured in steps, not in time: the thread is held in each until we let it go."""
    gate, told = threading.Semaphore(0), threading.Semaphore(0)
    steps: list[str] = []

    def step(name: str, count: int) -> Generator[int, None, None]:
        for _ in range(count):
            steps.append(name)
            told.release()
            gate.acquire()
            yield 0

    def take(job_id: int, name: str, count: int) -> None:
        copier.submit(TakeJob(job_id, 0, lambda _: step(name, count)), name)

    take(1, "long", 50)
    told.acquire()
    take(2, "short", 2)
    take(3, "long", 1)
    gate.release(100)
    results = wait(copier, 3)
    assert [result.job_id for result in results] == [2, 1, 3]
    # It came behind the lane that was alone, and then they took turns.
    assert steps[:5] == ["long", "long", "short", "long", "short"]


def test_others_are_told_of_what_a_job_has_yet_to_take(copier: Copier):
    promised: list[int] = []

    def taking(others: int) -> Generator[int, None, None]:
        promised.append(others)
        yield 30
        yield 70

    def refused(others: int) -> Generator[int, None, None]:
        raise OSError(f"{others} promised")
        yield

    def failing(others: int) -> Generator[int, None, None]:
        yield 1
        raise OSError("half way")

    began = threading.Event()
    copier.submit(CallJob(0, began.wait, Order.FREE))
    for lane in range(3):
        copier.submit(TakeJob(lane + 1, 100, taking), lane)
    copier.submit(TakeJob(4, 1 << 40, refused), 4)
    copier.submit(TakeJob(5, 100, failing), 5)
    began.set()
    results = wait(copier, 6)
    assert promised == [0, 70, 140]
    copier.submit(TakeJob(6, 1, taking))
    wait(copier)
    assert promised[-1] == 0, "what has failed takes nothing any more"
    errors = {result.job_id: str(result.error) for result in results if result.error}
    assert errors == {4: "210 promised", 5: "half way"}


@pytest.mark.parametrize("length", [PAGE, BACK_STEP_BYTES, 5 * BACK_STEP_BYTES + PAGE])
def test_long_ranges_are_given_and_taken_in_steps(copier: Copier, length: int):
    segment = Segment.create(f"{PREFIX}.long", 8 * BACK_STEP_BYTES)
    copier.submit(BackJob(1, segment, [ByteRange(PAGE, length)]))
    assert wait(copier) == [JobResult(1, None)]
    assert segment.backed_ranges() == [ByteRange(PAGE, length)]
    copier.submit(PunchJob(2, segment, [ByteRange(PAGE, length)]))
    assert wait(copier) == [JobResult(2, None)]
    assert segment.backed_ranges() == []
    segment.close(unlink=True)


def test_stop_does_what_is_queued_and_ends_the_thread(segment: Segment, staging: Staging):
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    copier = Copier()
    copier.submit(BackJob(0, segment, [ByteRange(0, SIZE)]))
    for job_id in range(1, 30):
        copier.submit(CopyJob(job_id, [item(staging, segment, 0, SIZE)]))
    assert sorted(result.job_id for result in copier.stop()) == list(range(30))
    assert copier.stop() == []
    assert copier.results() == []
    with pytest.raises(RuntimeError, match="job 30"):
        copier.submit(PunchJob(30, segment, []))
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_signals_are_left_to_the_main_thread(copier: Copier):
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "kvd-copier")
    with open(f"/proc/self/task/{thread.native_id}/status") as status:
        blocked = next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk"))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert blocked & (1 << (number - 1))


def test_main_thread_goes_on_while_much_is_copied(copier: Copier, monkeypatch: pytest.MonkeyPatch):
    # In one slice: if the GIL were held in either half of it, there would be a pause of at least
    # a quarter of the job, and no switching between slices could hide it.
    total = 256 * 1024 * 1024
    monkeypatch.setattr(copier_module, "SLICE_BYTES", total)
    source = memoryview(np.ones(total, np.uint8))
    segment = Segment.create(f"{PREFIX}.large", total)
    segment.back(0, total)
    shares: list[float] = []
    for attempt in range(5):  # the machine may have something else to do in one of them
        copier.submit(CopyJob(attempt, [CopyItem(source, 0, segment, 0, total)]))
        begin = last = time.perf_counter()
        longest = 0.0
        results: list[JobResult] = []
        while not results:
            results = copier.results()
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        assert results[0].items[0].error is None
        shares.append(longest / (last - begin))
        if shares[-1] < 0.15:
            break
    segment.close(unlink=True)
    assert min(shares) < 0.15, shares
