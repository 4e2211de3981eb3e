"""The built-in model against transformers on the same GGUF file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.loader import load_model
from phasewise.core.model_source import resolve_model

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "List three prime numbers.",
    "Translate 'good morning' to Spanish.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23?",
    "Summarise: " + "The quick brown fox jumps over the lazy dog. " * 12,
    "Continue the story: " + "Once upon a time there was a small village by the river. " * 20,
    "Repeat after me: " + "alpha beta gamma delta " * 40,
    "Hi",
]
TEXTS = [
    "The",
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "The largest planet in the solar system is",
    "In 1969, humans first",
    "Water boils at " * 30,
    "1, 2, 3, 4, 5, 6, 7,",
    "Roses are red, violets are",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_smollm2_logits_and_greedy_tokens(kit: Any) -> None:
    path: Path = resolve_model("smollm2-135m").path
    options = {"gguf_file": path.name}
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).eval()
    oracle.generation_config.eos_token_id = None
    in_float64 = copy.deepcopy(oracle).double()
    source = resolve_model("smollm2-135m")
    loaded = load_model(source, dtype="float32", device="cpu", seed=0, progress=lambda _: None)
    engine = kit.Engine(loaded, num_blocks=400, block_size=16, max_len=2048)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in QUESTIONS
    ] + [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len(prompts) == 20 and len({len(prompt) for prompt in prompts}) > 12
    expected = []
    for prompt in prompts:
        # In float32 the oracle's own logits are off by up to 1.4e-4 on some CPUs, by the order of their sums.
        with torch.inference_mode():
            logits = in_float64(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(engine.logits(prompt).double(), logits, atol=1e-4, rtol=0)
        expected.append(kit.oracle_tokens(oracle, prompt, 64))
    sequences = [engine.sequence(prompt) for prompt in prompts]
    for sequence in sequences:
        engine.prefill(sequence, chunk=100)
    engine.decode(sequences, 64)
    for sequence, tokens in zip(sequences, expected, strict=True):
        assert sequence.token_ids[sequence.num_prompt_tokens :] == tokens
        engine.release(sequence)
    engine.close()
