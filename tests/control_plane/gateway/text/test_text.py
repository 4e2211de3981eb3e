"""Token ids and text against transformers, tokenizers and sentencepiece, on the same files."""

from __future__ import annotations

import difflib
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from control_plane.gateway.text.tokenizer import TextTokenizer, load_tokenizer
from phasewise.core.errors import InvalidRequest, ModelLoadError
from phasewise.core.model_source import ModelSource, resolve_model

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "\n\n\tTabs and\r\nlines\n",
    "The year 2024, pi = 3.14159, 1,000,000 and 0x1F.",
    "a  1   22    333",
    "naïve café — “quoted” … ½ × ²",
    "日本語のテキスト 中文 한국어 العربية हिन्दी",
    "👩‍🚀 emoji 🇩🇪 ☕️ a\u0301 \u200b zero\u00a0width",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # comment\n",
    "I'll don't we've THEY'RE it's",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<s>[INST] x </s>",
    "\x00\x01\x7f\ufeff",
    "x" * 300,
    "ſpecial CASE ǅ K",
]
CORPUS = [inspect.getsource(difflib), *TEXTS * 3]


def auto_tokenizer(directory: Path, **options: Any) -> Any:
    """transformers' tokenizer for the same files; its own warnings are not our matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(directory), **options)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_are_those_of_transformers(
    text: str, smollm2_tokenizer: TextTokenizer, smollm2_oracle: Any
) -> None:
    ids = smollm2_tokenizer.encode(text)
    assert ids == smollm2_oracle(text)["input_ids"]
    assert ids == smollm2_tokenizer.encode(text, add_special=False)
    assert smollm2_tokenizer.decode(ids) == smollm2_oracle.decode(ids, skip_special_tokens=True)


def test_smollm2_every_token_has_the_bytes_that_transformers_prints(
    smollm2_tokenizer: TextTokenizer, smollm2_oracle: Any
) -> None:
    backend = smollm2_oracle.backend_tokenizer
    ids = range(smollm2_tokenizer.vocab_size)
    assert [smollm2_tokenizer.token_text(i) for i in ids] == [
        backend.decode([i], skip_special_tokens=False) for i in ids
    ]
    assert smollm2_tokenizer.special_ids == frozenset(range(17))
    assert smollm2_tokenizer.eos_token_ids == (2, 0), "the one that the file names, and <|endoftext|>"


def test_smollm2_ids_agree_on_every_basic_character(smollm2_tokenizer: TextTokenizer, smollm2_oracle: Any) -> None:
    for start in range(0, 0x10000, 64):
        text = " ".join(
            f"{c}a {c}1  {c}{c}" for c in map(chr, range(start, start + 64)) if not "\ud800" <= c <= "\udfff"
        )
        ids = smollm2_tokenizer.encode(text)
        assert ids == smollm2_oracle.backend_tokenizer.encode(text).ids, hex(start)
        if start:  # the model's vocabulary lacks six control characters
            assert smollm2_tokenizer.decode(ids) == text


# ---- GGUF files written here

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def train_byte_level(split: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def write_gguf(path: Path, num_tokens: int, fill: Callable[[gguf.GGUFWriter], None]) -> ModelSource:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(num_tokens)
    fill(writer)
    writer.add_tensor("token_embd.weight", np.zeros((num_tokens, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve_model(str(path))


def write_byte_level(path: Path, tokenizer: Tokenizer, pre: str, *, add_bos: bool = False) -> ModelSource:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(
            [3 if t in ("<s>", "</s>", "<|endoftext|>") else 4 if t == "<think>" else 1 for t in tokens]
        )
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(add_bos)

    return write_gguf(path, len(tokens), fill)


@pytest.mark.parametrize(
    ("pre", "split", "add_bos"),
    [("llama-bpe", LLAMA3, True), ("qwen2", QWEN2, False), ("default", None, False), ("gpt-2", None, True)],
)
def test_byte_level_gguf_is_its_source_and_transformers(
    pre: str, split: str | None, add_bos: bool, tmp_path: Path
) -> None:
    source_tokenizer = train_byte_level(split)
    source = write_byte_level(tmp_path / "model.gguf", source_tokenizer, pre, add_bos=add_bos)
    ours = load_tokenizer(source)
    oracle = auto_tokenizer(tmp_path, gguf_file="model.gguf")
    for text in [*TEXTS, "a<think>b", "<s>x</s>"]:
        ids = ours.encode(text, add_special=False)
        assert ids == source_tokenizer.encode(text, add_special_tokens=False).ids, text
        assert ours.encode(text) == oracle(text)["input_ids"], text
        assert ours.encode(text) == ([0] if add_bos else []) + ids
        assert ours.decode(ids) == source_tokenizer.decode(ids), text
    assert ours.eos_token_ids == (1, 2), "</s>, which the file names, and <|endoftext|>"
    assert ours.special_ids == frozenset({0, 1, 2})


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "corpus.txt").write_text("\n".join(CORPUS).replace("\0", ""), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "spm"),
        vocab_size=1000,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "spm.model"))


def write_sentencepiece(path: Path, spm: sentencepiece.SentencePieceProcessor) -> ModelSource:
    ids = range(spm.get_piece_size())

    def kind(i: int) -> int:
        return 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([spm.id_to_piece(i) for i in ids])
        writer.add_token_scores([spm.get_score(i) for i in ids])
        writer.add_token_types([kind(i) for i in ids])
        writer.add_bos_token_id(spm.bos_id())
        writer.add_eos_token_id(spm.eos_id())
        writer.add_unk_token_id(spm.unk_id())

    return write_gguf(path, len(ids), fill)


def test_sentencepiece_gguf_is_transformers_and_sentencepiece(
    sentencepiece_model: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    ours = load_tokenizer(write_sentencepiece(tmp_path / "model.gguf", sentencepiece_model))
    oracle = auto_tokenizer(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == oracle(text)["input_ids"], text
        assert ids[0] == sentencepiece_model.bos_id()
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True), text
        # Two things transformers has otherwise: special tokens in a text, and no second space before a leading one.
        if not text.startswith((" ", "\0")) and "<" not in text:
            assert ids[1:] == sentencepiece_model.encode(text), text
            assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", "'bert' is not supported; supported are"),
        ("gpt2", r"fit together \('a' and 'b' make no token\)"),
    ],
)
def test_unsupported_and_damaged_gguf_tokenizers_are_named(kind: str, words: str, tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b"])
        writer.add_token_merges(["a b"])

    source = write_gguf(tmp_path / "model.gguf", 2, fill)
    with pytest.raises(ModelLoadError, match=words):
        load_tokenizer(source)


# ---- Hugging Face directories and random models


def save_directory(directory: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> ModelSource:
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "max_position_embeddings": 128,
                "vocab_size": 1600,
                "eos_token_id": [1, 7],
            }
        )
    )
    (directory / "model.safetensors").write_bytes(b"")
    return resolve_model(str(directory))


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_directory_is_what_transformers_makes_of_it(add_bos: bool | None, tmp_path: Path) -> None:
    tokenizer = train_byte_level(LLAMA3)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "added_tokens_decoder": {"1501": {"content": "<|late|>", "special": True, "normalized": False}},
    }
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    ours = load_tokenizer(save_directory(tmp_path, tokenizer, config))
    oracle = auto_tokenizer(tmp_path)
    for text in [*TEXTS, "a<|late|>b<think>"]:
        ids = ours.encode(text)
        assert ids == oracle(text)["input_ids"], text
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.eos_token_ids == (1, 7)
    assert ours.token_bytes(1599) == b"", "an id beyond the tokenizer's has no text"


def test_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    source = save_directory(tmp_path, train_byte_level(None), {})
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        load_tokenizer(source)


def test_decoders_without_bytes_are_refused(tmp_path: Path) -> None:
    tokenizer = train_byte_level(None)
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelLoadError, match="WordPiece"):
        load_tokenizer(save_directory(tmp_path, tokenizer, {}))


def random_model(directory: Path, vocab_size: int, name: str = "config.json") -> ModelSource:
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, "vocab_size": vocab_size}
    (directory / name).write_text(json.dumps(config))
    return resolve_model(f"random:{directory / name}")


def test_random_model_takes_bytes(tmp_path: Path) -> None:
    ours = load_tokenizer(random_model(tmp_path, 300))
    assert ours.encode("aß") == [97, 195, 159]
    assert ours.decode([97, 195, 159, 256, 299]) == "aß<256><299>"
    assert ours.decode([195, 97]) == "\ufffda"
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        ours.encode_chat([{"role": "user", "content": "x"}])
    assert caught.value.field == "messages"


def test_random_model_below_256_ids_takes_ids_only(tmp_path: Path) -> None:
    ours = load_tokenizer(random_model(tmp_path, 255))
    with pytest.raises(InvalidRequest, match="list of token ids"):
        ours.encode("a")
    assert ours.decode([1, 97]) == "<1><97>"


def test_random_model_uses_the_tokenizer_beside_it(tmp_path: Path) -> None:
    tokenizer = train_byte_level(None)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(random_model(tmp_path, 2000)).encode("Hello") == tokenizer.encode("Hello").ids
    with pytest.raises(ModelLoadError, match="vocab_size 100"):
        load_tokenizer(random_model(tmp_path, 100))
    assert load_tokenizer(random_model(tmp_path, 256, "shape.json")).encode("A") == [65]


def test_lone_surrogates_are_refused(smollm2_tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        smollm2_tokenizer.encode("a\ud800b")
