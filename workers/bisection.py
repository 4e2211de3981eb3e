"""What a worker computes after a step on which its engine broke, until the request that breaks it is alone. Pure.

    broke        the step's requests are suspects: in halves, or alone if it was one. A half that breaks is halved again
    next_trial   the suspects of the next step, which has nobody else in it; None when there are none left
    passed       the step was right: its suspects are cleared

A request is the cause when a trial of it alone broke; nobody else ends. One cause among n requests takes some
2 log2(n) steps, in which others wait.

A trial has no more tokens than its requests had in the step that broke: what was too much for the device in company is
not made more. A suspect that its trial has no place for, because it was preempted or has ended, is cleared with the
rest. If it breaks a later step, that is halved in its turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trial:
    """Requests that are tried together, and how many tokens they had in the step that broke."""

    num_tokens: Mapping[str, int]

    @property
    def requests(self) -> Collection[str]:
        return self.num_tokens.keys()

    @property
    def token_budget(self) -> int:
        return sum(self.num_tokens.values())


class Bisection:
    """The suspects of one worker.

    Attributes:
        is_trying: a trial was begun, and its result is not known: no step may be planned.
    """

    def __init__(self) -> None:
        self.is_trying = False
        self._trials: list[Trial] = []  # the last is the next

    def next_trial(self) -> Trial | None:
        return self._trials[-1] if self._trials else None

    def begin(self) -> None:
        """The next trial's step was planned."""
        self.is_trying = bool(self._trials)

    def passed(self) -> None:
        """The step that is over was right, or nothing was left of the next trial."""
        if self._trials:
            self._trials.pop()
        self.is_trying = False

    def broke(self, num_tokens: Mapping[str, int]) -> str | None:
        """The engine broke on a step with so many tokens of these requests. Returns the one that is the cause, if it
        is known now."""
        was_trial, self.is_trying = self.is_trying, False
        if was_trial:
            self._trials.pop()
            if len(num_tokens) == 1:
                return next(iter(num_tokens))
        requests = list(num_tokens)
        middle = len(requests) // 2
        for half in (requests[middle:], requests[:middle]):
            if half:
                self._trials.append(Trial({request_id: num_tokens[request_id] for request_id in half}))
        return None
