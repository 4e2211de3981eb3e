"""What a gateway tells of the model that its cluster serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from control_plane.gateway.service import ModelCard
from phasewise.core.config import ServingConfig
from phasewise.core.messages import WorkerInfo
from phasewise.core.model_source import ModelSource, model_facts
from phasewise.core.sampling_defaults import NO_SAMPLING_DEFAULTS


def model_card(
    source: ModelSource, config: ServingConfig, workers: Sequence[WorkerInfo], *, has_chat_template: bool
) -> ModelCard:
    """Of the model at `source`, as these workers have loaded it. Raises ModelLoadError."""
    facts = model_facts(source)
    if config.model.generation_config == "none":
        facts = replace(facts, sampling=NO_SAMPLING_DEFAULTS)
    return ModelCard(
        name=config.model.served_name or source.name,
        context_length=min(info.max_model_len for info in workers),
        vocab_size=facts.vocab_size,
        dtype=workers[0].dtype,
        created_unix_s=int(source.path.stat().st_mtime),
        eos_token_ids=facts.eos_token_ids,
        has_chat_template=has_chat_template,
        sampling=facts.sampling,
    )
