"""Staging memory: sealed, complete, and safe to read whatever its client does to it."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
import pytest

from kvd.arena import PAGE, MappingInUse
from kvd.staging import HEADER_BYTES, Staging

SIZE = 256 * PAGE
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def staging() -> Iterator[Staging]:
    made = Staging.create(SIZE)
    yield made
    made.close()


def client(staging: Staging, code: str) -> subprocess.Popen[str]:
    """A process that has the staging's descriptor and runs `code`, with it mapped as `memory`."""
    begin = f"""
    import ctypes, mmap, os, signal, struct, sys
    fd = {staging.fd}
    memory = mmap.mmap(fd, {staging.size})
    def punch(offset, length):
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (ctypes.c_int64(offset), ctypes.c_int64(length))
        assert libc.fallocate(fd, 3, *arguments) == 0, os.strerror(ctypes.get_errno())
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(begin) + textwrap.dedent(code)],
        env=ENVIRONMENT,
        pass_fds=(staging.fd,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_client(staging: Staging, code: str) -> str:
    output, errors = client(staging, code).communicate(timeout=60)
    assert errors == ""
    return output


def test_new_staging_is_complete_zero_private_and_sealed(staging: Staging):
    assert staging.size == len(staging.buffer) == SIZE
    assert staging.backed_bytes() == SIZE
    assert not np.frombuffer(staging.buffer, np.uint8).any()
    assert stat.S_IMODE(os.fstat(staging.fd).st_mode) == 0o600
    assert not os.get_inheritable(staging.fd)
    seals = fcntl.fcntl(staging.fd, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def test_client_cannot_resize_it_or_seal_it_against_the_daemon(staging: Staging):
    said = run_client(
        staging,
        """
        import fcntl
        for attempt in (
            lambda: os.ftruncate(fd, 0),
            lambda: os.ftruncate(fd, 4096 * 1000),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            try:
                attempt()
            except PermissionError:
                print("refused")
        """,
    )
    assert said.split() == ["refused"] * 3
    assert os.fstat(staging.fd).st_size == SIZE


def test_both_sides_see_what_the_other_writes(staging: Staging):
    staging.set_completed(0x0102030405060708)
    said = run_client(
        staging,
        """
        print(memory[:9].hex())
        memory[4096:4099] = b"abc"
        """,
    )
    assert said.strip() == "080706050403020100"
    assert bytes(staging.buffer[HEADER_BYTES : HEADER_BYTES + 3]) == b"abc"


def test_completed_never_goes_back_and_a_forged_one_changes_nothing(staging: Staging):
    assert staging.completed() == 0
    staging.set_completed(5)
    staging.set_completed(5)
    with pytest.raises(ValueError, match="from 5 to 4"):
        staging.set_completed(4)
    run_client(staging, "memory[:8] = struct.pack('<Q', 2**64 - 1)")
    assert staging.completed() == 2**64 - 1
    staging.set_completed(6)
    assert staging.completed() == 6


def test_completed_is_never_seen_half_written_or_going_back(staging: Staging):
    # Multiples of 255 written over one another byte by byte would show numbers that are none.
    reader = client(
        staging,
        """
        number = memoryview(memory).cast("Q")
        print("ready", flush=True)
        torn = went_back = last = 0
        while last < 255 * 300_000:
            value = number[0]
            torn += value % 255 != 0
            went_back += value < last
            last = value
        print(torn, went_back)
        """,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    for count in range(300_001):
        staging.set_completed(255 * count)
    output, errors = reader.communicate(timeout=60)
    assert (output.strip(), errors) == ("0 0", "")


def test_holes_punched_by_the_client_read_as_zeros(staging: Staging):
    staging.buffer[:] = b"\1" * SIZE
    said = run_client(
        staging,
        """
        punch(4096, 100 * 4096)
        memory[200 * 4096] = 2
        print(os.fstat(fd).st_blocks * 512)
        """,
    )
    assert int(said) == staging.backed_bytes() == SIZE - 100 * PAGE
    view = np.frombuffer(staging.buffer, np.uint8)
    assert not view[PAGE : 101 * PAGE].any()
    assert (view[101 * PAGE : 200 * PAGE] == 1).all()
    assert view[200 * PAGE] == 2
    staging.set_completed(1)  # works on a punched header, too
    del view
    assert staging.backed_bytes() == SIZE  # reading has filled the holes: no error, only memory


def test_client_that_punches_and_rewrites_all_the_time_cannot_make_the_daemon_fault(
    staging: Staging,
):
    hostile = client(
        staging,
        f"""
        print("ready", flush=True)
        while True:
            punch(0, {SIZE})
            memory[:] = bytes([1]) * {SIZE}
        """,
    )
    assert hostile.stdout is not None
    assert hostile.stdout.readline() == "ready\n"
    copy = np.empty(SIZE, np.uint8)
    seen: set[int] = set()
    for round_number in range(20_000):
        np.copyto(copy, np.frombuffer(staging.buffer, np.uint8))
        seen.update(np.unique(copy).tolist())
        if round_number >= 100 and seen == {0, 1}:
            break
    assert hostile.poll() is None
    hostile.send_signal(signal.SIGKILL)
    hostile.communicate(timeout=60)
    assert seen == {0, 1}


@pytest.mark.parametrize("size", [0, PAGE, -PAGE, 2 * PAGE + 1])
def test_sizes_that_are_refused(size: int):
    with pytest.raises(ValueError, match="size"):
        Staging.create(size)


def test_failed_creation_leaks_no_descriptor():
    code = """
    import os, resource
    from kvd.staging import Staging
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = os.listdir("/proc/self/fd")
    try:
        Staging.create(16384)
    except OSError as error:
        print(error.strerror)
    print(len(os.listdir("/proc/self/fd")) - len(before))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["File too large", "0"], done.stderr


def test_close_under_a_view_is_refused_and_changes_nothing(staging: Staging):
    view = np.frombuffer(staging.buffer, np.uint8)
    with pytest.raises(MappingInUse, match="staging"):
        staging.close()
    staging.set_completed(3)
    assert staging.completed() == 3
    del view
    fd = staging.fd
    staging.close()
    staging.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(ValueError, match="closed"):
        _ = staging.buffer
