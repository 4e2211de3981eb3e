"""Phasewise: disaggregated serving of generative language models. This package is what a user's program imports.

>>> import phasewise
>>> with phasewise.Client("127.0.0.1:50051") as client:
...     print(client.generate("The capital of France is", max_tokens=8).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phasewise.core.errors import (
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
from phasewise.core.request import FinishReason
from phasewise.results import (
    Completion,
    Delta,
    Model,
    PlacedOn,
    Sample,
    TimelineEvent,
    Token,
    TopLogprob,
    Usage,
)

if TYPE_CHECKING:
    from phasewise.aio_client import AsyncClient, AsyncStream
    from phasewise.client import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "Delta",
    "DuplicateRequest",
    "FinishReason",
    "InternalError",
    "InvalidRequest",
    "Model",
    "ModelLoadError",
    "ModelNotFound",
    "Overloaded",
    "PlacedOn",
    "RequestCancelled",
    "Sample",
    "ServingError",
    "Stream",
    "TimelineEvent",
    "Token",
    "TopLogprob",
    "TransferFailed",
    "Unavailable",
    "Usage",
    "WorkerLost",
]


def __getattr__(name: str) -> Any:
    """Loads the clients when first asked for: workers import `phasewise.core` and must not pay for gRPC."""
    if name in ("Client", "Stream"):
        from phasewise import client

        return client.Client if name == "Client" else client.Stream
    if name in ("AsyncClient", "AsyncStream"):
        from phasewise import aio_client

        return aio_client.AsyncClient if name == "AsyncClient" else aio_client.AsyncStream
    raise AttributeError(f"module 'phasewise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
