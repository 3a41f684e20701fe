"""Segments: real shared memory, real processes. What a small budget does: kvd.core's tests."""

import contextlib
import ctypes
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
import pytest

from kvd.arena import (
    PAGE,
    SHM_DIR,
    ByteRange,
    MappingInUse,
    NoSpace,
    Segment,
    byte_ranges,
    list_segments,
    remove_segment,
)

PREFIX = f"kvdtest-arena-{os.getpid()}"
NAME = f"{PREFIX}.a"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(autouse=True)
def clean_shm() -> Iterator[None]:
    yield
    left = [name for name in os.listdir(SHM_DIR) if name.startswith(PREFIX)]
    for name in left:
        os.unlink(f"{SHM_DIR}/{name}")
    assert left == []


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(NAME, 64 * PAGE)
    yield made
    made.close(unlink=True)


def child(code: str, *arguments: object, before: tuple[str, ...] = (), fds: tuple[int, ...] = ()):
    """Runs `code` in a new interpreter, with `arguments` as sys.argv[1:]; returns what it wrote."""
    command = [*before, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(
        command, env=ENVIRONMENT, pass_fds=fds, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # A resource tracker that is told of a name it does not know complains there.
    assert done.stderr == ""
    return done.stdout.strip()


def test_new_segment_is_sparse_and_private():
    umask = os.umask(0)
    try:
        segment = Segment.create(NAME, 1 << 30)
    finally:
        os.umask(umask)
    found = os.stat(f"{SHM_DIR}/{NAME}")
    assert (found.st_size, found.st_blocks) == (1 << 30, 0)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (segment.name, segment.size, len(segment.buffer)) == (NAME, 1 << 30, 1 << 30)
    assert segment.backed_bytes() == 0
    assert segment.backed_ranges() == []
    segment.close(unlink=True)
    assert not os.path.exists(f"{SHM_DIR}/{NAME}")


def test_no_resource_tracker_is_started_and_other_names_are_still_tracked():
    said = child(
        """
        import sys
        from multiprocessing import resource_tracker, shared_memory
        from kvd.arena import Segment
        tracker = resource_tracker._resource_tracker
        segment = Segment.create(sys.argv[1], 4096)
        try:
            Segment.create(sys.argv[1], 4096)
        except FileExistsError:
            pass
        segment.close(unlink=True)
        before = tracker._fd
        other = shared_memory.SharedMemory(sys.argv[1], create=True, size=4096)
        print(before, tracker._fd is not None)
        other.close()
        other.unlink()
        """,
        NAME,
    )
    assert said == "None True"


def test_name_that_is_taken_is_left_alone(segment: Segment):
    segment.back(0, PAGE)
    segment.buffer[0] = 7
    with pytest.raises(FileExistsError):
        Segment.create(NAME, PAGE)
    assert os.path.samestat(os.stat(f"{SHM_DIR}/{NAME}"), os.fstat(segment._fd))
    assert segment.buffer[0] == 7


def test_failed_creation_leaves_nothing_behind():
    said = child(
        """
        import os, resource, sys
        from multiprocessing import resource_tracker
        from kvd.arena import Segment
        descriptors = os.listdir("/proc/self/fd")
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        try:
            Segment.create(sys.argv[1], 4 << 30)
        except OSError as error:
            print(error.strerror)
        print(os.path.exists("/dev/shm/" + sys.argv[1]))
        print(resource_tracker._resource_tracker._fd)
        print(len(os.listdir("/proc/self/fd")) - len(descriptors))
        """,
        NAME,
    )
    assert said.splitlines() == ["Cannot allocate memory", "False", "None", "0"]


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1, 1 << 63])
def test_sizes_that_are_refused(size: int):
    with pytest.raises(ValueError, match="size"):
        Segment.create(NAME, size)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "a" * 256])
