"""The handoff between two workers: cache to cache beside raw NCCL, its kernels, what it costs others, and a soak of it.

Real on two GPUs of one host; on a CPU links are sockets and models tiny, which shows that it runs. In the
Llama-3.1-8B shape a token is 131,072 bytes of KV. Parts, each in processes of its own:

    caches        paged cache to paged cache, alone and in a row; the floor is one message of that size on the bare wire
    kernels       packing, unpacking and summing alone
    interference  prefill while it pushes, decode steps while KV comes in
    cluster       handover, TTFT and second token through `phasewise serve`, beside one mixed worker
    memory        of one worker's links with eight peers, by number of channels
    many          handoffs of random length: sums, memory, tokens beside those of one worker

    python -m benchmarks.handoff --output benchmarks/results/handoff-h200x2.json
    python -m benchmarks.handoff --quick
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.link_kernels import CASES, Kernels
from benchmarks.link_nodes import MIB, CacheEnd, LinkEnd, LinkSettings
from benchmarks.link_worker import WorkerEnd
from benchmarks.nodes import Node, open_links, pipes
from benchmarks.offline import Rows, device_name, local_device, model_path
from phasewise.core.kv_spec import FP8, KVCacheSpec
from workers.link_sizes import sizes_for

BLOCK = 16
PARTS = ("caches", "kernels", "interference", "cluster", "memory", "many")
SHARES = {128: 70.0, 2048: 90.0, 8192: 95.0}
"""Prompt length → wanted share of raw NCCL, in percent."""
NUM_PEERS = 8
SPLITTABLE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""A small model that two ranks can share."""
Kinds = Mapping[str, tuple[int | Sequence[int], type, tuple[Any, ...]]]
"""Processes by name: (GPU or GPUs, kind, arguments). GPUs are counted round where there are too few."""


# ---- arithmetic


def share_percent(ours_s: float, raw_s: float) -> float:
    """How much of the bare wire's rate is reached."""
    return 100 * raw_s / ours_s


def duty_percent(num_bytes: int, elapsed_s: float, bytes_per_s: float) -> float:
    """The share of time in which a wire of that rate must have been busy."""
    return 100 * num_bytes / bytes_per_s / elapsed_s


def more_percent(value: float, base: float) -> float:
    return 100 * (value / base - 1)


def lengths_of(count: int, most: int, seed: str) -> list[int]:
    """Random prompt lengths, 1 … most."""
    rng = random.Random(seed)
    return [rng.randint(1, most) for _ in range(count)]


def shape_8b(dtype: str = "bfloat16") -> KVCacheSpec:
    return KVCacheSpec(32, 8, 128, BLOCK, dtype, "benchmark")


def num_unequal(tokens: Sequence[dict[str, list[int]]], alone: dict[str, list[int]]) -> int:
    """Requests whose tokens, joined from the two workers in turn, are not those of one worker."""
    return sum(
        [token for part in tokens for token in part.get(request, [])] != wanted for request, wanted in alone.items()
    )


# ---- parts


