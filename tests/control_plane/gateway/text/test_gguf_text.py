"""GGUF files say how text is split and which tokens end a turn: llama.cpp's names, the models' own tokenizers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from control_plane.gateway.text.gguf_splits import SPLITS
from control_plane.gateway.text.tokenizer import TextTokenizer, load_tokenizer
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.gguf_metadata import end_token_ids
from phasewise.core.model_source import ModelSource, model_facts, resolve_model

# Of tokenizer.json: SmolLM2, Llama-3, Qwen2.5, Mistral-Nemo, deepseek-coder, by the name that llama.cpp gives each.
BY_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BY_NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES: dict[str, list[str]] = {
    "gpt-2": ["It", "'s", " 1234", " ", " 5", "\n", "\n", "x"],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", "  ", "5", "\n", "\n", "x"],
    "llama-bpe": ["It", "'s", " ", "123", "4", " ", " ", "5", "\n\n", "x"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", " ", " ", "5", "\n\n", "x"],
    "tekken": ["It", "'s", " ", "1", "2", "3", "4", " ", " ", "5", "\n\n", "x"],
    "deepseek-coder": ["It", "'", "s", " ", "1", "2", "3", "4", "  ", "5", "\n", "\n", "x"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_split_as_the_name_says(pre: str) -> None:
    pieces = SPLITS[pre].pre_tokenizer().pre_tokenize_str("It's 1234  5\n\nx")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces] == PIECES[pre]


@pytest.mark.parametrize(("pre", "expression"), [("llama-bpe", BY_LLAMA3), ("tekken", BY_NEMO)])
def test_expressions_split_as_those_of_the_models(pre: str, expression: str) -> None:
    own = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for start in range(0, 0x600, 16):
        text = " ".join(f"{c}a{c}B 1{c} {c}{c}\n" for c in map(chr, range(start, start + 16)))
        assert SPLITS[pre].pre_tokenizer().pre_tokenize_str(text) == own.pre_tokenize_str(text), hex(start)


def test_every_split_keeps_all_of_a_text() -> None:
    text = "naïve 日本 ½ 12345\r\n\tdon't STOP <a> ñ\u0301 👩‍🚀  end  "
    for name, split in SPLITS.items():
        spelled = "".join(piece for piece, _ in split.pre_tokenizer().pre_tokenize_str(text))
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert spelled == "".join(piece for piece, _ in whole), name


def test_digits_of_the_built_in_model_are_split_one_by_one(smollm2_tokenizer: TextTokenizer) -> None:
    assert smollm2_tokenizer.encode("a  5") == [81, 256, 37]


def write(path: Path, **more: Any) -> ModelSource:
    """A file with a vocabulary of letters, their one merge and marked tokens; `more` are further entries."""
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "abb", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 3, 4, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    for key, value in entries.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve_model(str(path))


@pytest.mark.parametrize(
    ("pre", "words"), [("superbpe", "pre 'superbpe', which is unknown"), (None, "has no tokenizer")]
)
def test_an_unknown_split_is_a_warning(
    pre: str | None, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "model.gguf", pre=pre)
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(source).encode("ab") == [2]
    assert [words in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    load_tokenizer(write(tmp_path / "known.gguf", pre="qwen2"))
    assert not caplog.records


def test_words_that_are_tokens_stay_whole_where_the_model_has_it_so(tmp_path: Path) -> None:
    """Llama-3's tokenizer.json has `ignore_merges`: "abb" is a token that no merge leads to."""
    own = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "abb": 3}, [("a", "b")], ignore_merges=True))
    llama = load_tokenizer(write(tmp_path / "llama.gguf", pre="llama-bpe", add_bos_token=False))
    assert llama.encode("abb") == own.encode("abb").ids == [3]
    assert load_tokenizer(write(tmp_path / "qwen.gguf", pre="qwen2")).encode("abb") == [2, 1]


def test_a_bos_goes_before_a_text_where_the_model_has_it_so(tmp_path: Path) -> None:
    assert load_tokenizer(write(tmp_path / "llama.gguf", pre="llama-bpe", bos_token_id=7)).encode("ab") == [7, 2]
    assert load_tokenizer(write(tmp_path / "qwen.gguf", pre="qwen2", bos_token_id=7)).encode("ab") == [2]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (4, 5)),
        ({"eos_token_id": 7}, (7, 4, 5)),
        ({"eos_token_id": 4}, (4, 5)),
        ({"eos_token_id": 7, "eot_token_id": 2, "eom_token_id": 3}, (7, 2, 3, 4, 5)),
        ({"eos_token_id": 900}, (4, 5)),
        ({"token_type": None}, (4, 5, 6)),
    ],
)
def test_end_tokens_are_found_by_key_and_by_text(
    keys: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    source = write(tmp_path / "model.gguf", **keys)
    assert model_facts(source).eos_token_ids == expected
    tokenizer = load_tokenizer(source)
    assert tokenizer.eos_token_ids == expected
    if "token_type" not in keys:
        assert tokenizer.special_ids == {4, 5, 7}, "what ends a turn is no part of its text"


def test_the_built_in_model_ends_its_turn_whatever_its_file_names(smollm2: ModelSource) -> None:
    with GGUFFile(smollm2.path) as file:
        metadata = {**file.metadata, "tokenizer.ggml.eos_token_id": 0}
    assert metadata["tokenizer.ggml.tokens"][2] == "<|im_end|>"
    assert end_token_ids(metadata) == (0, 2)
