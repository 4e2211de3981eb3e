"""The Llama family on CUDA with few launches: the same weights and the same function as engine/models/llama.py.

Norms are folded: the norm's weight goes into the product behind it when the model is loaded, and the row's 1 / rms,
which is a scalar, is multiplied in after the product, where the next kernel reads its result anyway. Products that end
in the residual stream add to it themselves. A layer is then

    qkv = x · Wqkv          scale, bias, head norms, rotary, cache      (rope_and_cache)
    attention               x += attended · Wo
    gate_up = x · Wgu       scale, silu, product                         (silu_mul; for long prompts within the product)
                            x += act · Wdown

Of several ranks each has a part of the heads and of the MLP: a product that ends in x is partial there, and
engine/cuda/all_reduce.py adds up all of them. x is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.cuda.all_reduce import FastReduce
from engine.cuda.elementwise import rope_and_cache, row_scales, silu_mul
from engine.cuda.fp8 import Fp8Product
from engine.cuda.products import gate_up_silu, gemv, has_gate_up_silu, skinny_product, skinny_tile
from engine.cuda.sampling import greedy
from engine.layers.linear import Linear
from engine.layers.rotary import rope_tables
from engine.models.llama import DecoderLayer, LlamaModel
from engine.tensor_parallel import ids_of, sortable

# From this many rows on one pass over x for all scales beats computing a row's scale in every program that needs it.
_ROWS_FOR_SCALES = 257

Weight = torch.Tensor | Fp8Product
Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, qkv [num_tokens, heads, head_dim] with rotated queries and keys, out [num_tokens, num_heads, head_dim]) →
`out`, filled, or another contiguous tensor of its shape."""


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: Weight
    qkv_bias: torch.Tensor | None
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    output: Weight
    output_bias: torch.Tensor | None
    gate_up: Weight
    down: Weight


class CudaDecoder:
    """Runs layers of `model` over rows of tokens. Folds the model's norms on construction: the model stays valid.

    With several ranks every method is called by all of them together, and `config` is this rank's part.

    Raises:
        ConfigError: as `rope_tables`.
    """

    def __init__(self, model: LlamaModel, max_model_len: int) -> None:
        config = model.config
        cos, sin = rope_tables(config, max_model_len)
        self.config = config
        self._model = model
        self._eps = config.rms_norm_eps
        self._reduce = FastReduce.connect(model.group, model.device) if model.group.size > 1 else None
        self._layers = [_fold(layer) for layer in model.layers]
        self._rope = cos.to(model.device), sin.to(model.device)

    @property
    def num_ranks(self) -> int:
        return self._model.group.size

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] int64 → [num_tokens, hidden]"""
        return self._model.embed(input_ids)

    def run_layers(
        self,
        x: torch.Tensor,
        first: int,
        count: int,
        positions: torch.Tensor,
        slots: torch.Tensor,
        storage: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """Layers `first` to `first + count`; x [num_tokens, hidden] is overwritten and returned.

        positions, slots: [num_tokens] int64 (a negative slot writes no KV); storage: that of the PagedKVCache.
        """
        config, num_tokens = self.config, x.shape[0]
        workspace = x.new_empty(num_tokens, config.num_heads, config.head_dim)
        act = x.new_empty(num_tokens, config.intermediate_size)
        scales = self._scales(x)
        for index in range(first, first + count):
            layer = self._layers[index]
            qkv = _product(x, layer.qkv).view(num_tokens, -1, config.head_dim)
            rope_and_cache(
                qkv,
                x,
                scales,
                layer.qkv_bias,
                layer.head_norms,
                self._rope,
                positions,
                slots,
                storage[index],
                self._eps,
                config.num_heads,
            )
            attended = attend(index, qkv, workspace)
            scales = self._add_product(x, attended.view(num_tokens, -1), layer.output, layer.output_bias, turn=0)
            self._activate(x, scales, layer.gate_up, act)
            scales = self._add_product(x, act, layer.down, None, turn=1)
        return x

    def partial_logits(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden] → logits of the ids that this rank's rows of the head stand for, in the model's dtype.

        Embedding and head are never fp8: one row of the embedding is read per token, and an error of the head's is in
        the logits as it is, for a fifteenth of the bytes of an 8B model.
        """
        return _product(self._model.norm(x), _weight(self._model.head))

    def gather(self, partial_logits: torch.Tensor) -> torch.Tensor:
        """→ the logits of all ids, [num_rows, vocab_size]."""
        return self._model.group.gather_vocab(partial_logits, self.config.vocab_size)

    def largest(self, partial_logits: torch.Tensor) -> torch.Tensor:
        """→ the ids of the largest logits, [num_rows] int64, -1 where there is a NaN.

        8 bytes a row go between the ranks.
        """
        if self._reduce is None:
            return greedy(partial_logits)
        first_id = self._model.group.shard.vocab(self.config.vocab_size)[0]
        return ids_of(self._reduce.max_(sortable(partial_logits, first_id)))

    def share_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Rank 0's sampled ids, on every rank.  # [num_rows] int64; of the others only the shape counts"""
        if self._reduce is None:
            return ids
        return self._reduce.max_(ids.clone() if self._model.group.rank == 0 else torch.full_like(ids, -1))

    def _activate(self, x: torch.Tensor, scales: torch.Tensor | None, weight: Weight, act: torch.Tensor) -> None:
        """The MLP up to its activation: x [num_tokens, hidden] → `act` [num_tokens, intermediate_size]."""
        if scales is not None and isinstance(weight, torch.Tensor) and has_gate_up_silu(len(x), weight):
            gate_up_silu(x, weight, scales, act)
        else:
            silu_mul(_product(x, weight), x, scales, self._eps, act)

    def _scales(self, x: torch.Tensor) -> torch.Tensor | None:
        """1 / rms of each row, [num_tokens] float32; None where the kernels compute it themselves."""
        return row_scales(x, self._eps) if len(x) >= _ROWS_FOR_SCALES else None

    def _add_product(
        self, x: torch.Tensor, inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None, turn: int
    ) -> torch.Tensor | None:
        """x += inputs · Wᵀ + bias, over all ranks; the new `_scales`. Shapes as in the function `_add_product`."""
        if self._reduce is None:
            _add_product(x, inputs, weight)
            if bias is not None:
                x += bias
            return self._scales(x)
        partial = _product(inputs, weight, self._reduce.partial(x, turn))
        if bias is not None:  # on rank 0 alone
            partial += bias
        return self._reduce.add(x, partial, turn, self._eps)


