"""Fills a model's weights from a GGUF file: dequantises, renames, and restores llama's order of query and key rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import torch

from engine.gguf_config import ROPE_DIVISORS
from engine.model_config import ModelConfig
from engine.weights import check_complete
from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_file import GGUFFile, GGUFTensor

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

# Numpy gives the interpreter up for most of the work: more threads than cores still help a little.
_NUM_THREADS = 4
# Bounds the float32 copy of a thread to 16 MiB, and spreads a large embedding over the threads.
_VALUES_PER_PIECE = 4 << 20


def load_gguf(
    file: GGUFFile, config: ModelConfig, views: dict[str, torch.Tensor], progress: Callable[[float], None]
) -> None:
    """Dequantises every tensor into the view of its name.

    Raises:
        ModelLoadError: names the file and the tensor that is missing, unknown, of the wrong shape or type.
    """
    total = sum(tensor.num_bytes for tensor in file.tensors.values())
    pieces: list[tuple[GGUFTensor, torch.Tensor, int, int]] = []
    loaded: set[str] = set()
    for tensor in file.tensors.values():
        if tensor.name == ROPE_DIVISORS:  # part of the configuration
            continue
        name = weight_name(tensor.name)
        view = views.get(name)
        if view is None:
            raise ModelLoadError(f"{file.path}: tensor {tensor.name!r} has no place in this architecture")
        if tensor.shape != tuple(view.shape):
            raise ModelLoadError(
                f"{file.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, "
                f"the metadata asks for {list(view.shape)}"
            )
        if tensor.type_name not in SUPPORTED_TYPES:
            raise ModelLoadError(
                f"{file.path}: tensor {tensor.name!r} has type {tensor.type_name}; "
                f"supported: {', '.join(SUPPORTED_TYPES)}"
            )
        pieces += _split(tensor, _in_file_order(view, name, config))
        loaded.add(name)
    check_complete(views, loaded, file.path)
    done = 0
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for num_bytes in pool.map(lambda piece: _dequantise(file, *piece), pieces):
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


def _split(tensor: GGUFTensor, target: torch.Tensor) -> list[tuple[GGUFTensor, torch.Tensor, int, int]]:
    """(tensor, part of the target, first byte, number of bytes): whole units of the target's first dimension."""
    if target.dim() == 1:
        return [(tensor, target, 0, tensor.num_bytes)]
    num_units = target.shape[0]
    step = max(1, _VALUES_PER_PIECE // target[0].numel())
    unit_bytes = tensor.num_bytes // num_units
    return [
        (tensor, target[i : i + step], i * unit_bytes, min(step, num_units - i) * unit_bytes)
        for i in range(0, num_units, step)
    ]


def _dequantise(file: GGUFFile, tensor: GGUFTensor, target: torch.Tensor, first_byte: int, num_bytes: int) -> int:
    raw = np.frombuffer(file.data(tensor), dtype=np.uint8, count=num_bytes, offset=first_byte)
    rows = raw.reshape(-1, tensor.num_bytes // (np.prod(tensor.shape[:-1], dtype=int)))
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.type_id))
    # A copy for types that are only viewed (F32): the file is mapped read-only, which torch warns about.
    values = values if values.flags.writeable else values.copy()
    target.copy_(torch.from_numpy(values).reshape(target.shape))
    return num_bytes
