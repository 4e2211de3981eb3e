"""The decoder-only transformer of the Llama family: Llama, Mistral, Qwen2 (QKV bias), Qwen3 (QK norm).

A model and nothing else: the cache is reached through an attention backend, batches are rows of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.attention.backend import AttentionBackend
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import ModelConfig
from engine.tensor_parallel import Group

RopePlan = tuple[torch.Tensor, torch.Tensor]


class Attention:
    """Self-attention of one layer, with queries, keys and values as one fused product."""

    def __init__(
        self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device, *, has_output_bias: bool
    ) -> None:
        self._layer = layer
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        self._head_dim = config.head_dim
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = Linear(
            config.hidden_size, query_size + 2 * kv_size, bias=config.qkv_bias, dtype=dtype, device=device
        )
        self.output = Linear(query_size, config.hidden_size, bias=has_output_bias, dtype=dtype, device=device)
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps, device) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps, device) if config.qk_norm else None

    def __call__(
        self, x: torch.Tensor, rotary: RotaryEmbedding, rope: RopePlan, backend: AttentionBackend
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] → the same."""
        num_tokens, num_rotated = x.shape[0], self._num_heads + self._num_kv_heads
        heads = self.qkv(x).view(num_tokens, -1, self._head_dim)
        queries = heads[:, : self._num_heads]
        if self.query_norm is not None and self.key_norm is not None:
            queries.copy_(self.query_norm(queries))
            keys = heads[:, self._num_heads : num_rotated]
            keys.copy_(self.key_norm(keys))
        rotary.rotate_(heads[:, :num_rotated], rope)
        keys_values = heads[:, self._num_heads :].unflatten(1, (2, self._num_kv_heads))
        attended = backend.run(self._layer, queries, keys_values)
        return self.output(attended.view(num_tokens, -1))

    def weight_views(self, prefix: str) -> dict[str, torch.Tensor]:
        query_size, kv_size = self._num_heads * self._head_dim, self._num_kv_heads * self._head_dim
        views: dict[str, torch.Tensor] = {}
        first = 0
        for name, count in (("q_proj", query_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            views |= _linear_views(f"{prefix}.{name}", self.qkv, first, count)
            first += count
        views |= _linear_views(f"{prefix}.o_proj", self.output)
        if self.query_norm is not None and self.key_norm is not None:
            views[f"{prefix}.q_norm.weight"] = self.query_norm.weight
            views[f"{prefix}.k_norm.weight"] = self.key_norm.weight
        return views


class MLP:
    """The gated feed-forward network, with gate and up as one fused product (Shazeer 2020, "SwiGLU")."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, has_output_bias: bool) -> None:
        self._size = config.intermediate_size
        self.gate_up = Linear(config.hidden_size, 2 * self._size, bias=config.mlp_bias, dtype=dtype, device=device)
        self.down = Linear(self._size, config.hidden_size, bias=has_output_bias, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] → the same."""
        both = self.gate_up(x)
        return self.down(F.silu(both[:, : self._size]).mul_(both[:, self._size :]))

    def weight_views(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            **_linear_views(f"{prefix}.gate_proj", self.gate_up, 0, self._size),
            **_linear_views(f"{prefix}.up_proj", self.gate_up, self._size, self._size),
            **_linear_views(f"{prefix}.down_proj", self.down),
        }


class DecoderLayer:
    """Attention and MLP, each behind a norm, summed over the ranks and then added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        self._group = group
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device)
        self.attention = Attention(config, layer, dtype, device, has_output_bias=config.output_bias and group.rank == 0)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device)
        self.mlp = MLP(config, dtype, device, has_output_bias=config.mlp_bias and group.rank == 0)

    def __call__(
        self, hidden: torch.Tensor, rotary: RotaryEmbedding, rope: RopePlan, backend: AttentionBackend
    ) -> torch.Tensor:
        """hidden: [num_tokens, hidden_size], overwritten and returned."""
        hidden += self._group.all_reduce(self.attention(self.attention_norm(hidden), rotary, rope, backend))
        hidden += self._group.all_reduce(self.mlp(self.mlp_norm(hidden)))
        return hidden

    def weight_views(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.input_layernorm.weight": self.attention_norm.weight,
            f"{prefix}.post_attention_layernorm.weight": self.mlp_norm.weight,
            **self.attention.weight_views(f"{prefix}.self_attn"),
            **self.mlp.weight_views(f"{prefix}.mlp"),
        }

    def fold_norms(self) -> None:
        """Multiplies the norms' weights into the products behind them, and leaves ones: the layer's function stays."""
        for norm, linear in ((self.attention_norm, self.attention.qkv), (self.mlp_norm, self.mlp.gate_up)):
            linear.scale_inputs(norm.weight)
            norm.weight.fill_(1.0)

    def quantize(self) -> None:
        """Replaces the products' weights by fp8, with the norms folded in: the scales then see what is multiplied."""
        for norm, linear in ((self.attention_norm, self.attention.qkv), (self.mlp_norm, self.mlp.gate_up)):
            linear.quantize(norm.weight)
            norm.weight.fill_(1.0)
        self.attention.output.quantize()
        self.mlp.down.quantize()

    def linears(self) -> tuple[Linear, ...]:
        return (self.attention.qkv, self.attention.output, self.mlp.gate_up, self.mlp.down)


class LlamaModel:
    """Token ids in, logits out, in three steps, so that a caller can act between groups of layers.

    The weights are unset until a loader has filled every one of `weight_views` and called `finish_loading`. In a group
    of several ranks this is one rank's part of the model that `whole` describes: `config` has the heads and the MLP
    that are computed here, and hidden states are equal on all ranks.

    Raises:
        ConfigError: the group cannot split this model evenly.
    """

    def __init__(self, whole: ModelConfig, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        self.config = config = group.shard.part(whole)
        self.dtype = dtype
        self.device = device
        self.group = group
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = [DecoderLayer(config, i, dtype, device, group) for i in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device)
        first, count = group.shard.vocab(config.vocab_size)
        self.head = Linear(config.hidden_size, count, bias=False, dtype=dtype, device=device)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding[first : first + count]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] int64 → hidden states [num_tokens, hidden_size]"""
        return self.embedding.index_select(0, input_ids)

    def run_layers(
        self,
        hidden: torch.Tensor,
        first: int,
        count: int,
        rotary: RotaryEmbedding,
        rope: RopePlan,
        backend: AttentionBackend,
    ) -> torch.Tensor:
        """Layers `first` to `first + count`; `hidden` [num_tokens, hidden_size] is overwritten and returned."""
        for layer in self.layers[first : first + count]:
            hidden = layer(hidden, rotary, rope, backend)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] → [num_rows, vocab_size] float32"""
        return self.group.gather_vocab(self.head(self.norm(hidden)).float(), self.config.vocab_size)

    def weight_views(self) -> dict[str, torch.Tensor]:
        """Name in a Hugging Face checkpoint → what it fills: a view of the stored shape, or of a rank's part of it."""
        views = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm.weight}
        for i, layer in enumerate(self.layers):
            views |= layer.weight_views(f"model.layers.{i}")
        if not self.config.tie_word_embeddings:
            views |= _linear_views("lm_head", self.head)
        return views

    def finish_loading(self) -> None:
        """Lays the weights out for the device; `weight_views` is not valid afterwards."""
        for layer in self.layers:
            for linear in layer.linears():
                linear.finish_loading()
        self.head.finish_loading()


def _linear_views(name: str, linear: Linear, first: int = 0, count: int | None = None) -> dict[str, torch.Tensor]:
    count = linear.out_features if count is None else count
    views = {f"{name}.weight": linear.rows(first, count)}
    if linear.bias is not None:
        views[f"{name}.bias"] = linear.bias_rows(first, count)
    return views
