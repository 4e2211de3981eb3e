"""A real mixed worker without a cluster, around any engine: requests in, tokens out."""

from __future__ import annotations

from kv_transfer.cache_port import CachePort
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import ServingConfig
from phasewise.core.messages import PrefillTask, WorkerInfo, WorkerLoad, WorkerOutput
from phasewise.core.placement import Placement, WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import Request
from workers.assemble import Ports, assemble
from workers.driver import Runner


class Outputs:
    """The worker's ports: keeps what comes out."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}

    def send(self, *_: object) -> None:
        raise AssertionError("a mixed worker has nobody to talk to")

    send_part = send

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        assert not output.failures
        for chunk in output.chunks:
            tokens = self.tokens.setdefault((chunk.request_id, chunk.sample_index), [])
            assert len(tokens) == chunk.position
            tokens += [token.token_id for token in chunk.tokens]

    def report(self, load: WorkerLoad) -> None: ...


def serve(
    runner: Runner, port: CachePort, config: ServingConfig, requests: list[Request], num_blocks: int = 0
) -> dict[tuple[str, int], list[int]]:
    """All requests at once through a worker's loop, until nothing is left: (request, sample) → tokens.

    `num_blocks`: of the cache; 0 for all of them.
    """
    outputs, spec, blocks = Outputs(), port.spec, num_blocks or port.cache.num_blocks
    profile, kind = DeviceProfile.linear(0, 0, 0, 0), port.device.type
    length = blocks * spec.block_size
    info = WorkerInfo("w", WorkerRole.MIXED, 0, "", kind, "float32", 1, spec, blocks, length, profile)
    worker = assemble(info, runner, port, config, Ports(outputs, outputs, outputs, outputs), MonotonicClock())
    for request in requests:
        worker.post(PrefillTask(request, Placement(request.request_id, "w", "w"), "gateway", 1e6))
    while worker.round():
        pass
    worker.rounds.parts.blocks.check()
    assert worker.load().num_used_blocks == 0
    return outputs.tokens
