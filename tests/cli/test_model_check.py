"""What is said of a model before anything is started: its context, its sampling values, its files that do not count."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.model_check import check_model, check_sampling_defaults
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError, ModelLoadError
from phasewise.core.model_source import ModelFacts, resolve_model
from phasewise.core.sampling_defaults import SamplingDefaults

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def check(folder: Path, *, generation: dict[str, Any] | None = None, model: Any = None, **config: Any) -> ModelFacts:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    path = f"random:{folder}"
    return check_model(resolve_model(path), build_config({"model": {"path": path, **(model or {})}}, source="test"))


@pytest.mark.parametrize(
    ("config", "context", "reason"),
    [
        ({}, 64, "max_position_embeddings 64"),
        ({"rope_parameters": YARN}, 256, "RoPE type yarn: factor 4 × original 64"),
        ({"rope_parameters": {**YARN, "factor": None}, "max_position_embeddings": 192}, 192, "factor 3 × original 64"),
        ({"rope_scaling": {"type": "yarn", "factor": 1.5}}, 96, "factor 1.5 × original 64"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 128, "RoPE type linear: factor 2 × max_position_embed"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 64, "dynamic RoPE scaling is constant only up to there"),
        (
            {"rope_parameters": {**YARN, "rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}},
            64,
            "max_position_embeddings 64",
        ),
    ],
)
def test_the_context_is_what_the_model_takes_and_not_a_token_more(
    config: dict[str, Any], context: int, reason: str, tmp_path: Path
) -> None:
    facts = check(tmp_path, **config)
    assert facts.context_length == context and reason in facts.context.reason
    assert check(tmp_path, **config, model={"max_model_len": context}) == facts
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, **config, model={"max_model_len": context + 1})
    assert caught.value.field == "model.max_model_len"
    assert f"model.max_model_len is {context + 1}, but the model takes {context} tokens" in caught.value.message
    assert reason in caught.value.message


def test_sampling_values_of_the_model_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": None,
        "max_new_tokens": 99,
        "do_sample": False,
        "eos_token_id": 7,
    }
    with caplog.at_level(logging.INFO):
        facts = check(tmp_path, generation=values)
    file = str(tmp_path / "generation_config.json")
    assert facts.sampling == SamplingDefaults(temperature=0.6, top_k=20, max_tokens=99, source=file)
    assert facts.eos_token_ids == (7,)
    assert [r.getMessage() for r in caplog.records] == [
        f"requests that give no other value have those of {file}: temperature 0.6, top_k 20, max_tokens 99"
    ]
    without = check(tmp_path, generation=values, model={"generation_config": "none"})
    assert without == replace(facts, sampling=SamplingDefaults())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 5.0}, "'temperature' is out of range: temperature must be 0 to 2"),
        ({"top_p": 1.5}, "'top_p' is out of range"),
        ({"top_k": -7}, "'top_k' is out of range"),
        ({"min_p": -0.1}, "'min_p' is out of range"),
        ({"repetition_penalty": 0.0}, "'repetition_penalty' is out of range"),
    ],
)
def test_a_value_that_no_request_could_have_is_refused(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check(tmp_path, generation=values)
    assert caught.value.field == "model.generation_config"
    assert str(tmp_path / "generation_config.json") in caught.value.message
    assert "set model.generation_config to none" in caught.value.message
    check(tmp_path, generation=values, model={"generation_config": "none"})


@pytest.mark.parametrize(
    "values", [{"temperature": "hot"}, {"top_k": 0.5}, {"max_new_tokens": 0}, {"min_p": True}, {"top_p": [1]}]
)
def test_a_value_of_another_type_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=rf"generation_config.json: '{next(iter(values))}' must be a"):
        check(tmp_path, generation=values)


def test_files_that_do_not_count_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "model.safetensors", "adapter_model.safetensors", "model_old.safetensors"):
        (tmp_path / name).write_text("{}")
    with caplog.at_level(logging.INFO):
        check_model(resolve_model(str(tmp_path)), build_config({"model": {"path": str(tmp_path)}}, source="test"))
    assert [record.getMessage() for record in caplog.records] == [
        "not used, because they are no part of the checkpoint: adapter_model.safetensors, model_old.safetensors"
    ]


def test_values_that_requests_may_have_are_taken() -> None:
    check_sampling_defaults(SamplingDefaults(0.0, 1.0, -1, 1.0, 1.3, 2048, "x"))
