"""Small tokenizers of the kinds that models have, trained in a moment, all with the same added tokens."""

from __future__ import annotations

import difflib
import inspect
import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from control_plane.gateway.text.slices import LLAMA3_SPLIT, QWEN2_SPLIT

CORPUS = [inspect.getsource(difflib), "naïve café “quoted” 中文 日本語 한국어 " * 20, "user assistant system " * 5]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]"]
WORDS = ["<think>", "</think>", "<|fim|>"]
"""Added, but not marked as special; the last one is spelled as if it were."""
BYTE_KINDS = ("gpt2", "digits", "llama3", "qwen2")
KINDS = (*BYTE_KINDS, "metaspace", "llama2", "gemma")


def make_tokenizer(kind: str, *, strips: bool = False) -> Tokenizer:
    """`strips`: special tokens eat the white space to their right."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True, rstrip=strips) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in WORDS])
    return tokenizer


@cache
def _trained(kind: str) -> str:
    is_bytes = kind in BYTE_KINDS
    tokenizer = Tokenizer(models.BPE())
    if is_bytes:
        tokenizer.pre_tokenizer = _bytes_pre_tokenizer(kind)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_bytes else []
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str((tokenizer if is_bytes else _with_bytes(tokenizer, kind)).to_str())


def _bytes_pre_tokenizer(kind: str) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "digits"))
    if kind == "gpt2":
        return level
    split = pre_tokenizers.Digits(individual_digits=True)
    if kind != "digits":
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT if kind == "llama3" else QWEN2_SPLIT), "isolated")
    return pre_tokenizers.Sequence([split, level])


def _with_bytes(tokenizer: Tokenizer, kind: str) -> Tokenizer:
    """As a SentencePiece model: a token for every byte, spaces as `▁` in one of the three ways."""
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    state["model"]["byte_fallback"] = True
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if kind == "metaspace":
        state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    elif kind == "llama2":
        steps = [{"type": "Prepend", "prepend": "▁"}, replace]
        state["normalizer"], state["pre_tokenizer"] = {"type": "Sequence", "normalizers": steps}, None
    else:
        state["normalizer"], state["pre_tokenizer"] = replace, None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
