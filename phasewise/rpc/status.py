"""Errors ↔ gRPC statuses, both ways: the server raises a class, the client re-raises the same one.

The class's own code, the field and the retry hints travel as an `ErrorDetail` in the trailing metadata
`phasewise-error-bin`. A status without it was made by gRPC itself or by a proxy on the way.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf.message import DecodeError

from phasewise.core.errors import (
    ERROR_BY_CODE,
    ConfigError,
    DeadlineExceeded,
    DuplicateRequest,
    InternalError,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    Overloaded,
    RequestCancelled,
    ServingError,
    TransferFailed,
    Unavailable,
    WorkerLost,
)
from phasewise.rpc import phasewise_pb2 as pb

ERROR_KEY = "phasewise-error-bin"

STATUS_BY_ERROR: dict[type[ServingError], grpc.StatusCode] = {
    InternalError: grpc.StatusCode.INTERNAL,
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelled: grpc.StatusCode.CANCELLED,
    WorkerLost: grpc.StatusCode.UNAVAILABLE,
    TransferFailed: grpc.StatusCode.UNAVAILABLE,
    ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    ModelLoadError: grpc.StatusCode.FAILED_PRECONDITION,
}

ERROR_BY_STATUS: dict[grpc.StatusCode, type[ServingError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: RequestCancelled,
}

_WRONG_TARGET = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
)
# gRPC refuses trailing metadata over 8 KiB, and percent-encoding may treble a message.
_MAX_MESSAGE_BYTES = 1500
_MAX_FIELD_BYTES = 250


def to_status(error: ServingError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """(status code, status message, trailing metadata) of an error. Long messages are cut to fit a header."""
    detail = pb.ErrorDetail(code=error.code, field=_cut(error.field, _MAX_FIELD_BYTES), retry_safe=error.retry_safe)
    if error.retry_after_s is not None:
        detail.retry_after_s = error.retry_after_s
    known = next(cls for cls in type(error).__mro__ if cls in STATUS_BY_ERROR or cls is ServingError)
    status = STATUS_BY_ERROR.get(known, grpc.StatusCode.INTERNAL)
    return status, _cut(error.message, _MAX_MESSAGE_BYTES), ((ERROR_KEY, detail.SerializeToString()),)


def from_status(
    status: grpc.StatusCode, message: str, metadata: Iterable[tuple[str, str | bytes]], *, target: str
) -> ServingError:
    """The error behind a failed call to `target`."""
    value = next((value for key, value in metadata if key == ERROR_KEY), None)
    if isinstance(value, bytes):
        try:
            return _from_detail(pb.ErrorDetail.FromString(value), status, message)
        except DecodeError:
            return InternalError(f"{target} sent an error that cannot be read: {status.name}: {message}")
    return _from_bare_status(status, message, target)


def _from_detail(detail: pb.ErrorDetail, status: grpc.StatusCode, message: str) -> ServingError:
    # A code from a newer server falls back to the nearest class of its status.
    cls = ERROR_BY_CODE.get(detail.code) or ERROR_BY_STATUS.get(status, InternalError)
    retry_after_s = detail.retry_after_s if detail.HasField("retry_after_s") else None
    error = cls(message, field=detail.field, retry_after_s=retry_after_s)
    error.retry_safe = detail.retry_safe
    return error


def _from_bare_status(status: grpc.StatusCode, message: str, target: str) -> ServingError:
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return InvalidRequest(f"the message exceeds a size limit of {target} ({message}); shorten it", field="prompt")
    if status in _WRONG_TARGET:
        return ConfigError(
            f"{target} does not serve phasewise.v1.Inference to this client ({status.name}: {message}); "
            "check the target's address, credentials and version",
            field="target",
        )
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{target} did not finish within the call's timeout_s; raise it, or ask for less")
    if status is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"no connection to {target}: {message}")
    return ERROR_BY_STATUS.get(status, InternalError)(f"{target}: {status.name}: {message}")


def _cut(text: str, max_bytes: int) -> str:
    encoded = text.encode("utf-8", errors="replace")
    if len(encoded) <= max_bytes:
        return encoded.decode("utf-8")
    return encoded[:max_bytes].decode("utf-8", errors="ignore") + "…"
