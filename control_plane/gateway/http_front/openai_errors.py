"""Errors in OpenAI's form: {"error": {message, type, param, code}}, with the HTTP status that fits.

`x-should-retry` tells OpenAI's own clients what the error tree knows: whether sending again is safe.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from phasewise.core.errors import InvalidRequest, ServingError
from phasewise.core.shown import MAX_SHOWN, clipped, shown

_STATUS_AND_TYPE: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "duplicate_request": (409, "invalid_request_error"),
    "overloaded": (429, "rate_limit_error"),
    "cancelled": (499, "cancelled_error"),
    "unavailable": (503, "service_unavailable_error"),
    "worker_lost": (503, "service_unavailable_error"),
    "transfer_failed": (503, "service_unavailable_error"),
    "deadline_exceeded": (504, "timeout_error"),
}
_INTERNAL = (500, "server_error")


class BodyTooLarge(InvalidRequest):
    """The HTTP body is longer than this server accepts."""

    code = "body_too_large"


class UnsupportedMedia(InvalidRequest):
    """The HTTP body is in a form that this server does not read."""

    code = "unsupported_media_type"


@dataclass(frozen=True, slots=True)
class ParameterNames:
    """How the fields of `GenerateInput` are called in one HTTP request."""

    renamed: Mapping[str, str]

    def of(self, field: str) -> str:
        """`token_ids[3]` → `prompt[3]`."""
        name, bracket, rest = field.partition("[")
        return self.renamed.get(name, name) + bracket + rest


NO_RENAMES = ParameterNames({})


def status_of(error: ServingError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, BodyTooLarge):
        return 413
    if isinstance(error, UnsupportedMedia):
        return 415
    return _STATUS_AND_TYPE.get(error.code, _INTERNAL)[0]


def error_body(error: ServingError, names: ParameterNames = NO_RENAMES) -> dict[str, Any]:
    """The JSON object of an error."""
    kind = (
        "invalid_request_error" if isinstance(error, InvalidRequest) else _STATUS_AND_TYPE.get(error.code, _INTERNAL)[1]
    )
    param = names.of(error.field) if error.field else None
    message = error.message
    if param is not None and param != error.field:  # the message names the field as the core calls it
        message = re.sub(rf"(?<!\w){re.escape(error.field)}(?!\w)", lambda _: param, message)
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def error_response(
    error: ServingError, names: ParameterNames = NO_RENAMES, headers: Mapping[str, str] | None = None
) -> Response:
    """A whole HTTP answer. 429 and 503 carry Retry-After."""
    status = status_of(error)
    all_headers = {"x-should-retry": "true" if error.retry_safe else "false", **(headers or {})}
    if status in (429, 503):
        all_headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    body = json.dumps(error_body(error, names), separators=(",", ":"))
    return Response(body, status, headers=all_headers, media_type="application/json")


def error_event(error: ServingError, names: ParameterNames = NO_RENAMES) -> bytes:
    """An error in the middle of an event stream."""
    return b"data: " + json.dumps(error_body(error, names), separators=(",", ":")).encode() + b"\n\n"


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
_TOO_FAR = {"greater_than_equal": "at least", "less_than_equal": "at most"}
_JSON_NAMES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def from_validation(error: ValidationError, schema: type[BaseModel]) -> InvalidRequest:
    """The first fault of a body as one sentence that names the field and says what would be right."""
    fault = error.errors(include_url=False)[0]
    kind, location, given = fault["type"], fault["loc"], fault["input"]
    path = _path(location)
    if kind == "json_invalid":
        reason = fault["msg"].removeprefix("Invalid JSON: ")
        return InvalidRequest(f"the body is not valid JSON: {reason}; send one JSON object")
    if kind == "unknown_field":
        return _unknown_field((*location, fault["ctx"]["name"]), schema)
    if kind == "missing":
        return InvalidRequest(f"{path} is missing; it is required", field=path)
    if kind in _TOO_FAR:
        return InvalidRequest(f"{path} must be {_TOO_FAR[kind]} {_bound(fault)}, not {shown(given)}", field=path)
    expected = _EXPECTED.get(kind)
    if expected is None:
        return InvalidRequest(f"{path}: {fault['msg']}" if path else fault["msg"], field=path)
    what = path or "the body"
    got = "null" if given is None else _JSON_NAMES.get(type(given), type(given).__name__)
    details = "" if isinstance(given, dict | list) or given is None else f" ({_as_json(given)})"
    return InvalidRequest(f"{what} must be {expected}, not {got}{details}", field=path)


def _bound(fault: Mapping[str, Any]) -> int:
    limits = fault["ctx"]
    return int(limits["ge"] if "ge" in limits else limits["le"])


def _as_json(value: str | bool | int | float) -> str:
    if isinstance(value, str):
        return clipped(json.dumps(value[:MAX_SHOWN], ensure_ascii=False))
    return str(value).lower() if isinstance(value, bool) else shown(value)


def _path(location: tuple[int | str, ...]) -> str:
    """('messages', 2, 'content') → messages[2].content"""
    path = ""
    for part in location:
        if part != "[key]":
            path += f"[{part}]" if isinstance(part, int) else f".{clipped(part)}" if path else clipped(part)
    return path


def _unknown_field(location: tuple[int | str, ...], schema: type[BaseModel]) -> InvalidRequest:
    path = _path(location)
    known = schema.model_fields
    if len(location) > 1:
        owner = known[str(location[0])].annotation
        known = next((t.model_fields for t in _models_in(owner)), {})
    near = difflib.get_close_matches(clipped(str(location[-1])), list(known), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "leave it out"
    return InvalidRequest(f"unknown field {shown(path)}; {hint}", field=path)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    return [c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel)]
