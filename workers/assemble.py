"""Wires the parts of a worker: phases, both halves of handoffs, messages out, its rounds, and the driver of those.

Nothing here needs torch: a virtual worker has other ports and a cache without tensors, and no driver. More than 15 of
our modules are imported, for this file alone knows all parts of a worker beside its engine.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from decode_workers.joining import JoiningRules
from decode_workers.phase import Cache, DecodePhase
from engine.block_manager import BlockManager
from kv_transfer.cache_protocol import ReceivingCache, SendingCache
from kv_transfer.codec import Codec
from kv_transfer.link import Link
from kv_transfer.paths import SendLimits
from kv_transfer.prober import LinkProber, ProbingCache
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from phasewise.core.clock import Clock
from phasewise.core.config import ServingConfig
from phasewise.core.messages import WorkerInfo
from phasewise.core.outbox import Outbox, PeerOutbox
from phasewise.core.ports import GatewayPort, LoadPort, PeerPort
from prefill_workers.phase import PrefillPhase
from prefill_workers.scheduler import PrefillScheduler
from workers.driver import Runner, WorkerDriver
from workers.link_sizes import link_sizes
from workers.round import RoundLimits, WorkerParts, WorkerRound
from workers.settings import token_budget


@dataclass(frozen=True, slots=True)
class Ports:
    """How a worker reaches the others."""

    peers: PeerPort
    gateways: GatewayPort
    loads: LoadPort
    link: Link


class WorkerCache(SendingCache, ReceivingCache, ProbingCache, Protocol):
    """A worker's cache as handoffs see it (kv_transfer/cache_port.py). `cache`: as the decode phase sees it."""

    @property
    def cache(self) -> Cache: ...

    @property
    def packs_inside_steps(self) -> bool:
        """Whether a part may be packed between two layers of a step. Several ranks are not there together."""


def assemble(
    info: WorkerInfo,
    runner: Runner,
    port: WorkerCache,
    config: ServingConfig,
    ports: Ports,
    clock: Clock,
    *,
    codec_bytes_per_s: float = 0.0,
) -> WorkerDriver:
    """Wires a worker around an engine. `codec_bytes_per_s`: as SendLimits has it."""
    rounds = make_round(info, port, config, ports, clock, threading.Lock(), codec_bytes_per_s=codec_bytes_per_s)
    layers_per_part = config.transfer.layers_per_part if port.packs_inside_steps else None
    return WorkerDriver(rounds, runner, clock, layers_per_part)


def make_round(
    info: WorkerInfo,
    port: WorkerCache,
    config: ServingConfig,
    ports: Ports,
    clock: Clock,
    guard: AbstractContextManager[object],
    *,
    codec_bytes_per_s: float = 0.0,
) -> WorkerRound:
    """What decides in a worker, without an engine and without a thread. `guard`: as KVReceiver has it."""
    scheduler, budget = config.scheduler, token_budget(config, info.device)
    blocks = BlockManager(info.num_kv_blocks, info.kv_spec.block_size, prefix_caching=config.cache.prefix_caching)
    outbox, peers = Outbox(info.worker_id, ports.gateways, clock), PeerOutbox(ports.peers)
    limits = _send_limits(info, config, budget, codec_bytes_per_s, packs_inside_steps=port.packs_inside_steps)
    sender = KVSender(info.worker_id, port, ports.link, peers, clock, limits)
    receiver = KVReceiver(port, peers, clock, guard)
    prober = LinkProber(info.worker_id, port, ports.link, clock)
    prompts = PrefillScheduler(blocks, lookahead_tokens=2 * budget)
    prefill = PrefillPhase(blocks, prompts, sender, outbox, clock, scheduler.max_waiting)
    rules = JoiningRules(info.num_kv_blocks, info.kv_spec.block_size, scheduler.max_running, scheduler.reserve_headroom)
    decode = DecodePhase(blocks, rules, receiver, port.cache, peers, outbox, clock)
    parts = WorkerParts(blocks, prefill, decode, sender, receiver, prober, outbox, peers)
    return WorkerRound(info, parts, ports.loads, clock, RoundLimits(budget, config.health.heartbeat_s))


def _send_limits(
    info: WorkerInfo, config: ServingConfig, budget: int, codec_bytes_per_s: float, *, packs_inside_steps: bool
) -> SendLimits:
    transfer, num_layers = config.transfer, info.kv_spec.num_layers
    # What has room in slabs must not wait for the window. A part is more than its KV: by less than a hundredth.
    sizes = link_sizes(config)
    slabs_mib = sizes.num_slabs * sizes.slab_mib * 1.01
    layers_per_part = transfer.layers_per_part if packs_inside_steps else 0
    return SendLimits(
        int(max(transfer.window_mib, slabs_mib) * 2**20),
        transfer.timeout_s,
        Codec(transfer.codec),
        codec_bytes_per_s,
        num_groups=ceil(num_layers / (layers_per_part or num_layers)),
        chunk_tokens=budget,
        threshold_tokens=transfer.layerwise_threshold_tokens,
    )
