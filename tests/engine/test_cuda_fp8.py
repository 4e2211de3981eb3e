"""fp8 on a GPU: every kernel against its plain twin in float64, whole models against the plain fp8 model and bf16."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers

from engine.attention.reference import ReferenceAttention
from engine.batch import ScheduledBatch, ScheduledSequence
from engine.block_manager import BlockManager
from engine.kv_cache import PagedKVCache
from engine.layers.fp8 import FP8_DTYPE, Fp8Weight, quantize_weight, saturate
from engine.loader import load_model
from engine.sequence import Sequence
from phasewise.core.kv_spec import FP8, KVCacheSpec
from phasewise.core.model_source import ModelSource
from phasewise.core.request import SamplingParams
from tests.engine.conftest import build_oracle, plain_hidden, poisoned_memory

pytest.importorskip("triton")

from engine.cuda.decode_attention import DecodeAttention
from engine.cuda.elementwise import rope_and_cache, row_scales
from engine.cuda.executor import StepExecutor
from engine.cuda.fp8 import (
    ROWS_FOR_FP8_ACTIVATIONS,
    Fp8Product,
    SkinnyTile,
    gemv_fp8,
    quantize_rows,
    skinny_fp8_tile,
    skinny_product_fp8,
)
from engine.cuda.runner import CudaModelRunner
from tests.engine.test_cuda import SIZES, GpuEngine, Ragged, ragged, random_ragged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8"
    ),
    pytest.mark.filterwarnings("ignore"),  # of other versions of torch and Triton than the pinned ones
]

DEVICE = "cuda"
BF16 = torch.bfloat16
NAN = 0x7F  # of e4m3fn, as a byte


def random_weight(rows: int, columns: int) -> tuple[Fp8Weight, torch.Tensor]:
    """Rows of unequal size, and what they stand for in float64."""
    scale = torch.logspace(-3, 1, rows, device=DEVICE).unsqueeze(1)
    weight = quantize_weight((torch.randn(rows, columns, device=DEVICE) * scale).to(BF16))
    return weight, weight.values.double() * weight.scales.double().unsqueeze(1)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The worst of all columns: rows of a weight of unequal size must not hide each other."""
    return ((ours.double() - exact).norm(dim=0) / exact.norm(dim=0)).max().item()


def poison(num_floats: int) -> None:
    """Leaves NaN in the memory that the next allocation of this size gets."""
    torch.full((num_floats,), torch.nan, device=DEVICE)


@pytest.mark.parametrize(("rows", "columns"), [(208, 528), (512, 4096), (4096, 14336)])
@pytest.mark.parametrize("tile", [(4, 1024, 4), (2, 2048, 8)])
def test_gemv_against_the_product(rows: int, columns: int, tile: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    weight, exact_weight = random_weight(rows, columns)
    x = torch.randn(1, columns, device=DEVICE).to(BF16)
    exact = x.double() @ exact_weight.T
    out = torch.full((1, rows), torch.nan, device=DEVICE, dtype=BF16)
    gemv_fp8(x, weight, out, adds=False, tile=tile)
    rounding = 1e-6 * exact_weight.norm(dim=1) * x.double().norm()  # of the sum; that of the result is relative
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + rounding).all()
    exact = out.double() + exact
    gemv_fp8(x, weight, out, adds=True, tile=tile)
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + rounding).all()


@pytest.mark.parametrize("num_tokens", [7, 64])
@pytest.mark.parametrize(("rows", "columns"), [(208, 528), (256, 8192)])
def test_skinny_product_against_the_product(num_tokens: int, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    weight, exact_weight = random_weight(rows, columns)
    x = torch.randn(num_tokens, columns, device=DEVICE).to(BF16)
    exact = x.double() @ exact_weight.T
    arrivals = torch.zeros(1024, dtype=torch.int32, device=DEVICE)
    tiles = (
        skinny_fp8_tile(rows, columns),
        SkinnyTile(64, 128, 3, 4, 4),
        SkinnyTile(128, 128, 1, 8, 3),
    )
    for tile in tiles:
        results = []
        for _ in range(3):  # the arrival counters must be ready again, and the sums equal whoever came last
            out = torch.full((num_tokens, rows), torch.nan, device=DEVICE, dtype=BF16)
            poison(tile.num_splits * num_tokens * rows)
            skinny_product_fp8(x, weight, out, tile, arrivals, adds=False)
            results.append(out)
        assert relative_error(results[0], exact) < 4e-3, tile
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), tile
        skinny_product_fp8(x, weight, out, tile, arrivals, adds=True)
        assert relative_error(out, 2 * exact) < 6e-3, tile
        assert not arrivals.any()


