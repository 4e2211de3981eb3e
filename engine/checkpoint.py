"""An opened checkpoint of safetensors files: which tensor of which file is which weight of the model."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.model_config import ModelConfig
from phasewise.core.checkpoint_files import checkpoint_files
from phasewise.core.errors import ModelLoadError

logger = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Written by older versions of transformers, computed here.
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")
_WITHOUT_PREFIX = re.compile(r"^(embed_tokens|layers|norm)\.")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class _Stored:
    name: str
    file: Path
    handle: Any


class Checkpoint:
    """Tensors by the names that our model gives them. Opening reads the files' headers alone.

    A checkpoint that was saved from the model without its head has names without `model.`; both forms are taken.
    Tensors of layers beyond the configuration's are `unused`, as in transformers.

    Raises:
        ModelLoadError: a file is missing or damaged, or two tensors are the same weight.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.files = checkpoint_files(directory).files
        self.unused: list[str] = []
        self._tensors: dict[str, _Stored] = {}
        for file in self.files:
            with _named(file):
                handle = safe_open(file, framework="pt")
                for stored_name in handle.keys():  # noqa: SIM118  (it is no mapping)
                    self._add(_Stored(stored_name, file, handle), config.num_layers)

    def config(self, config: ModelConfig) -> ModelConfig:
        """The configuration that fits the weights. Adapts the names of tied weights to it.

        A head that is tied to the embedding may be stored as either, or as both. Where the two differ the head has
        weights of its own, whatever the configuration says, as in transformers.
        """
        if not config.tie_word_embeddings or HEAD not in self._tensors:
            return config
        head = self._tensors[HEAD]
        embedding = self._tensors.setdefault(EMBEDDING, head)
        if embedding is not head and not torch.equal(self.tensor(EMBEDDING), self.tensor(HEAD)):
            logger.warning(
                "%s: config.json ties the output head to the embedding, but the checkpoint has two different ones: "
                "both are used; set tie_word_embeddings to false",
                head.file.parent,
            )
            return replace(config, tie_word_embeddings=False)
        del self._tensors[HEAD]
        return config

    def names(self) -> Iterator[str]:
        yield from self._tensors

    def tensor(self, name: str) -> torch.Tensor:
        """The whole stored tensor, in the stored dtype. Its file stays mapped while it is used; nothing is read yet."""
        stored = self._tensors[name]
        with _named(stored.file):
            return stored.handle.get_tensor(stored.name)

    def where(self, name: str) -> str:
        """File and stored name, for messages."""
        stored = self._tensors[name]
        return f"{stored.file}: tensor {stored.name!r}"

    def _add(self, stored: _Stored, num_layers: int) -> None:
        """Raises ModelLoadError for a dtype that is not supported, or a second tensor of the same weight."""
        name = weight_name(stored.name)
        if _NOT_WEIGHTS.search(name):
            return
        layer = _LAYER.match(name)
        if layer is not None and int(layer.group(1)) >= num_layers:
            self.unused.append(stored.name)
            return
        other = self._tensors.setdefault(name, stored)
        if other is stored:
            return
        if other.file == stored.file:
            raise ModelLoadError(
                f"{stored.file}: tensors {other.name!r} and {stored.name!r} are the same weight; remove one"
            )
        raise ModelLoadError(
            f"tensor {stored.name!r} is in two files of the checkpoint, {other.file} and {stored.file}; remove the one "
            "that does not belong to it, or save the model again"
        )


def weight_name(stored_name: str) -> str:
    """The name that our model has for a stored tensor."""
    if _WITHOUT_PREFIX.match(stored_name):
        return f"model.{stored_name}"
    return stored_name.removeprefix("model.") if stored_name == f"model.{HEAD}" else stored_name


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Makes what safetensors raises inside a ModelLoadError that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelLoadError(f"{file} is cut short or damaged ({reason}); copy or download it again") from None
