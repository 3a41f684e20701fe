"""examples/demo.py is killed: nothing of it goes on. That it ends well, and what it shows, is for
`make demo`."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


def test_a_demo_that_is_killed_takes_its_daemon_along(tmp_path: Path) -> None:
    """And its workers. The directory with the sockets is left to whoever clears the others away."""
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    demo = subprocess.Popen([sys.executable, str(DEMO)], env=environ, stdout=subprocess.PIPE)
    begun: list[psutil.Process] = []
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith(b"==> worker A"):
                break
        begun = psutil.Process(demo.pid).children(recursive=True)
        commands = [" ".join(process.cmdline()) for process in begun]
        assert len([each for each in commands if "-m kvd serve" in each]) == 1
        demo.kill()
        _, alive = psutil.wait_procs(begun, timeout=120)
        assert alive == []
    finally:
        demo.kill()
        for process in begun:
            if process.is_running():
                process.kill()
        demo.communicate()
