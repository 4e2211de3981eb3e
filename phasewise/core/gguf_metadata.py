"""What a GGUF file's metadata say, typed: the shape of its RoPE, its context, and the tokens that end a turn."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from phasewise.core.context_length import ContextLength, context_length
from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.rope import RopeConfig

ROPE_DIVISORS = "rope_freqs.weight"
CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type`."""

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    )
)
"""Tokens that end a turn in whichever model has them (llama.cpp, `llama_vocab`, end-of-generation tokens)."""


class GGUFValues:
    """Typed access to the entries of the file's architecture. Raises ModelLoadError for a value of another type."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = file.metadata.get("general.architecture")
        self._prefix = f"{self.architecture}."

    def get(self, key: str) -> Any:
        return self.file.metadata.get(self._prefix + key)

    def integer(self, key: str, *, default: int | None = None) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._error(key, "one whole number", value)
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(key, "a number", value)
        return float(value)

    def context(self) -> ContextLength:
        """How many tokens the model takes."""
        key = "context_length"
        return context_length(self.rope(), self.integer(key), self._prefix + key)

    def rope(self) -> RopeConfig:
        """As llama.cpp reads it: a factor without a type is linear scaling."""
        theta, divisors = self.number("rope.freq_base", default=10000.0), self._divisors()
        factor = self.number("rope.scaling.factor", default=self.number("rope.scale_linear", default=0.0))
        scaling = self.get("rope.scaling.type") or ("linear" if factor else "none")
        if scaling not in ("none", "linear", "yarn"):
            raise ModelLoadError(
                f"{self.file.path}: RoPE scaling {scaling!r} is not supported; supported: none, linear, yarn"
            )
        if scaling == "none" or not factor:
            return RopeConfig(theta=theta, frequency_divisors=divisors)
        context = self.integer("context_length")
        return RopeConfig(
            rope_type=scaling,
            theta=theta,
            factor=factor,
            original_context=self.integer("rope.scaling.original_context_length", default=context),
            frequency_divisors=divisors,
        )

    def _divisors(self) -> tuple[float, ...]:
        tensor = self.file.tensors.get(ROPE_DIVISORS)
        if tensor is None:
            return ()
        if tensor.type_name != "F32":
            raise ModelLoadError(f"{self.file.path}: tensor {ROPE_DIVISORS!r} must be F32, not {tensor.type_name}")
        with self.file.data(tensor) as data:
            return struct.unpack(f"<{tensor.num_bytes // 4}f", data)

    def _error(self, key: str, wanted: str, value: object) -> ModelLoadError:
        return ModelLoadError(f"{self.file.path}: metadata {self._prefix + key!r} must be {wanted}, not {value!r}")


def end_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer, as llama.cpp finds them: named by a key, or known by their text among marked tokens.

    A file often names only the one that its base model ends documents with, while its chat template ends turns with
    another.
    """
    named = [metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    ids = [token for token in named if isinstance(token, int) and not isinstance(token, bool)]
    return tuple(dict.fromkeys((*ids, *_known_ends(metadata))))


def _known_ends(metadata: dict[str, Any]) -> Iterator[int]:
    """Marked are control and user-defined tokens, which are matched whole; where nothing is marked, all."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list):
        return
    if not isinstance(types, list) or len(types) != len(tokens):
        types = [CONTROL] * len(tokens)
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if token in END_TEXTS and kind in (CONTROL, USER_DEFINED):
            yield index
