"""The CUDA path on a GPU: every kernel against its plain twin in float64, the whole runner against transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.attention.reference import ReferenceAttention
from engine.batch import ScheduledBatch, ScheduledSequence
from engine.block_manager import BlockManager
from engine.forward_inputs import ForwardInputs
from engine.kv_cache import PagedKVCache
from engine.loader import load_model
from engine.sequence import Sequence
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.model_source import ModelSource
from phasewise.core.request import SamplingParams
from tests.engine.conftest import SMALL, build_oracle, oracle_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),  # of other versions of torch and Triton than the pinned ones
]

SIZES: dict[str, Any] = {**SMALL, "hidden_size": 256, "intermediate_size": 384, "max_position_embeddings": 512}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=20),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=64),
}


def ragged_inputs(rng: random.Random, num_blocks: int, block_size: int, kinds: str) -> tuple[ForwardInputs, int]:
    """A random ragged batch: `d` one-token items, `p` prompt chunks with and without earlier context."""
    free = list(range(num_blocks))
    rng.shuffle(free)
    starts, contexts, tables, slots, positions = [0], [], [], [], []
    for kind in kinds:
        context = rng.randrange(1, 300)
        queries = 1 if kind == "d" else rng.choice([context, rng.randrange(1, context + 1)])
        table = tuple(free.pop() for _ in range(-(-context // block_size)))
        span = range(context - queries, context)
        positions += span
        slots += [table[i // block_size] * block_size + i % block_size for i in span]
        starts.append(starts[-1] + queries)
        contexts.append(context)
        tables.append(table)
    to = {"device": "cuda"}
    inputs = ForwardInputs(
        torch.zeros(len(slots), dtype=torch.int64, **to),
        torch.tensor(positions, **to),
        torch.tensor(slots, **to),
        tuple(starts),
        tuple(contexts),
        tuple(tables),
    )
    return inputs, len(slots)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 64), (32, 8, 128), (9, 3, 64), (4, 4, 128)])
@pytest.mark.parametrize("window", [None, 37])
def test_ragged_attention_against_the_plain_twin(
    dtype: str, tolerance: float, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    from engine.cuda.kernels import DecodeAttention
    from engine.cuda.runner import RaggedAttention

    rng = random.Random(f"{dtype}{num_heads}{head_dim}{window}")
    torch.manual_seed(rng.randrange(1000))
    spec = KVCacheSpec(1, num_kv_heads, head_dim, 16, dtype)
    torch_dtype = getattr(torch, dtype)
    for kinds in ("d", "ddddd", "p", "pdpdd", "dppp", "d" * 40):
        inputs, num_tokens = ragged_inputs(rng, 1200, 16, kinds)
        cache = PagedKVCache(spec, 1200, "cuda")
        cache.storage.normal_()
        written = torch.zeros(1200 * 16, dtype=torch.bool, device="cuda")
        for table, context in zip(inputs.block_tables, inputs.context_lens, strict=True):
            for i in range(context):
                written[table[i // 16] * 16 + i % 16] = True
        cache.storage[:, :, ~written] = torch.nan  # poison: what nobody wrote must not be read
        qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device="cuda").to(torch_dtype)
        keys_values = qkv[:, num_heads:].unflatten(1, (2, num_kv_heads))
        twin = PagedKVCache(KVCacheSpec(1, num_kv_heads, head_dim, 16, "float32"), 1200, "cuda")
        twin.storage = cache.storage.double()
        reference = ReferenceAttention(twin, (window,))
        reference.plan(inputs)
        wanted = reference.run(0, qkv[:, :num_heads].double(), keys_values.double())
        cache.storage[0].index_copy_(1, inputs.slot_mapping, keys_values.transpose(0, 1))
        decode = DecodeAttention(num_heads, num_kv_heads, head_dim, 16, 64, torch.device("cuda"), torch_dtype)
        decode._partial.fill_(torch.nan)
        attend = RaggedAttention(decode, cache, (window,), inputs)
        for _ in range(2):  # twice: the arrival counters must be ready again
            out = torch.full((num_tokens, num_heads, head_dim), torch.nan, device="cuda", dtype=torch_dtype)
            attend(0, qkv, out)
            error = (out.double() - wanted).norm() / wanted.norm()
            assert error < tolerance, (kinds, error.item())


def test_decode_attention_gives_the_log_sum_exp_and_zeros_for_padding() -> None:
    from engine.cuda.kernels import DecodeAttention

    torch.manual_seed(0)
    cache = torch.randn(2, 64 * 16, 2, 64, device="cuda")
    tables = torch.randperm(64, device="cuda", dtype=torch.int32).view(4, 16)
    contexts = torch.tensor([0, 1, 100, 250], dtype=torch.int32, device="cuda")
    qkv = torch.randn(4, 12 * 64, device="cuda")
    for num_splits in (1, 3, 16):
        attention = DecodeAttention(8, 2, 64, 16, 4, torch.device("cuda"), torch.float32, num_splits=num_splits)
        out, lse = torch.full((4, 8, 64), torch.nan, device="cuda"), torch.full((4, 8), torch.nan, device="cuda")
        attention(qkv, cache, tables, contexts, out, lse=lse)
        assert (out[0] == 0).all()
        for row in (1, 2, 3):
            context = int(contexts[row])
            slots = torch.tensor([int(tables[row, i // 16]) * 16 + i % 16 for i in range(context)], device="cuda")
            keys = cache[0, slots].repeat_interleave(4, dim=1).double()
            scores = torch.einsum("hd,khd->hk", qkv.view(4, 12, 64)[row, :8].double(), keys) / 8
            assert torch.allclose(scores.logsumexp(-1), lse[row].double(), atol=1e-5)


@pytest.mark.parametrize("columns", [512, 1000, 4096])
def test_gemv_against_the_product(columns: int) -> None:
    from engine.cuda.kernels import gemv

    torch.manual_seed(0)
    x, weight = torch.randn(1, columns, device="cuda"), torch.randn(333, columns, device="cuda")
    out = torch.full((1, 333), torch.nan, device="cuda")
    gemv(x, weight, out, adds=False)
    wanted = (x.double() @ weight.double().T).float()
    assert torch.allclose(out, wanted, atol=1e-3)
    gemv(x, weight, out, adds=True)
    assert torch.allclose(out, 2 * wanted, atol=2e-3)


@pytest.mark.parametrize("num_tokens", [2, 7, 16, 33, 64])
@pytest.mark.parametrize(("rows", "columns"), [(384, 512), (16_384, 256), (256, 8192)])
def test_skinny_product_against_the_product(num_tokens: int, rows: int, columns: int) -> None:
    from engine.cuda.kernels import skinny_product

    torch.manual_seed(0)
    x = torch.randn(num_tokens, columns, device="cuda").bfloat16()
    weight = torch.randn(rows, columns, device="cuda").bfloat16()
    wanted = x.double() @ weight.double().T
    for tile in ((128, 128, 4), (32, 256, 6 if num_tokens <= 32 else 3), (64, 128, 6)):
        out = torch.full((num_tokens, rows), torch.nan, device="cuda", dtype=torch.bfloat16)
        skinny_product(x, weight, out, tile, adds=False)
        assert (out.double() - wanted).norm() / wanted.norm() < 3e-3
        skinny_product(x, weight, out, tile, adds=True)
        assert (out.double() - 2 * wanted).norm() / wanted.norm() < 8e-3


def test_a_chunk_split_at_its_context_against_the_plain_twin() -> None:
    from engine.cuda.kernels import DecodeAttention
    from engine.cuda.runner import RaggedAttention

    rng = random.Random(1)
    for queries, earlier in ((256, 256), (512, 1280), (768, 512)):
        context = queries + earlier
        table = tuple(rng.sample(range(200), -(-context // 16)))
        span = range(earlier, context)
        slots = torch.tensor([table[i // 16] * 16 + i % 16 for i in span], device="cuda")
        inputs = ForwardInputs(slots, slots, slots, (0, queries), (context,), (table,))
        cache = PagedKVCache(KVCacheSpec(1, 2, 128, 16, "bfloat16"), 200, "cuda")
        cache.storage.normal_()
        qkv = torch.randn(queries, 12, 128, device="cuda").bfloat16()
        keys_values = qkv[:, 8:].unflatten(1, (2, 2))
        twin = PagedKVCache(KVCacheSpec(1, 2, 128, 16, "float32"), 200, "cuda")
        twin.storage = cache.storage.double()
        reference = ReferenceAttention(twin, (None,))
        reference.plan(inputs)
        wanted = reference.run(0, qkv[:, :8].double(), keys_values.double())
        cache.storage[0].index_copy_(1, slots, keys_values.transpose(0, 1))
        decode = DecodeAttention(8, 2, 128, 16, 4, torch.device("cuda"))
        attend = RaggedAttention(decode, cache, (None,), inputs)
        assert attend._split
        out = torch.full((queries, 8, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
        attend(0, qkv, out)
        assert (out.double() - wanted).norm() / wanted.norm() < 1e-2


class GpuEngine:
    """A model on the GPU, driven step by step."""

    def __init__(self, folder: Path, dtype: str, num_blocks: int = 400) -> None:
        from engine.cuda.runner import CudaModelRunner

        source = ModelSource("hf", folder, "test")
        self.loaded = load_model(source, dtype=dtype, device="cuda", seed=0, progress=lambda share: None)
        self.blocks = BlockManager(num_blocks, 16)
        self.cache = PagedKVCache(self.loaded.kv_cache_spec(16), num_blocks, "cuda")
        self.cache.storage.fill_(torch.nan)
        self.runner = CudaModelRunner(self.loaded, self.cache, 512, max_batch=16)

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        items = []
        for sequence, num_tokens in work:
            missing = self.blocks.blocks_for(sequence.num_computed_tokens + num_tokens) - len(sequence.block_table)
            sequence.block_table += self.blocks.allocate(max(missing, 0))
            items.append(ScheduledSequence(sequence, num_tokens, int(num_tokens == sequence.num_unscheduled_tokens)))
        result = self.runner.run(ScheduledBatch(tuple(items)))
        for item, tokens in zip(items, result.tokens, strict=True):
            item.sequence.num_computed_tokens += item.num_tokens
            item.sequence.token_ids += [token.token_id for token in tokens]

    def generate(self, prompts: list[list[int]], num_tokens: int, chunk: int, **sampling: Any) -> list[list[int]]:
        """All prompts together, in chunks, prompts and decodes mixed in one batch."""
        params = SamplingParams(**{"temperature": 0.0, **sampling})
        sequences = [Sequence("r", params, list(p), len(p)) for p in prompts]
        while running := [s for s in sequences if s.num_output_tokens < num_tokens]:
            self.step([(s, min(s.num_unscheduled_tokens, chunk)) for s in running])
        for sequence in sequences:
            self.blocks.release(sequence.block_table)
        return [s.token_ids[s.num_prompt_tokens :] for s in sequences]


def prompts_of(vocab: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(vocab) for _ in range(n)] for n in (1, 5, 16, 33, 100, 150, 200)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    oracle = build_oracle(CONFIGS[name](), tmp_path)
    prompts = prompts_of(SIZES["vocab_size"])
    expected = [oracle_tokens(oracle, prompt, 48) for prompt in prompts]
    engine = GpuEngine(tmp_path, "float32")
    assert engine.generate(prompts, 48, chunk=10**6) == expected
    assert engine.generate(prompts, 48, chunk=29) == expected, "in chunks, mixed with decodes"
    assert [engine.generate([p], 48, chunk=10**6)[0] for p in prompts] == expected, "one at a time"


def test_graph_and_kernel_by_kernel_agree_and_sampling_does_not_care(tmp_path: Path) -> None:
    build_oracle(CONFIGS["llama"](), tmp_path)
    engine = GpuEngine(tmp_path, "float32")
    prompts = prompts_of(SIZES["vocab_size"])
    sampling = {"temperature": 1.1, "top_p": 0.9, "seed": 5, "frequency_penalty": 0.3}
    graphed = engine.generate(prompts, 30, chunk=10**6, **sampling)
    graphs, engine.runner._graphs = engine.runner._graphs, []
    assert engine.generate(prompts, 30, chunk=10**6, **sampling) == graphed
    engine.runner._graphs = graphs
    assert [engine.generate([p], 30, chunk=10**6, **sampling)[0] for p in prompts] == graphed


def test_bfloat16_is_as_close_to_float64_as_transformers_in_bfloat16(tmp_path: Path) -> None:
    oracle = build_oracle(CONFIGS["llama"](), tmp_path)
    prompt = prompts_of(SIZES["vocab_size"])[-1]
    ids = torch.tensor([prompt], device="cuda")
    with torch.inference_mode():
        exact = oracle.double().cuda()(ids).logits[0, -1]
        theirs = oracle.to(torch.bfloat16)(ids).logits[0, -1].double()
    engine = GpuEngine(tmp_path, "bfloat16")
    sequence = Sequence("r", SamplingParams(), prompt, len(prompt))
    sequence.block_table = engine.blocks.allocate(engine.blocks.blocks_for(len(prompt)))
    with torch.inference_mode():
        batch = ScheduledBatch((ScheduledSequence(sequence, len(prompt), 1),))
        hidden = engine.runner._forward(batch, None, 3)
        ours = engine.loaded.model.logits(hidden[-1:])[0].double()
    their_error, our_error = (theirs - exact).norm(), (ours - exact).norm()
    assert our_error < 1.5 * their_error, (our_error.item(), their_error.item())
