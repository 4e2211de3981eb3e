"""What ranks of a group are asked to compute in tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engine.attention.select import select_backend
from engine.batch import ScheduledBatch, ScheduledSequence
from engine.forward_inputs import build_forward_inputs
from engine.kv_cache import PagedKVCache
from engine.layers.rotary import RotaryEmbedding
from engine.loader import load_model
from engine.sequence import Sequence
from engine.tensor_parallel import Group
from phasewise.core.model_source import ModelSource
from phasewise.core.request import SamplingParams


def logits(group: Group, kind: str, path: Path, prompt: list[int]) -> np.ndarray:
    """Of every prompt token.  # [len(prompt), vocab_size]"""
    source = ModelSource(kind, path, "test")  # type: ignore[arg-type]
    loaded = load_model(source, dtype="float32", device="cpu", seed=7, progress=lambda _: None, group=group)
    with torch.inference_mode():
        cache = PagedKVCache(loaded.kv_cache_spec(8), 32, "cpu")
        model, config = loaded.model, loaded.config
        sequence = Sequence("r", SamplingParams(), prompt, len(prompt), block_table=list(range(31, 0, -1)))
        inputs = build_forward_inputs(
            ScheduledBatch((ScheduledSequence(sequence, len(prompt), 1),)), 8, 256, torch.device("cpu")
        )
        backend = select_backend("auto", cache, config.windows)
        backend.plan(inputs)
        rotary = RotaryEmbedding(config, 256, model.dtype, model.device)
        hidden = model.embed(inputs.input_ids)
        hidden = model.run_layers(hidden, 0, config.num_layers, rotary, rotary.plan(inputs.positions), backend)
        return model.logits(hidden).numpy()


def largest(group: Group, values: np.ndarray) -> list[int]:
    """Group.largest of rows of logits, each rank giving its part."""
    first, count = group.shard.vocab(values.shape[1])
    return group.largest(torch.from_numpy(values[:, first : first + count]), values.shape[1]).tolist()
