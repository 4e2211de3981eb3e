"""What the HTTP port answers while the model loads.

The port is bound before the model is loaded, so that an address in use is reported at once. Loading may take minutes.
Whoever watches the process needs an answer meanwhile: without one, it cannot tell a process that loads from one that
hangs, and restarts it.

1. loading   `FrontDoor` passes each request to `starting_app`: alive, and ready for nothing
2. open      `open` has given it the real application, to which all later requests go
"""

from __future__ import annotations

import uuid

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from control_plane.gateway.bodies import is_to_be_closed
from control_plane.gateway.http_front.openai_errors import error_response
from control_plane.gateway.http_front.openai_responses import dumps
from control_plane.gateway.preparation import is_request_id
from phasewise.core.errors import Unavailable

_LIVE_PATH = "/health/live"
_REQUEST_ID_HEADER = "x-request-id"
_RETRY_AFTER_S = 5.0


class FrontDoor:
    """An ASGI application that can be served before the real one exists."""

    def __init__(self) -> None:
        self._app: ASGIApp = starting_app

    def open(self, app: ASGIApp) -> None:
        """From now on `app` answers. A request that has begun is still answered by who began it."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def starting_app(scope: Scope, receive: Receive, send: Send) -> None:
    """200 for GET and HEAD of /health/live, and 503 for everything else. It reads no body."""
    request = Request(scope, receive)
    given = request.headers.get(_REQUEST_ID_HEADER, "")
    headers = {_REQUEST_ID_HEADER: given if is_request_id(given) else uuid.uuid4().hex}
    if request.method in ("GET", "HEAD") and scope["path"].rstrip("/") == _LIVE_PATH:
        response = Response(dumps({"status": "ok"}), headers=headers, media_type="application/json")
    else:
        if _has_body(request) and is_to_be_closed(request):
            headers["connection"] = "close"
        error = Unavailable("the server is starting: the model is being loaded", retry_after_s=_RETRY_AFTER_S)
        response = error_response(error, headers=headers)
    await response(scope, receive, send)


def _has_body(request: Request) -> bool:
    return "content-length" in request.headers or "transfer-encoding" in request.headers
