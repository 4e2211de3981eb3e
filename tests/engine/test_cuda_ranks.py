"""Two GPUs as one group: the fused sums against exact ones, and the sharded decoder against one GPU's."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.sharding import Shard
from engine.tensor_parallel import Group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
    pytest.mark.filterwarnings("ignore"),  # of other versions of torch and Triton than the pinned ones
]


def check_sums(rank: int, store: str, results: Any) -> None:
    """Every size and method, eager and in a replayed graph; puts the worst errors."""
    from engine.cuda.all_reduce import FastReduce

    device, group = torch.device("cuda", rank), Group(Shard(rank, 2))
    group.connect(store, device)
    reduce = FastReduce.connect(group, device)
    errors: dict[str, float] = {}
    for num_rows, hidden in ((1, 64), (1, 8192), (7, 576), (64, 4096), (130, 4096), (1000, 4096), (2048, 4096)):
        torch.manual_seed(num_rows)
        x = torch.randn(num_rows, hidden, device=device).bfloat16()
        parts = torch.randn(2, 4, num_rows, hidden, device=device).bfloat16()

        def step(x: torch.Tensor = x, parts: torch.Tensor = parts) -> torch.Tensor:
            for i in range(4):
                partial = reduce.partial(x, i % 2)
                partial.copy_(parts[rank, i])
                scales = reduce.add(x, partial, i % 2, 1e-5)
            return scales

        wanted = x.double() + parts.double().sum(dim=(0, 1))
        start = x.clone()
        scales = step()
        case = f"{num_rows}x{hidden} {reduce.method(x.numel() * 2)}"
        errors[case] = ((x.double() - wanted).norm() / wanted.norm()).item()
        exact_scales = (x.double().square().mean(-1) + 1e-5).rsqrt()
        errors[f"{case} scales"] = (scales.double() / exact_scales - 1).abs().max().item()
        eager = x.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        for _ in range(20):
            x.copy_(start)
            graph.replay()
            errors[f"{case} graph"] = errors.get(f"{case} graph", 0.0) + float(not torch.equal(x, eager))
    for num_rows in (1, 64, 1000):
        keys = torch.randint(-(2**62), 2**62, (2, num_rows), device=device, generator=_generator(device))
        for _ in range(20):
            wrong = float(not torch.equal(reduce.max_(keys[rank].clone()), keys.amax(0)))
            errors[f"max {num_rows}"] = errors.get(f"max {num_rows}", 0.0) + wrong
    results.put((rank, errors))
    group.close()


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def check_decoder(rank: int, store: str, results: Any, config: str, size: int) -> None:
    """The last hidden state and the largest logits' ids after a prompt and three decodes."""
    from engine.cuda.decode_attention import DecodeAttention
    from engine.cuda.decoder import CudaDecoder
    from engine.loader import load_model
    from phasewise.core.model_source import ModelSource

    torch.backends.cuda.matmul.allow_tf32 = False
    device, group = torch.device("cuda", rank), Group(Shard(rank, size))
    if size > 1:
        group.connect(store, device)
    torch.cuda.set_device(device)
    source = ModelSource("random", Path(config), "test")
    loaded = load_model(
        source, dtype="float32", device=f"cuda:{rank}", seed=1, progress=lambda share: None, group=group
    )
    shape = loaded.config
    decoder = CudaDecoder(loaded.model, 64)
    storage = torch.zeros(shape.num_layers, 2, 64, shape.num_kv_heads, shape.head_dim, device=device)
    attention = DecodeAttention(shape.num_heads, shape.num_kv_heads, shape.head_dim, 16, 2, device, torch.float32)
    tables = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
    ids = torch.tensor([5, 9], device=device)
    hidden, tokens = [], []
    with torch.inference_mode():
        for position in range(20):
            contexts = torch.full((2,), position + 1, dtype=torch.int32, device=device)

            def attend(
                layer: int, qkv: torch.Tensor, out: torch.Tensor, contexts: torch.Tensor = contexts
            ) -> torch.Tensor:
                return attention(qkv.view(2, -1), storage[layer], tables, contexts, out)

            positions = torch.full((2,), position, device=device)
            x = decoder.embed(ids)
            x = decoder.run_layers(
                x, 0, shape.num_layers, positions, positions + 32 * torch.arange(2, device=device), storage, attend
            )
            part = decoder.partial_logits(x)
            ids = decoder.share_ids(decoder.largest(part))
            assert torch.equal(ids, decoder.gather(part).argmax(-1))
            hidden.append(x.cpu().numpy().copy())
            tokens.append(ids.tolist())
    results.put((rank, hidden, tokens))
    group.close()


