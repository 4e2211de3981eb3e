"""What a model's own `generation_config.json` says about sampling, for requests that say nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phasewise.core.errors import ModelLoadError

_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Key of the file → our field. Those that vLLM takes; `do_sample` is none of them."""
_WHOLE = ("top_k", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values of requests that give none. None: the API's own default. `source` is the file, for error messages."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    source: str = ""

    def given(self) -> dict[str, float]:
        """What the file says, by our fields' names."""
        return {name: value for name, value in asdict(self).items() if name != "source" and value is not None}

    def key_of(self, field: str) -> str:
        """The file's key of one of our fields."""
        return next(key for key, name in _KEYS.items() if name == field)


NO_SAMPLING_DEFAULTS = SamplingDefaults()


def read_sampling_defaults(values: dict[str, Any], path: Path) -> SamplingDefaults:
    """From the values of a generation_config.json. `null` is the same as an absent key.

    Raises:
        ModelLoadError: a value is no number. Ranges are those of requests, which the gateway knows.
    """
    found: dict[str, Any] = {}
    for key, name in _KEYS.items():
        value = values.get(key)
        if value is None:
            continue
        kind: Any = int if key in _WHOLE else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or (key == "max_new_tokens" and value < 1):
            wanted = {"top_k": "a whole number", "max_new_tokens": "a positive whole number"}.get(key, "a number")
            raise ModelLoadError(
                f"{path}: {key!r} must be {wanted}, not {str(value)[:100]!r}; correct it or set "
                "model.generation_config to none"
            )
        found[name] = value
    return SamplingDefaults(**found, source=str(path)) if found else NO_SAMPLING_DEFAULTS
