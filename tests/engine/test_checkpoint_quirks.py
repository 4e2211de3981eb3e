"""Directories with one quirk each, made here: ours computes what transformers computes, or both refuse.

Where we refuse what transformers takes (`Outcome.WE_REFUSE`), it computes with weights that nobody can know, or leaves
some aside that config.json does not account for.
"""

from __future__ import annotations

import enum
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.checkpoint import EMBEDDING, HEAD
from phasewise.core.errors import ModelLoadError
from phasewise.core.hf_config import DEFAULTS
from phasewise.core.model_source import model_facts, resolve_model

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path], None]


class Outcome(enum.Enum):
    SAME = "both load, and the logits agree"
    BOTH_REFUSE = "neither loads or computes"
    WE_REFUSE = "transformers goes on, with weights that are not known, or without some"


@dataclass(frozen=True)
class Quirk:
    """`options` are of the model that is saved; then `edit` changes its files. `words`: in our refusal."""

    edit: Edit
    family: str = "Llama"
    options: Mapping[str, Any] = field(default_factory=dict)
    outcome: Outcome = Outcome.SAME
    words: str = ""
    prompt: int = 30


def config(remove: tuple[str, ...] = (), **changes: Any) -> Edit:
    """Changes and removes keys of config.json."""

    def edit(directory: Path) -> None:
        values = {**json.loads((directory / "config.json").read_text()), **changes}
        for key in remove:
            values.pop(key, None)
        (directory / "config.json").write_text(json.dumps(values))

    return edit


def weights(change: Callable[[Tensors], Tensors], *more: Edit) -> Edit:
    """Changes the tensors of the one weights file."""

    def edit(directory: Path) -> None:
        tensors = change(load_file(directory / FILE))
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / FILE)
        for other in more:
            other(directory)

    return edit


def beside(name: str, change: Callable[[Tensors], Tensors] | None = None) -> Edit:
    """Another file of weights, all wrong unless `change` says otherwise."""

    def edit(directory: Path) -> None:
        tensors = load_file(directory / FILE)
        wrong = {key: torch.full_like(tensor, 0.25) for key, tensor in tensors.items()}
        (directory / name).parent.mkdir(exist_ok=True)
        save_file(change(tensors) if change else wrong, directory / name)

    return edit


