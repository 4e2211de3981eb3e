"""Small random models saved by transformers, and an engine that a test can drive step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from engine.attention.select import select_backend
from engine.batch import ScheduledBatch, ScheduledSequence
from engine.block_manager import BlockManager
from engine.forward_inputs import build_forward_inputs
from engine.kv_cache import PagedKVCache
from engine.layers.rotary import RotaryEmbedding
from engine.loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.sequence import Sequence
from phasewise.core.model_source import ModelSource
from phasewise.core.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Engine:
    """A loaded model with cache, block manager and runner; checks at the end that no block is lost."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int = 96,
        block_size: int = 8,
        max_len: int = 256,
        cache_dtype: str = "auto",
        attention: str = "auto",
    ) -> None:
        self.loaded = loaded
        self.blocks = BlockManager(num_blocks, block_size)
        self.cache = PagedKVCache(
            loaded.kv_cache_spec(block_size, cache_dtype), num_blocks, "cpu", num_swap_blocks=num_blocks
        )
        self.cache.storage.fill_(torch.nan)  # whoever reads what nobody wrote will notice
        self.max_len = max_len
        self.runner = ModelRunner(loaded, self.cache, max_len, attention=attention)

    def sequence(self, prompt: list[int], sampling: SamplingParams = GREEDY, **fields: Any) -> Sequence:
        return Sequence("request", sampling, list(prompt), len(prompt), **fields)

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        missing = self.blocks.blocks_for(sequence.num_computed_tokens + num_tokens) - len(sequence.block_table)
        if missing > 0:
            sequence.block_table += self.blocks.allocate(missing)

    def step(self, *work: tuple[Sequence, int], **options: Any) -> None:
        """Computes (sequence, number of tokens) pairs in one batch; appends a token where all is computed then."""
        items = []
        for sequence, num_tokens in work:
            self.reserve(sequence, num_tokens)
            items.append(ScheduledSequence(sequence, num_tokens, int(num_tokens == sequence.num_unscheduled_tokens)))
        result = self.runner.run(ScheduledBatch(tuple(items)), **options)
        for item, tokens in zip(items, result.tokens, strict=True):
            item.sequence.num_computed_tokens += item.num_tokens
            item.sequence.token_ids += [token.token_id for token in tokens]
            self.blocks.publish(item.sequence)

    def prefill(self, sequence: Sequence, chunk: int = 10**6) -> None:
        while sequence.num_output_tokens == 0:
            self.step((sequence, min(chunk, sequence.num_unscheduled_tokens)))

    def decode(self, sequences: list[Sequence], num_tokens: int) -> None:
        while running := [sequence for sequence in sequences if sequence.num_output_tokens < num_tokens]:
            self.step(*((sequence, 1) for sequence in running))

    def release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []

    def generate(self, prompt: list[int], num_tokens: int, chunk: int = 10**6) -> list[int]:
        sequence = self.sequence(prompt)
        self.prefill(sequence, chunk)
        self.decode([sequence], num_tokens)
        self.release(sequence)
        return sequence.token_ids[len(prompt) :]

    def logits(self, prompt: list[int], attention: str = "auto") -> torch.Tensor:
        """Of every prompt token: [len(prompt), vocab_size], through the parts that the runner is made of."""
        sequence = self.sequence(prompt)
        self.reserve(sequence, len(prompt))
        batch = ScheduledBatch((ScheduledSequence(sequence, len(prompt), 1),))
        hidden = plain_hidden(self.loaded, self.cache, batch, self.max_len, attention)
        with torch.inference_mode():
            logits = self.loaded.model.logits(hidden)
        self.release(sequence)
        return logits

    def close(self) -> None:
        self.blocks.check()
        assert self.blocks.num_used_blocks == 0, "a test left blocks behind"


@torch.inference_mode()
def plain_hidden(
    loaded: LoadedModel, cache: PagedKVCache, batch: ScheduledBatch, max_len: int, attention: str
) -> torch.Tensor:
    """[num_tokens, hidden_size] after the last layer, through the parts that the plain runner is made of."""
    model, config = loaded.model, loaded.config
    backend = select_backend(attention, cache, config.windows)
    rotary = RotaryEmbedding(config, max_len, model.dtype, model.device)
    inputs = build_forward_inputs(batch, cache.block_size, max_len, model.device)
    backend.plan(inputs)
    hidden = model.embed(inputs.input_ids)
    return model.run_layers(hidden, 0, config.num_layers, rotary, rotary.plan(inputs.positions), backend)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors of torch.empty hold NaN: what nobody wrote must not be read."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    with mock.patch.object(torch, "empty", poisoned):
        yield


def build_oracle(config: transformers.PretrainedConfig, directory: Path, seed: int = 0) -> torch.nn.Module:
    """A model with all weights random (biases and norms too), saved to `directory`."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.15)
    model.save_pretrained(directory)
    return model


def load(directory: Path, dtype: str = "float32") -> LoadedModel:
    source = ModelSource("hf", directory, "test")
    return load_model(source, dtype=dtype, device="cpu", seed=0, progress=lambda share: None)


def oracle_tokens(
    model: torch.nn.Module, prompt: list[int], num_tokens: int, *, min_tokens: int = 0, ends: tuple[int, ...] = ()
) -> list[int]:
    """Greedy: `num_tokens`, or up to the first of `ends` that comes behind `min_tokens`."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            min_new_tokens=min_tokens if ends else num_tokens,
            do_sample=False,
            eos_token_id=list(ends) or None,
        )
    return output[0, len(prompt) :].tolist()


def random_prompt(length: int, seed: int = 0, vocab_size: int = 199) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


class Kit:
    """What the tests of this folder share."""

    GREEDY = GREEDY
    SMALL = SMALL
    Engine = Engine
    build_oracle = staticmethod(build_oracle)
    load = staticmethod(load)
    oracle_tokens = staticmethod(oracle_tokens)
    random_prompt = staticmethod(random_prompt)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, LoadedModel]:
    """(the oracle, the same model loaded): a small Llama."""
    directory = tmp_path_factory.mktemp("llama")
    oracle = build_oracle(transformers.LlamaConfig(**SMALL), directory)
    return oracle, load(directory)


@pytest.fixture
def engine(llama: tuple[torch.nn.Module, LoadedModel]) -> Iterator[Engine]:
    engine = Engine(llama[1])
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, and other tests may be running beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
