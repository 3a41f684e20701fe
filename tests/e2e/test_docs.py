"""What the README and the examples say is run as it stands there."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
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


def test_the_document_is_read_once_by_a_daemon_that_is_started(
    smollm2: Path, tmp_path: Path
) -> None:
    """None runs where the example looks for one."""
    (tmp_path / "licence.txt").write_text((ROOT / "LICENSE").read_text()[:1400])
    instance = f"example-{os.getpid()}"
    command = [sys.executable, str(ROOT / "examples" / "document_qa.py")]
    options = ["--document", "licence.txt", "--workers", "2", "--tokens", "4"]
    for question in ("What is a Contribution?", "Who is the Licensor?"):
        options += ["--question", question]
    try:
        said = run(
            [*command, str(smollm2), "--instance", instance, *options],
            tmp_path,
            KVD_RUNTIME_DIR=str(tmp_path / "run"),
        )
    finally:
        end_private_daemon(instance)
    rows = re.findall(r"\? +(\d+) +(\d+) +(\d+) +[\d.]+ s +[\d.]+ s", said)
    assert [row[0] for row in rows] == ["1", "2"], said
    tokens, cached = ([int(row[column]) for row in rows] for column in (1, 2))
    assert cached[0] < 20, "how every chat begins"
    assert 250 < tokens[1] - 40 < cached[1] < tokens[1]
    assert "-q" in run([*command, "--help"], tmp_path)


def end_private_daemon(instance: str) -> None:
    """Rather than wait until it goes by itself, some seconds after its last client."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if "serve" in command and instance in command:
                process.terminate()
                process.wait(20)


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