def shards(directory: Path, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> None:
    """Splits the one file in two with an index."""
    tensors = load_file(directory / FILE)
    (directory / FILE).unlink()
    halves: list[Tensors] = [{}, {}]
    for number, (key, tensor) in enumerate(sorted(tensors.items())):
        halves[number % 2][key] = tensor
    weight_map = {}
    for name, half in zip(names, halves, strict=True):
        (directory / name).parent.mkdir(exist_ok=True)
        save_file(half, directory / name)
        weight_map |= dict.fromkeys(half, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def each(*edits: Edit) -> Edit:
    def edit(directory: Path) -> None:
        for one in edits:
            one(directory)

    return edit


def file(name: str, content: bytes | None) -> Edit:
    """Writes a file, or removes it."""

    def edit(directory: Path) -> None:
        (directory / name).write_bytes(content) if content is not None else (directory / name).unlink()

    return edit


def moved(name: str, to: str) -> Edit:
    return lambda directory: shutil.move(directory / name, directory / to)


def bare(tensors: Tensors) -> Tensors:
    return {key.removeprefix("model."): tensor for key, tensor in tensors.items()}


def with_head(scale: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, HEAD: tensors[EMBEDDING] * scale}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {new if key == old else key: tensor for key, tensor in tensors.items()}


TIED = {"tie_word_embeddings": True}
ADAPTER = b'{"peft_type": "LORA", "base_model_name_or_path": "x", "r": 1, "target_modules": ["q_proj"]}'
WHOLE_LATE = {"num_attention_heads": 8, "num_key_value_heads": 8}
BOTH, OURS = Outcome.BOTH_REFUSE, Outcome.WE_REFUSE

FILES: dict[str, Quirk] = {
    "an older copy beside it": Quirk(beside("model_old.safetensors")),
    "an adapter beside it": Quirk(
        each(beside("adapter_model.safetensors"), file("adapter_config.json", ADAPTER)),
    ),
    "a consolidated file beside it": Quirk(beside("consolidated.safetensors")),
    "torch files beside it": Quirk(each(file("pytorch_model.bin", b"x"), file("training_args.bin", b"x"))),
    "shards": Quirk(shards),
    "shards in a folder": Quirk(lambda d: shards(d, ("part/a.safetensors", "part/b.safetensors"))),
    "a stray shard": Quirk(each(beside("stray.safetensors"), shards)),
    "one file beside an index": Quirk(
        each(
            beside("wrong.safetensors"),
            file(INDEX, json.dumps({"metadata": {}, "weight_map": {HEAD: "wrong.safetensors"}}).encode()),
        )
    ),
    "named by config.json": Quirk(
        each(
            beside("wrong.safetensors"),
            moved(FILE, "right.safetensors"),
            moved("wrong.safetensors", FILE),
            config(transformers_weights="right.safetensors"),
        )
    ),
    "named by config.json, not there": Quirk(
        config(transformers_weights="lost.safetensors"), outcome=BOTH, words="lost.safetensors, which is not there"
    ),
    "named by config.json, elsewhere": Quirk(
        config(transformers_weights="../other.safetensors"), outcome=BOTH, words="inside the directory"
    ),
    "another name alone": Quirk(
        moved(FILE, "weights.safetensors"), outcome=BOTH, words="it holds weights.safetensors, which counts only where"
    ),
    "shards without their index": Quirk(each(shards, file(INDEX, None)), outcome=BOTH, words="copy the index"),
    "a lost shard": Quirk(each(shards, file("b.safetensors", None)), outcome=BOTH, words="lacks b.safetensors, which"),
    "a tensor in two shards": Quirk(
        each(shards, lambda d: save_file({**load_file(d / "b.safetensors"), **_one(d)}, d / "b.safetensors")),
        outcome=OURS,
        words=r"is in two files of the checkpoint, .*a\.safetensors and .*b\.safetensors",
    ),
}


def _one(directory: Path) -> Tensors:
    """A tensor of the first shard, changed."""
    name, tensor = min(load_file(directory / "a.safetensors").items())
    return {name: tensor * 2}


NAMES: dict[str, Quirk] = {
    "no prefix": Quirk(weights(bare)),
    "no prefix, tied": Quirk(weights(bare), options=TIED),
    "saved without its head": Quirk(weights(bare, config(architectures=["LlamaModel"])), options=TIED),
    "no architectures": Quirk(config(("architectures",))),
    "a prefix on the head": Quirk(weights(renamed(HEAD, f"model.{HEAD}"))),
    "layers beyond the configuration's": Quirk(config(num_hidden_layers=1)),
    "layers beyond, Qwen": Quirk(config(num_hidden_layers=1, layer_types=["full_attention"]), "Qwen2"),
    "old rotary buffers": Quirk(
        weights(lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    ),
    "a tied head, stored too": Quirk(weights(with_head(1.0)), options=TIED),
    "a tied head that differs": Quirk(weights(with_head(-1.0)), options=TIED),
    "a tied head alone": Quirk(weights(renamed(EMBEDDING, HEAD)), options=TIED),
    "no head, not tied": Quirk(
        weights(lambda t: {k: v for k, v in t.items() if k != HEAD}), outcome=OURS, words=f"'{HEAD}' is missing"
    ),
    "one weight under two names": Quirk(
        weights(lambda t: {**t, "norm.weight": t["model.norm.weight"] * 2}), outcome=OURS, words="are the same weight"
    ),
    "weights of another architecture": Quirk(
        weights(lambda t: {**t, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        outcome=OURS,
        words="'model.layers.0.self_attn.q_norm.weight' has no place in this architecture",
    ),
    "two architectures": Quirk(config(model_type="llama"), "Qwen2", outcome=OURS, words="make them agree"),
    "another shape": Quirk(config(intermediate_size=40), outcome=BOTH, words="has shape .* the configuration asks for"),
}
CONFIGS: dict[str, Quirk] = {
    "Llama without key/value heads": Quirk(config(("num_key_value_heads",)), options={"num_key_value_heads": 4}),
    "Llama with null heads": Quirk(config(num_key_value_heads=None, head_dim=None), options={"num_key_value_heads": 4}),
    "Llama without rope, eps and ties": Quirk(
        config(("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act"))
    ),
    "Llama without a context": Quirk(config(("max_position_embeddings",)), prompt=100),
    "Llama of another eps": Quirk(config(("rms_norm_eps",)), options={"rms_norm_eps": 1e-2}),
    "Mistral without key/value heads": Quirk(config(("num_key_value_heads",)), "Mistral", WHOLE_LATE),
    "Mistral with null key/value heads": Quirk(
        config(num_key_value_heads=None), "Mistral", outcome=BOTH, words="'num_key_value_heads' must not be null"
    ),
    "Mistral without a context": Quirk(config(("max_position_embeddings",)), "Mistral", prompt=100),
    "Mistral without a window": Quirk(config(("sliding_window",)), "Mistral"),
    "Mistral with a null window": Quirk(config(sliding_window=None), "Mistral", {"sliding_window": 7}),
    "Mistral with a window of 0": Quirk(
        config(sliding_window=0), "Mistral", outcome=BOTH, words="'sliding_window' must be a positive whole number"
    ),
    "Mistral with biases named": Quirk(config(attention_bias=True), "Mistral"),
    "Mistral with an uneven head": Quirk(config(("head_dim",)), "Mistral", {"hidden_size": 34, "head_dim": 8}),
    "Llama with an uneven head": Quirk(
        config(("head_dim",), hidden_size=34), outcome=BOTH, words="hidden_size 34 is no multiple of"
    ),
    "Qwen2 with a window of 0 switched off": Quirk(config(sliding_window=0, use_sliding_window=False), "Qwen2"),
    "Qwen2 with a window switched off": Quirk(config(sliding_window=5, use_sliding_window=False), "Qwen2"),
    "Qwen2 with a null window": Quirk(
        config(("layer_types",), sliding_window=None, use_sliding_window=True, max_window_layers=0), "Qwen2"
    ),
    "Qwen2 with windows in late layers": Quirk(
        config(("layer_types",), sliding_window=5, use_sliding_window=True, max_window_layers=1), "Qwen2"
    ),
    "Qwen2 with windows that are off": Quirk(
        config(layer_types=["sliding_attention", "full_attention"]), "Qwen2", outcome=BOTH, words="needs use_sliding"
    ),
    "Qwen2 with kinds for other layers": Quirk(
        config(num_hidden_layers=1), "Qwen2", outcome=BOTH, words="'layer_types' must be a list of 1 names"
    ),
    "Qwen2 with null switch": Quirk(
        config(use_sliding_window=None), "Qwen2", outcome=BOTH, words="'use_sliding_window' must not be null"
    ),
    "Qwen2 with a head dimension": Quirk(config(head_dim=16), "Qwen2", {"head_dim": 16}),
    "Qwen3 without a head dimension": Quirk(config(("head_dim",)), "Qwen3", {"head_dim": 128}),
    "Qwen3 with a null head dimension": Quirk(
        config(head_dim=None), "Qwen3", outcome=BOTH, words="'head_dim' must not be null"
    ),
    "both forms of rope": Quirk(
        config(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=500.0, rope_parameters=YARN)
    ),
    "rope of null": Quirk(config(rope_scaling=None, rope_parameters=None, rope_theta=500.0)),
    "a null theta": Quirk(
        config(("rope_parameters",), rope_theta=None), outcome=BOTH, words="'rope_theta' must not be null"
    ),
    "a null theta inside": Quirk(
        config(rope_parameters={"rope_type": "default", "rope_theta": None}),
        outcome=BOTH,
        words="RoPE setting 'rope_theta' must be a number",
    ),
    "yarn past the context": Quirk(config(rope_parameters=YARN), prompt=120),
    "yarn without its original": Quirk(
        config(("rope_parameters",), rope_scaling={"rope_type": "yarn", "factor": 2.0}), prompt=120
    ),
    "yarn with its original outside": Quirk(
        config(rope_parameters={**YARN, "original_max_position_embeddings": 8}, original_max_position_embeddings=16)
    ),
    "yarn with a null factor": Quirk(config(rope_parameters={**YARN, "factor": None})),
    "yarn without a factor": Quirk(
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), outcome=BOTH, words="'yarn' needs 'factor'"
    ),
    "linear past the context": Quirk(config(rope_parameters={**YARN, "rope_type": "linear"}), prompt=120),
    "llama3 without a factor": Quirk(
        config(rope_parameters={"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        outcome=BOTH,
        words="'llama3' needs 'factor'",
    ),
    "an unknown kind of rope": Quirk(
        config(rope_parameters={"rope_type": "spiral", "factor": 2.0}), outcome=BOTH, words="'spiral' is not supported"
    ),
    "a null size": Quirk(config(hidden_size=None), outcome=BOTH, words="'hidden_size' must not be null"),
    "a null context": Quirk(
        config(max_position_embeddings=None), outcome=BOTH, words="'max_position_embeddings' must not be null"
    ),
    "a null tie": Quirk(config(tie_word_embeddings=None), outcome=BOTH, words="'tie_word_embeddings' must not be"),
    "keys of nobody": Quirk(config(cache_implementation=None, made_up={"a": [1]})),
}
QUIRKS = FILES | NAMES | CONFIGS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, kit: Any) -> Callable[[Quirk], Path]:
    """The directory of an unchanged model of a quirk's kind; each kind is made once."""
    made: dict[str, Path] = {}

    def directory(quirk: Quirk) -> Path:
        options = {"head_dim": 8} if quirk.family == "Qwen3" else {}
        options |= quirk.options
        key = f"{quirk.family}{sorted(options.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("saved")
            kit.build_oracle(getattr(transformers, quirk.family + "Config")(**{**SIZES, **options}), made[key])
            (made[key] / "tokenizer.json").write_text("{}")
        return made[key]

    return directory


@pytest.mark.parametrize("name", QUIRKS)
@pytest.mark.filterwarnings("ignore")  # transformers' own, about what is quirky
def test_quirk(name: str, saved: Callable[[Quirk], Path], tmp_path: Path, kit: Any) -> None:
    quirk = QUIRKS[name]
    directory = tmp_path / "model"
    shutil.copytree(saved(quirk), directory)
    quirk.edit(directory)
    prompt = kit.random_prompt(quirk.prompt, vocab_size=SIZES["vocab_size"])
    if quirk.outcome is Outcome.SAME:
        expected = their_logits(directory, prompt)
        assert expected.std() > 0.5, "the oracle says nothing"
        torch.testing.assert_close(our_logits(directory, prompt, kit), expected, atol=1e-4, rtol=0)
        return
    if quirk.outcome is Outcome.BOTH_REFUSE:
        with pytest.raises(Exception):  # noqa: B017  (whatever it raises)
            their_logits(directory, prompt)
    else:
        their_logits(directory, prompt)
    with pytest.raises(ModelLoadError, match=quirk.words) as caught:
        our_logits(directory, prompt, kit)
    assert "\n" not in caught.value.message and directory.name in caught.value.message


def their_logits(directory: Path, prompt: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return logits


def our_logits(directory: Path, prompt: list[int], kit: Any) -> torch.Tensor:
    """By the way of a cluster: found, its facts read, then loaded; the context must hold the prompt."""
    facts = model_facts(resolve_model(str(directory)))
    assert facts.context_length >= len(prompt)
    engine = kit.Engine(kit.load(directory), num_blocks=40, max_len=len(prompt))
    logits: torch.Tensor = engine.logits(prompt)
    engine.close()
    return logits


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_defaults_are_those_of_transformers_config_classes(architecture: str) -> None:
    family: Any = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config")
    theirs = {f.name: f.default for f in fields(family) if f.default is not MISSING}
    theirs["rope_theta"] = family.default_theta
    known = {key for defaults in DEFAULTS.values() for key in defaults}
    assert {key: theirs.get(key) for key in DEFAULTS[architecture]} == DEFAULTS[architecture]
    assert {key for key in theirs if key in known} <= set(DEFAULTS[architecture]), "a key of theirs that we ignore"


def test_files_that_are_left_out_are_told(saved: Callable[[Quirk], Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(saved(QUIRKS["shards"]), directory)
    for name in ("model_old.safetensors", "adapter_model.safetensors"):
        beside(name)(directory)
    file("training_args.bin", b"x")(directory)
    facts = model_facts(resolve_model(str(directory)))
    assert facts.left_out == ("adapter_model.safetensors", "model_old.safetensors")
