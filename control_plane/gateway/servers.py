"""The two servers of a gateway process, over one service.

1. made
2. bound     `bind_http`: the HTTP port is taken, and answers there say that the model is being loaded
3. open      `open`: the service answers at both addresses
4. closed    `close`: no port is left
"""

from __future__ import annotations

import asyncio
import socket

import grpc.aio
import uvicorn

from control_plane.gateway.bodies import Bodies, largest_body
from control_plane.gateway.grpc_front.server import start_grpc_server
from control_plane.gateway.http_front.openai_server import build_app
from control_plane.gateway.http_front.protocol import make_http_server
from control_plane.gateway.http_front.starting import FrontDoor
from control_plane.gateway.listening import bind_http, format_address
from control_plane.gateway.service import InferenceService
from control_plane.gateway.summed_log import SummedLog
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import GatewayConfig, split_address

_MORE_CALLS = 1024
"""gRPC calls beside those of open requests: refusals on their way, health watches, tokenising."""

_GRPC_GRACE_S = 1.0
"""For gRPC calls that are being answered when the server closes."""


class GatewayServers:
    """`addresses` has HOST:PORT of `http` and `grpc`, as configured at first and as really listened on later."""

    def __init__(self, config: GatewayConfig) -> None:
        self.addresses = {"http": config.http, "grpc": config.grpc}
        self._config = config
        self._socket: socket.socket | None = None
        self._door = FrontDoor()
        self._http: uvicorn.Server | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._grpc: grpc.aio.Server | None = None
        self._bodies: Bodies | None = None
        self._lines = SummedLog(MonotonicClock())

    async def bind_http(self) -> str:
        """Serves HTTP, with the answers of a server that starts. Gives its address.

        Raises:
            ConfigError: the port is taken, or the host is not ours.
        """
        self._socket = bind_http(self._config.http)
        self._http = make_http_server(self._door)
        self._http_task = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        self.addresses["http"] = format_address(self._socket)
        return self.addresses["http"]

    async def open(self, service: InferenceService, longest_token_bytes: int) -> str:
        """Puts `service` behind both servers. Gives the gRPC address.

        Raises:
            ConfigError: the gRPC port is taken, or the host is not ours.
        """
        config, context_length = self._config, service.model.context_length
        most_bytes = config.max_body_mib * 2**20
        self._bodies = Bodies(largest_body(context_length, longest_token_bytes, most_bytes), config.max_open_requests)
        self._grpc, port = await start_grpc_server(
            service,
            config.grpc,
            max_message_bytes=largest_body(context_length, longest_token_bytes, most_bytes, is_json=False),
            max_calls=config.max_open_requests + _MORE_CALLS,
            bodies=self._bodies,
        )
        host, _ = split_address(config.grpc, field="gateway.grpc")
        self.addresses["grpc"] = f"{host}:{port}"
        self._door.open(build_app(service, self._bodies, cors_origins=config.cors_origins, lines=self._lines))
        return self.addresses["grpc"]

    async def close(self) -> None:
        """Closes what is open, at whatever point of its life this is."""
        if self._grpc is not None:
            await self._grpc.stop(_GRPC_GRACE_S)
        if self._http is not None and self._http_task is not None:
            self._http.should_exit = True
            await self._http_task
        self._lines.flush()
        if self._socket is not None:
            self._socket.close()
        if self._bodies is not None:
            self._bodies.close()
