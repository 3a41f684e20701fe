"""What settings are warned of: a budget that the machine does not have, or that is too small for a
model."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvd.advice import Needs, known_models, of_machine, of_model
from kvd.arena import Segment
from kvd.instance import segment_prefix
from kvd.limits import Sources, ceilings
from kvd.settings import Settings
from tests.shell.raw import BLOCK_TOKENS, raw_client
from tests.support import running_daemon

MIB = 1 << 20
SMALL = Settings(instance="test-advice", max_memory=64 * MIB)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """This machine, in a cgroup with a limit of 256 MiB."""
    root = tmp_path / "cgroup"
    root.mkdir()
    (root / "cgroup.controllers").write_text("memory\n")
    (root / "memory.max").write_text(f"{256 * MIB}\n")
    (root / "memory.current").write_text("0\n")
    own = tmp_path / "own"
    own.write_text("0::/\n")
    return Sources(own_cgroup=str(own), cgroup_root=str(root))


def test_a_budget_that_is_there_is_not_warned_of(sources: Sources) -> None:
    assert of_machine(SMALL, sources) == []


def test_a_budget_beyond_the_cgroup_is(sources: Sources) -> None:
    (warning,) = of_machine(replace(SMALL, max_memory=193 * MIB), sources)
    assert "max_memory (193MiB), with 64MiB beside it, is more than the limit of" in warning
    assert f"{sources.cgroup_root} (256MiB)" in warning
    assert of_machine(replace(SMALL, max_memory=192 * MIB), sources) == []


def test_a_budget_beyond_dev_shm_and_the_machine_is() -> None:
    most = ceilings()
    assert most.shm is not None
    beyond = max(most.shm, most.machine) + MIB
    found = of_machine(replace(SMALL, max_memory=beyond))
    assert any("/dev/shm has" in each and "remount" in each for each in found)
    assert any("this machine has available" in each for each in found)


def test_what_the_instance_has_already_counts_as_there(tmp_path: Path) -> None:
    """Its memory is not available to others, and it is the budget's."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1048576 kB\nMemAvailable: 126976 kB\n")  # 124 MiB
    sources = Sources(meminfo=str(meminfo), cgroup_root=str(tmp_path))
    (warning,) = of_machine(SMALL, sources)
    assert "this machine has available (124MiB)" in warning
    segment = Segment.create(f"{segment_prefix(SMALL.instance)}.arena-x", 4 * MIB)
    try:
        segment.back(0, 4 * MIB)
        assert of_machine(SMALL, sources) == []
    finally:
        segment.close(unlink=True)


def test_a_model_of_which_too_little_fits() -> None:
    """32 tokens of 1 MiB: 8 sequences of 1,024 tokens need 256 MiB."""
    model = Needs("big", 32, MIB)
    settings = replace(SMALL, max_context=1024)
    assert of_model(settings, model, 256 * MIB) is None
    warning = of_model(settings, model, 256 * MIB - 1)
    assert warning is not None
    assert "8 sequences (n_seq_max) of 1024 tokens (max_context) of model big" in warning
    assert "take 256MiB" in warning
    assert "8160 of 8192 tokens fit" in warning
    assert of_model(replace(settings, max_context=0), model, 1) is None


def test_models_of_an_instance_are_known_and_warned_of(tmp_path: Path) -> None:
    """Also without asking its daemon, which warns when the model is registered."""
    with running_daemon("--max-memory", "2MiB", runtime_dir=tmp_path / "rt") as daemon:
        with raw_client(daemon, staging_bytes=0) as client:
            client.register("tiny")
        (model,) = known_models(daemon.instance)
        assert (model.name, model.block_tokens) == ("tiny", BLOCK_TOKENS)
        assert model.stride_bytes % 4096 == 0
        assert list(known_models("test-nobody")) == []
        assert "warning budget is small tenant=default" in daemon.log.read_text()
        assert "of model tiny take" in daemon.log.read_text()