def run_ranks(function: Any, size: int, tmp_path: Path, *arguments: Any) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    store = str(tmp_path / f"store{size}")
    processes = [
        context.Process(target=function, args=(rank, store, results, *arguments), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        return sorted((results.get(timeout=120.0) for _ in processes), key=lambda result: result[0])
    finally:
        for process in processes:
            process.join(20.0)
            process.kill()


def test_sums_of_every_size(tmp_path: Path) -> None:
    first, second = run_ranks(check_sums, 2, tmp_path)
    assert first[1] == second[1]
    for case, error in first[1].items():
        bound = 0.0 if "graph" in case or "max" in case else 1e-4 if "scales" in case else 1e-2
        assert error <= bound, (case, error)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_two_gpus_decode_what_one_does(name: str, tmp_path: Path) -> None:
    import transformers

    sizes = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "initializer_range": 0.15,
    }
    kinds: dict[str, Any] = {
        "llama": lambda: transformers.LlamaConfig(**sizes, attention_bias=True),
        "qwen2": lambda: transformers.Qwen2Config(**sizes),
        "qwen3": lambda: transformers.Qwen3Config(**sizes, head_dim=64),
    }
    config = kinds[name]()
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    path = str(tmp_path / "config.json")
    ((_, alone, tokens),) = run_ranks(check_decoder, 1, tmp_path, path, 1)
    both = run_ranks(check_decoder, 2, tmp_path, path, 2)
    for _, hidden, ids in both:
        assert ids == tokens
        for ours, wanted in zip(hidden, alone, strict=True):
            assert abs(ours - wanted).max() < 1e-3 * abs(wanted).max()
    assert all((a == b).all() for a, b in zip(both[0][1], both[1][1], strict=True)), "equal on all ranks, bit by bit"


def serve_worker(rank: int, store: str, results: Any, config_path: str, size: int) -> None:
    """The tokens of requests of all kinds through a worker of `size` ranks."""
    from phasewise.core.clock import MonotonicClock
    from phasewise.core.config import build_config
    from phasewise.core.placement import WorkerRole
    from phasewise.core.request import Request, SamplingParams
    from tests.support.lone_worker import serve
    from workers.build import load_engine
    from workers.settings import WorkerSettings

    torch.backends.cuda.matmul.allow_tf32 = False
    values = {
        "model": {"path": f"random:{config_path}", "dtype": "float32", "max_model_len": 512},
        "cache": {"kv_cache_gib": 0.02},
        "scheduler": {"token_budget": 256, "max_running": 8},
    }
    config = build_config(values, source="test")
    settings = WorkerSettings("w", WorkerRole.MIXED, "cuda", 1, config, tensor_parallel=size)
    engine = load_engine(settings, lambda share: None, MonotonicClock())
    requests = []
    for i in range(24):
        prompt = tuple((7919 * i + 31 * j) % 1000 for j in range(1 + 37 * i % 300))
        sampling: dict[str, Any] = {"temperature": 0.0}
        if i % 3 == 1:
            sampling = {"temperature": 1.0, "top_p": 0.8, "seed": i, "frequency_penalty": 0.3, "n": 1 + i % 2}
        if i == 5:
            sampling["prompt_logprobs"] = 1
        requests.append(Request(f"r{i}", prompt, SamplingParams(max_tokens=5 + i, **sampling)))
    tokens = serve(engine.runner, engine.port, config, requests)
    if engine.ranks is not None:
        engine.ranks.close()
    results.put((rank, tokens))


def test_a_worker_of_two_ranks_serves_what_one_serves(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.15,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    path = str(tmp_path / "config.json")
    ((_, alone),) = run_ranks(serve_worker, 1, tmp_path / "one", path, 1)
    ((_, both),) = run_ranks(serve_worker, 1, tmp_path / "two", path, 2)
    assert both == alone
