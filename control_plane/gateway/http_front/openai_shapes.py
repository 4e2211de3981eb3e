"""Fields of the OpenAI API whose values have several shapes, checked item by item and converted to one.

Each function stops at the first fault and raises InvalidRequest, which names the place and says what would be right.
"""

from __future__ import annotations

import math

from phasewise.core.errors import InvalidRequest
from phasewise.core.shown import shown

MAX_CHOICES = 1024
"""Of one answer: prompts times n."""

_INT32 = (-(2**31), 2**31 - 1)
_MAX_ID_DIGITS = 10  # of the largest of them


def split_prompts(prompt: object) -> list[str | list[int]]:
    """The four forms of `prompt` as a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        what = "an empty list" if prompt == [] else "null" if prompt is None else f"a {type(prompt).__name__}"
        raise InvalidRequest(
            f"prompt must be a string, a list of token ids, or a list of either; it is {what}", field="prompt"
        )
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [_fitting(prompt, "prompt")]
    if len(prompt) > MAX_CHOICES:  # before any of them is looked at
        raise InvalidRequest(
            f"prompt has {len(prompt)} prompts, which are more than {MAX_CHOICES} choices; send fewer", field="prompt"
        )
    if kinds == {str}:
        return list(prompt)
    if kinds == {list}:
        for index, ids in enumerate(prompt):
            if set(map(type, ids)) - {int}:
                raise InvalidRequest(f"prompt[{index}] must hold token ids, which are whole numbers", field="prompt")
            _fitting(ids, f"prompt[{index}]")
        return list(prompt)
    raise InvalidRequest(
        "prompt must be all strings, all token ids (whole numbers), or all lists of token ids", field="prompt"
    )


def whole_numbers(given: object, field: str) -> list[int]:
    """`given`: a list of whole numbers that fit into 32 bits. Which token ids the model knows is checked later."""
    if not isinstance(given, list):
        raise InvalidRequest(f"{field} must be a list of whole numbers, not {shown(given)}", field=field)
    if set(map(type, given)) - {int}:
        index, wrong = next((i, number) for i, number in enumerate(given) if type(number) is not int)
        place = f"{field}[{index}]"
        raise InvalidRequest(f"{place} must be a whole number, not {shown(wrong)}", field=place)
    return _fitting(given, field)


def stop_strings(stop: object) -> tuple[str, ...]:
    """`stop`: null, a string or a list of strings."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    if not isinstance(stop, list):
        raise InvalidRequest(f"stop must be a string or a list of strings, not a {type(stop).__name__}", field="stop")
    for index, string in enumerate(stop):
        if not isinstance(string, str):
            raise InvalidRequest(
                f"stop[{index}] must be a string, not a {type(string).__name__}", field=f"stop[{index}]"
            )
    return tuple(stop)


def logit_bias_of(given: object) -> dict[int, float] | None:
    """`logit_bias`: null, or an object whose names are token ids."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise InvalidRequest(
            f"logit_bias must be an object such as {{'50256': -100}}, not a {type(given).__name__}", field="logit_bias"
        )
    biases: dict[int, float] = {}
    for key, bias in given.items():
        is_id = key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS and int(key) <= _INT32[1]
        if not is_id:
            raise InvalidRequest(
                f"logit_bias has the key {shown(key)}; keys are token ids such as '50256'", field="logit_bias"
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not _is_finite(bias):
            raise InvalidRequest(
                f"logit_bias[{key}] must be a finite number, not {shown(bias)}", field=f"logit_bias[{key}]"
            )
        if int(key) in biases:
            raise InvalidRequest(f"logit_bias names the token id {int(key)} twice; name it once", field="logit_bias")
        biases[int(key)] = float(bias)
    return biases or None


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond every float
        return False


def _fitting(numbers: list[int], field: str) -> list[int]:
    low, high = _INT32
    if numbers and (min(numbers) < low or max(numbers) > high):
        index, wrong = next((i, number) for i, number in enumerate(numbers) if not low <= number <= high)
        place = f"{field}[{index}]"
        raise InvalidRequest(f"{place} must be {low} to {high}; it is {shown(wrong)}", field=place)
    return numbers
