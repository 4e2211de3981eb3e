"""Architecture name → model class."""

from __future__ import annotations

import torch

from engine.model_config import ModelConfig
from engine.models.llama import LlamaModel
from engine.tensor_parallel import Group
from phasewise.core.errors import ModelLoadError

_MODELS: dict[str, type[LlamaModel]] = {
    "LlamaForCausalLM": LlamaModel,
    "MistralForCausalLM": LlamaModel,
    "Qwen2ForCausalLM": LlamaModel,
    "Qwen3ForCausalLM": LlamaModel,
}


def build_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, group: Group | None = None
) -> LlamaModel:
    """The model, or this rank's part of it, with weights that are not loaded yet.

    Raises:
        ModelLoadError: an unknown architecture.
        ConfigError: the group cannot split this model evenly.
    """
    model = _MODELS.get(config.architecture)
    if model is None:
        raise ModelLoadError(f"architecture {config.architecture!r} is not supported; supported: {', '.join(_MODELS)}")
    return model(config, dtype, device, group or Group())