def test_quantised_rows_against_torch() -> None:
    torch.manual_seed(0)
    for columns in (96, 500, 4096, 14336):
        x = torch.randn(6, columns, device=DEVICE).to(BF16)
        x *= torch.tensor([1e-4, 1.0, 3e4, 0.0, 1.0, 1.0], device=DEVICE).unsqueeze(1).to(BF16)
        x[4, 3], x[5, 3] = torch.nan, torch.inf
        values, scales = quantize_rows(x)
        largest = x[:4].float().abs().amax(dim=1)
        torch.testing.assert_close(scales[:4], largest.clamp(min=1e-12) / 448, rtol=1e-6, atol=0)
        error = (values[:4].double() * scales[:4, None].double() - x[:4].double()).abs()
        half_step = x[:4].double().abs() / 16 + scales[:4, None].double() * 2**-10
        assert (error <= half_step * 1.001).all()
        assert (values[:4].float().abs().amax(dim=1) == torch.where(largest > 0, 448, 0)).all()
        assert values[4, 3].float().isnan() and values[5, 3].float().isnan(), "a broken row stays broken"


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 100, 300])
@pytest.mark.parametrize(("rows", "columns"), [(208, 528), (4096, 14336)])
def test_a_product_of_any_number_of_rows(num_tokens: int, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    weight, exact_weight = random_weight(rows, columns)
    x = torch.randn(num_tokens, columns, device=DEVICE).to(BF16)
    rounded = x.double()
    if num_tokens >= ROWS_FOR_FP8_ACTIVATIONS:
        values, scales = quantize_rows(x)
        rounded = values.double() * scales.double().unsqueeze(1)
    product, exact = Fp8Product(weight), rounded @ exact_weight.T
    ours = product(x)
    limit = 5e-3
    assert (ours.double() - exact).norm() / exact.norm() < limit
    assert (exact - x.double() @ exact_weight.T).norm() / exact.norm() < 0.04, "what quantised activations cost"
    residual = torch.randn(num_tokens, rows, device=DEVICE).to(BF16)
    wanted = residual.double() + exact
    product.add_to(residual, x)
    assert (residual.double() - wanted).norm() / wanted.norm() < 2 * limit


def test_products_beside_each_other_on_two_streams() -> None:
    """As those of a step's prompts beside its decodes."""
    torch.manual_seed(0)
    weight, _ = random_weight(4096, 4096)
    product, graphs = Fp8Product(weight), []
    for num_tokens in (16, 64):
        x, stream = torch.randn(num_tokens, 4096, device=DEVICE).to(BF16), torch.cuda.Stream()
        alone = product(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            product(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs = [product(x) for _ in range(100)]
        graphs.append((stream, graph, x, outs, alone))  # x, too: the graph reads it
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, graph, *_ in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for *_, outs, alone in graphs:
            assert all(torch.equal(out, alone) for out in outs)


@pytest.mark.parametrize("num_tokens", [5, 80])
def test_rope_and_cache_rounds_keys_and_values_where_they_are_made(num_tokens: int) -> None:
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = 8, 2, 64
    x = torch.randn(num_tokens, 256, device=DEVICE)
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE)
    qkv[1, num_heads] *= 1e4  # a key beyond the largest fp8 number
    qkv[2, -1, 5] = torch.nan
    angles = torch.rand(100, head_dim // 2, device=DEVICE)
    positions = torch.arange(num_tokens, device=DEVICE)
    slots = torch.randperm(200, device=DEVICE)[:num_tokens]
    slots[3] = -1
    scales = row_scales(x, 1e-5) if num_tokens > 64 else None
    results = []
    for dtype in (torch.float32, FP8_DTYPE):
        rows, cache = qkv.clone(), torch.full((2, 200, num_kv_heads, head_dim), torch.nan, device=DEVICE).to(dtype)
        rope_and_cache(
            rows, x, scales, None, None, (angles.cos(), angles.sin()), positions, slots, cache, 1e-5, num_heads
        )
        results.append((rows, cache))
    (plain, _), (ours, cache) = results
    torch.testing.assert_close(ours[:, :num_heads], plain[:, :num_heads], rtol=1e-5, atol=1e-5)
    stored = saturate(plain[:, num_heads:], FP8_DTYPE).float()
    torch.testing.assert_close(ours[:, num_heads:], stored, rtol=0, atol=0, equal_nan=True)
    assert ours[1, num_heads].abs().max() == 448 and ours[2, -1, 5].isnan()
    written = [i for i in range(num_tokens) if i != 3]
    in_cache = cache.float()[:, slots[written]]
    torch.testing.assert_close(
        in_cache, stored.unflatten(1, (2, num_kv_heads)).transpose(0, 1)[:, written], rtol=0, atol=0, equal_nan=True
    )
    others = torch.ones(200, dtype=torch.bool, device=DEVICE)
    others[slots[written]] = False
    assert cache.float()[:, others].isnan().all(), "a negative slot writes nothing"


def fp8_cache(num_blocks: int, num_kv_heads: int, head_dim: int) -> tuple[PagedKVCache, PagedKVCache]:
    """A cache full of random numbers, and its float64 twin."""
    cache = PagedKVCache(KVCacheSpec(1, num_kv_heads, head_dim, 16, FP8), num_blocks, DEVICE)
    cache.storage.copy_(torch.randn(cache.storage.shape, device=DEVICE))
    twin = PagedKVCache(KVCacheSpec(1, num_kv_heads, head_dim, 16, "float32"), num_blocks, DEVICE)
    twin.storage = cache.storage.double()
    return cache, twin


def attention_error(
    batch: Ragged,
    cache: PagedKVCache,
    twin: PagedKVCache,
    num_heads: int,
    dtype: torch.dtype,
    window: int | None,
) -> float:
    """Of two runs over the same batch, against float64 over what the cache holds."""
    num_kv_heads, head_dim = cache.spec.num_kv_heads, cache.spec.head_dim
    inputs, num_tokens = batch.inputs, batch.num_tokens
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE).to(dtype)
    qkv[:, num_heads:] = saturate(qkv[:, num_heads:], FP8_DTYPE).to(dtype)  # as rope_and_cache leaves them
    keys_values = qkv[:, num_heads:].unflatten(1, (2, num_kv_heads))
    reference = ReferenceAttention(twin, (window,))
    reference.plan(inputs)
    exact = reference.run(0, qkv[:, :num_heads].double(), keys_values.double())
    written = saturate(keys_values.transpose(0, 1), FP8_DTYPE).contiguous().view(torch.uint8)
    cache.storage.view(torch.uint8)[0].index_copy_(1, inputs.slot_mapping, written)
    with poisoned_memory():
        decode = DecodeAttention(num_heads, num_kv_heads, head_dim, 16, 64, torch.device(DEVICE), dtype)
    attend = batch.attention(decode, cache, window)
    worst = 0.0
    for _ in range(2):  # twice: the arrival counters must be ready again
        out = torch.full((num_tokens, num_heads, head_dim), torch.nan, device=DEVICE, dtype=dtype)
        out = attend(0, qkv, out)
        error = ((out.double() - exact).norm() / exact.norm()).item()
        worst = max(worst, error) if error == error else float("inf")
    return worst


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize("window", [None, 37])
def test_ragged_attention_over_an_fp8_cache(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    rng = random.Random(f"{num_heads}{head_dim}{window}")
    torch.manual_seed(rng.randrange(1000))
    batches = [random_ragged(rng, 1200, 16, kinds) for kinds in ("d", "p", "dddpp", "d" * 40)]
    batches.append(ragged([(5000, 16), (3000, 64), (5, 5)], 0, rng.sample(range(1200), 1200), 16))  # cut into shares
    for batch in batches:
        cache, twin = fp8_cache(1200, num_kv_heads, head_dim)
        written = torch.zeros(1200 * 16, dtype=torch.bool, device=DEVICE)
        for table, context in zip(batch.inputs.block_tables, batch.inputs.context_lens, strict=True):
            for i in range(context):
                written[table[i // 16] * 16 + i % 16] = True
        cache.storage.view(torch.uint8)[:, :, ~written] = NAN  # what nobody wrote must not be read
        assert attention_error(batch, cache, twin, num_heads, BF16, window) < 1e-2, batch.inputs.context_lens


def test_a_chunk_split_at_its_context_over_an_fp8_cache() -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    batch = ragged([(1024 + 4096, 1024)], 0, rng.sample(range(400), 400), 16)
    cache, twin = fp8_cache(400, 2, 128)
    assert attention_error(batch, cache, twin, 8, BF16, None) < 1e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that keep the size of their inputs: larger ones let attention flip between tokens at every rounding."""
    path = tmp_path_factory.mktemp("fp8")
    model = build_oracle(transformers.Qwen2Config(**SIZES), path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter *= 0.06 / 0.15
    model.save_pretrained(path)
    return path


class Fp8Engine(GpuEngine):
    """As GpuEngine, with weights and cache as wanted."""

    def __init__(self, folder: Path, weights: str, cache_dtype: str, *, graphs: bool = True) -> None:
        source, num_blocks = ModelSource("hf", folder, "test"), 400
        self.loaded = load_model(
            source, dtype="bfloat16", device=DEVICE, seed=0, progress=lambda share: None, weights=weights
        )
        self.blocks = BlockManager(num_blocks, 16)
        self.cache = PagedKVCache(self.loaded.kv_cache_spec(16, cache_dtype), num_blocks, DEVICE)
        self.cache.storage.fill_(torch.nan)
        self.runner = CudaModelRunner(self.loaded, self.cache, 512, max_batch=8, graphs=graphs)

    @torch.inference_mode()
    def twin_logits(self, prompt: list[int]) -> torch.Tensor:
        """As `logits`, by the plain twin over the same weights, with a cache of its own."""
        cache = PagedKVCache(self.cache.spec, 400, DEVICE)
        sequence = Sequence("r", SamplingParams(), list(prompt), len(prompt))
        sequence.block_table = list(range(-(-len(prompt) // 16)))
        batch = ScheduledBatch((ScheduledSequence(sequence, len(prompt), 0),))
        return self.loaded.model.logits(plain_hidden(self.loaded, cache, batch, 512, "reference")).double()

    @torch.inference_mode()
    def logits(self, prompt: list[int], chunk: int) -> torch.Tensor:
        """Of every prompt token, kernel by kernel.  # [len(prompt), vocab_size] float64"""
        executor = StepExecutor(self.loaded, self.cache, 512, 8, graphs=False)
        planner = executor.planner()
        sequence = Sequence("r", SamplingParams(), list(prompt), len(prompt))
        sequence.block_table = self.blocks.allocate(self.blocks.blocks_for(len(prompt)))
        parts = []
        while sequence.num_computed_tokens < len(prompt):
            count = min(chunk, len(prompt) - sequence.num_computed_tokens)
            item, num_layers = ScheduledSequence(sequence, count, 0), self.loaded.config.num_layers
            hidden = executor.execute(planner.plan([], [item], num_layers), None).hidden
            assert hidden is not None
            parts.append(self.loaded.model.logits(hidden).double())
            sequence.num_computed_tokens += count
        self.blocks.release(sequence.block_table)
        return torch.cat(parts)


def test_logits_are_those_of_the_plain_twin_and_near_bfloat16(folder: Path) -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(SIZES["vocab_size"]) for _ in range(200)]
    plain = Fp8Engine(folder, "auto", "auto")
    bf16 = plain.logits(prompt, 200)
    # (weights, cache, chunk) → the most that the kernels may differ from the twin, and from bf16: one and a half times
    # what plain code in bf16 differs. Chunks of 200 quantise their activations, which the twin does not.
    for weights, cache, chunk, from_twin, from_bf16 in (
        ("auto", FP8, 200, 0.08, 0.1),
        ("auto", FP8, 40, 0.08, 0.1),
        ("fp8", "auto", 40, 0.04, 0.16),
        ("fp8", "auto", 200, 0.16, 0.2),
        ("fp8", FP8, 40, 0.09, 0.18),
        ("fp8", FP8, 1, 0.09, 0.18),
    ):
        engine = Fp8Engine(folder, weights, cache)
        ours = engine.logits(prompt, chunk)
        twin = engine.twin_logits(prompt)
        case = (weights, cache, chunk)
        assert (ours - twin).norm() / twin.norm() < from_twin, case
        assert (ours - bf16).norm() / bf16.norm() < from_bf16, case


def test_graphs_give_the_tokens_of_kernels_one_by_one(folder: Path) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(SIZES["vocab_size"]) for _ in range(n)] for n in (1, 5, 16, 33, 60, 20, 8, 2)]
    engine = Fp8Engine(folder, "fp8", FP8)
    graphed = engine.generate(prompts, 30, chunk=10**6)
    plain = Fp8Engine(folder, "fp8", FP8, graphs=False)
    assert plain.generate(prompts, 30, chunk=10**6) == graphed
    # A second runner over the same weights, which were folded already.
    engine.runner = CudaModelRunner(engine.loaded, engine.cache, 512, max_batch=8)
    assert engine.generate(prompts, 30, chunk=10**6) == graphed
