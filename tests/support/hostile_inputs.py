"""Strategies for what no well-meaning client sends: JSON of any shape, valid bodies with faults, broken protobufs.

JSON is text here, because much of it (numbers of thousands of digits, names that come twice, deep nesting) is nothing
that `json.dumps` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

HUGE_DIGITS = "9" * 5000
_RAW = {  # a string in the value → what stands for it in the text
    "@digits@": HUGE_DIGITS,
    "@exponent@": "1e999",
    "@deep@": "[" * 5000 + "]" * 5000,
    "@surrogate@": '"\\ud800"',
    "@nan@": "NaN",
    "@long@": json.dumps("long " * 1000),
    "@longer@": json.dumps("longer" * 20_000),
}

_TEXTS = st.text(max_size=8) | st.sampled_from(["", "\x00", "user", "5", "-1", "٣", "x" * 300, "1" * 5000])
_NUMBERS = (
    st.integers(-3, 400)
    | st.sampled_from([2**31, -(2**31) - 1, 2**63, -(2**63) - 1, 10**400, -0.0, 1e308, 5e-324])
    | st.floats(allow_nan=True, allow_infinity=True)
)
_LEAVES = st.none() | st.booleans() | _NUMBERS | _TEXTS | st.sampled_from(sorted(_RAW))
ANY_VALUE = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4), max_leaves=8
)


def as_text(value: Any) -> str:
    """The JSON of a value, with what `_RAW` names written out."""
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


ANY_JSON = ANY_VALUE.map(as_text)


@st.composite
def faulty_bodies(draw: st.DrawFn, valid: dict[str, Any]) -> str:
    """A valid body after one to three changes: values replaced, removed, wrapped, repeated; fields added or doubled."""
    prompt, *others = valid
    chosen = {prompt, "max_tokens", *draw(st.lists(st.sampled_from(others), max_size=4))}  # few, so that each is met
    body = {name: json.loads(json.dumps(value)) for name, value in valid.items() if name in chosen}
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(body))
        if not places:
            break
        owner, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "repeat", "add"]))
        if how == "replace":
            owner[key] = draw(ANY_VALUE)
        elif how == "remove":
            del owner[key]
        elif how == "wrap":
            owner[key] = [owner[key]]
        elif how == "repeat" and isinstance(owner, list):
            owner[key : key + 1] = [owner[key]] * draw(st.integers(2, 30))
        elif isinstance(owner, dict):
            owner[draw(_TEXTS)] = draw(ANY_VALUE)
    text = as_text(body)
    if text.startswith('{"') and draw(st.integers(0, 9)) == 0:
        text = "{" + f"{json.dumps(draw(st.sampled_from(sorted(valid))))}: {draw(ANY_JSON)}, " + text[1:]
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(list or dict, index or name) of everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


@st.composite
def broken_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes after one to four changes: some replaced, removed, added or repeated."""
    raw = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        end = min(len(raw), start + draw(st.integers(0, 6)))
        how = draw(st.sampled_from(["replace", "remove", "add", "repeat"]))
        if how == "repeat":
            raw[start:end] = raw[start:end] * draw(st.integers(2, 40))
        else:
            raw[start : end if how != "add" else start] = b"" if how == "remove" else draw(st.binary(max_size=6))
    return bytes(raw)
