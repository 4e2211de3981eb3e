"""The model's own sampling values, for requests that give none."""

from __future__ import annotations

from dataclasses import replace

from control_plane.gateway.service import SamplingInput
from phasewise.core.sampling_defaults import SamplingDefaults


def with_defaults(given: SamplingInput, defaults: SamplingDefaults) -> SamplingInput:
    """`given`, with the model's value for what it leaves open. Not max_tokens: its default depends on the prompt."""
    return replace(
        given,
        temperature=defaults.temperature if given.temperature is None else given.temperature,
        top_p=defaults.top_p if given.top_p is None else given.top_p,
        top_k=defaults.top_k if given.top_k is None else given.top_k,
        min_p=defaults.min_p if given.min_p is None else given.min_p,
        repetition_penalty=(
            defaults.repetition_penalty if given.repetition_penalty is None else given.repetition_penalty
        ),
    )
