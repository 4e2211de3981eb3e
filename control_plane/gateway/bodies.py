"""Reads the bodies of requests: their form, their size, and what may be in preparation at once.

A body is *in preparation* from its first byte until its request is placed or answered. The number of such bodies and
the bytes of the large ones are bounded, in all and per client; small ones do not count in bytes.
"""

from __future__ import annotations

from typing import Any, TypeVar

from starlette.requests import Request

from control_plane.gateway.http_front.disconnects import until_disconnect
from control_plane.gateway.http_front.openai_errors import BodyTooLarge, UnsupportedMedia
from control_plane.gateway.http_front.openai_schema import Body
from control_plane.gateway.large_bodies import VERY_LARGE_BYTES, LargeBodies, parse_body
from control_plane.gateway.memory_return import MemoryReturn
from control_plane.gateway.quota import Quota, share_of

LARGE_BYTES = 1 << 16
"""From here on a body counts as large. One of token ids takes some 5 ms to parse at this size."""

_MIN_MAX_BYTES = 1 << 20
_MAX_ESCAPED_BYTES = 6  # of JSON for one byte of text: \u0041
_MAX_ID_BYTES = 5  # of a token id in a protobuf
_FRAME_BYTES = 1 << 16  # all fields beside the prompt
_MAX_DISCARDED_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"
_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")

_Schema = TypeVar("_Schema", bound=Body)


def largest_body(context_length: int, longest_token_bytes: int, configured_bytes: int, *, is_json: bool = True) -> int:
    """The most bytes that a body can need for a prompt that fits, or `configured_bytes` where that is less.

    Several short prompts in one body share this; 1 MiB is always allowed.
    """
    per_token = longest_token_bytes * _MAX_ESCAPED_BYTES if is_json else max(longest_token_bytes, _MAX_ID_BYTES)
    needed = context_length * per_token + _FRAME_BYTES
    return min(configured_bytes, max(needed, _MIN_MAX_BYTES))


class Preparation:
    """What one request in preparation takes of the quotas, from its construction to `end`, which may be repeated."""

    def __init__(self, client: str | None, requests: Quota, large_bytes: Quota) -> None:
        self._client = client
        self._requests = requests
        self._large_bytes = large_bytes
        self._num_large_bytes = 0
        requests.take(client)
        self._is_open = True

    def grow(self, num_bytes: int) -> None:
        """The body has, or will have, so many bytes. Raises Overloaded."""
        if num_bytes > max(LARGE_BYTES, self._num_large_bytes):
            self._large_bytes.take(self._client, num_bytes - self._num_large_bytes)
            self._num_large_bytes = num_bytes

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if self._is_open:
            self._is_open = False
            self._requests.give_back(self._client)
            self._large_bytes.give_back(self._client, self._num_large_bytes)


class Bodies:
    """Reads and parses bodies. `close` ends its process."""

    def __init__(self, max_bytes: int, max_requests: int) -> None:
        self._max_bytes = max_bytes
        self._requests = Quota("requests in preparation", max_requests, share_of(max_requests))
        self._large_bytes = Quota("bytes of large requests in preparation", 4 * max_bytes, 2 * max_bytes)
        self._large = LargeBodies()
        self._very_large = LargeBodies()  # of its own, so that what takes seconds keeps nothing else waiting
        self._memory = MemoryReturn()

    def close(self) -> None:
        self._large.close()
        self._very_large.close()

    def begin(self, client: str | None) -> Preparation:
        """For a request whose body is about to be read. Raises Overloaded."""
        return Preparation(client, self._requests, self._large_bytes)

    async def read(
        self, request: Request, preparation: Preparation, schema: type[_Schema], empty: bytes = b""
    ) -> _Schema:
        """The body as `schema`; `empty` stands for one without content.

        Raises:
            UnsupportedMedia: it is not UTF-8, or compressed.
            BodyTooLarge: as soon as that is known.
            InvalidRequest: it is not JSON of that schema.
            Overloaded: too much is in preparation.
            ClientLeft: the client left while its body was parsed.
        """
        _check_form(request)
        raw = (await self._read(request, preparation)).removeprefix(_BOM) or empty
        if len(raw) <= LARGE_BYTES:
            return parse_body(raw, schema)
        body = await until_disconnect(request.receive, self._parse(schema.__name__, raw))
        assert isinstance(body, schema)
        return body

    async def read_message(self, method: str, raw: bytes) -> Any:
        """What a large gRPC message says (grpc_codec.py). Raises InvalidRequest."""
        return await self._parse(method, raw)

    async def _parse(self, kind: str, raw: bytes) -> Any:
        process = self._large if len(raw) < VERY_LARGE_BYTES else self._very_large
        try:
            return await process.parse(kind, raw)
        finally:
            self._memory.soon()

    async def _read(self, request: Request, preparation: Preparation) -> bytes:
        announced = request.headers.get("content-length", "")
        self._check_size(int(announced[:20]) if announced.isascii() and announced.isdigit() else 0, preparation)
        parts: list[bytes] = []
        num_bytes = 0
        async for part in request.stream():
            num_bytes += len(part)
            self._check_size(num_bytes, preparation)
            parts.append(part)
        return b"".join(parts)

    def _check_size(self, num_bytes: int, preparation: Preparation) -> None:
        if num_bytes > self._max_bytes:
            raise BodyTooLarge(
                f"the body is longer than the {self._max_bytes} bytes that a request to this model can need; send less"
            )
        preparation.grow(num_bytes)


def is_to_be_closed(request: Request) -> bool:
    """Whether a connection is better closed than read to the end of a body that was refused."""
    announced = request.headers.get("content-length", "")
    has_length = announced.isascii() and announced.isdigit()
    return not has_length or len(announced) > 20 or int(announced) > _MAX_DISCARDED_BYTES


def _check_form(request: Request) -> None:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        raise UnsupportedMedia(f"content-encoding {coding[:40]!r} is not supported; send the body as it is")
    for parameter in request.headers.get("content-type", "").split(";")[1:]:
        name, _, value = parameter.partition("=")
        charset = value.strip().strip("\"'").lower()
        if name.strip().lower() == "charset" and charset not in _CHARSETS:
            raise UnsupportedMedia(f"charset {charset[:40]!r} is not supported; send UTF-8")
