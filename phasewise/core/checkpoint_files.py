"""Which files of a Hugging Face directory are its weights: transformers' rule, in its order.

1. what `transformers_weights` in config.json names: one file, or an index
2. model.safetensors
3. model.safetensors.index.json, and the shards that it names

Other files in the directory (adapters, older copies, other formats) do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phasewise.core.errors import ModelLoadError
from phasewise.core.hf_config import optional_json, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_EXPLICIT_KEY = "transformers_weights"
_OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "consolidated*.pth", "*.gguf")


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """`files` are read; `left_out` are the names of files beside them that look like weights and are not."""

    files: tuple[Path, ...]
    left_out: tuple[str, ...]


def checkpoint_files(directory: Path) -> CheckpointFiles:
    """The files that count, in the order of their names.

    Raises:
        ModelLoadError: there are none, or one that an index names is missing; the message says what is there instead.
    """
    first = _first(directory)
    files = _shards(directory, first) if first.name.endswith(".index.json") else [first]
    beside = {file for pattern in _OTHER_WEIGHTS for file in directory.glob(pattern)}
    return CheckpointFiles(tuple(files), tuple(sorted(file.name for file in beside - set(files))))


def missing_weights_hint(directory: Path) -> str:
    """What a directory without weights holds instead; completes "…lacks model.safetensors", and may be empty."""
    if names := sorted(file.name for file in directory.glob("*.safetensors")):
        return (
            f"; it holds {', '.join(names[:3])}, which counts only where {INDEX_FILE} names it: copy the index, too, "
            f"or rename a single file to {SINGLE_FILE}"
        )
    if any(directory.glob("*.gguf")):
        return "; it holds a .gguf file: name that file instead"
    if any(directory.glob("*.bin")):
        return "; it holds .bin weights: save the model again with save_pretrained to have safetensors"
    return ""


def _first(directory: Path) -> Path:
    """The one file, or the index. Raises ModelLoadError when there is neither."""
    explicit = optional_json(directory / "config.json").get(_EXPLICIT_KEY)
    if explicit is not None:
        return _explicit(directory, explicit)
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_file():
            return directory / name
    raise ModelLoadError(f"model directory {directory} lacks {SINGLE_FILE}{missing_weights_hint(directory)}")


def _explicit(directory: Path, name: object) -> Path:
    """The file or index that config.json names. Raises ModelLoadError for a name that is none, or leads elsewhere."""
    where = f"{directory / 'config.json'}: {_EXPLICIT_KEY!r}"
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelLoadError(f"{where} must name a .safetensors file or a .safetensors.index.json, not {name!r}")
    file = directory / name
    if not file.resolve().is_relative_to(directory.resolve()):
        raise ModelLoadError(f"{where} must name a file inside the directory, not {name!r}")
    if not file.is_file():
        raise ModelLoadError(f"{where} names {name}, which is not there; copy it, or remove the key")
    return file


def _shards(directory: Path, index: Path) -> list[Path]:
    """The files of an index. Raises ModelLoadError when it names none, or one that is missing."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no 'weight_map'; copy or download it again")
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelLoadError(
            f"{directory} lacks {', '.join(missing)}, which {index.name} names; copy or download it again"
        )
    return [directory / name for name in names]