class Benchmark:
    """`quick` makes everything small; `rows` has what was measured."""

    def __init__(self, rows: Rows, quick: bool, channels: int) -> None:
        self.rows = rows
        self._quick = quick
        self._settings = LinkSettings(channels)
        self._num_gpus = torch.cuda.device_count()

    def caches(self) -> None:
        lengths = (16, 128) if self._quick else tuple(SHARES)
        self._caches(lengths, self._settings, SHARES, "")
        half = replace(self._settings, num_slabs_out=2, num_slabs_in=2)
        self._caches(lengths, half, {}, ", half the staging memory")

    def _caches(self, lengths: Sequence[int], settings: LinkSettings, must: Mapping[int, float], note: str) -> None:
        arguments = shape_8b(), -(-max(lengths) // BLOCK), 1024 * MIB
        kinds = {"sender": (0, CacheEnd, arguments), "receiver": (1, CacheEnd, arguments)}
        with self._nodes(kinds, settings) as nodes:
            rates = open_links(nodes, ("sender", "receiver"))
            rate = rates["sender", "receiver"] / 1e9
            self.rows.add(f"rate of the link's trial messages{note}", "GB/s", rate, better="high")
            sender, receiver = nodes["sender"], nodes["receiver"]
            token = sender.call("raw_token")
            sender.begin("raw_open", token, 0)
            receiver.call("raw_open", token, 1)
            sender.end()
            for length in lengths:
                self._cache_to_cache(sender, receiver, length, must.get(length), note)

    def _cache_to_cache(self, sender: Node, receiver: Node, length: int, must: float | None, note: str) -> None:
        num_bytes = length * shape_8b().bytes_per_token
        raw = ("raw_receive", "sender", num_bytes), ("raw_send", num_bytes)
        ours = ("take",), ("give", "receiver", length)
        for label, in_a_row, repeats in (("alone", 1, 21), ("in a row", 20, 3)):
            if self._quick:
                in_a_row, repeats = min(in_a_row, 4), 3
            raw_s, ours_s = (_median_s(receiver, sender, *calls, in_a_row, repeats) for calls in (raw, ours))
            case = f"{length} tokens, {num_bytes / 1e6:.1f} MB, {label}{note}"
            self.rows.add(f"cache to cache: {case}", "ms", 1000 * ours_s, floor=1000 * raw_s)
            share = share_percent(ours_s, raw_s)
            self.rows.add(f"share of the bare wire: {case}", "%", share, floor=100, must=must, better="high")
        if sender.call("content", length) != receiver.call("content", length):
            raise RuntimeError(f"{length} tokens arrived wrong")

    def kernels(self) -> None:
        num_tokens = 64 if self._quick else 2048
        node = Node(Kernels, [0], num_tokens)
        try:
            node.end()
            for case in CASES:
                for what, rate, floor in node.call("rates", case):
                    self.rows.add(f"{what}, {num_tokens} tokens, {case}", "GB/s", rate, floor=floor, better="high")
        finally:
            node.close()

    def interference(self) -> None:
        prompt, count, batch, context = (64, 8, 4, 64) if self._quick else (2048, 24, 64, 1024)
        with tempfile.TemporaryDirectory() as folder:
            model = {
                "path": model_path("tiny" if self._quick else "8b", Path(folder)),
                "device": local_device(),
                "max_model_len": 9216,
            }
            values = {
                "model": model,
                "cache": {"kv_cache_gib": 0.05 if self._quick else 40, "prefix_caching": False},
                "scheduler": {"max_running": batch + 32},
            }
            settings = LinkSettings(self._settings.channels, slab_bytes=(16 if self._quick else 128) * MIB)
            controls = pipes(("prefill", "decode"), ("pusher", "decode"))
            kinds = {"prefill": (0, WorkerEnd, (values,)), "decode": (1, WorkerEnd, (values,))}
            with self._nodes(kinds, settings, controls) as nodes:
                open_links(nodes, ("prefill", "decode"))
                self._prefill_while_pushing(nodes, [prompt] * count)
                cache = nodes["decode"].call("spec"), -(-prompt // BLOCK), 8 * settings.slab_bytes
                with self._nodes({"pusher": (0, CacheEnd, cache)}, settings, controls) as more:
                    nodes |= more
                    rates = open_links(nodes, ("pusher", "decode"))
                    self._decode_while_receiving(nodes, rates["pusher", "decode"], prompt, batch, context)

    def _prefill_while_pushing(self, nodes: dict[str, Node], lengths: list[int]) -> None:
        prefill, decode = nodes["prefill"], nodes["decode"]
        seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
        for turn in range(3):
            for at in seconds:
                took_s = prefill.call("serve", at, f"{at}-{turn}", lengths, 1 if at == "prefill" else 2)
                nodes[at].call("finished", len(lengths))
                if turn:
                    seconds[at].append(took_s)
        alone, pushing = (sum(lengths) / min(seconds[at]) for at in ("prefill", "decode"))
        case = f"prefill of {len(lengths)} x {lengths[0]}"
        self.rows.add(f"{case} while pushing", "tokens/s", pushing, floor=alone, better="high")
        self.rows.add(
            f"{case}, pushing over not pushing", "%", 100 * pushing / alone, floor=100, must=97, better="high"
        )
        decode.call("tokens")

    def _decode_while_receiving(
        self, nodes: dict[str, Node], bytes_per_s: float, prompt: int, batch: int, context: int
    ) -> None:
        decode, pusher = nodes["decode"], nodes["pusher"]
        num_steps, duration_s = (30, 1.0) if self._quick else (150, 3.0)
        decode.call("fill", batch, context, 10**6 if self._quick else 6000)
        alone_ms = [decode.call("step_ms", num_steps)]
        pusher.begin("push_at", "decode", prompt, 0.2 * bytes_per_s, duration_s)
        receiving_ms = decode.call("step_ms", num_steps)
        num_bytes, elapsed_s = pusher.end()
        alone_ms.append(decode.call("step_ms", num_steps))
        decode.call("empty")
        case = f"decode step, batch {batch}, context {context}"
        base_ms = statistics.mean(alone_ms)
        duty = duty_percent(num_bytes, elapsed_s, bytes_per_s)
        self.rows.add(f"{case}, while receiving at {duty:.1f} % duty", "ms", receiving_ms, floor=base_ms)
        self.rows.add(f"{case}, longer by receiving", "%", more_percent(receiving_ms, base_ms), floor=0, must=5)
        self.rows.add("duty reached of 20 % wanted", "%", duty, must=19, better="high")

    def cluster(self) -> None:
        from benchmarks.link_cluster import compare_clusters

        compare_clusters(self.rows, self._quick)

    def memory(self) -> None:
        num_peers = 2 if self._quick else NUM_PEERS
        for channels in (16, 1) if self._quick else (4, 8, 16):
            sizes = sizes_for(num_peers)
            settings = LinkSettings(channels, sizes.num_slabs, 0, sizes.slab_mib * MIB)  # a prefill worker's
            peers: Kinds = {f"peer-{i}": (1, LinkEnd, ()) for i in range(num_peers)}
            small = LinkSettings(channels, num_slabs_out=0, slab_bytes=16 * MIB)
            with self._nodes(peers, small) as others, self._nodes({"worker": (0, LinkEnd, ())}, settings) as worker:
                open_links({**worker, **others}, *(("worker", peer) for peer in peers))
                taken = worker["worker"].call("memory")
            links = taken["device"] if self._num_gpus else taken["resident"]
            case = f"links of one worker with {num_peers} peers, {channels} channels"
            must = 1024 if channels == sizes.channels and num_peers == NUM_PEERS else None
            self.rows.add(f"{case}: memory", "MiB", links, floor=0, must=must)
            if self._num_gpus:
                self.rows.add(f"{case}: of which slabs, as torch reserves", "MiB", taken["reserved"], floor=0)

    def many(self) -> None:
        total, most = (30, 200) if self._quick else (1000, 4096)
        self._many_caches("bfloat16", FP8, total // 5, most)
        self._many_caches(FP8, "bfloat16", total // 5, most)
        for sizes in ((1, 1), (1, 2), (2, 1)):
            self._many_workers(*sizes, total // 5, most)

    def _many_caches(self, source: str, target: str, count: int, most: int) -> None:
        """Without a model: all lengths, the dtype changing on the way."""
        num_blocks = -(-most // BLOCK)
        kinds = {
            name: (place, CacheEnd, (shape_8b(dtype), num_blocks, 256 * MIB))
            for place, (name, dtype) in enumerate((("sender", source), ("receiver", target)))
        }
        with self._nodes(kinds) as nodes:
            open_links(nodes, ("sender", "receiver"))
            lengths = lengths_of(count, most, source)
            quarter = max(count // 4, 1)
            before: dict[str, dict[str, float]] = {}
            for first in range(0, count, quarter):
                batch = lengths[first : first + quarter]
                nodes["receiver"].begin("take", len(batch))
                nodes["sender"].call("give_all", "receiver", batch)
                nodes["receiver"].end()
                before = before or {name: node.call("memory") for name, node in nodes.items()}
            self._end_of_many(f"{count} handoffs, {source} to {target}", nodes, before, nodes["receiver"])

    def _many_workers(self, prefill: int, decode: int, count: int, most: int) -> None:
        """With a model in float32, which must give the tokens that one worker gives."""
        case = f"{count} handoffs, TP {prefill} to TP {decode}"
        num_tokens = 8
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.json"
            file.write_text(json.dumps(SPLITTABLE))
            values = {
                "model": {"path": f"random:{file}", "device": local_device(), "dtype": "float32"},
                "cache": {"kv_cache_gib": 0.5, "prefix_caching": False},
                "transfer": {"layers_per_part": 2},
            }
            # With two GPUs workers share one; the first ranks, which hold the links, do not.
            decode_places = range(1, 1 + decode) if self._num_gpus == 2 else range(prefill, prefill + decode)
            kinds = {
                "prefill": (range(prefill), WorkerEnd, (values, prefill)),
                "decode": (decode_places, WorkerEnd, (values, decode)),
            }
            with self._nodes(kinds) as nodes:
                open_links(nodes, ("prefill", "decode"))
                one = "prefill" if prefill == 1 else "decode"
                unequal, before, quarter = 0, {}, max(count // 4, 1)
                lengths = lengths_of(count, most, case)
                for first in range(0, count, quarter):
                    batch = lengths[first : first + quarter]
                    nodes[one].call("serve", one, f"r{first}", batch, num_tokens)
                    nodes[one].call("finished", len(batch))
                    alone = nodes[one].call("tokens")
                    nodes["prefill"].call("serve", "decode", f"r{first}", batch, num_tokens)
                    nodes["decode"].call("finished", len(batch))
                    unequal += num_unequal([nodes["prefill"].call("tokens"), nodes["decode"].call("tokens")], alone)
                    before = before or {name: node.call("memory") for name, node in nodes.items()}
                self.rows.add(f"{case}: requests with other tokens than one worker's", "number", unequal, must=0)
                self._end_of_many(case, nodes, before, nodes["decode"])

    def _end_of_many(
        self, case: str, nodes: dict[str, Node], before: dict[str, dict[str, float]], receiver: Node
    ) -> None:
        self.rows.add(f"{case}: checksum errors", "number", receiver.call("num_checksum_failures"), must=0)
        kinds = ("device", "resident") if self._num_gpus else ("resident",)
        for kind in kinds:
            growth = max(node.call("memory")[kind] - before[name][kind] for name, node in nodes.items())
            self.rows.add(f"{case}: {kind} memory more than after a quarter", "MiB", growth, must=64)

    @contextlib.contextmanager
    def _nodes(
        self,
        kinds: Kinds,
        settings: LinkSettings | None = None,
        controls: dict[str, dict[str, Connection]] | None = None,
    ) -> Iterator[dict[str, Node]]:
        """Processes that are up. Without `controls` two of them get a connection, more none."""
        names = list(kinds)
        if controls is None:
            controls = pipes((names[0], names[1])) if len(names) == 2 else {}
        nodes: dict[str, Node] = {}
        try:
            for name, (places, kind, arguments) in kinds.items():
                gpus = [p % max(self._num_gpus, 1) for p in ([places] if isinstance(places, int) else places)]
                nodes[name] = Node(kind, gpus, name, controls.get(name, {}), settings or self._settings, *arguments)
            for node in nodes.values():
                node.end()
            yield dict(nodes)
        finally:
            for node in nodes.values():
                node.leave()
            for node in nodes.values():
                node.close()


def _median_s(
    receiver: Node, sender: Node, receive: tuple[Any, ...], send: tuple[Any, ...], in_a_row: int, repeats: int
) -> float:
    """Seconds of one of `in_a_row` that go at once, from the beginning of the first to the end of the last."""
    times = []
    for _ in range(repeats + 1):
        receiver.begin(*receive, in_a_row)
        start_s = sender.call(*send, in_a_row)
        times.append((receiver.end() - start_s) / in_a_row)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="everything small: shows that it runs")
    parser.add_argument("--channels", type=int, default=LinkSettings().channels, help="of NCCL")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 1 and parts != ["kernels"]:
        parser.error("NCCL links need two GPUs, and here is one; use --parts kernels, or hide it to measure on the CPU")
    name = device_name("cuda" if num_gpus else "cpu")
    packages = ("phasewise", "torch", "triton", "cupy-cuda13x", "ray")
    rows = Rows(arguments.output, f"{num_gpus} x {name}" if num_gpus else name, packages)
    benchmark, failed = Benchmark(rows, arguments.quick, arguments.channels), []
    for part in parts:
        start_s = time.perf_counter()
        try:
            getattr(benchmark, part)()
        except Exception:  # the other parts are worth having
            traceback.print_exc()
            failed.append(part)
        print(f"-- {part}: {time.perf_counter() - start_s:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
