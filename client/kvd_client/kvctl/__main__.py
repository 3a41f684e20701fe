"""`python -m kvd_client.kvctl`: works also where another program is called kvctl."""

import sys

from kvd_client.kvctl.main import main

sys.exit(main())
