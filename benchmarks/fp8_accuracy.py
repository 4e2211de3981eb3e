# ruff: noqa: E402
"""What fp8 costs in accuracy: KL divergence, perplexity, agreement of the likeliest token, against the unrounded model.

The text is this repository's own pages, read in windows; every token is predicted from those before it. A window is
computed in chunks, later ones attending to the cache as decodes do. Chunks of 64 take the products that round weights
alone, chunks of 512 those that round activations, too. The second model has the shape of Llama-3.1-8B, random weights
and random tokens: its perplexity says nothing, so only its logits are compared.

    python benchmarks/fp8_accuracy.py --output benchmarks/results/fp8-accuracy-h100.json
    python benchmarks/fp8_accuracy.py --device cpu --windows 4      (the plain twins: float32 activations)
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# This file's folder comes first on the path when it is run as a script, and holds an engine.py.
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks")]

import torch

from benchmarks.offline import SHAPES, device_name, model_path, write_result
from control_plane.gateway.text.tokenizer import load_tokenizer
from engine.attention.reference import ReferenceAttention
from engine.batch import ScheduledBatch, ScheduledSequence
from engine.forward_inputs import build_forward_inputs
from engine.kv_cache import PagedKVCache
from engine.layers.rotary import RotaryEmbedding
from engine.loader import LoadedModel, load_model
from engine.sequence import Sequence
from phasewise.core.kv_spec import FP8
from phasewise.core.model_source import ModelSource, resolve_model
from phasewise.core.request import SamplingParams

BLOCK = 16
HiddenOf = Callable[[ScheduledSequence], torch.Tensor]
"""Computes an item: [item.num_tokens, hidden_size] after the last layer."""

# name → (model.weights, cache.dtype)
KINDS = {"fp8 weights": ("fp8", "auto"), "fp8 KV": ("auto", FP8), "fp8 weights and KV": ("fp8", FP8)}


@dataclass
class Difference:
    """Sums over predicted tokens of what one kind of rounding changed."""

    num_tokens: int = 0
    kl: float = 0.0
    nll: float = 0.0
    reference_nll: float = 0.0
    num_agreed: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    worst_kl: float = field(default=0.0)

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """logits, reference: [num_tokens, vocab_size] float32; targets: [num_tokens], the tokens that follow."""
        if not torch.isfinite(logits).all():
            raise SystemExit("the logits are not finite")
        ours, exact = logits.log_softmax(-1), reference.log_softmax(-1)
        kl = (exact.exp() * (exact - ours)).sum(-1)
        self.num_tokens += len(targets)
        self.kl += kl.sum().item()
        self.worst_kl = max(self.worst_kl, kl.max().item())
        self.nll -= ours.gather(1, targets[:, None]).sum().item()
        self.reference_nll -= exact.gather(1, targets[:, None]).sum().item()
        self.num_agreed += int((ours.argmax(-1) == exact.argmax(-1)).sum())
        self.squared_error += (logits - reference).double().square().sum().item()
        self.squared_norm += reference.double().square().sum().item()

    def rows(self, case: str, *, has_text: bool) -> list[dict[str, Any]]:
        n = self.num_tokens
        figures = [
            ("mean KL divergence", "nat", self.kl / n, "low"),
            ("largest KL divergence", "nat", self.worst_kl, "low"),
            ("likeliest token is the same", "%", 100 * self.num_agreed / n, "high"),
            ("error of the logits", "%", 100 * math.sqrt(self.squared_error / self.squared_norm), "low"),
        ]
        if has_text:
            growth = math.exp((self.nll - self.reference_nll) / n) - 1
            figures.append(("perplexity", "", math.exp(self.nll / n), "low"))
            figures.append(("perplexity above the unrounded model's", "%", 100 * growth, "low"))
        none = dict.fromkeys(("floor", "peer", "must", "goal"))
        return [
            {"case": f"{case}: {name}", "unit": unit, "ours": float(f"{value:.4g}"), **none, "better": better}
            for name, unit, value, better in figures
        ]


def hidden_of(loaded: LoadedModel, cache_dtype: str, window: int) -> HiddenOf:
    """By the plain parts on a CPU, kernel by kernel on a GPU; over a cache for one sequence of `window` tokens."""
    cache = PagedKVCache(loaded.kv_cache_spec(BLOCK, cache_dtype), -(-window // BLOCK) + 1, loaded.model.device)
    model, config = loaded.model, loaded.config
    if cache.device.type == "cpu":
        backend = ReferenceAttention(cache, config.windows)
        rotary = RotaryEmbedding(config, window, model.dtype, model.device)

        def plain(item: ScheduledSequence) -> torch.Tensor:
            inputs = build_forward_inputs(ScheduledBatch((item,)), BLOCK, window, model.device)
            backend.plan(inputs)
            x = model.embed(inputs.input_ids)
            return model.run_layers(x, 0, config.num_layers, rotary, rotary.plan(inputs.positions), backend)

        return plain
    from engine.cuda.executor import StepExecutor  # needs Triton

    executor = StepExecutor(loaded, cache, window, 1, graphs=False)
    planner = executor.planner()

    def fast(item: ScheduledSequence) -> torch.Tensor:
        hidden = executor.execute(planner.plan([], [item], config.num_layers), None).hidden
        assert hidden is not None
        return hidden

    return fast


@torch.inference_mode()
def logits_of(hidden: HiddenOf, loaded: LoadedModel, tokens: list[int], chunk: int) -> torch.Tensor:
    """Teacher-forced logits.  # [len(tokens), vocab_size] float32"""
    sequence = Sequence("r", SamplingParams(), list(tokens), len(tokens))
    sequence.block_table = list(range(1, -(-len(tokens) // BLOCK) + 1))
    parts = []
    while sequence.num_computed_tokens < len(tokens):
        count = min(chunk, len(tokens) - sequence.num_computed_tokens)
        item = ScheduledSequence(sequence, count, 0)
        parts.append(loaded.model.logits(hidden(item)).float())
        sequence.num_computed_tokens += count
    return torch.cat(parts)


def compare(
    source: ModelSource, windows: list[list[int]], device: str, chunks: list[int], label: str, *, has_text: bool
) -> list[dict[str, Any]]:
    """Loads the model with and without fp8 weights; every kind in every chunk length against the unrounded model."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    loaded = {
        weights: load_model(source, dtype=dtype, device=device, seed=0, progress=lambda share: None, weights=weights)
        for weights in ("fp8", "auto")
    }
    length = max(map(len, windows))
    plain = hidden_of(loaded["auto"], "auto", length)
    kinds = {kind: hidden_of(loaded[weights], dtype, length) for kind, (weights, dtype) in KINDS.items()}
    found = {(kind, chunk): Difference() for kind in KINDS for chunk in chunks}
    # How far the unrounded model is from itself when it is cut differently: what is below that is noise.
    noise = {chunk: Difference() for chunk in chunks[1:]}
    for tokens in windows:
        targets = torch.tensor(tokens[1:], device=loaded["auto"].model.device)
        reference = logits_of(plain, loaded["auto"], tokens, chunks[0])[:-1]
        for chunk, difference in noise.items():
            difference.add(logits_of(plain, loaded["auto"], tokens, chunk)[:-1], reference, targets)
        for (kind, chunk), difference in found.items():
            logits = logits_of(kinds[kind], loaded[KINDS[kind][0]], tokens, chunk)[:-1]
            difference.add(logits, reference, targets)
    rows = []
    for chunk, difference in noise.items():
        rows += difference.rows(f"{label}, {dtype}, chunks of {chunk}", has_text=has_text)
    for (kind, chunk), difference in found.items():
        rows += difference.rows(f"{label}, {kind}, chunks of {chunk}", has_text=has_text)
    for row in rows:
        print(f"{row['case']:95} {row['ours']:12} {row['unit']}", flush=True)
    return rows


def text_windows(source: ModelSource, length: int, count: int) -> list[list[int]]:
    """The pages of this repository as token ids, cut into windows."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    tokenizer = load_tokenizer(source)
    ids = tokenizer.encode("\n\n".join(page.read_text(encoding="utf-8") for page in pages))
    windows = [list(ids[first : first + length]) for first in range(0, len(ids) - length + 1, length)]
    if len(windows) < count:
        raise SystemExit(f"the pages hold only {len(windows)} windows of {length} tokens: lower --windows or --length")
    return windows[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="as model.path; must have a tokenizer")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--no-8b", action="store_true", help="leave the random model of 8B parameters out")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    source = resolve_model(arguments.model)
    windows = text_windows(source, arguments.length, arguments.windows)
    rows = compare(source, windows, arguments.device, arguments.chunks, source.name, has_text=True)
    if arguments.device == "cuda" and not arguments.no_8b:
        rng = random.Random(0)
        noise = [[rng.randrange(SHAPES["8b"]["vocab_size"]) for _ in range(1024)] for _ in range(2)]
        with tempfile.TemporaryDirectory() as folder:
            random_source = resolve_model(model_path("8b", Path(folder)))
            rows += compare(random_source, noise, "cuda", arguments.chunks, "random 8B", has_text=False)
    if arguments.output:
        write_result(arguments.output, device_name(arguments.device), ("phasewise", "torch", "triton"), rows)


if __name__ == "__main__":
    main()