def _product(x: torch.Tensor, weight: Weight, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [num_tokens, columns] · Wᵀ → [num_tokens, rows], `out` or a new tensor, by the kernel that is fastest."""
    if isinstance(weight, Fp8Product):
        return weight(x) if out is None else out.copy_(weight(x))
    num_tokens, (rows, columns) = x.shape[0], weight.shape
    if out is None:
        out = x.new_empty(num_tokens, rows)
    tile = skinny_tile(num_tokens, rows, columns, x.dtype)
    if num_tokens == 1:
        return gemv(x, weight, out, adds=False)
    if tile is not None:
        return skinny_product(x, weight, out, tile, adds=False)
    return torch.mm(x, weight.t(), out=out)


def _add_product(x: torch.Tensor, inputs: torch.Tensor, weight: Weight) -> None:
    """x [num_tokens, rows] += inputs [num_tokens, columns] · Wᵀ, in one kernel where there is one."""
    if isinstance(weight, Fp8Product):
        return weight.add_to(x, inputs)
    num_tokens, (rows, columns) = x.shape[0], weight.shape
    tile = skinny_tile(num_tokens, rows, columns, x.dtype)
    if num_tokens == 1:
        gemv(inputs, weight, x, adds=True)
    elif tile is not None:
        skinny_product(inputs, weight, x, tile, adds=True)
    else:
        x.addmm_(inputs, weight.t())


def _fold(layer: DecoderLayer) -> _Layer:
    attention, mlp = layer.attention, layer.mlp
    if attention.qkv.fp8 is None:  # else it was done before the weights were quantised
        layer.fold_norms()
    head_norms = None
    if attention.query_norm is not None and attention.key_norm is not None:
        head_norms = (attention.query_norm.weight, attention.key_norm.weight)
    return _Layer(
        qkv=_weight(attention.qkv),
        qkv_bias=attention.qkv.bias,
        head_norms=head_norms,
        output=_weight(attention.output),
        output_bias=attention.output.bias,
        gate_up=_weight(mlp.gate_up),
        down=_weight(mlp.down),
    )


def _weight(linear: Linear) -> Weight:
    if linear.fp8 is not None:
        return Fp8Product(linear.fp8)
    assert linear.weight is not None, "packed weights are for the CPU"
    return linear.weight
