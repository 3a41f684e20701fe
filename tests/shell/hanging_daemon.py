"""`kvd serve`, whose loop does nothing as long as there is a file.

python -m tests.shell.hanging_daemon FILE python -m kvd serve ...
"""

import sys
import time
from pathlib import Path

from kvd import cli, server

_tick = server.Server._tick


def _hang(self: server.Server) -> float:
    while Path(sys.argv[1]).exists():
        time.sleep(0.01)
    return min(_tick(self), 0.02) if _tick(self) >= 0 else 0.02


if __name__ == "__main__":
    server.Server._tick = _hang  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[5:]))
