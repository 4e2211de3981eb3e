"""For all tests."""

from __future__ import annotations

import signal

# A shell starts what it puts into the background with this signal ignored, and so would every process of a test be.
signal.signal(signal.SIGINT, signal.default_int_handler)
