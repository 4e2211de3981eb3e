"""Both protocols' real servers over a whole cluster in one process, on a loop of their own: for blocking clients.

What a hostile client meets is all here: HTTP's parser, grpc.aio, the gateway's loop, the scheduler, workers and an
engine. `local_cluster.py` says what is missing beside a real cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from control_plane.gateway.bodies import Bodies
from control_plane.gateway.grpc_front.server import start_grpc_server
from control_plane.gateway.http_front.openai_server import build_app
from control_plane.gateway.http_front.protocol import HttpLimits, make_http_server
from tests.support.local_cluster import LocalCluster, local_cluster

WAIT_S = 30.0
_MAX_BODY_BYTES = 1 << 20
_T = TypeVar("_T")


class FrontDoors:
    """Made by `front_doors`. `http_port` and `grpc_port` are on 127.0.0.1."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.is_up = threading.Event()
        self.is_over = asyncio.Event()
        self.cluster: LocalCluster
        self.http_port = 0
        self.grpc_port = 0
        self.faults: list[str] = []
        """What any logger of the process said of a fault, since it was last looked at."""

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs `work` on the servers' loop; for the test's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def wait_until_empty(self) -> None:
        """Returns when nothing of any request is left anywhere; TimeoutError when that does not come."""
        self.run(self.cluster.until_empty())

    def num_open(self) -> int:
        """Requests that are open at the gateway."""
        return int(self.run(self.cluster.service.status())["gateway"]["open_requests"])

    async def serve(self, model: Path, sections: dict[str, Any]) -> None:
        """The life of both servers, until `is_over` is set."""
        async with local_cluster(model, **sections) as self.cluster:
            service = self.cluster.service
            with (
                contextlib.closing(Bodies(_MAX_BODY_BYTES, 100)) as bodies,
                socket.socket(
                    socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
                ) as listener,  # as `bind_http` does
            ):
                grpc_server, self.grpc_port = await start_grpc_server(
                    service, "127.0.0.1:0", max_message_bytes=_MAX_BODY_BYTES, bodies=bodies
                )
                listener.bind(("127.0.0.1", 0))
                listener.listen()
                self.http_port = listener.getsockname()[1]
                http = make_http_server(build_app(service, bodies), HttpLimits())
                serving = asyncio.create_task(http.serve([listener]))
                self.is_up.set()
                await self.is_over.wait()
                await grpc_server.stop(None)
                http.should_exit = True
                await serving


@contextlib.contextmanager
def front_doors(model: Path, **sections: Any) -> Iterator[FrontDoors]:
    """A cluster over `model`, with `sections` of the configuration, behind both its servers."""
    doors = FrontDoors()
    handler = _Faults(doors.faults)
    logging.getLogger().addHandler(handler)
    thread = threading.Thread(target=doors.loop.run_until_complete, args=(doors.serve(model, sections),))
    thread.start()
    try:
        assert doors.is_up.wait(WAIT_S)
        yield doors
    finally:
        doors.loop.call_soon_threadsafe(doors.is_over.set)
        thread.join(WAIT_S)
        assert not thread.is_alive()
        doors.loop.close()
        logging.getLogger().removeHandler(handler)


class _Faults(logging.Handler):
    """Collects errors, and whatever has a traceback."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__()
        self._faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self._faults.append(logging.Formatter("%(name)s: %(message)s").format(record))
