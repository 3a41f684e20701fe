"""Warm lists: a daemon that starts cold warms itself; one that starts warm does not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

import kvd_client
from tests.llama import tiny_models
from tests.shell.raw import until
from tests.support import Daemon, running_daemon, start_daemon

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

SECONDS = 120.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_llama(tmp_path_factory.mktemp("tiny") / "llama.gguf")


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    """Two lists of the same model, the second of two prompts, and with an end."""
    for name, n_tokens in (("a", 70), ("b", 33), ("c", 100)):
        tokens = np.random.default_rng(n_tokens).integers(1, tiny_models.N_VOCAB, n_tokens)
        (tmp_path / f"{name}.json").write_text(json.dumps(tokens.tolist()))
    path = tmp_path / "kvd.toml"
    path.write_text(
        f"""
        max_memory = "64MiB"
        keep_on_stop = true
        [warm.one]
        model = "{tiny}"
        files = ["{tmp_path}/a.json"]
        threads = 1
        [warm.two]
        model = "{tiny}"
        files = ["{tmp_path}/b.json", "{tmp_path}/c.json"]
        type_k = "q8_0"
        type_v = "q8_0"
        threads = 1
        ttl = "1h"
        """
    )
    return path


def pins(daemon: Daemon) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=0, timeout=30) as client:
        for row in client.pins():
            found.setdefault(row["owner"], []).append(row["tokens"])
            assert (row["expires_seconds"] is None) == (row["owner"] == "warm-one")
    return {owner: sorted(tokens) for owner, tokens in found.items()}


def test_a_cold_start_warms_itself_and_a_warm_one_does_not(config: Path, tmp_path: Path) -> None:
    expected = {"warm-one": [70], "warm-two": [33, 100]}
    flags = ("--config", str(config), "--keep-on-stop")
    first = start_daemon(*flags, runtime_dir=tmp_path / "rt")
    until(lambda: pins(first) == expected, SECONDS)
    until(lambda: first.log.read_text().count(" warmed list=") == 2, SECONDS)
    first.kill()
    with running_daemon(
        *flags, "--no-keep-on-stop", runtime_dir=tmp_path / "rt", instance=first.instance
    ) as second:
        assert pins(second) == expected
        assert not children(second)
    assert first.log.read_text().count("info warming") == 2, "both by the first"


def children(daemon: Daemon) -> list[psutil.Process]:
    return psutil.Process(daemon.process.pid).children()


@pytest.fixture
def slow(tiny: Path, tmp_path: Path) -> tuple[Path, Callable[[], None]]:
    """A list whose prompt is a pipe that nobody has written to, and what writes to it."""
    fifo = tmp_path / "slow.json"
    os.mkfifo(fifo)
    path = tmp_path / "kvd.toml"
    path.write_text(
        f'max_memory = "64MiB"\n[warm.slow]\nmodel = "{tiny}"\nfiles = ["{fifo}"]\nthreads = 1\n'
    )

    def write() -> None:
        fifo.write_text("[1, 2, 3]")

    return path, write


def test_the_daemon_serves_meanwhile_and_ends_what_it_has_begun(
    slow: tuple[Path, Callable[[], None]], tmp_path: Path
) -> None:
    path, _ = slow
    with running_daemon("--config", str(path), runtime_dir=tmp_path / "rt") as daemon:
        until(lambda: len(children(daemon)) == 1, SECONDS)
        (child,) = children(daemon)
        assert pins(daemon) == {}
        until(lambda: child.nice() == 19, SECONDS)
        score = Path(f"/proc/{child.pid}/oom_score_adj")
        until(lambda: score.read_text().strip() == "1000", SECONDS)
        assert daemon.stop() == 0
        assert not child.is_running()
    assert "not warmed list=slow code=-15" in daemon.log.read_text()


def test_it_goes_on_when_the_other_end_is_there(
    slow: tuple[Path, Callable[[], None]], tmp_path: Path
) -> None:
    path, write = slow
    with running_daemon("--config", str(path), runtime_dir=tmp_path / "rt") as daemon:
        until(lambda: len(children(daemon)) == 1, SECONDS)
        write()
        until(lambda: " warmed list=slow" in daemon.log.read_text(), SECONDS)
        with kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as client:
            (row,) = client.pins()
        assert (row["owner"], row["tokens"]) == ("warm-slow", 3)
        assert not children(daemon)


def test_a_list_that_cannot_be_done_is_said_and_the_next_one_is_done(
    config: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text("[")
    with running_daemon("--config", str(config), runtime_dir=tmp_path / "rt") as daemon:
        until(lambda: " warmed list=two" in daemon.log.read_text(), SECONDS)
        assert pins(daemon) == {"warm-two": [33, 100]}
        (line,) = (each for each in daemon.log.read_text().splitlines() if "not warmed" in each)
        assert "list=one code=2" in line
        assert "a.json" in line
