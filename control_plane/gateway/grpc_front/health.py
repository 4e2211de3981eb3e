"""grpc.health.v1 for the gateway: whether the service is ready, and whether it is alive, asked anew each time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.gateway.service import InferenceService
from phasewise.core.shown import shown

LIVENESS = "liveness"
"""A name that is SERVING as long as anybody answers: also while the gateway drains, and while a pool is empty."""

WATCH_PERIOD_S = 0.5
"""How often a Watch looks at the service, which announces no changes."""


class GatewayHealth(health_pb2_grpc.HealthServicer):
    """Answers whether it is ready for the names "" (the server) and those given, and for `LIVENESS`."""

    def __init__(self, service: InferenceService, names: tuple[str, ...]) -> None:
        self._service = service
        self._names = ("", LIVENESS, *names)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {shown(request.service)}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now and at every change, until the watcher leaves or the server stops."""
        sent: int | None = None
        while True:
            status = self._status(request.service)
            if status != sent:
                yield health_pb2.HealthCheckResponse(status=status)
                sent = status
            await asyncio.sleep(WATCH_PERIOD_S)

    def _status(self, name: str) -> int:
        if name not in self._names:
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        ready = name == LIVENESS or self._service.is_ready
        return int(health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING)
