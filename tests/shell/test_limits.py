"""Memory limits: the machine's real numbers, and cgroups as files in the kernel's format, since the
memory controller of the machine that runs the tests cannot be had everywhere."""

import os
import timeit
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from kvd.limits import (
    RESERVE_BYTES,
    NotEnoughRoom,
    Sources,
    ceilings,
    check_room,
    longest_segment,
    memory_headroom,
)

MIB = 1024 * 1024


class CgroupTree:
    """A cgroup v2 hierarchy on disk, and us in one of its cgroups."""

    def __init__(self, root: Path) -> None:
        self.root = root / "cgroup"
        self.own = root / "own"
        self.root.mkdir()
        (self.root / "cgroup.controllers").write_text("cpu memory\n")
        self.sources = Sources(own_cgroup=str(self.own), cgroup_root=str(self.root))

    def enter(self, path: str) -> None:
        self.own.write_text(f"1:name=systemd:/other\n0::{path}\n")

    def add(self, path: str, limit: str, current: int, inactive_file: int = 0) -> None:
        directory = self.root / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{current}\n")
        (directory / "memory.stat").write_text(
            f"anon 1\nfile 999999999999\ninactive_file {inactive_file}\nactive_file 5\n"
        )


@pytest.fixture
def tree(tmp_path: Path) -> CgroupTree:
    return CgroupTree(tmp_path)


def test_real_numbers():
    room = memory_headroom()
    assert room.machine == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    shm = os.statvfs("/dev/shm")
    assert room.shm is None or room.shm == pytest.approx(shm.f_bavail * shm.f_frsize, rel=0.1)
    assert room.cgroup is None or room.cgroup >= 0
    assert check_room(4096).machine > RESERVE_BYTES


def test_least_of_our_cgroup_and_its_ancestors_counts(tree: CgroupTree):
    tree.add("a", str(1000 * MIB), 400 * MIB)
    tree.add("a/b", "max", 300 * MIB)
    tree.add("a/b/c", str(800 * MIB), 100 * MIB)
    tree.add("a/other", str(10 * MIB), 10 * MIB)
    tree.enter("/a/b/c")
    room = memory_headroom(sources=tree.sources)
    assert (room.cgroup, room.cgroup_path) == (600 * MIB, f"{tree.root}/a")
    tree.add("a/b/c", str(800 * MIB), 300 * MIB)
    room = memory_headroom(sources=tree.sources)
    assert (room.cgroup, room.cgroup_path) == (500 * MIB, f"{tree.root}/a/b/c")
    tree.add("a/b/c", str(800 * MIB), 801 * MIB)  # a limit that was lowered under our feet
    assert memory_headroom(sources=tree.sources).cgroup == 0


@pytest.mark.parametrize("path", ["/", "/../sibling", "/is/gone (deleted)"])
def test_container_sees_its_own_limit_at_the_root(tree: CgroupTree, path: str):
    tree.enter(path)
    assert memory_headroom(sources=tree.sources).cgroup is None
    tree.add("", str(500 * MIB), 100 * MIB)
    tree.add("../sibling", str(5 * MIB), 0)
    room = memory_headroom(sources=tree.sources)
    assert (room.cgroup, room.cgroup_path) == (400 * MIB, str(tree.root))


def test_no_limit_and_no_cgroup_v2_are_unlimited(tree: CgroupTree):
    tree.add("a", "max", 5)
    tree.enter("/a")
    assert memory_headroom(sources=tree.sources).cgroup is None
    tree.add("a", "100", 5)
    assert memory_headroom(sources=tree.sources).cgroup == 95
    (tree.root / "cgroup.controllers").unlink()
    assert memory_headroom(sources=tree.sources).cgroup is None


def test_cgroup_that_is_short_is_named(tree: CgroupTree):
    tree.add("a", str(500 * MIB), 100 * MIB)
    tree.enter("/a")
    assert check_room(400 * MIB - RESERVE_BYTES, sources=tree.sources).cgroup == 400 * MIB
    with pytest.raises(NotEnoughRoom, match=r"memory\.max of .*/a") as caught:
        check_room(400 * MIB - RESERVE_BYTES + 1, sources=tree.sources)
    assert caught.value.needed == 400 * MIB - RESERVE_BYTES + 1
    assert caught.value.available == 400 * MIB - RESERVE_BYTES
    assert check_room(400 * MIB, reserve=0, sources=tree.sources)


def test_pages_of_files_do_not_make_a_cgroup_look_full(tree: CgroupTree):
    tree.add("a", str(500 * MIB), 499 * MIB, inactive_file=300 * MIB)
    tree.add("a/b", str(400 * MIB), 300 * MIB, inactive_file=10 * MIB)
    tree.enter("/a/b")
    assert memory_headroom(sources=tree.sources).cgroup == 1 * MIB
    assert check_room(MIB, sources=tree.sources).cgroup == 110 * MIB
    with pytest.raises(NotEnoughRoom, match="/a/b") as caught:
        check_room(111 * MIB, reserve=0, sources=tree.sources)
    assert caught.value.available == 110 * MIB


