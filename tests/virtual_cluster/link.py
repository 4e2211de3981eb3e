"""A link without bytes: parts take the time that their bytes would, one behind the other to each peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kv_transfer.link import ArrivedPart
from phasewise.core.messages import KVCommit, KVPart, KVPartAck, LinkLost
from phasewise.core.placement import WorkerId
from tests.virtual_cluster.cache import VirtualWire
from tests.virtual_cluster.clock import VirtualTime
from tests.virtual_cluster.network import Network

Receive = Callable[[KVPart, ArrivedPart], None]
_Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Of a worker's links: to each peer `rate` bytes per second, and room for so many parts that have not arrived."""

    rate: float
    part_s: float = 0.0002
    num_buffers: int = 8
    max_part_bytes: int = 2**28


class VirtualLink:
    """The links of one worker. Implements Link (kv_transfer/link.py).

    Attributes:
        in_next_part: what happens once, with the peer's name, while the next part is on its way to it; or None.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        time: VirtualTime,
        network: Network,
        receivers: dict[WorkerId, Receive],
        post: Callable[[Any], None],
        speed: LinkSpeed,
    ) -> None:
        """`receivers` has the workers that can be reached; `post` brings this worker what happens to its links."""
        self._worker_id = worker_id
        self._time = time
        self._network = network
        self._receivers = receivers
        self._post = post
        self._speed = speed
        self._free_at_s: dict[WorkerId, float] = {}
        self._on_way: dict[_Key, WorkerId] = {}  # parts whose bytes have not all come
        self._in_use: dict[_Key, WorkerId] = {}  # parts whose buffer has not come back
        self.in_next_part: Callable[[WorkerId], None] | None = None

    @property
    def num_in_use(self) -> int:
        return len(self._in_use)

    def name(self, peer: WorkerId) -> str:
        return "virtual"

    def part_s(self, peer: WorkerId) -> float:
        return self._speed.part_s

    def max_part_bytes(self, peer: WorkerId) -> int:
        return self._speed.max_part_bytes

    def bytes_per_s(self, peer: WorkerId) -> float:
        return self._speed.rate

    def buffer(self, peer: WorkerId, num_bytes: int) -> VirtualWire | None:
        return None if self.is_full else VirtualWire(num_bytes)

    @property
    def is_full(self) -> bool:
        return len(self._in_use) >= self._speed.num_buffers

    @property
    def uses_store(self) -> bool:
        return False

    def give_back(self, wire: VirtualWire) -> None: ...

    def send_part(self, peer: WorkerId, part: KVPart, wire: VirtualWire) -> None:
        key = (part.transfer_id, part.part_index)
        self._on_way[key] = self._in_use[key] = peer

        def release() -> None:
            self._network.send(f"link of {self._worker_id}", KVPartAck(*key), f"{peer} {part.transfer_id}")

        def arrive() -> None:
            receive = self._receivers.get(peer)
            if self._on_way.pop(key, None) is not None and receive is not None:
                receive(part, ArrivedPart(wire, release))

        start_s = max(self._time.now_s(), self._free_at_s.get(peer, 0.0)) + self._speed.part_s
        self._free_at_s[peer] = start_s + wire.num_bytes / self._speed.rate
        if (happen := self.in_next_part) is not None:
            self.in_next_part = None
            self._time.at(start_s, f"in a part > {peer}", lambda: happen(peer))
        self._time.at(self._free_at_s[peer], f"{part.transfer_id} part {part.part_index} > {peer}", arrive)

    def on_ack(self, ack: KVPartAck) -> None:
        """A part's buffer has come back. Not twice, where the link broke meanwhile."""
        if self._in_use.pop((ack.transfer_id, ack.part_index), None) is not None:
            self._post(ack)

    def break_to(self, peer: WorkerId) -> frozenset[str]:
        """The link to a peer breaks: what is on its way is lost. The transfers that have lost something."""
        lost = [key for key, receiver in self._on_way.items() if receiver == peer]
        transfer_ids = frozenset(transfer_id for transfer_id, _ in lost)
        for key in lost:
            del self._on_way[key], self._in_use[key]
        self._post(LinkLost(peer, "it was cut", transfer_ids))
        return transfer_ids

    def send_commit(self, peer: WorkerId, commit: KVCommit) -> bool:
        return False

    def forget(self, peer: WorkerId) -> None:
        self._on_way = {key: receiver for key, receiver in self._on_way.items() if receiver != peer}
        self._in_use = {key: receiver for key, receiver in self._in_use.items() if receiver != peer}

    def close(self) -> None: ...
