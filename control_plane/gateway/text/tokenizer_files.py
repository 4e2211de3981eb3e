"""Finds and reads what a model says about text: tokenizer, special tokens, chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from control_plane.gateway.text.chat_template import select_template
from control_plane.gateway.text.gguf_tokenizer import build_gguf_tokenizer, gguf_special_tokens
from control_plane.gateway.text.vocabulary import (
    ByteVocabulary,
    IdVocabulary,
    TokenizersVocabulary,
    Vocabulary,
)
from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.hf_config import optional_json, read_json
from phasewise.core.model_source import ModelSource

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TextFiles:
    """What was read: `chat_template` is jinja source or None, `special_tokens` are its variables."""

    vocabulary: Vocabulary
    chat_template: str | None
    special_tokens: dict[str, str]


def read_text_files(source: ModelSource, vocab_size: int) -> TextFiles:
    """Reads the tokenizer of a model whose logits have `vocab_size` rows.

    A random model uses the tokenizer.json beside its config.json; without one it takes bytes as ids, and with fewer
    than 256 ids no text at all.

    Raises:
        ModelLoadError: a file is missing or damaged, or of a kind that is not supported.
    """
    if source.kind == "gguf":
        return _read_gguf(source.path)
    if source.kind == "hf":
        return _read_directory(source.path)
    # A configuration of another name is a bare shape: what lies beside it need not belong to it.
    if source.path.name == "config.json" and (source.path.parent / "tokenizer.json").is_file():
        files = _read_directory(source.path.parent)
        if isinstance(files.vocabulary, TokenizersVocabulary) and files.vocabulary.num_ids > vocab_size:
            raise ModelLoadError(
                f"{source.path.parent / 'tokenizer.json'} has {files.vocabulary.num_ids} ids, but {source.path} has "
                f"vocab_size {vocab_size}; raise vocab_size or remove tokenizer.json"
            )
        return files
    vocabulary: Vocabulary = ByteVocabulary() if vocab_size >= 256 else IdVocabulary(vocab_size)
    return TextFiles(vocabulary, None, {})


def _read_gguf(path: Path) -> TextFiles:
    with GGUFFile(path) as file:
        metadata = file.metadata
    tokenizer, ends = build_gguf_tokenizer(metadata, str(path))
    vocabulary = TokenizersVocabulary(tokenizer, ends=ends, where=str(path))
    template = select_template(metadata.get("tokenizer.chat_template"), where=str(path))
    return TextFiles(vocabulary, template, gguf_special_tokens(metadata))


def _read_directory(directory: Path) -> TextFiles:
    file = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises the bare class
        reason = " ".join(str(error).split())
        raise ModelLoadError(f"cannot read {file}: {reason}; save it again with save_pretrained") from None
    config = optional_json(directory / "tokenizer_config.json")
    special_tokens = _special_tokens(config, optional_json(directory / "special_tokens_map.json"))
    _add_missing_tokens(tokenizer, config, special_tokens)
    # As in transformers, `add_bos_token` in tokenizer_config.json counts for nothing beside a tokenizer.json.
    vocabulary = TokenizersVocabulary(tokenizer, ends=None, where=str(file))
    return TextFiles(vocabulary, _directory_template(directory, config), special_tokens)


def _token_text(entry: object) -> str | None:
    """A token in these files is a string, or an object with its text in "content"."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _special_tokens(config: dict[str, Any], older: dict[str, Any]) -> dict[str, str]:
    found = {name: _token_text(config[name] if name in config else older.get(name)) for name in _SPECIAL_NAMES}
    return {name: text for name, text in found.items() if text is not None}


def _add_missing_tokens(tokenizer: Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Tokens that tokenizer_config.json knows and tokenizer.json does not mark as added, in the order of their ids."""
    marked = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    tokens = [
        AddedToken(
            entry["content"],
            special=bool(entry.get("special", False)) or entry["content"] in special_tokens.values(),
            lstrip=bool(entry.get("lstrip", False)),
            rstrip=bool(entry.get("rstrip", False)),
            single_word=bool(entry.get("single_word", False)),
            normalized=bool(entry.get("normalized", True)),
        )
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0]))
        if entry["content"] not in marked
    ]
    marked.update(token.content for token in tokens)
    tokens += [AddedToken(text, special=True) for text in dict.fromkeys(special_tokens.values()) if text not in marked]
    tokenizer.add_tokens(tokens)


def _directory_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, then chat_template.json, then chat_template in tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"cannot read {file}: {error}") from None
    beside = directory / "chat_template.json"
    if beside.is_file():
        return select_template(read_json(beside).get("chat_template"), where=str(beside))
    return select_template(config.get("chat_template"), where=str(directory / "tokenizer_config.json"))
