"""Sends an answer as a stream of server-sent events."""

from __future__ import annotations

import logging

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from control_plane.gateway.http_front.call import Call
from control_plane.gateway.http_front.disconnects import until_disconnect
from control_plane.gateway.http_front.openai_errors import error_event
from control_plane.gateway.http_front.openai_generation import Answer
from control_plane.gateway.http_front.openai_responses import EventWriter
from phasewise.core.errors import ServingError

logger = logging.getLogger(__name__)


class EventStream(Response):
    """Sends events as they come, and closes the answer at the end, or as soon as the client leaves.

    Args:
        first: the first events, which have come already.
    """

    def __init__(self, call: Call, answer: Answer, writer: EventWriter, first: bytes) -> None:
        super().__init__(headers={**call.headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._call = call
        self._answer = answer
        self._writer = writer
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientLeft."""
        try:
            await until_disconnect(receive, self._send_events(send))
        finally:
            self._answer.close()

    async def _send_events(self, send: Send) -> None:
        """Sends all events; an error becomes the last one, and no [DONE] follows."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        events, last = self._first, b""
        try:
            while events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
                events = await self._answer.next_events(self._writer)
        except ServingError as error:  # logged where it arose
            last = error_event(error, self._call.names)
        except Exception:
            logger.exception("stream failed", extra={"request_id": self._call.request_id})
            last = error_event(self._call.internal_error(), self._call.names)
        self._answer.close()  # first: who has read the end finds nothing running
        await send({"type": "http.response.body", "body": last, "more_body": False})
