"""`kvd serve`, whose last hour passes in seconds: it takes its samples that much faster.

python -m tests.shell.quick_history_daemon SECONDS python -m kvd serve ...
"""

import sys

from kvd import cli
from kvd.metrics import history

if __name__ == "__main__":
    history.SAMPLE_SECONDS = float(sys.argv[1])
    sys.exit(cli.main(sys.argv[5:]))
