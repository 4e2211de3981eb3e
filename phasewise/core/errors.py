"""The one tree of errors that a request, a client or an operator can meet.

Every error says whether sending the same request again is safe, and has a `code` that the two protocols map to
their own form (`phasewise/rpc/status.py` for gRPC, `control_plane/gateway/http_front/openai_errors.py` for HTTP).
"""

from __future__ import annotations


class ServingError(Exception):
    """Base of all errors of Phasewise.

    Attributes:
        code: stable machine-readable reason, one per class.
        retry_safe: True when the same request may be sent again without doing work twice that a user would notice.
        field: the offending input field, or "" when no field is to blame.
        retry_after_s: hint for when to try again, or None.
    """

    code = "internal"
    retry_safe = False

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.field, self.retry_after_s))


def _rebuild(cls: type[ServingError], message: str, field: str, retry_after_s: float | None) -> ServingError:
    return cls(message, field=field, retry_after_s=retry_after_s)


class InvalidRequest(ServingError):
    """The request itself is wrong; `field` names where, the message says what would be right."""

    code = "invalid_request"


class ModelNotFound(InvalidRequest):
    """The request names a model that this cluster does not serve."""

    code = "model_not_found"


class DuplicateRequest(InvalidRequest):
    """A request with this id is open already."""

    code = "duplicate_request"


class Overloaded(ServingError):
    """The bounded queues are full; nothing was started."""

    code = "overloaded"
    retry_safe = True


class Unavailable(ServingError):
    """The cluster cannot take requests now (starting, draining, or a pool is empty); nothing was started."""

    code = "unavailable"
    retry_safe = True


class DeadlineExceeded(ServingError):
    """The request's own deadline passed before it was finished."""

    code = "deadline_exceeded"


class RequestCancelled(ServingError):
    """The client left, or asked for the request to be cancelled."""

    code = "cancelled"


class WorkerLost(ServingError):
    """A worker that held the request died, and the request could not be moved."""

    code = "worker_lost"
    retry_safe = True


class TransferFailed(ServingError):
    """The KV cache could not be moved from prefill to decode; nothing corrupt was decoded."""

    code = "transfer_failed"
    retry_safe = True


class InternalError(ServingError):
    """A fault of ours; the log has the details under the request's id."""

    code = "internal"


class ConfigError(ServingError):
    """A configuration file, flag or model directory is wrong; raised before anything is served."""

    code = "config"


class ModelLoadError(ConfigError):
    """The model's files are missing, damaged or of a kind that is not supported."""

    code = "model_load"


ERROR_BY_CODE: dict[str, type[ServingError]] = {
    cls.code: cls
    for cls in (
        InternalError,
        InvalidRequest,
        ModelNotFound,
        DuplicateRequest,
        Overloaded,
        Unavailable,
        DeadlineExceeded,
        RequestCancelled,
        WorkerLost,
        TransferFailed,
        ConfigError,
        ModelLoadError,
    )
}
