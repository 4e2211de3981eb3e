"""Fills a model's weights from a GGUF file: dequantises, renames, and restores llama's order of query and key rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import numpy as np
import torch

from engine.model_config import ModelConfig
from engine.sharding import Shard, Slice
from engine.weights import check_complete, whole_shape
from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_file import GGUFFile, GGUFTensor
from phasewise.core.gguf_metadata import ROPE_DIVISORS

SUPPORTED_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"^blk\.(\d+)\.(\w+)\.(weight|bias)$")

# Numpy releases the interpreter lock for most of the work: more threads than cores still help a little.
_NUM_THREADS = 4
# Bounds the float32 copy of a thread to 16 MiB, and spreads a large embedding over the threads.
_VALUES_PER_PIECE = 4 << 20


def load_gguf(
    file: GGUFFile,
    config: ModelConfig,
    views: dict[str, torch.Tensor],
    progress: Callable[[float], None],
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> None:
    """Dequantises every tensor, or this rank's part of it, into the view of its name, which has the part's shape.

    Raises:
        ModelLoadError: names the file and the tensor that is missing, unknown, of the wrong shape or type.
    """
    pieces: list[_Piece] = []
    loaded: set[str] = set()
    for tensor in file.tensors.values():
        if tensor.name == ROPE_DIVISORS:  # part of the configuration
            continue
        name = weight_name(tensor.name)
        view, cut = views.get(name), shard.slice_of(name, config)
        if view is None and cut is not None and not cut.count:
            continue
        if view is None:
            raise ModelLoadError(f"{file.path}: tensor {tensor.name!r} has no place in this architecture")
        if tensor.shape != whole_shape(view, cut):
            raise ModelLoadError(
                f"{file.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, "
                f"the metadata asks for {list(whole_shape(view, cut))}"
            )
        if tensor.type_name not in SUPPORTED_TYPES:
            raise ModelLoadError(
                f"{file.path}: tensor {tensor.name!r} has type {tensor.type_name}; "
                f"supported: {', '.join(SUPPORTED_TYPES)}"
            )
        pieces += _split(tensor, _in_file_order(view, name, config), cut)
        loaded.add(name)
    check_complete(views, loaded, file.path)
    done, total = 0, sum(piece.num_bytes for piece in pieces) or 1
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for num_bytes in pool.map(lambda piece: _dequantise(file, piece), pieces):
            done += num_bytes
            progress(done / total)


def weight_name(gguf_name: str) -> str:
    """GGUF's name of a tensor → Hugging Face's; an unknown one is given back as it is."""
    if match := _LAYER.match(gguf_name):
        layer, name, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES.get(name, name)}.{kind}"
    name, _, kind = gguf_name.rpartition(".")
    return f"{_NAMES.get(name, name)}.{kind}"


def _in_file_order(view: torch.Tensor, name: str, config: ModelConfig) -> torch.Tensor:
    """The view as [units, rows of a unit …], iterated in the order in which the file stores its rows.

    For architecture `llama` the converter interleaves the two halves of each query and key head, because llama.cpp
    rotates neighbouring pairs: file row (head, i, half) is our row (head, half, i).
    """
    is_rotated = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
    if is_rotated and config.architecture == "LlamaForCausalLM":
        return view.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2)
    return view


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a tensor, and the part of the weight that they fill. `columns`: of each row only those."""

    tensor: GGUFTensor
    target: torch.Tensor
    first_byte: int
    num_bytes: int
    columns: slice


def _split(tensor: GGUFTensor, target: torch.Tensor, cut: Slice | None) -> list[_Piece]:
    """Whole units of the target's first dimension. Columns are cut from dequantised rows: blocks lie along them."""
    num_units, columns, first_unit, whole = len(target), slice(None), 0, len(target)
    if cut is not None and cut.dim == 1:
        columns = slice(cut.first, cut.first + cut.count)
    elif cut is not None:
        first_unit, whole = cut.first * num_units // cut.count, cut.whole * num_units // cut.count
    unit_bytes = tensor.num_bytes // whole
    step = max(1, _VALUES_PER_PIECE * whole // int(np.prod(tensor.shape, dtype=int)))
    return [
        _Piece(
            tensor,
            target[i : i + step],
            (first_unit + i) * unit_bytes,
            min(step, num_units - i) * unit_bytes,
            columns,
        )
        for i in range(0, num_units, step)
    ]


def _dequantise(file: GGUFFile, piece: _Piece) -> int:
    tensor, target = piece.tensor, piece.target
    raw = np.frombuffer(file.data(tensor), dtype=np.uint8, count=piece.num_bytes, offset=piece.first_byte)
    # A bias is stored as F32, so that any part of it is a row.
    rows = raw.reshape(1, -1) if len(tensor.shape) == 1 else raw.reshape(-1, tensor.num_bytes // tensor.shape[0])
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.type_id))[:, piece.columns]
    # A copy for types that are only viewed (F32): the file is mapped read-only, which torch warns about.
    values = values if values.flags.writeable else values.copy()
    target.copy_(torch.from_numpy(values).reshape(target.shape))
    return piece.num_bytes
