"""Messages between the processes of a virtual cluster: each takes its own time, so they overtake each other."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phasewise.core.messages import AbortRequest, GatewayLost, LinkLost, PeerLost, PrefillTask, WorkerMessage
from tests.virtual_cluster.clock import VirtualTime


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one message: `base_s` at least, then an exponential part; one in `1 / straggler_share` takes much longer."""

    base_s: float = 0.0004
    mean_extra_s: float = 0.0002
    straggler_share: float = 0.002
    straggler_s: float = 0.2

    def draw(self, rng: random.Random) -> float:
        extra_s = rng.expovariate(1 / self.mean_extra_s)
        return self.base_s + extra_s + (self.straggler_s if rng.random() < self.straggler_share else 0.0)


class Network:
    """Knows every process by its name. What is on its way to one that is lost never comes; what the lost one had sent
    before does."""

    def __init__(self, time: VirtualTime, rng: random.Random, latency: Latency) -> None:
        self._time = time
        self._rng = rng
        self._latency = latency
        self._receivers: dict[str, Callable[[Any], None]] = {}

    def join(self, name: str, receive: Callable[[Any], None]) -> None:
        self._receivers[name] = receive

    def lose(self, name: str) -> None:
        del self._receivers[name]

    def knows(self, name: str) -> bool:
        return name in self._receivers

    def send(self, receiver: str, message: Any, name: str) -> None:
        """`name` is what the event is called by, beside the message's type."""

        def arrive() -> None:
            receive = self._receivers.get(receiver)
            if receive is not None:
                receive(message)

        event = f"{type(message).__name__} {name} > {receiver}"
        self._time.after(self._latency.draw(self._rng), event, arrive)


def about(message: WorkerMessage) -> str:
    """The request or the handoff that a message to a worker is about."""
    match message:
        case PrefillTask(request):
            return request.request_id
        case AbortRequest(request_id):
            return request_id
        case PeerLost() | LinkLost() | GatewayLost():
            return ""
        case _:
            return message.transfer_id
