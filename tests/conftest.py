"""For all tests."""

from __future__ import annotations

import signal
from typing import Any

import grpc.aio
from hypothesis import HealthCheck, settings

# A shell starts what it puts into the background with this signal ignored, and so would every process of a test be.
signal.signal(signal.SIGINT, signal.default_int_handler)

# gRPC's poller thread ends with the last server or channel of a process. A collection of garbage may find that one,
# inside whatever runs then, and was seen to wait for the thread for ever. This reference keeps it until the end.
grpc.aio.init_grpc_aio()

# The same examples every time, and few; `pytest --hypothesis-profile=long` looks for new ones, for minutes.
_QUIET: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("short", max_examples=150, derandomize=True, database=None, **_QUIET)
settings.register_profile("long", max_examples=5000, print_blob=True, **_QUIET)
settings.load_profile("short")
