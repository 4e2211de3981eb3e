"""For all tests."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# A shell starts what it puts into the background with this signal ignored, and so would every process of a test be.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and few; `pytest --hypothesis-profile=long` looks for new ones, for minutes.
_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("short", derandomize=True, database=None, deadline=None, suppress_health_check=_QUIET)
settings.register_profile("long", max_examples=10_000, deadline=None, print_blob=True, suppress_health_check=_QUIET)
settings.load_profile("short")