def test_names_that_are_refused(name: str):
    with pytest.raises(ValueError, match="name"):
        Segment.create(name, PAGE)
    with pytest.raises(ValueError, match="name"):
        remove_segment(name)


def test_backing_and_punching_are_what_the_operating_system_counts(segment: Segment):
    segment.back(4 * PAGE, 8 * PAGE)
    segment.back(20 * PAGE, PAGE)
    # At once, before anything is written: pages that were only allocated would look like a hole.
    assert segment.backed_ranges() == [ByteRange(4 * PAGE, 8 * PAGE), ByteRange(20 * PAGE, PAGE)]
    assert segment.backed_bytes() == 9 * PAGE
    view = np.frombuffer(segment.buffer, np.uint8)
    assert not view[4 * PAGE : 12 * PAGE].any()
    view[4 * PAGE : 12 * PAGE] = 7
    assert segment.backed_bytes() == 9 * PAGE

    segment.punch(6 * PAGE, 2 * PAGE)
    assert segment.backed_bytes() == 7 * PAGE
    assert segment.backed_ranges() == [
        ByteRange(4 * PAGE, 2 * PAGE),
        ByteRange(8 * PAGE, 4 * PAGE),
        ByteRange(20 * PAGE, PAGE),
    ]
    segment.punch(0, 64 * PAGE)
    assert segment.backed_bytes() == 0
    segment.punch(0, 64 * PAGE)
    segment.back(63 * PAGE, PAGE)
    assert segment.backed_ranges() == [ByteRange(63 * PAGE, PAGE)]
    assert not view[63 * PAGE :].any()
    del view


def test_backed_range_is_mapped_without_further_faults(segment: Segment):
    segment.back(0, 64 * PAGE)
    view = np.frombuffer(segment.buffer, np.uint8)
    resident = (ctypes.c_ubyte * 64)()
    libc = ctypes.CDLL(None)
    assert (
        libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(64 * PAGE), resident) == 0
    )
    assert all(page & 1 for page in resident)
    del view


@pytest.mark.parametrize(
    ("offset", "length"),
    [(1, PAGE), (0, PAGE - 1), (-PAGE, PAGE), (0, 0), (64 * PAGE, PAGE), (0, 65 * PAGE)],
)
def test_ranges_that_are_refused(segment: Segment, offset: int, length: int):
    for operation in (segment.back, segment.punch):
        with pytest.raises(ValueError, match="bytes at"):
            operation(offset, length)
    assert segment.backed_bytes() == 0


