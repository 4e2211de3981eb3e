"""Architecture name → model class."""

from __future__ import annotations

import torch

from engine.model_config import ModelConfig
from engine.models.llama import LlamaModel
from phasewise.core.errors import ModelLoadError

_MODELS: dict[str, type[LlamaModel]] = {
    "LlamaForCausalLM": LlamaModel,
    "MistralForCausalLM": LlamaModel,
    "Qwen2ForCausalLM": LlamaModel,
    "Qwen3ForCausalLM": LlamaModel,
}


def build_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LlamaModel:
    """The model with weights that are not loaded yet. Raises ModelLoadError for an unknown architecture."""
    model = _MODELS.get(config.architecture)
    if model is None:
        raise ModelLoadError(f"architecture {config.architecture!r} is not supported; supported: {', '.join(_MODELS)}")
    return model(config, dtype, device)
