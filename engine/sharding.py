"""What each rank of a tensor-parallel model holds: its part of the shape, and of every stored weight.

Attention heads, the columns of the MLP and the rows of the output head are split evenly (Shoeybi et al. 2019,
"Megatron-LM"); norms and the embedding are on every rank. A sharded embedding would save vocab_size × hidden_size /
ranks values a rank, 0.5 GB for Llama-3.1-8B on two, and would cost an all-reduce a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.model_config import ModelConfig
from phasewise.core.errors import ConfigError

_FIELD = "tensor_parallel"
# The products of the head are fastest in whole tiles of so many rows: the last rank's part is the smaller one.
_VOCAB_TILE = 128


@dataclass(frozen=True, slots=True)
class Slice:
    """Entries `first` to `first + count` of dimension `dim`, which has `whole` of them. Count 0: nothing of it."""

    dim: int
    first: int
    count: int
    whole: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of the `size` that compute one model together."""

    rank: int = 0
    size: int = 1

    def part(self, whole: ModelConfig) -> ModelConfig:
        """The shape that this rank computes. Vocabulary and hidden size stay whole.

        Raises:
            ConfigError: heads, MLP or vocabulary cannot be split evenly.
        """
        heads, kv_heads, size = whole.num_heads, whole.num_kv_heads, self.size
        if not _fits(whole, size):
            possible = ", ".join(str(n) for n in range(1, heads + 1) if _fits(whole, n))
            raise ConfigError(
                f"{_FIELD} {size} cannot split this model evenly: {heads} attention heads, {kv_heads} key/value heads, "
                f"intermediate_size {whole.intermediate_size}, vocabulary {whole.vocab_size}; possible: {possible}",
                field=_FIELD,
            )
        return replace(
            whole,
            num_heads=heads // size,
            num_kv_heads=max(kv_heads // size, 1),
            intermediate_size=whole.intermediate_size // size,
        )

    def kv_heads(self, num_kv_heads: int) -> tuple[int, int]:
        """(first, number) of the model's key/value heads that this rank has; ranks share one when there are too few."""
        return self.rank * num_kv_heads // self.size, max(num_kv_heads // self.size, 1)

    def vocab(self, vocab_size: int) -> tuple[int, int]:
        """(first token id, number of ids) of this rank's rows of the head; `vocab_step` for all ranks but the last."""
        step = self.vocab_step(vocab_size)
        first = self.rank * step
        return first, min(step, vocab_size - first)

    def vocab_step(self, vocab_size: int) -> int:
        if self.size == 1:
            return vocab_size
        tile = _VOCAB_TILE if vocab_size >= _VOCAB_TILE * self.size**2 else 1
        return -(-vocab_size // (self.size * tile)) * tile

    def slice_of(self, name: str, whole: ModelConfig) -> Slice | None:
        """What this rank takes of the tensor that a Hugging Face checkpoint calls `name`; None: all of it."""
        if self.size == 1:
            return None
        if name == "lm_head.weight":
            return Slice(0, *self.vocab(whole.vocab_size), whole.vocab_size)
        part = self.part(whole)
        module, _, kind = name.rpartition(".")
        match module.rpartition(".")[2]:
            case "q_proj":
                return self._nth(0, self.rank, part.num_heads * part.head_dim, whole.num_heads * whole.head_dim)
            case "k_proj" | "v_proj":
                first_head, _ = self.kv_heads(whole.num_kv_heads)
                size = part.num_kv_heads * part.head_dim
                return self._nth(0, first_head // part.num_kv_heads, size, whole.num_kv_heads * whole.head_dim)
            case "gate_proj" | "up_proj":
                return self._nth(0, self.rank, part.intermediate_size, whole.intermediate_size)
            case "o_proj" if kind == "weight":
                return self._nth(1, self.rank, part.num_heads * part.head_dim, whole.num_heads * whole.head_dim)
            case "down_proj" if kind == "weight":
                return self._nth(1, self.rank, part.intermediate_size, whole.intermediate_size)
            case "o_proj" | "down_proj" if self.rank:  # the partial results are added up: one bias is enough
                return Slice(0, 0, 0, whole.hidden_size)
        return None

    @staticmethod
    def _nth(dim: int, index: int, count: int, whole: int) -> Slice:
        return Slice(dim, index * count, count, whole)


def _fits(whole: ModelConfig, size: int) -> bool:
    heads_fit = whole.num_heads % size == 0 and (whole.num_kv_heads % size == 0 or size % whole.num_kv_heads == 0)
    last_ids = Shard(size - 1, size).vocab(whole.vocab_size)[1]
    return heads_fit and whole.intermediate_size % size == 0 and last_ids > 0
