"""What a GGUF file's metadata say, typed: the shape of its RoPE, its context, and the tokens that end a turn."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
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
    """Typed access to the entries of the file's architecture.

    Every method raises ModelLoadError for a value of another type, or one that is not supported.
    """

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
        plain = RopeConfig(theta=theta, frequency_divisors=divisors)
        if scaling == "yarn" and factor:
            return self._yarn(plain, factor)
        self._only("rope.scaling.attn_factor", (1.0,), "without YaRN")
        self._only("rope.scaling.yarn_attn_factor", (1.0,), "without YaRN")
        self._only("rope.scaling.yarn_ext_factor", (0.0, -1.0), "without YaRN")
        if scaling != "linear" or not factor:
            return plain
        context = self.integer("rope.scaling.original_context_length", default=self.integer("context_length"))
        return replace(plain, rope_type="linear", factor=factor, original_context=context)

    def _yarn(self, plain: RopeConfig, factor: float) -> RopeConfig:
        """As llama.cpp computes YaRN (`llama_context`): its factor on cosine and sine is the product of two.

        One is `attn_factor`. The other is (1 + 0.1 ln f) / (1 + 0.1 m ln f), where f is the scaling factor and m is
        `yarn_log_multiplier`. `yarn_attn_factor` has no part in it: llama.cpp overwrites it, while its converter stores
        there what transformers calls `attention_factor`. So a file with another value than 1 contradicts itself.
        """
        self._only("rope.scaling.yarn_ext_factor", (1.0, -1.0), "with YaRN")
        self._only("rope.scaling.yarn_attn_factor", (1.0,), "with YaRN")
        multiplier = self.number("rope.scaling.yarn_log_multiplier", default=0.0)
        if not 0 <= multiplier < math.inf:
            raise self._error("rope.scaling.yarn_log_multiplier", "a number, at least 0", multiplier)
        log_factor = 0.1 * math.log(factor) if factor > 1 else 0.0
        scale = (1.0 + log_factor) / (1.0 + multiplier * log_factor)
        return replace(
            plain,
            rope_type="yarn",
            factor=factor,
            original_context=self.integer(
                "rope.scaling.original_context_length", default=self.integer("context_length")
            ),
            attention_factor=scale * self._positive("rope.scaling.attn_factor", 1.0),
            beta_fast=self._positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=self._positive("rope.scaling.yarn_beta_slow", 1.0),
        )

    def _positive(self, key: str, default: float) -> float:
        value = self.number(key, default=default)
        if not 0 < value < math.inf:
            raise self._error(key, "a number above 0", value)
        return value

    def _only(self, key: str, supported: tuple[float, ...], when: str) -> None:
        """Refuses a value by which positions would be rotated differently from how they are here."""
        value = self.number(key, default=supported[0])
        if value not in supported:
            raise ModelLoadError(
                f"{self.file.path}: metadata {self._prefix + key!r} is {value:g}, which is not supported; supported "
                f"{when}: {supported[0]:g}. Convert the model again without it, or serve the original"
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
