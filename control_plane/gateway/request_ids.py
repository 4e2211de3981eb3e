"""The ids that clients give to their requests: each is in use at most once.

An id is claimed by a request that has it alone, or by an answer to several prompts that share it. It is released when
that request, or that answer, has ended. A claim in between is refused, before anything runs.
"""

from __future__ import annotations

from phasewise.core.errors import DuplicateRequest
from phasewise.core.shown import shown


class RequestIds:
    """The ids in use at one gateway."""

    def __init__(self) -> None:
        self._in_use: set[str] = set()

    def claim(self, request_id: str) -> ClaimedId:
        """Raises DuplicateRequest when the id is in use."""
        if request_id in self._in_use:
            raise DuplicateRequest(
                f"a request with the id {shown(request_id)} is open already; use another id", field="request_id"
            )
        self._in_use.add(request_id)
        return ClaimedId(request_id, self._in_use)


class ClaimedId:
    """An id in use, until it is released."""

    def __init__(self, request_id: str, in_use: set[str]) -> None:
        self.request_id = request_id
        self._in_use: set[str] | None = in_use

    def release(self) -> None:
        """Harmless when repeated."""
        if self._in_use is not None:
            self._in_use.discard(self.request_id)
            self._in_use = None
