"""`kvd serve`, with a collector of cycles that only counts: at its end it tells what only a walk of
all objects would have freed.

    python -m tests.shell.collecting_daemon FILE python -m kvd serve ...
"""

import gc
import json
import sys
from collections import Counter

from kvd import cli, pauses, server


def _count(self: server.Server) -> None:
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage)
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
    gc.garbage.clear()
    _close(self)


_close = server.Server.close

if __name__ == "__main__":
    server.Server.close = _count  # type: ignore[method-assign]
    pauses.bound = gc.disable
    gc.collect()
    sys.exit(cli.main(sys.argv[5:]))
