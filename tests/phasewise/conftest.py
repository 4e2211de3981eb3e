"""The service behind the SDK's tests. A real cluster fits in its place where a test scripts nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from control_plane.gateway.grpc_front.server import start_grpc_server
from phasewise.aio_client import AsyncClient
from phasewise.client import Client
from tests.phasewise.scripted_service import ScriptedService, Serving, serve_in_thread


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    service = ScriptedService(num_deltas_at_once=1)
    yield service
    assert [s.request_id for s in service.streams if not s.closed.is_set()] == [], "streams that nobody closed"


@pytest.fixture
def serving(service: ScriptedService) -> Iterator[Serving]:
    with serve_in_thread(service) as serving:
        yield serving


@pytest.fixture
def client(serving: Serving) -> Iterator[Client]:
    with Client(serving.target, timeout_s=60, retry_backoff_s=0.01) as client:
        yield client


@pytest.fixture
async def aio_target(service: ScriptedService) -> AsyncIterator[str]:
    """A server on the test's own loop, for asynchronous clients."""
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=1 << 20)
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def aio_client(aio_target: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(aio_target, timeout_s=60, retry_backoff_s=0.01) as client:
        yield client
