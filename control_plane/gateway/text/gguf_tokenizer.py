"""Builds a `tokenizers.Tokenizer` from the metadata of a GGUF file.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer". The ids are those of the model's own
tokenizer.json. transformers gives the same for the same file, but for the splits of `tokenizer.ggml.pre` that it does
not know. Two kinds:

gpt2     byte-level BPE: tokens and merges; `tokenizer.ggml.pre` names the expression that splits text beforehand
llama    SentencePiece BPE: tokens with scores, from which the merges follow; bytes as `<0x0A>`
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from control_plane.gateway.text.gguf_splits import Split, find_split
from control_plane.gateway.text.vocabulary import EndTokens, byte_alphabet
from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_metadata import CONTROL, END_TEXTS, USER_DEFINED


def build_gguf_tokenizer(metadata: dict[str, Any], where: str) -> tuple[Tokenizer, EndTokens]:
    """The tokenizer, and the ids that go before and after a text.

    Raises:
        ModelLoadError: the metadata lack a part, or describe a kind of tokenizer that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelLoadError(
            f"{where} holds no tokenizer (tokenizer.ggml.tokens); convert it again with its vocabulary"
        )
    try:
        if kind == "gpt2":
            split = find_split(metadata.get("tokenizer.ggml.pre"), where)
            tokenizer, vocabulary = _byte_level(metadata, tokens, split, where)
            adds_bos = split.adds_bos
        elif kind == "llama":
            tokenizer, vocabulary = _sentencepiece(metadata, tokens, where)
            adds_bos = True
        else:
            raise ModelLoadError(
                f"{where}: tokenizer.ggml.model {kind!r} is not supported; supported are 'gpt2' and 'llama'"
            )
        _add_marked_tokens(tokenizer, metadata, tokens, vocabulary)
    except UnicodeEncodeError:
        raise ModelLoadError(f"{where}: tokenizer.ggml.tokens holds a token that is not UTF-8; damaged file") from None
    return tokenizer, _end_tokens(metadata, add_bos_by_default=adds_bos)


def gguf_special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """The variables of the chat template: bos_token, eos_token, unk_token, pad_token, where the file has them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], split: Split, where: str
) -> tuple[Tokenizer, dict[str, int]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelLoadError(f"{where} lacks tokenizer.ggml.merges; convert it again")
    spelling = byte_alphabet()
    alphabet = set(spelling.values())
    # Some files hold a token as plain text; spelled in bytes it is never mistaken for another one.
    vocabulary = {
        token if alphabet.issuperset(token) else "".join(spelling[byte] for byte in token.encode("utf-8")): index
        for index, token in enumerate(tokens)
    }
    options = {"fuse_unk": False, "ignore_merges": split.whole_words}
    tokenizer = Tokenizer(_bpe(vocabulary, _pairs(merges, where), where, **options))
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, vocabulary


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], where: str) -> tuple[Tokenizer, dict[str, int]]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = metadata.get("tokenizer.ggml.scores")
    if isinstance(merges := metadata.get("tokenizer.ggml.merges"), list):
        pairs = _pairs(merges, where)
    elif isinstance(scores, list) and len(scores) == len(tokens):
        pairs = merges_from_scores(vocabulary, dict(zip(tokens, scores, strict=True)))
    else:
        raise ModelLoadError(f"{where} lacks tokenizer.ggml.scores, one for each of {len(tokens)} tokens")
    tokenizer = Tokenizer(_bpe(vocabulary, pairs, where, fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)] if prefix else parts)
    return tokenizer, vocabulary


def merges_from_scores(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary stands for: every split of every token, the best score first.

    Of equal scores the longer left part goes first, then the longer right part, then the order of the vocabulary.
    """
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, score in scores.items():
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked.extend((score, len(left), len(right), left, right) for left, right in known)
    ranked.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in ranked]


def _pairs(merges: list[str], where: str) -> list[tuple[str, str]]:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    if any(not left or not right for left, right in pairs):
        raise ModelLoadError(f"{where}: tokenizer.ggml.merges must hold pairs such as 'Ġ t'; the file is damaged")
    return pairs


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], where: str, **options: bool) -> BPE:
    for left, right in merges:  # the library panics at some of these
        if left + right not in vocabulary:
            raise ModelLoadError(
                f"{where}: tokens and merges do not fit together ({left!r} and {right!r} make no token); convert it "
                "again"
            )
    try:
        return BPE(vocab=vocabulary, merges=merges, **options)
    except UnicodeEncodeError:
        raise
    except Exception as error:  # the library raises the bare class
        reason = " ".join(str(error).split())
        raise ModelLoadError(f"{where}: tokens and merges do not fit together ({reason}); convert it again") from None


def _add_marked_tokens(
    tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], vocabulary: dict[str, int]
) -> None:
    """Control tokens become special, user-defined ones plain added tokens: both are matched whole in a text.

    Tokens that end a turn are control tokens, whatever some files say. A marked token that was spelled anew is left
    out: adding it would give it a second id.
    """
    types = metadata.get("tokenizer.ggml.token_type") or []
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=False) if token in vocabulary]
    control = [token for token, kind in marked if kind == CONTROL or (kind == USER_DEFINED and token in END_TEXTS)]
    defined = [token for token, kind in marked if kind == USER_DEFINED and token not in END_TEXTS]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])


def _end_tokens(metadata: dict[str, Any], *, add_bos_by_default: bool) -> EndTokens:
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", add_bos_by_default)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    return EndTokens((bos,) if add_bos and bos is not None else (), (eos,) if add_eos and eos is not None else ())
