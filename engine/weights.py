"""Fills a model's weights from safetensors files by several threads, or with seeded random numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.model_config import ModelConfig
from engine.sharding import Shard, Slice
from phasewise.core.errors import ModelLoadError
from phasewise.core.model_source import read_json

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Written by older versions of transformers, computed here.
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")

# Copies give the interpreter up. A few threads keep a disk's queue, or the way to a GPU, full.
_NUM_THREADS = 8
_VALUES_PER_PIECE = 8 << 20

_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


def load_safetensors(
    directory: Path,
    config: ModelConfig,
    views: dict[str, torch.Tensor],
    progress: Callable[[float], None],
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> None:
    """Copies every tensor of the checkpoint, or this rank's part of it, into the view of its name.

    The dtype is converted; bytes of other ranks' parts are not read. A stored `lm_head.weight` is left alone where the
    output head is the embedding. `progress` gets 0 to 1.

    Raises:
        ModelLoadError: names the file and the tensor that is missing, of the wrong shape or type, or damaged.
    """
    loaded: set[str] = set()
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for file in safetensors_files(directory):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  (a safe_open is no mapping)
                    if _NOT_WEIGHTS.search(name) or (config.tie_word_embeddings and name == "lm_head.weight"):
                        continue
                    # Not read yet: the tensor lies in the file, which is mapped into memory for as long as it is used.
                    tensor = stored.get_tensor(name)
                    copies += _checked(views, name, tensor, shard.slice_of(name, config), file)
                    loaded.add(name)
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ModelLoadError(f"{file} is cut short or damaged ({reason}); copy or download it again") from None
    check_complete(views, loaded, str(directory))
    total, done = sum(part.numel() for part, _ in copies) or 1, 0
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for num_values in pool.map(lambda copy: _copy(*copy), copies):
            done += num_values
            progress(done / total)


def _checked(
    views: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, cut: Slice | None, file: Path
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(stored part, its place), in pieces for the threads, once type and shape are right."""
    view = views.get(name)
    if view is None and (cut is None or cut.count):
        raise ModelLoadError(
            f"{file}: tensor {name!r} has no place in this architecture; is config.json the right one?"
        )
    if tensor.dtype not in _FLOATS:
        raise ModelLoadError(f"{file}: tensor {name!r} is {tensor.dtype}; supported: float32, bfloat16, float16")
    if view is None:
        return []
    expected = whole_shape(view, cut)
    if tensor.shape != expected:
        raise ModelLoadError(
            f"{file}: tensor {name!r} has shape {list(tensor.shape)}, the configuration asks for {list(expected)}"
        )
    if cut is not None:
        tensor = tensor.narrow(cut.dim, cut.first, cut.count)
    step = max(1, _VALUES_PER_PIECE // max(tensor[0].numel(), 1))
    return list(zip(tensor.split(step), view.split(step), strict=True))


def _copy(part: torch.Tensor, place: torch.Tensor) -> int:
    place.copy_(part)
    return part.numel()


def whole_shape(view: torch.Tensor, cut: Slice | None) -> tuple[int, ...]:
    """The shape of the stored tensor of which `view` takes `cut`."""
    shape = list(view.shape)
    if cut is not None:
        shape[cut.dim] = cut.whole
    return tuple(shape)


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


def check_complete(views: dict[str, torch.Tensor], loaded: set[str], where: str) -> None:
    """Raises ModelLoadError unless every weight was filled."""
    missing = sorted(set(views) - loaded)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"{where}: tensor {missing[0]!r}{more} is missing; the checkpoint is not complete")


def fill_random(
    config: ModelConfig,
    views: dict[str, torch.Tensor],
    seed: int,
    progress: Callable[[float], None],
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> None:
    """Normal weights of the configured deviation, norms about 1; each tensor depends on (seed, its name) alone.

    The numbers are the same in every process on the same kind of device: a rank makes the whole tensor and keeps its
    part, so that all ranks together have the weights that one alone would have.
    """
    for done, (name, view) in enumerate(views.items(), start=1):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(device=view.device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        cut = shard.slice_of(name, config)
        numbers = torch.empty(whole_shape(view, cut), dtype=torch.float32, device=view.device)
        numbers.normal_(mean=1.0 if "norm" in name else 0.0, std=config.initializer_range, generator=generator)
        view.copy_(numbers if cut is None else numbers.narrow(cut.dim, cut.first, cut.count))
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
