"""A gateway as it is in a cluster, over workers that give every open request a token each 20 ms.

For benchmarks/gateway.py: prints one line with its addresses, then answers each line of its input with one of JSON,
`{request id: when the workers were told to drop it}` (seconds of the monotonic clock, which processes of a host share).
It wires a whole gateway, so it imports more than 15 of our modules.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

import uvloop

from control_plane.actors import SWITCH_INTERVAL_S
from control_plane.gateway.bodies import Bodies, largest_body
from control_plane.gateway.grpc_front.server import start_grpc_server
from control_plane.gateway.http_front.openai_server import build_app
from control_plane.gateway.http_front.protocol import make_http_server
from control_plane.gateway.inference import InferenceGateway
from control_plane.gateway.listening import bind_http, format_address
from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.service import ModelCard
from control_plane.gateway.text.tokenizer import load_tokenizer
from control_plane.metrics import GatewayMetrics
from control_plane.serving_pools import ServingPools
from phasewise.core.clock import MonotonicClock
from phasewise.core.collector import freeze_collector
from phasewise.core.messages import AbortRequest, NewTokens, PrefillTask, WorkerOutput
from phasewise.core.model_source import model_facts, resolve_model
from phasewise.core.placement import Placement, PlaceRequest, WorkerRole
from phasewise.core.request import FinishReason, SampledToken

STEP_S = 0.02


class StubCluster:
    """Placer and workers."""

    def __init__(self, context_length: int) -> None:
        source = resolve_model("smollm2-135m")
        facts = model_facts(source)
        self.tokenizer = load_tokenizer(source)
        self.card = ModelCard(source.name, context_length, facts.vocab_size, "float32", 1, facts.eos_token_ids, True)
        self.clock = MonotonicClock()
        self.dropped: dict[str, float] = {}
        self._running: dict[str, tuple[PrefillTask, int]] = {}
        self._token = SampledToken(self.tokenizer.encode(" word")[0])
        self.service = InferenceGateway(
            "gateway-0",
            self.card,
            self.tokenizer,
            RequestPreparer(self.tokenizer, self.card, RequestLimits()),
            self,
            self,
            GatewayMetrics("m"),
            self.clock,
            pools=ServingPools({"prefill-0": WorkerRole.PREFILL, "decode-0": WorkerRole.DECODE}),
            max_open_requests=4096,
            addresses={},
        )

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        return Placement(request.request_id, "prefill-0", "decode-0")

    def first_token(self, request_id: str) -> None: ...

    def finished(self, request_id: str, num_output_tokens: int) -> None: ...

    async def snapshot(self) -> list[Any]:
        return []

    def send(self, worker_id: str, message: Any) -> None:
        if isinstance(message, PrefillTask):
            self._running[message.request.request_id] = (message, 0)
        elif isinstance(message, AbortRequest) and message.request_id in self._running:
            del self._running[message.request_id]
            self.dropped[message.request_id.rsplit("~", 1)[0]] = self.clock.now_s()

    async def steps(self) -> None:
        while True:
            chunks = []
            for request_id, (task, position) in list(self._running.items()):
                is_last = position + 1 == task.request.max_new_tokens
                reason = FinishReason.LENGTH if is_last else None
                chunks.append(NewTokens(request_id, 0, position, (self._token,), reason))
                self._running[request_id] = (task, position + 1)
                if is_last:
                    del self._running[request_id]
            self.service.deliver(WorkerOutput("decode-0", chunks=tuple(chunks)))
            await asyncio.sleep(STEP_S)


async def main(context_length: int) -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    cluster = StubCluster(context_length)
    max_bytes = largest_body(context_length, cluster.tokenizer.longest_token_bytes, 16 << 20)
    listener = bind_http("127.0.0.1:0")
    bodies = Bodies(max_bytes, 4096)
    message_bytes = largest_body(context_length, cluster.tokenizer.longest_token_bytes, 16 << 20, is_json=False)
    _, grpc_port = await start_grpc_server(
        cluster.service, "127.0.0.1:0", max_message_bytes=message_bytes, max_calls=5120, bodies=bodies
    )
    http = make_http_server(build_app(cluster.service, bodies))
    cluster.service.start_admitting()
    freeze_collector()
    tasks = [asyncio.create_task(http.serve(sockets=[listener])), asyncio.create_task(cluster.steps())]
    print(format_address(listener), f"127.0.0.1:{grpc_port}", max_bytes, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        dropped, cluster.dropped = cluster.dropped, {}
        print(json.dumps(dropped), flush=True)
    tasks[1].cancel()
    http.should_exit = True
    await tasks[0]
    bodies.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, required=True)
    uvloop.run(main(parser.parse_args().context))
