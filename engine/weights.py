"""Fills a model's weights from safetensors shards, one tensor at a time, or with seeded random numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from phasewise.core.errors import ModelLoadError
from phasewise.core.model_source import read_json

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Written by older versions of transformers, computed here.
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")

_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


def load_safetensors(
    directory: Path, views: dict[str, torch.Tensor], *, tied: bool, progress: Callable[[float], None]
) -> None:
    """Copies every tensor of the checkpoint into the view of its name, converting the dtype.

    `tied`: the output head is the embedding, so a stored `lm_head.weight` is left alone. `progress` gets 0 to 1.

    Raises:
        ModelLoadError: names the file and the tensor that is missing, of the wrong shape or type, or damaged.
    """
    files = safetensors_files(directory)
    total = sum(file.stat().st_size for file in files)
    loaded: set[str] = set()
    num_bytes = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  (a safe_open is no mapping)
                    if _NOT_WEIGHTS.search(name) or (tied and name == "lm_head.weight"):
                        continue
                    tensor = shard.get_tensor(name)
                    copy_weight(views, name, tensor, str(file))
                    loaded.add(name)
                    num_bytes += tensor.numel() * tensor.element_size()
                    progress(min(1.0, num_bytes / total))
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ModelLoadError(f"{file} is cut short or damaged ({reason}); copy or download it again") from None
    check_complete(views, loaded, str(directory))


def safetensors_files(directory: Path) -> list[Path]:
    """The shards: those that the index names, or all of the directory. Raises ModelLoadError when one is missing."""
    index = directory / _INDEX
    if not index.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ModelLoadError(f"{directory} holds no *.safetensors; save the model again with save_pretrained")
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no 'weight_map'; copy or download it again")
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelLoadError(f"{directory} lacks {', '.join(missing)}, which {_INDEX} names; copy or download it again")
    return [directory / name for name in names]


def copy_weight(views: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, where: str) -> None:
    """Checks a stored tensor against its place in the model and copies it there. Raises ModelLoadError."""
    view = views.get(name)
    if view is None:
        raise ModelLoadError(
            f"{where}: tensor {name!r} has no place in this architecture; is config.json the right one?"
        )
    if tensor.dtype not in _FLOATS:
        raise ModelLoadError(f"{where}: tensor {name!r} is {tensor.dtype}; supported: float32, bfloat16, float16")
    if tensor.shape != view.shape:
        raise ModelLoadError(
            f"{where}: tensor {name!r} has shape {list(tensor.shape)}, the configuration asks for {list(view.shape)}"
        )
    view.copy_(tensor)


def check_complete(views: dict[str, torch.Tensor], loaded: set[str], where: str) -> None:
    """Raises ModelLoadError unless every weight was filled."""
    missing = sorted(set(views) - loaded)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"{where}: tensor {missing[0]!r}{more} is missing; the checkpoint is not complete")


def fill_random(views: dict[str, torch.Tensor], *, seed: int, std: float, progress: Callable[[float], None]) -> None:
    """Normal weights of this standard deviation, norms about 1; each tensor depends on (seed, its name) alone.

    The numbers are the same in every process on the same kind of device.
    """
    for done, (name, view) in enumerate(views.items(), start=1):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(device=view.device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        numbers = torch.empty(view.shape, dtype=torch.float32, device=view.device)
        view.copy_(numbers.normal_(mean=1.0 if "norm" in name else 0.0, std=std, generator=generator))
        progress(done / len(views))


def files_identity(files: list[Path]) -> str:
    """Stands for the content of large files without reading them whole: sizes, beginnings, and evenly spread samples.

    File names and places do not matter. Raises ModelLoadError when a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            size = file.stat().st_size
            with file.open("rb") as handle:
                digest.update(size.to_bytes(8, "little"))
                for i in range(_SAMPLES_PER_FILE + 1):
                    handle.seek(max(0, size - _SAMPLE_BYTES) * i // _SAMPLES_PER_FILE)
                    digest.update(handle.read(_SAMPLE_BYTES))
        except OSError as error:
            raise ModelLoadError(f"cannot read {file}: {error.strerror}") from None
    return digest.hexdigest()
