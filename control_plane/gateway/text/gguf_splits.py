"""`tokenizer.ggml.pre`: how a byte-level BPE vocabulary splits text before it merges.

The names are llama.cpp's (`src/llama-vocab.cpp`), which gives one to every tokenizer.json that its converter meets; the
steps are those of that tokenizer.json. Names of architectures that the engine does not have are left out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

logger = logging.getLogger(__name__)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_GPT2: tuple[str, ...] = ()  # the expression that ByteLevel has built in
_LLAMA3 = (_CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _REST,)
_QWEN2 = (_CONTRACTIONS + _WORD + r"|\p{N}" + _REST,)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SEED_CODER = (_CONTRACTIONS + _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")


@dataclass(frozen=True, slots=True)
class Split:
    """`expressions` split one after the other, each match apart; none: as GPT-2.

    `digits_first`: each digit apart before that. `whole_words`: a word that is a token is not merged together.
    `adds_bos`: where the file does not say whether a BOS goes before a text.
    """

    expressions: tuple[str, ...] = _GPT2
    digits_first: bool = False
    whole_words: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self) -> Any:
        """For a `tokenizers.Tokenizer`."""
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits_first else []
        steps += [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in self.expressions]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.expressions))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


DEFAULT = Split()
_LIKE_LLAMA3 = Split(_LLAMA3, whole_words=True, adds_bos=True)
_LIKE_SMOLLM = Split(digits_first=True)

SPLITS: dict[str, Split] = {
    "default": DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "jais", "mpt", "gigachat", "mellum", "trillion"), DEFAULT),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _LIKE_SMOLLM),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"), _LIKE_LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe", "glm4"), Split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan"), Split(_QWEN2)),
    "tekken": Split(_TEKKEN, whole_words=True, adds_bos=True),
    "deepseek-coder": Split(_DEEPSEEK_CODER),
    "seed-coder": Split(_SEED_CODER),
}
"""llama.cpp's name → the split."""


def find_split(pre: object, where: str) -> Split:
    """The split of that name. An unknown one, and none, is a warning: text is then split as GPT-2 does."""
    if isinstance(pre, str) and pre in SPLITS:
        return SPLITS[pre]
    what = "has no tokenizer.ggml.pre"
    if pre is not None:
        what = f"has tokenizer.ggml.pre {str(pre)[:100]!r}, which is unknown"
    logger.warning(
        "%s %s: text is split as GPT-2 does, and tokens may differ from those that the model was trained on; use the "
        "model's Hugging Face directory, or convert it again",
        where,
        what,
    )
    return DEFAULT
