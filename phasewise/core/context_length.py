"""How many tokens a model takes, which of its values says so, and whether a wished length can be served."""

from __future__ import annotations

from dataclasses import dataclass

from phasewise.core.errors import ConfigError
from phasewise.core.rope import RopeConfig


@dataclass(frozen=True, slots=True)
class ContextLength:
    """Prompt and output together, in tokens. `reason` names the values of the model's files that it follows from."""

    tokens: int
    reason: str

    def at_most(self, wanted: int | None) -> int:
        """The length to serve: `wanted` (model.max_model_len), or all of it.

        Raises:
            ConfigError: more is wanted than the model takes.
        """
        if wanted is None:
            return self.tokens
        if wanted > self.tokens:
            raise ConfigError(
                f"model.max_model_len is {wanted}, but the model takes {self.tokens} tokens ({self.reason}); lower it "
                f"to {self.tokens}, leave it out, or give the model RoPE scaling in its files",
                field="model.max_model_len",
            )
        return wanted


def context_length(rope: RopeConfig, max_position_embeddings: int, key: str) -> ContextLength:
    """The context of a model with this RoPE scaling, as vLLM derives it but for dynamic scaling.

    YaRN multiplies the original context by its factor. `max_position_embeddings` counts only where that is absent,
    because files give there the length before or after scaling. Linear scaling multiplies `max_position_embeddings`.
    With Llama 3's scaling that length is already the scaled one. Dynamic scaling changes every position's angles with
    each token beyond that length, so KV could not be kept. `key` is the name of `max_position_embeddings` in the
    model's file.
    """
    plain = f"{key} {max_position_embeddings}"
    if rope.rope_type == "yarn":
        tokens = int(rope.original_context * rope.factor)
        return ContextLength(tokens, f"RoPE type yarn: factor {rope.factor:g} × original {rope.original_context}")
    if rope.rope_type == "linear":
        tokens = int(max_position_embeddings * rope.factor)
        return ContextLength(tokens, f"RoPE type linear: factor {rope.factor:g} × {plain}")
    if rope.rope_type == "dynamic":
        return ContextLength(max_position_embeddings, f"{plain}; dynamic RoPE scaling is constant only up to there")
    return ContextLength(max_position_embeddings, plain)
