"""Messages to actors, by name. Knows of an actor handle only that `handle.method.remote(…)` sends and returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phasewise.core.messages import WorkerMessage, WorkerOutput
from phasewise.core.placement import WorkerId

ActorHandle = Any


class WorkerHandles:
    """PeerPort over the handles of worker actors. What is sent to an unknown worker is dropped: it is gone."""

    def __init__(self) -> None:
        self._handles: dict[WorkerId, ActorHandle] = {}

    def connect(self, handles: Mapping[WorkerId, ActorHandle]) -> None:
        self._handles.update(handles)

    def forget(self, worker_id: WorkerId) -> None:
        self._handles.pop(worker_id, None)

    def get(self, worker_id: WorkerId) -> ActorHandle | None:
        return self._handles.get(worker_id)

    def ids(self) -> list[WorkerId]:
        return list(self._handles)

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        handle = self._handles.get(worker_id)
        if handle is not None:
            handle.post.remote(message)


class GatewayHandles:
    """GatewayPort over the handles of gateway actors."""

    def __init__(self) -> None:
        self._handles: dict[str, ActorHandle] = {}

    def connect(self, handles: Mapping[str, ActorHandle]) -> None:
        self._handles.update(handles)

    def forget(self, gateway_id: str) -> None:
        self._handles.pop(gateway_id, None)

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        handle = self._handles.get(gateway_id)
        if handle is not None:
            handle.deliver.remote(output)
