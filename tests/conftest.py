"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that: programs that the tests
# start and then interrupt would go on.
signal.signal(signal.SIGINT, signal.default_int_handler)
