"""The tests of the HTTP protocol once more, against a real cluster of processes."""

from __future__ import annotations

import pytest

from tests.control_plane.gateway.http_front.test_openai_http import *  # noqa: F403
from tests.support.served import Served

pytestmark = pytest.mark.cluster


@pytest.fixture
def base_url(cluster: Served) -> str:
    return f"http://{cluster.http}"
