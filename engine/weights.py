"""Fills a model's weights from safetensors files by several threads, or with seeded random numbers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint
from engine.model_config import ModelConfig
from engine.sharding import Shard, Slice
from phasewise.core.errors import ModelLoadError

logger = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Copies release the interpreter lock. A few threads keep a disk's queue, or the bus to a GPU, full.
_NUM_THREADS = 8
_VALUES_PER_PIECE = 8 << 20

_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


def load_safetensors(
    checkpoint: Checkpoint,
    config: ModelConfig,
    views: dict[str, torch.Tensor],
    progress: Callable[[float], None],
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> None:
    """Copies every tensor of the checkpoint, or this rank's part of it, into the view of its name.

    The dtype is converted; bytes of other ranks' parts are not read. `config` is that of the checkpoint
    (`Checkpoint.config`). `progress` gets 0 to 1.

    Raises:
        ModelLoadError: names the file and the tensor that is missing, of the wrong shape or type, or damaged.
    """
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name in checkpoint.names():
        copies += _checked(views, name, checkpoint, shard.slice_of(name, config))
    if checkpoint.unused and shard.rank == 0:
        beyond = f"{len(checkpoint.unused)} tensors of layers beyond num_hidden_layers {config.num_layers}"
        logger.warning("%s are in the checkpoint and not used, %s among them", beyond, min(checkpoint.unused))
    check_complete(views, set(checkpoint.names()), str(checkpoint.files[0].parent))
    total, done = sum(part.numel() for part, _ in copies) or 1, 0
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for num_values in pool.map(lambda copy: _copy(*copy), copies):
            done += num_values
            progress(done / total)


def _checked(
    views: dict[str, torch.Tensor], name: str, checkpoint: Checkpoint, cut: Slice | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(stored part, its place), both of one shape, in pieces for the threads.

    Raises ModelLoadError for a name, type or shape that is not the model's.
    """
    view = views.get(name)
    if view is None and (cut is None or cut.count):
        raise ModelLoadError(
            f"{checkpoint.where(name)} has no place in this architecture; is config.json the right one?"
        )
    tensor = checkpoint.tensor(name)
    if tensor.dtype not in _FLOATS:
        raise ModelLoadError(f"{checkpoint.where(name)} is {tensor.dtype}; supported: float32, bfloat16, float16")
    if view is None:
        return []
    expected = whole_shape(view, cut)
    if tensor.shape != expected:
        raise ModelLoadError(
            f"{checkpoint.where(name)} has shape {list(tensor.shape)}, the configuration asks for {list(expected)}"
        )
    if cut is not None:
        tensor = tensor.narrow(cut.dim, cut.first, cut.count)
    step = max(1, _VALUES_PER_PIECE // max(tensor[0].numel(), 1))
    return list(zip(tensor.split(step), view.split(step), strict=True))


def _copy(part: torch.Tensor, place: torch.Tensor) -> int:
    """Copies a part to its place of the same shape; the number of its values."""
    place.copy_(part)
    return part.numel()


def whole_shape(view: torch.Tensor, cut: Slice | None) -> tuple[int, ...]:
    """The shape of the stored tensor of which `view` takes `cut`."""
    shape = list(view.shape)
    if cut is not None:
        shape[cut.dim] = cut.whole
    return tuple(shape)


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


def files_identity(files: Sequence[Path]) -> str:
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
