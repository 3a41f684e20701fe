"""What `make bench` measures of store and fetch runs here, and its report says what it should.

Of the peers, those that are there: `make bench-peers` gets them. No times are compared.
"""

import dataclasses
import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bench import bulk, plots, report
from bench.peers.kvd import Kvd
from bench.peers.lmcache import LMCache
from bench.peers.memcached import Memcached
from bench.peers.peer import LeftOut, Peer
from bench.peers.redis import Redis

ROOT = Path(__file__).resolve().parents[2]
SIZES = (64 << 10, 2 << 20)


@pytest.mark.timeout(300)
def test_rows_of_kvd_and_of_each_peer_that_is_there() -> None:
    found = bulk.measure(2, SIZES)
    peers = {row.peer.split()[0] for row in found.rows if row.peer}
    left_out = {each.split()[0] for each in found.remarks if "left out" in each}
    assert peers | left_out == {"Redis", "memcached", "LMCache"}
    assert not peers & left_out
    floors = [row.name for row in found.rows if row.floor_name == bulk.MEMCPY]
    assert floors == [
        "store of 64 KiB, kvd",
        f"{bulk.GET}, kvd",
        "store of 2 MiB, kvd",
        "fetch of 2 MiB, kvd",
    ]
    assert all(row.value > 0 and row.floor > 0 for row in found.rows)


@pytest.mark.parametrize("kind", [Kvd, Redis, Memcached, LMCache])
@pytest.mark.timeout(300)
def test_a_peer_gives_back_what_was_stored_last(kind: type[Peer]) -> None:
    peer = kind()
    try:
        try:
            peer.start(max(SIZES))
        except LeftOut as why:
            pytest.skip(str(why))
        for size in SIZES:
            for number in range(3):
                payload = np.random.default_rng(number).integers(0, 256, size, np.uint8)
                into = np.zeros(size, np.uint8)
                assert peer.store("key", payload) > 0
                assert peer.fetch("key", into) > 0
                assert np.array_equal(into, payload)
    finally:
        peer.stop()


@pytest.mark.parametrize("kind", [Redis, Memcached])
def test_a_payload_longer_than_a_value_is_several(
    kind: type[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[kind.__module__], "MOST", 300_000)
    test_a_peer_gives_back_what_was_stored_last(kind)


def test_other_bytes_end_the_measurement() -> None:
    class Liar:
        name = "liar"

        def store(self, key: str, payload: np.ndarray) -> float:
            return 1.0

        def fetch(self, key: str, into: np.ndarray) -> float:
            into[:] = 7
            return 1.0

    with pytest.raises(SystemExit, match="liar has given other bytes"):
        bulk._measure(4096, 1, [Liar()])


def test_a_peer_that_is_faster_is_said_to_be() -> None:
    slow = report.Row("store of 16 MiB, kvd", 2.0, "ms", 1.0, "LMCache 1", 2.0, 0.1, "LMCache 1")
    assert bulk._is_slower(slow)
    said = bulk._remark(slow)
    assert said.startswith("LMCache 1 is faster at store of 16 MiB: kvd takes 2.00 times as long. ")
    assert bulk.WHY["store", "LMCache"] in said
    assert not bulk._is_slower(dataclasses.replace(slow, ratio=0.9))
    assert not bulk._is_slower(dataclasses.replace(slow, peer=""))


def test_the_paper_has_each_row_under_its_part_and_says_noise() -> None:
    machine = {"cpu": "x", "cores": 2, "kernel": "6", "python": "3", "load_before": 1.5}
    quiet = report.row("quiet", [1.0, 1.0, 1.0], "ms", [0.5], "a floor")
    noisy = report.row("noisy", [1.0, 2.0, 9.0], "us", [1.0], "another")
    text = report.paper({"One": [quiet], "Two": [noisy]}, ["Redis was left out."], machine)
    one, two = text.split("## One")[1].split("## Two")
    assert "| quiet | 1.000 ms | 0.000 | 2.000 | 0.500 ms | a floor |" in one
    assert "| noisy | 2.000 us ~ |" in two
    assert "x, 2 cores" in text
    assert "1.50" in text
    assert text.endswith("- Redis was left out.\n")


def test_plots_are_drawn_if_matplotlib_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"Store and fetch": [report.row("a", [1.0, 2.0], "ms", [1.0], "b")]}
    drawn = plots.draw(parts, tmp_path)
    if importlib.util.find_spec("matplotlib"):
        assert [path.name for path in drawn] == ["report-store-and-fetch.png"]
        assert drawn[0].read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert plots.draw(parts, tmp_path) == []


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", ROOT / "scripts" / "peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peers_that_cannot_be_had_are_no_failure(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "run", lambda command: False)
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    assert script.get_program("redis-server", "redis-server", tmp_path).startswith("left out: ")
    assert script.get_lmcache("torch", ["lmcache==1"], tmp_path / "lmcache").startswith("left out")


def test_what_is_there_is_not_got_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "run", lambda command: pytest.fail("something was got"))
    (tmp_path / "complete").write_text("1.2")
    assert script.get_lmcache("torch", ["lmcache==1.2"], tmp_path) == "is there"
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert script.get_program("memcached", "memcached", tmp_path) == "is on PATH"


def test_the_makefile_and_the_script_name_what_there_is() -> None:
    assert "scripts/peers.py\n" in (ROOT / "Makefile").read_text()
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["kvd"]["bench-peers"]
    assert asked["lmcache"][0].startswith("lmcache==")
