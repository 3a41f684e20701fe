"""The papers name what there is: tests, files, targets of make. What the README says is run in
tests/e2e/test_docs.py; what PROTOCOL.md says is compared in tests/proto/test_protocol_doc.py."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAPERS = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    ROOT / "proto" / "PROTOCOL.md",
    ROOT / "systemd" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
WRITTEN = {"bench/report.json", "bench/report.md"}
"""By make, not by us."""
OTHERS = {"examples/server/server.py"}
"""Of llama-cpp-python."""
papers = pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)


@papers
def test_each_file_that_is_named_exists(paper: Path) -> None:
    """Those with a folder: `tests/core/test_tree.py`, `systemd/kvd.service`."""
    named = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.\w+)`", paper.read_text())
    ours = {name for name in named if (ROOT / name.split("/")[0]).is_dir()} - WRITTEN - OTHERS
    assert {name for name in ours if not (ROOT / name).exists()} == set()


@papers
def test_each_link_leads_somewhere(paper: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", paper.read_text())
    assert [link for link in links if not (paper.parent / link).exists()] == []


@papers
def test_each_target_of_make_that_is_named_exists(paper: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^    )make ([a-z-]+)", paper.read_text(), re.MULTILINE)
    assert set(named) <= set(targets)


def test_a_test_stands_behind_each_promise() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    table = text.split("## What is promised")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10
    without = [row for row in rows if not re.search(r"`tests/[\w/]+\.py`", row)]
    assert without == []


def test_the_papers_name_enough_for_these_tests_to_mean_something() -> None:
    named = re.findall(r"`tests/[\w/]+\.py`", "".join(paper.read_text() for paper in PAPERS))
    assert len(set(named)) > 20
