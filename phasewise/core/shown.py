"""What a message or a log line shows of a value that somebody else sent: one line, at most 100 characters of it."""

from __future__ import annotations

import math

MAX_SHOWN = 100
"""Characters."""

_MAX_SHOWN_BITS = 256  # beyond, a whole number is described: Python refuses to write one of over 4300 digits


def shown(value: object) -> str:
    """`value` as Python writes it; of a long text its beginning, of a container only what it is."""
    if isinstance(value, str):
        text = repr(value[:MAX_SHOWN])
        return text if len(text) <= MAX_SHOWN and len(value) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
    if isinstance(value, int) and value.bit_length() > _MAX_SHOWN_BITS:
        return f"a number of some {math.ceil(value.bit_length() * math.log10(2))} digits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__}"


def clipped(text: str) -> str:
    """`text` without quotes: a field's name, or a sentence that quotes its input. On one line."""
    text = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