def test_more_than_the_file_system_has_is_an_error_and_changes_nothing():
    shm = os.statvfs(SHM_DIR)
    if shm.f_blocks == 0:
        pytest.skip(f"{SHM_DIR} has no size limit here")
    too_much = (shm.f_blocks * shm.f_frsize // PAGE + 1) * PAGE
    segment = Segment.create(NAME, PAGE + too_much)
    segment.back(0, PAGE)
    with pytest.raises(NoSpace, match="no space") as caught:
        segment.back(PAGE, too_much)
    assert (caught.value.segment, caught.value.offset) == (NAME, PAGE)
    assert (caught.value.length, caught.value.backed_bytes) == (too_much, PAGE)
    assert 0 < caught.value.free_bytes < too_much
    assert segment.backed_ranges() == [ByteRange(0, PAGE)]
    segment.close(unlink=True)


def private_shm(size: str) -> tuple[str, ...]:
    """The beginning of a command that runs the rest with a /dev/shm of its own, of `size`."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("NOT TESTED: a full /dev/shm needs util-linux' unshare")
    begin = [unshare, "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    begin += ["sh", "-c", f'mount -t tmpfs -o size={size} none {SHM_DIR} && exec "$@"', "sh"]
    if subprocess.run([*begin, "true"], capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED: a full /dev/shm needs the right to mount one")
    return tuple(begin)


def test_a_full_shm_is_an_error_that_rolls_back():
    said = child(
        """
        from kvd.arena import PAGE, NoSpace, Segment
        segment = Segment.create("full", 1024 * PAGE)
        segment.back(0, 100 * PAGE)
        segment.buffer[0 : 100 * PAGE] = bytes([7]) * 100 * PAGE
        try:
            segment.back(100 * PAGE, 200 * PAGE)
        except NoSpace as error:
            print(error.free_bytes // PAGE, error.backed_bytes // PAGE)
        print(segment.backed_bytes() // PAGE, segment.backed_ranges() == [(0, 100 * PAGE)])
        print(segment.buffer[0 : 100 * PAGE] == bytes([7]) * 100 * PAGE)
        segment.back(100 * PAGE, 156 * PAGE)
        segment.punch(0, 100 * PAGE)
        segment.back(900 * PAGE, 100 * PAGE)
        print(segment.backed_bytes() // PAGE)
        segment.close(unlink=True)
        """,
        before=private_shm("1m"),
    )
    assert said.splitlines() == ["156 100", "100 True", "True", "256"]


def test_read_through_a_read_only_mapping_fills_a_hole_and_is_named(segment: Segment):
    segment.back(0, PAGE)
    fd = segment.open_reader(1)
    child(
        """
        import mmap, sys
        view = mmap.mmap(int(sys.argv[1]), 0, prot=mmap.PROT_READ)
        assert view[10 * 4096] == 0
        """,
        fd,
        fds=(fd,),
    )
    os.close(fd)
    assert segment.backed_ranges() == [ByteRange(0, PAGE), ByteRange(10 * PAGE, PAGE)]
    assert segment.backed_bytes() == 2 * PAGE
    segment.punch(10 * PAGE, PAGE)
    assert segment.backed_ranges() == [ByteRange(0, PAGE)]


def test_read_only_descriptor_gives_no_way_to_write(segment: Segment):
    segment.back(0, PAGE)
    segment.buffer[5] = 99
    first, second = segment.open_reader(1), segment.open_reader(1)
    os.close(first)
    with mmap.mmap(second, 0, prot=mmap.PROT_READ) as view:
        assert view[5] == 99
    with pytest.raises(PermissionError):
        mmap.mmap(second, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(second, b"x")
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(second, 0)
    assert not os.get_inheritable(second)
    os.close(second)


def test_failed_mapping_of_the_descriptor_does_not_remove_the_segment():
    segment = Segment.create(NAME, 4 << 30)
    fd = segment.open_reader(1)
    said = child(
        """
        import mmap, resource, sys
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        try:
            mmap.mmap(int(sys.argv[1]), 0, prot=mmap.PROT_READ)
        except OSError as error:
            print(error.strerror)
        """,
        fd,
        fds=(fd,),
    )
    os.close(fd)
    assert said == "Cannot allocate memory"
    assert list_segments(PREFIX) == [NAME]
    segment.close(unlink=True)


def test_segment_goes_on_when_somebody_removes_or_replaces_its_name(segment: Segment):
    segment.back(0, PAGE)
    segment.buffer[0] = 7
    os.unlink(f"{SHM_DIR}/{NAME}")
    usurper = Segment.create(NAME, PAGE)
    fd = segment.open_reader(1)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
        assert view[0] == 7
    os.close(fd)
    segment.close(unlink=True)
    assert list_segments(PREFIX) == [NAME]  # the usurper's
    usurper.close(unlink=True)


@pytest.mark.parametrize("whole_group", [False, True])
def test_segment_outlives_the_sigkill_of_its_creator(whole_group: bool):
    code = """
    import sys, signal
    from kvd.arena import Segment
    segment = Segment.create(sys.argv[1], 4096)
    segment.back(0, 4096)
    segment.buffer[:3] = b"abc"
    print("there", flush=True)
    signal.pause()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), NAME],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as creator:
        assert creator.stdout is not None
        assert creator.stdout.readline() == b"there\n"
        if whole_group:
            os.killpg(creator.pid, signal.SIGKILL)
        else:
            creator.kill()
        # End of file: everybody who had the pipe is gone, a resource tracker included.
        assert creator.stdout.read() == b""
    assert list_segments(PREFIX) == [NAME]
    with open(f"{SHM_DIR}/{NAME}", "rb") as file:
        assert file.read(3) == b"abc"
    assert remove_segment(NAME)
    assert not remove_segment(NAME)


def test_segment_outlives_a_clean_exit_that_did_not_unlink():
    child(
        """
        import sys
        from kvd.arena import Segment
        Segment.create(sys.argv[1], 4096).close(unlink=False)
        """,
        NAME,
    )
    assert list_segments(PREFIX) == [NAME]
    assert remove_segment(NAME)


@pytest.mark.parametrize(
    "view_of",
    [
        lambda buffer: np.frombuffer(buffer, np.uint8),
        lambda buffer: buffer[PAGE:],
        lambda buffer: (ctypes.c_char * PAGE).from_buffer(buffer),
    ],
    ids=["numpy", "slice", "ctypes"],
)
def test_close_under_a_view_is_refused_and_changes_nothing(segment: Segment, view_of):
    view = view_of(segment.buffer)
    for _ in range(2):
        with pytest.raises(MappingInUse, match=NAME):
            segment.close(unlink=True)
    assert list_segments(PREFIX) == [NAME]
    segment.back(PAGE, PAGE)
    segment.buffer[PAGE] = 3
    del view
    segment.close(unlink=True)
    segment.close(unlink=True)
    assert list_segments(PREFIX) == []
    with pytest.raises(ValueError, match="closed"):
        segment.back(0, PAGE)
    with pytest.raises(ValueError, match="closed"):
        _ = segment.buffer


def test_closing_leaks_no_descriptor_and_no_memory():
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        segment = Segment.create(NAME, 16 * PAGE)
        segment.back(0, 16 * PAGE)
        segment.close(unlink=True)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with open("/proc/self/maps") as maps:
        assert NAME not in maps.read()


def test_only_own_regular_files_are_listed_and_removed(segment: Segment):
    others = {kind: f"{SHM_DIR}/{PREFIX}.{kind}" for kind in ("link", "fifo", "directory")}
    os.symlink(f"{SHM_DIR}/{NAME}", others["link"])
    os.mkfifo(others["fifo"])
    os.mkdir(others["directory"])
    foreign = f"{SHM_DIR}/{PREFIX}.foreign"
    if os.geteuid() == 0:
        os.close(os.open(foreign, os.O_CREAT | os.O_EXCL, 0o600))
        os.chown(foreign, 12345, 12345)
    try:
        assert list_segments(PREFIX) == [NAME]
        for kind in (*others, "foreign"):
            assert not remove_segment(f"{PREFIX}.{kind}")
        assert os.path.islink(others["link"])
        assert os.path.exists(foreign) == (os.geteuid() == 0)
    finally:
        os.unlink(others["link"])
        os.unlink(others["fifo"])
        os.rmdir(others["directory"])
        with contextlib.suppress(FileNotFoundError):
            os.unlink(foreign)


def test_the_next_page_with_memory_is_found_without_filling_any(segment: Segment) -> None:
    assert segment.next_backed(0) is None
    segment.back(4 * PAGE, 2 * PAGE)
    assert segment.next_backed(0) == 4 * PAGE
    assert segment.next_backed(5 * PAGE) == 5 * PAGE
    assert segment.next_backed(6 * PAGE) is None
    assert segment.backed_bytes() == 2 * PAGE


def test_slots_become_as_few_ranges_as_there_are_gaps() -> None:
    assert byte_ranges([], PAGE) == []
    assert byte_ranges({7, 3, 4, 0}, PAGE) == [
        ByteRange(0, PAGE),
        ByteRange(3 * PAGE, 2 * PAGE),
        ByteRange(7 * PAGE, PAGE),
    ]
