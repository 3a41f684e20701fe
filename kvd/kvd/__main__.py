"""`python -m kvd` is `kvd`: for a daemon that a client starts with its own interpreter."""

import sys

from kvd.cli import main

sys.exit(main())
