"""What the README and the examples say is run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import Daemon

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PAPERS = {"README.md": 2, "docs/llama.md": 2}
"""And how many pieces of Python each has."""
BLOCKS = {
    paper: re.findall(r"```python\n(.*?)```", (ROOT / paper).read_text(), re.DOTALL)
    for paper in PAPERS
}


@pytest.mark.parametrize(
    ("paper", "index"), [(paper, index) for paper in PAPERS for index in range(PAPERS[paper])]
)
def test_python_in_the_papers_runs(
    paper: str, index: int, daemon: Daemon, smollm2: Path, tmp_path: Path
) -> None:
    code = BLOCKS[paper][index]
    (tmp_path / "model.gguf").symlink_to(smollm2)
    run([sys.executable, "-c", code], tmp_path, KVD_RUNTIME_DIR=str(daemon.runtime_dir))


def test_all_python_of_the_papers_is_run() -> None:
    assert {paper: len(blocks) for paper, blocks in BLOCKS.items()} == PAPERS


def test_commands_in_the_readme_run(daemon: Daemon, smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(smollm2)
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line.split("#")[0].split() for line in lines if line.startswith("    kvctl ")]
    assert len(commands) >= 5
    for _, *arguments in commands:
        run(
            [sys.executable, "-m", "kvd_client.kvctl", *arguments],
            tmp_path,
            KVD_RUNTIME_DIR=str(daemon.runtime_dir),
        )


def test_the_readme_shows_what_model_size_says(smollm2: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvd_client.kvctl", "model-size", str(smollm2)]
    said = run(command, tmp_path, KVD_RUNTIME_DIR=str(tmp_path))
    readme = (ROOT / "README.md").read_text().splitlines()
    shown = [line.strip() for line in readme if line.startswith(("    block  ", "    context "))]
    assert len(shown) == 2
    assert set(shown) <= set(said.splitlines())


def test_the_demo_convinces(tmp_path: Path) -> None:
    """It exits with an error itself unless both hits come from the cache and logits are equal."""
    said = run([sys.executable, str(ROOT / "examples" / "demo.py")], tmp_path)
    assert "0 sequences in use" in said
    assert "done." in said


def run(command: list[str], directory: Path, **environ: str) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
