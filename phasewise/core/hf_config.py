"""A Hugging Face `config.json`, read as transformers reads it: keys that are absent have the class's default.

This is the only reader of such a file. The engine makes its ModelConfig from it; the gateway takes what it needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phasewise.core.errors import ModelLoadError

_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "MistralForCausalLM": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Qwen2ForCausalLM": {**_QWEN, "head_dim": None},
    "Qwen3ForCausalLM": {**_QWEN, "head_dim": 128, "attention_bias": False},
}
"""Of transformers' LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config: a test compares them."""

_NULLABLE = {"num_key_value_heads", "sliding_window", "layer_types", "head_dim", "bos_token_id", "eos_token_id"}
_NOT_NULLABLE = {
    ("MistralForCausalLM", "num_key_value_heads"),
    ("Qwen2ForCausalLM", "head_dim"),
    ("Qwen3ForCausalLM", "head_dim"),
}

SUPPORTED_ARCHITECTURES = tuple(DEFAULTS)
_BY_MODEL_TYPE = dict(zip(("llama", "mistral", "qwen2", "qwen3"), SUPPORTED_ARCHITECTURES, strict=True))


class HFConfig:
    """The values of one file. Every refusal is a ModelLoadError that names the file, the key and what would be right.

    Raises:
        ModelLoadError: the file cannot be read, or is of an architecture that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_json(path)
        self.architecture = self._architecture()
        self._defaults = DEFAULTS[self.architecture]

    def error(self, text: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {text}")

    def get(self, key: str) -> Any:
        """The value, or the class's default where the key is absent. `null` does not count as absent.

        Raises KeyError for a key that the architecture does not have, which is a bug of ours.
        """
        if key not in self._defaults:
            raise KeyError(f"{self.architecture} has no {key!r}")
        value = self.values.get(key, self._defaults[key])
        may_be_null = key in _NULLABLE and (self.architecture, key) not in _NOT_NULLABLE
        if value is None and key in self.values and not may_be_null:
            raise self.error(f"{key!r} must not be null; remove the key to have the default")
        return value

    def has(self, key: str) -> bool:
        """Whether configurations of this architecture have the key; other keys have no meaning."""
        return key in self._defaults

    def whole(self, key: str) -> int:
        """A positive whole number."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(f"{key!r} must be a positive whole number, not {value!r}")
        return value

    def optional_whole(self, key: str) -> int | None:
        """A positive whole number, or None for `null`."""
        return None if self.get(key) is None else self.whole(key)

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(f"{key!r} must be a number, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where the architecture has no such key."""
        value = self.get(key) if self.has(key) else False
        if not isinstance(value, bool):
            raise self.error(f"{key!r} must be true or false, not {value!r}")
        return value

    def token_ids(self, key: str) -> list[int]:
        """One id, several, or none."""
        return token_ids(self.get(key))

    def _architecture(self) -> str:
        """From `architectures`, or if that names none from `model_type`, the only one that transformers reads."""
        names = self.values.get("architectures") or [None]
        named = names[0] if isinstance(names, list) else names
        by_type = _BY_MODEL_TYPE.get(str(self.values.get("model_type")))
        if named is None and by_type is not None:
            return by_type
        # Saved without its head, a model is a LlamaModel.
        architecture = str(named).removesuffix("Model") + "ForCausalLM" if str(named).endswith("Model") else str(named)
        if architecture not in DEFAULTS:
            supported = ", ".join(SUPPORTED_ARCHITECTURES)
            raise self.error(f"architecture {named!r} is not supported; supported: {supported}")
        if by_type not in (None, architecture):
            raise self.error(
                f"'architectures' says {named} and 'model_type' says {self.values['model_type']!r}; make them agree"
            )
        return architecture


def token_ids(value: Any) -> list[int]:
    """The ids in a value of `eos_token_id` and the like: a number, a list of them, or null."""
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int) and not isinstance(token, bool)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError that names the file and the place of the fault."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelLoadError(f"{path} is not UTF-8 text; copy it again") from None
    except json.JSONDecodeError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}; copy it again") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, lists a thousand deep
        raise ModelLoadError(f"{path} holds a value beyond all bounds; copy it again") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}
