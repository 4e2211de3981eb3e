"""Wires the parts of a worker around an engine: phases, both halves of handoffs, messages out, and the step loop."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from decode_workers.phase import DecodePhase
from decode_workers.reservations import ReservationQueue
from decode_workers.scheduler import DecodeScheduler
from engine.block_manager import BlockManager
from kv_transfer.cache_port import CachePort
from kv_transfer.codec import Codec
from kv_transfer.link import Link
from kv_transfer.paths import SendLimits
from kv_transfer.prober import LinkProber
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from phasewise.core.clock import Clock
from phasewise.core.config import ServingConfig
from phasewise.core.messages import WorkerInfo
from phasewise.core.outbox import Outbox, PeerOutbox
from phasewise.core.ports import GatewayPort, LoadPort, PeerPort
from prefill_workers.phase import PrefillPhase
from prefill_workers.scheduler import PrefillScheduler
from workers.engine_facts import token_budget
from workers.link_sizes import link_sizes
from workers.ranked_cache import LeadingCachePort
from workers.worker import LoopSettings, Runner, Worker, WorkerParts


@dataclass(frozen=True, slots=True)
class Ports:
    """How a worker reaches the others."""

    peers: PeerPort
    gateways: GatewayPort
    loads: LoadPort
    link: Link


def assemble(
    info: WorkerInfo,
    runner: Runner,
    port: CachePort,
    config: ServingConfig,
    ports: Ports,
    clock: Clock,
    *,
    codec_bytes_per_s: float = 0.0,
) -> Worker:
    """Wires a worker around an engine. `codec_bytes_per_s`: as SendLimits has it."""
    spec, scheduler, transfer = info.kv_spec, config.scheduler, config.transfer
    budget = token_budget(config, info.device)
    blocks = BlockManager(info.num_kv_blocks, spec.block_size, prefix_caching=config.cache.prefix_caching)
    outbox, peers = Outbox(info.worker_id, ports.gateways, clock), PeerOutbox(ports.peers)
    is_alone = not isinstance(port, LeadingCachePort)
    loop = LoopSettings(
        budget, transfer.layers_per_part if is_alone else 0, config.health.heartbeat_s, is_alone=is_alone
    )
    # What has room in slabs must not wait for the window. A part is more than its KV: by less than a hundredth.
    sizes = link_sizes(config)
    slabs_mib = sizes.num_slabs * sizes.slab_mib * 1.01
    sending = SendLimits(
        int(max(transfer.window_mib, slabs_mib) * 2**20),
        transfer.timeout_s,
        Codec(transfer.codec),
        codec_bytes_per_s,
        num_groups=ceil(spec.num_layers / (loop.layers_per_part or spec.num_layers)),
        chunk_tokens=budget,
        threshold_tokens=transfer.layerwise_threshold_tokens,
    )
    sender = KVSender(info.worker_id, port, ports.link, peers, clock, sending)
    receiver = KVReceiver(port, peers, clock)
    prompts = PrefillScheduler(blocks, lookahead_tokens=2 * budget)
    decode = DecodePhase(
        blocks,
        DecodeScheduler(blocks, scheduler.max_running),
        ReservationQueue(spec.block_size, scheduler.max_running, scheduler.reserve_headroom),
        receiver,
        port.cache,
        ports.peers,
        outbox,
        clock,
        prompts.num_staying,
    )
    prefill = PrefillPhase(
        blocks,
        prompts,
        sender,
        outbox,
        clock,
        scheduler.max_waiting,
        decode.adopt,
        decode.has_room,
    )
    prober = LinkProber(info.worker_id, port, ports.link, clock)
    parts = WorkerParts(runner, blocks, prefill, decode, sender, receiver, prober, outbox, peers)
    return Worker(info, parts, ports.peers, ports.loads, clock, loop)
