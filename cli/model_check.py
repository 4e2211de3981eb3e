"""Checks a model and its settings before anything is started."""

from __future__ import annotations

import logging
from dataclasses import replace

from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.service import GenerateInput, ModelCard
from control_plane.gateway.text.tokenizer import TextTokenizer
from control_plane.gateway.text.vocabulary import IdVocabulary
from engine.gguf_config import read_gguf_config
from engine.model_config import read_model_config
from phasewise.core.config import ServingConfig
from phasewise.core.errors import ConfigError, InvalidRequest
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.model_source import ModelFacts, ModelSource, config_file, model_facts
from phasewise.core.sampling_defaults import NO_SAMPLING_DEFAULTS, SamplingDefaults

logger = logging.getLogger(__name__)


def check_model(source: ModelSource, config: ServingConfig) -> ModelFacts:
    """The facts of a model that can be served with this configuration; its weights are not read.

    Logs once which files of the model's directory are not used and which sampling values it sets; the workers and the
    gateway would each log it.

    Raises:
        ModelLoadError: a file is at fault, or the engine does not know the architecture.
        ConfigError: model.max_model_len is more than the model takes, or its generation_config.json has a value that no
            request could have.
    """
    facts = model_facts(source)
    if source.kind == "gguf":
        with GGUFFile(source.path) as file:
            read_gguf_config(file)
    else:
        read_model_config(config_file(source))
    facts.context.at_most(config.model.max_model_len)
    if config.model.generation_config == "none":
        facts = replace(facts, sampling=NO_SAMPLING_DEFAULTS)
    check_sampling_defaults(facts.sampling)
    if facts.left_out:
        logger.info("not used, because they are no part of the checkpoint: %s", ", ".join(facts.left_out))
    if facts.sampling.given():
        values = ", ".join(f"{name} {value:g}" for name, value in facts.sampling.given().items())
        logger.info("requests that give no other value have those of %s: %s", facts.sampling.source, values)
    return facts


def check_sampling_defaults(defaults: SamplingDefaults) -> None:
    """A request without sampling values must be valid. Raises ConfigError with the file and its key."""
    card = ModelCard("any", 64, 2, "float32", 0, (), has_chat_template=False, sampling=defaults)
    tokenizer = TextTokenizer(IdVocabulary(2), vocab_size=2, eos_token_ids=(), chat_template=None)
    try:
        RequestPreparer(tokenizer, card, RequestLimits()).prepare(GenerateInput(token_ids=(0,)))
    except InvalidRequest as error:
        key = defaults.key_of(str(error.field))
        raise ConfigError(
            f"{defaults.source}: {key!r} is out of range: {error.message}; correct it, or set model.generation_config "
            "to none",
            field="model.generation_config",
        ) from None
