"""What a run of the tests leaves behind does not keep the next one from being collected."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_run_is_collected() -> None:
    """Hypothesis keeps its examples in the directory of the run, and its plugin for pytest warns
    (an error here) if that would be searched for tests."""
    (ROOT / ".hypothesis").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/core/test_tree.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
