"""`python -m paperbook`."""

import signal
import sys

from paperbook.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being asked to end is an interruption too
    sys.exit(main())
