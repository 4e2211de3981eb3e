"""The CUDA path on a GPU: every kernel against its plain twin in float64, the whole runner against transformers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from kv_transfer.cache_port import CachePort
from phasewise.core.config import build_config
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.model_source import ModelSource
from phasewise.core.request import Request, SamplingParams
from tests.engine.conftest import SMALL, build_oracle, oracle_tokens, poisoned_memory
from tests.support.lone_worker import serve

pytest.importorskip("triton")

from engine.cuda.attention import RaggedAttention
from engine.cuda.decode_attention import DecodeAttention
from engine.cuda.executor import StepExecutor
from engine.cuda.products import gate_up_silu, gemv, has_gate_up_silu, skinny_product
from engine.cuda.prompt_attention import prompt_attention
from engine.cuda.runner import CudaModelRunner
from engine.cuda.step_inputs import PromptChunk, Upload
from engine.cuda.step_plan import needs_draw

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


@dataclass
class Ragged:
    """A random ragged batch for both kinds of attention: one-token items first, then prompt chunks."""

    inputs: ForwardInputs
    num_decodes: int
    chunks: list[PromptChunk]

    @property
    def num_tokens(self) -> int:
        return len(self.inputs.slot_mapping)

    def attention(self, decode: DecodeAttention, cache: PagedKVCache, window: int | None) -> RaggedAttention:
        width = max(len(table) for table in self.inputs.block_tables)
        tables = torch.zeros(self.num_decodes, width, dtype=torch.int32)
        for row, table in enumerate(self.inputs.block_tables[: self.num_decodes]):
            tables[row, : len(table)] = torch.tensor(table)
        contexts = torch.tensor(self.inputs.context_lens[: self.num_decodes], dtype=torch.int32)
        upload = Upload.of_size(RaggedAttention.upload_bytes(self.chunks), torch.device("cuda"))
        attend = RaggedAttention(decode, cache, (window,), tables.cuda(), contexts.cuda(), self.chunks, upload)
        upload.send()
        return attend


def ragged(spans: list[tuple[int, int]], num_decodes: int, free: list[int], block_size: int) -> Ragged:
    """Items given as (context, queries), on blocks taken from `free`."""
    starts, contexts, tables, slots, positions = [0], [], [], [], []
    for context, queries in spans:
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
    chunks = [
        PromptChunk(starts[i], spans[i][1], spans[i][0], np.asarray(tables[i], dtype=np.int32))
        for i in range(num_decodes, len(spans))
    ]
    return Ragged(inputs, num_decodes, chunks)


def random_ragged(rng: random.Random, num_blocks: int, block_size: int, kinds: str) -> Ragged:
    """`d` one-token items, `p` prompt chunks with and without earlier context."""
    free = list(range(num_blocks))
    rng.shuffle(free)
    spans = []
    for kind in kinds:
        context = rng.randrange(1, 300)
        spans.append((context, 1 if kind == "d" else rng.choice([context, rng.randrange(1, context + 1)])))
    return ragged(spans, kinds.count("d"), free, block_size)


def attend_twice(
    batch: Ragged, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, window: int | None
) -> tuple[RaggedAttention, float]:
    """The step's attention, and its error over a cache of 1200 blocks; in float32 the larger of it and its LSE's."""
    num_tokens, inputs, torch_dtype = batch.num_tokens, batch.inputs, getattr(torch, dtype)
    cache = PagedKVCache(KVCacheSpec(1, num_kv_heads, head_dim, 16, dtype), 1200, "cuda")
    cache.storage.normal_()
    unwritten = torch.ones(1200 * 16, dtype=torch.bool)
    for table, context in zip(inputs.block_tables, inputs.context_lens, strict=True):
        slots = torch.tensor(table)[:, None] * 16 + torch.arange(16)
        unwritten[slots.view(-1)[:context]] = False
    cache.storage[:, :, unwritten.cuda()] = torch.nan  # poison: what nobody wrote must not be read
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device="cuda").to(torch_dtype)
    keys_values = qkv[:, num_heads:].unflatten(1, (2, num_kv_heads))
    twin = PagedKVCache(KVCacheSpec(1, num_kv_heads, head_dim, 16, "float32"), 1200, "cuda")
    twin.storage = cache.storage.double()
    reference = ReferenceAttention(twin, (window,))
    reference.plan(inputs)
    wanted, wanted_lse = reference.run_with_lse(0, qkv[:, :num_heads].double(), keys_values.double())
    cache.storage[0].index_copy_(1, inputs.slot_mapping, keys_values.transpose(0, 1))
    with poisoned_memory():
        decode = DecodeAttention(num_heads, num_kv_heads, head_dim, 16, 64, torch.device("cuda"), torch_dtype)
    attend = batch.attention(decode, cache, window)
    paged, worst = attend.paged, 0.0
    if paged is not None:
        paged.workspace.partial.fill_(torch.nan)
        rows = torch.cat([torch.arange(first, first + count) for first, count, _ in paged.spans.T.tolist()]).cuda()
    for _ in range(2):  # twice: the arrival counters must be ready again
        out = torch.full((num_tokens, num_heads, head_dim), torch.nan, device="cuda", dtype=torch_dtype)
        errors = [(attend(0, qkv, out).double() - wanted).norm() / wanted.norm()]
        if paged is not None and dtype == "float32":
            lse = torch.full((num_tokens, num_heads), torch.nan, device="cuda")
            arguments = (paged.tables, paged.work, paged.spans, paged.workspace, paged.tile)
            prompt_attention(qkv, cache.storage[0], *arguments, out, 16, window=window, lse=lse)
            errors.append((lse[rows].double() - wanted_lse[rows]).norm() / wanted_lse[rows].norm())
        worst = max(worst, *(error.item() if error == error else float("inf") for error in errors))
    return attend, worst


SHAPES = [(8, 2, 64), (32, 8, 128), (9, 3, 64), (4, 4, 128)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("window", [None, 37])
def test_ragged_attention_against_the_plain_twin(
    dtype: str, tolerance: float, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    rng = random.Random(f"{dtype}{num_heads}{head_dim}{window}")
    torch.manual_seed(rng.randrange(1000))
    for kinds in ("d", "ddddd", "p", "dddpp", "dppp", "d" * 40):
        batch = random_ragged(rng, 1200, 16, kinds)
        _, error = attend_twice(batch, num_heads, num_kv_heads, head_dim, dtype, window)
        assert error < tolerance, (kinds, error)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [*SHAPES, (16, 1, 128)])
@pytest.mark.parametrize("window", [None, 37, 1000])  # 37: most shares of a context have nothing to do
def test_contexts_cut_into_shares_against_the_plain_twin(
    dtype: str, tolerance: float, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    rng = random.Random(f"{dtype}{num_heads}{head_dim}{window}")
    torch.manual_seed(rng.randrange(1000))
    chosen = [(rng.randrange(300, 5000), rng.randrange(1, 65)) for _ in range(3)]
    for spans in ([(5000, 1)], [(4107, 16)], [(4096, 64)], [(5000, 64), (3, 3), (64, 64), (900, 17)], chosen):
        batch = ragged(spans, 0, rng.sample(range(1200), 1200), 16)
        attend, error = attend_twice(batch, num_heads, num_kv_heads, head_dim, dtype, window)
        assert attend.paged is not None
        assert spans is chosen or (attend.paged.work[3] > 1).any()
        assert error < tolerance, (spans, error)


def test_decode_attention_gives_the_log_sum_exp_and_zeros_for_padding() -> None:
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


@pytest.mark.parametrize("size", [128, 14336])
@pytest.mark.parametrize("num_tokens", [1, 127, 130, 1025, 2048 + 77])
def test_the_product_that_ends_in_the_activation(num_tokens: int, size: int) -> None:
    """Beside float64; a tile that hangs over the last row writes to no other memory."""
    if torch.cuda.get_device_capability()[0] != 9:  # asked here: where there is no GPU it raises
        pytest.skip("its kernel runs on Hopper alone, elsewhere `has_gate_up_silu` never takes it")
    columns = 256 if size > 128 else 4096
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    x = torch.randn(num_tokens, columns, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(2 * size, columns, generator=generator, device="cuda") / columns**0.5).bfloat16()
    scales = torch.rand(num_tokens, generator=generator, device="cuda") + 0.5
    beside = torch.full((num_tokens + 128, size), torch.nan, dtype=torch.bfloat16, device="cuda")
    out = gate_up_silu(x, weight, scales, beside[:num_tokens])
    gate, up = ((x.double() @ weight.double().t()) * scales.double()[:, None]).chunk(2, dim=1)
    torch.testing.assert_close(out.double(), torch.nn.functional.silu(gate) * up, rtol=0.01, atol=0.002)
    assert beside[num_tokens:].isnan().all()


def test_where_the_activation_is_within_the_product() -> None:
    weight = torch.empty(28672, 4096, dtype=torch.bfloat16, device="cuda")
    assert has_gate_up_silu(2048, weight) == (torch.cuda.get_device_capability()[0] == 9)
    assert not has_gate_up_silu(512, weight)  # 448 tiles for 132 multiprocessors: the last round is half empty
    assert not has_gate_up_silu(2048, weight.half())
    assert not has_gate_up_silu(2048, weight[:1100])


def test_a_chunk_split_at_its_context_against_the_plain_twin() -> None:
    rng = random.Random(1)
    for queries, earlier in ((1024, 4096), (1280, 4352)):
        context = queries + earlier
        batch = ragged([(context, queries)], 0, rng.sample(range(400), 400), 16)
        inputs, slots = batch.inputs, batch.inputs.slot_mapping
        cache = PagedKVCache(KVCacheSpec(1, 2, 128, 16, "bfloat16"), 400, "cuda")
        cache.storage.normal_()
        qkv = torch.randn(queries, 12, 128, device="cuda").bfloat16()
        keys_values = qkv[:, 8:].unflatten(1, (2, 2))
        twin = PagedKVCache(KVCacheSpec(1, 2, 128, 16, "float32"), 400, "cuda")
        twin.storage = cache.storage.double()
        reference = ReferenceAttention(twin, (None,))
        reference.plan(inputs)
        wanted = reference.run(0, qkv[:, :8].double(), keys_values.double())
        cache.storage[0].index_copy_(1, slots, keys_values.transpose(0, 1))
        decode = DecodeAttention(8, 2, 128, 16, 4, torch.device("cuda"))
        attend = batch.attention(decode, cache, None)
        assert attend.split
        out = torch.full((queries, 8, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
        out = attend(0, qkv, out)
        assert (out.double() - wanted).norm() / wanted.norm() < 1e-2


class GpuEngine:
    """A model on the GPU, driven step by step."""

    def __init__(self, folder: Path, dtype: str, num_blocks: int = 400, *, graphs: bool = True) -> None:
        source = ModelSource("hf", folder, "test")
        self.loaded = load_model(source, dtype=dtype, device="cuda", seed=0, progress=lambda share: None)
        self.blocks = BlockManager(num_blocks, 16)
        self.cache = PagedKVCache(self.loaded.kv_cache_spec(16), num_blocks, "cuda", num_blocks)
        self.cache.storage.fill_(torch.nan)
        self.runner = CudaModelRunner(self.loaded, self.cache, 512, max_batch=16, graphs=graphs)

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
    plain = GpuEngine(tmp_path, "float32", graphs=False)
    assert plain.generate(prompts, 30, chunk=10**6, **sampling) == graphed
    assert [engine.generate([p], 30, chunk=10**6, **sampling)[0] for p in prompts] == graphed


def test_bfloat16_is_as_close_to_float64_as_transformers_in_bfloat16(tmp_path: Path) -> None:
    oracle = build_oracle(CONFIGS["llama"](), tmp_path)
    prompt = prompts_of(SIZES["vocab_size"])[-1]
    ids = torch.tensor([prompt], device="cuda")
    with torch.inference_mode():
        exact = oracle.double().cuda()(ids).logits[0, -1]
        theirs = oracle.to(torch.bfloat16)(ids).logits[0, -1].double()
    source = ModelSource("hf", tmp_path, "test")
    loaded = load_model(source, dtype="bfloat16", device="cuda", seed=0, progress=lambda share: None)
    cache = PagedKVCache(loaded.kv_cache_spec(16), 32, "cuda")
    cache.storage.fill_(torch.nan)
    executor = StepExecutor(loaded, cache, 512, 16, graphs=False)
    sequence = Sequence("r", SamplingParams(), prompt, len(prompt), block_table=list(range(-(-len(prompt) // 16))))
    with torch.inference_mode():
        inputs = executor.planner().plan([], [ScheduledSequence(sequence, len(prompt), 1)], 3)
        hidden = executor.execute(inputs, None).hidden
        assert hidden is not None
        ours = loaded.model.logits(hidden[-1:])[0].double()
    their_error, our_error = (theirs - exact).norm(), (ours - exact).norm()
    assert our_error < 1.5 * their_error, (our_error.item(), their_error.item())


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 3, "repetition_penalty": 1.1}])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_damaged_block_leaves_only_its_own_sequence_without_token(
    graphs: bool, sampling: dict[str, Any], tmp_path: Path
) -> None:
    build_oracle(CONFIGS["llama"](), tmp_path)
    engine = GpuEngine(tmp_path, "float32", graphs=graphs)
    params = SamplingParams(**sampling)
    prompts = prompts_of(SIZES["vocab_size"])
    sequences = [Sequence(f"r{i}", params, list(prompt), len(prompt)) for i, prompt in enumerate(prompts)]
    engine.step([(sequence, sequence.num_tokens) for sequence in sequences])
    newcomer = Sequence("newcomer", params, prompts[3][:20], 20)
    for sequence in (*sequences, newcomer):
        sequence.block_table += engine.blocks.allocate(2)

    def two_steps() -> tuple[Any, Any]:
        """Of one token each, the second submitted before the first is collected; the newcomer is in the first."""
        items = [ScheduledSequence(sequence, 1, 1) for sequence in sequences]
        first = engine.runner.submit(ScheduledBatch((*items, ScheduledSequence(newcomer, 20, 1))))
        for sequence in sequences:
            sequence.begin_step(1)
        second = engine.runner.submit(ScheduledBatch(tuple(ScheduledSequence(s, 1, 1) for s in sequences)))
        for sequence in sequences:
            sequence.num_in_flight_tokens = 0
        return first.collect().tokens, second.collect().tokens

    right = two_steps()
    engine.cache.blocks_view()[1, :, sequences[4].block_table[0]] = torch.nan
    for tokens, wanted in zip(two_steps(), right, strict=True):
        assert tokens == (*wanted[:4], None, *wanted[5:])


CONFIG = build_config({"scheduler": {"token_budget": 64, "max_running": 16}}, source="test")


def test_a_worker_a_step_ahead_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    oracle = build_oracle(CONFIGS["llama"](), tmp_path)
    rng = random.Random(11)
    prompts = [[rng.randrange(SIZES["vocab_size"]) for _ in range(rng.randrange(1, 150))] for _ in range(40)]
    expected = [oracle_tokens(oracle, prompt, rng.randrange(1, 60)) for prompt in prompts]
    requests = []
    for i, (prompt, tokens) in enumerate(zip(prompts, expected, strict=True)):
        stops = tuple(tokens[len(tokens) // 2 :][:1]) if i % 3 == 0 else ()  # found out a step late
        limit = len(tokens)
        if stops:
            tokens[tokens.index(stops[0]) + 1 :] = []
        params = SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=stops)
        requests.append(Request(f"r{i}", tuple(prompt), params))
    engine = GpuEngine(tmp_path, "float32")
    for num_blocks in (400, 60):  # the second preempts
        outputs = serve(engine.runner, CachePort(engine.cache, engine.cache.spec), CONFIG, requests, num_blocks)
        assert [outputs[(f"r{i}", 0)] for i in range(len(requests))] == expected


@pytest.mark.parametrize("graphs", [True, False])
def test_min_tokens_gives_the_tokens_of_transformers(graphs: bool, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    oracle = build_oracle(CONFIGS["llama"](), tmp_path)
    expected, requests = [], []
    for i, prompt in enumerate(prompts_of(SIZES["vocab_size"]) * 2):
        free = oracle_tokens(oracle, prompt, 12)
        ends = (free[0], free[4], free[11])  # each would end the sample where it comes first
        min_tokens = (0, 1, 6, 30)[i % 4]
        expected.append(oracle_tokens(oracle, prompt, 40, min_tokens=min_tokens, ends=ends))
        params = SamplingParams(
            temperature=0.0,
            max_tokens=40,
            min_tokens=min_tokens,
            stop_token_ids=ends,
            logprobs=1 if i % 5 == 0 else None,
        )
        requests.append(Request(f"r{i}", tuple(prompt), params))
    engine = GpuEngine(tmp_path, "float32", graphs=graphs)
    outputs = serve(engine.runner, CachePort(engine.cache, engine.cache.spec), CONFIG, requests)
    assert [outputs[(f"r{i}", 0)] for i in range(len(requests))] == expected
    assert len({len(tokens) for tokens in expected}) > 3


def test_a_greedy_step_draws_only_until_min_tokens_are_there() -> None:
    def draws(num_outputs: int, in_flight: int = 0, **sampling: Any) -> bool:
        params = SamplingParams(temperature=0.0, **sampling)
        sequence = Sequence("r", params, [1, 2, 3] + [5] * (num_outputs - in_flight), 3)
        sequence.num_computed_tokens = sequence.num_tokens - 1
        if in_flight:
            sequence.begin_step(1)
        return needs_draw(ScheduledSequence(sequence, 1, 1))

    limits = {"min_tokens": 4, "stop_token_ids": (9,)}
    assert [draws(n, **limits) for n in range(1, 7)] == [True, True, True, False, False, False]
    assert [draws(n, 1, **limits) for n in range(2, 7)] == [True, True, False, False, False]
    assert not draws(1, min_tokens=4)  # nothing ends it
    assert not draws(1, stop_token_ids=(9,))
    assert draws(9, logprobs=0)


def test_sampling_a_step_ahead_does_not_change_a_token(tmp_path: Path) -> None:
    build_oracle(CONFIGS["llama"](), tmp_path)
    rng = random.Random(12)
    requests = []
    for i in range(12):
        prompt = tuple(rng.randrange(SIZES["vocab_size"]) for _ in range(rng.randrange(1, 90)))
        params = SamplingParams(
            temperature=1.0,
            top_p=0.9,
            seed=i,
            max_tokens=30,
            frequency_penalty=0.4,
            presence_penalty=0.2,
            repetition_penalty=1.1,
            n=1 + i % 3,
            logprobs=2 if i % 4 == 0 else None,
        )
        requests.append(Request(f"r{i}", prompt, params))
    engine = GpuEngine(tmp_path, "float32")
    together = serve(engine.runner, CachePort(engine.cache, engine.cache.spec), CONFIG, requests)
    alone: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        alone |= serve(engine.runner, CachePort(engine.cache, engine.cache.spec), CONFIG, [request])
    assert together == alone
