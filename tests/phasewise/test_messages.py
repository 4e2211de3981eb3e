"""Hop messages survive pickling, the common one in a compact form."""

from __future__ import annotations

import pickle

from phasewise.core.lifecycle import Stage
from phasewise.core.messages import NewTokens, PromptLogprobs, RequestFailed, TimelineEvent, WorkerOutput
from phasewise.core.request import FinishReason, SampledToken

OUTPUT = WorkerOutput(
    "mixed-0",
    (
        NewTokens("a", 0, 0, (SampledToken(5),)),
        NewTokens("a", 1, 7, (SampledToken(6), SampledToken(0)), FinishReason.LENGTH),
        NewTokens("b", 0, 3, (SampledToken(7, -0.5), SampledToken(8, 0.0, ((8, 0.0), (9, -2.0))))),
        NewTokens("c", 0, 4, (), FinishReason.STOP),
    ),
    (PromptLogprobs("a", (SampledToken(1), SampledToken(2, -1.5))),),
    (TimelineEvent("a", Stage.FIRST_TOKEN, 1.25, "mixed-0", num_tokens=3),),
    (RequestFailed("d", "overloaded", "full"),),
)


def test_a_workers_output_comes_back_as_it_was() -> None:
    assert pickle.loads(pickle.dumps(OUTPUT)) == OUTPUT
    assert pickle.loads(pickle.dumps(WorkerOutput("mixed-0"))) == WorkerOutput("mixed-0")


def test_a_workers_output_is_pickled_without_an_object_for_every_token() -> None:
    assert b"NewTokens" not in pickle.dumps(WorkerOutput("mixed-0", OUTPUT.chunks))