def test_machine_that_is_short_is_named(tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal: 900000 kB\nMemAvailable:  102400 kB\n")
    sources = Sources(meminfo=str(tmp_path / "meminfo"), cgroup_root=str(tmp_path))
    assert check_room(36 * MIB, sources=sources).machine == 100 * MIB
    with pytest.raises(NotEnoughRoom, match="MemAvailable") as caught:
        check_room(37 * MIB, sources=sources)
    assert (caught.value.needed, caught.value.available) == (37 * MIB, 36 * MIB)
    (tmp_path / "meminfo").write_text("MemAvailable: 1024 kB\n")
    with pytest.raises(NotEnoughRoom) as caught:
        check_room(1, sources=sources)
    assert caught.value.available == 0


def test_shm_that_is_short_is_named():
    room = memory_headroom()
    if room.shm is None:
        pytest.skip("/dev/shm has no size limit here")
    with pytest.raises(NotEnoughRoom, match="the size of /dev/shm") as caught:
        check_room(2 * room.shm)
    assert caught.value.available == pytest.approx(room.shm, rel=0.1)


def test_a_memfd_needs_no_room_in_shm(tree: CgroupTree, tmp_path: Path):
    """Where /dev/shm is small, as it is in containers, stagings are had all the same."""
    tree.add("a", "max", 0)
    tree.enter("/a")
    sources = replace(tree.sources, shm=str(tmp_path))
    room = memory_headroom(sources=sources)
    assert room.shm is not None
    sources = replace(sources, meminfo=str(tmp_path / "meminfo"))
    (tmp_path / "meminfo").write_text(f"MemAvailable: {4 * room.shm // 1024} kB\n")
    check_room(2 * room.shm, in_shm=False, sources=sources)
    with pytest.raises(NotEnoughRoom, match="the size of"):
        check_room(2 * room.shm, sources=sources)


def test_it_is_fast_enough_to_ask_before_every_block(tree: CgroupTree):
    for path in ("a", "a/b", "a/b/c"):
        tree.add(path, str(10_000 * MIB), 100 * MIB)
    tree.enter("/a/b/c")
    ask = timeit.Timer(lambda: check_room(MIB, sources=tree.sources))
    assert min(ask.repeat(repeat=20, number=20)) / 20 < 100e-6


# --- what there is at most


def test_the_ceilings_are_the_systems(tmp_path: Path) -> None:
    tree = CgroupTree(tmp_path)
    tree.add("", "max", 1)
    tree.add("a", str(5 * MIB), 4 * MIB)
    tree.add("a/b", str(7 * MIB), 1)
    tree.enter("/a/b")
    found = ceilings(tree.sources)
    assert (found.cgroup, found.cgroup_path) == (5 * MIB, f"{tree.root}/a")
    assert found.machine == psutil.virtual_memory().total
    shm = os.statvfs("/dev/shm")
    assert found.shm == shm.f_blocks * shm.f_frsize
    tree.enter("/")
    assert ceilings(tree.sources).cgroup is None
    assert longest_segment(tree.sources) == found.shm


class OldCgroupTree(CgroupTree):
    """The hierarchy of the memory controller of cgroup v1, as it is mounted everywhere."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        (self.root / "cgroup.controllers").unlink()

    def enter(self, path: str) -> None:
        self.own.write_text(f"12:cpu,cpuacct:/other\n9:memory:{path}\n1:name=systemd:/x\n0::/x\n")

    def add(self, path: str, limit: str, current: int, inactive_file: int = 0) -> None:
        directory = self.root / "memory" / path
        directory.mkdir(parents=True, exist_ok=True)
        limit = "9223372036854771712" if limit == "max" else limit
        (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (directory / "memory.usage_in_bytes").write_text(f"{current}\n")
        (directory / "memory.stat").write_text(
            f"cache 1\ninactive_file 7\ntotal_inactive_file {inactive_file}\n"
        )


def test_the_limits_of_cgroup_v1_count_the_same(tmp_path: Path) -> None:
    tree = OldCgroupTree(tmp_path)
    tree.enter("/a/b/c")
    assert memory_headroom(sources=tree.sources).cgroup is None
    tree.add("a", str(1000 * MIB), 400 * MIB)
    tree.add("a/b", "max", 300 * MIB)
    tree.add("a/b/c", str(800 * MIB), 100 * MIB, inactive_file=30 * MIB)
    tree.add("a/other", str(10 * MIB), 10 * MIB)
    room = memory_headroom(sources=tree.sources)
    assert (room.cgroup, room.cgroup_path) == (600 * MIB, f"{tree.root}/memory/a")
    tree.add("a/b/c", str(800 * MIB), 750 * MIB, inactive_file=30 * MIB)
    assert memory_headroom(sources=tree.sources).cgroup == 50 * MIB
    assert memory_headroom(sources=tree.sources, count_file_cache=True).cgroup == 80 * MIB
    assert ceilings(tree.sources).cgroup == 800 * MIB
    with pytest.raises(NotEnoughRoom, match=r"memory\.limit_in_bytes of .*memory/a/b/c"):
        check_room(81 * MIB, reserve=0, sources=tree.sources)


def test_a_container_under_v1_sees_its_limit_at_the_root(tmp_path: Path) -> None:
    tree = OldCgroupTree(tmp_path)
    tree.enter("/docker/0123456789abcdef")
    tree.add("", str(500 * MIB), 100 * MIB)
    assert memory_headroom(sources=tree.sources).cgroup == 400 * MIB
