"""One HTTP request on its way: its id, its headers, and how the core's field names are called in it."""

from __future__ import annotations

import math
import uuid

from starlette.requests import Request
from starlette.responses import Response

from control_plane.gateway.bodies import Preparation, is_to_be_closed
from control_plane.gateway.http_front.openai_errors import NO_RENAMES, BodyTooLarge, ParameterNames, error_response
from control_plane.gateway.http_front.openai_responses import dumps
from control_plane.gateway.preparation import is_request_id
from control_plane.gateway.quota import client_of
from phasewise.core.errors import InternalError, InvalidRequest, Overloaded, ServingError
from phasewise.core.shown import shown

REQUEST_ID_HEADER = "x-request-id"


class Call:
    """Made by the server for each request.

    Attributes:
        request_id: given by the client or made; every answer carries it.
        asked_id: the same, or one that cannot be used: the service refuses that, and it is never sent back.
        names: set by the endpoint.
        preparation: set by the endpoint that reads a body.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        given = request.headers.get(REQUEST_ID_HEADER)
        self.request_id = given if given is not None and is_request_id(given) else uuid.uuid4().hex
        self.asked_id = given or self.request_id
        self.names: ParameterNames = NO_RENAMES
        self.preparation: Preparation | None = None

    def end_preparation(self) -> None:
        """Nothing of the request is in preparation any more. Harmless when repeated."""
        if self.preparation is not None:
            self.preparation.end()

    @property
    def client(self) -> str | None:
        """Whose share the request counts to."""
        client = self.request.client
        return client_of(client.host) if client is not None else None

    @property
    def headers(self) -> dict[str, str]:
        """Of every answer."""
        return {REQUEST_ID_HEADER: self.request_id}

    @property
    def wants_timeline(self) -> bool:
        return self.request.headers.get("x-phasewise-timeline", "") in ("1", "true")

    @property
    def timeout_s(self) -> float | None:
        """Raises InvalidRequest."""
        text = self.request.headers.get("x-phasewise-timeout-s")
        return None if text is None else _seconds(text)

    def json(self, body: object, status: int = 200) -> Response:
        return Response(dumps(body), status, headers=self.headers, media_type="application/json")

    def error(self, error: ServingError) -> Response:
        is_unread = isinstance(error, BodyTooLarge | Overloaded) and is_to_be_closed(self.request)
        headers = {**self.headers, "connection": "close"} if is_unread else self.headers
        return error_response(error, self.names, headers)

    def internal_error(self) -> InternalError:
        """What the client is told of a fault that is in the log."""
        return InternalError(f"internal error; the server's log has it under request {self.request_id}")


def _seconds(text: str) -> float:
    """The value of the time-out's header. Raises InvalidRequest."""
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise InvalidRequest(
            f"header x-phasewise-timeout-s must be a number of seconds above 0, not {shown(text)}",
            field="x-phasewise-timeout-s",
        )
    return timeout_s
