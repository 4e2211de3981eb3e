"""When a call is tried again, where, and after how long. Plain decisions: the clients do the waiting and calling.

A call is never at two targets at once: the next attempt begins when the one before it has ended.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from phasewise.core.clock import Clock
from phasewise.core.errors import DuplicateRequest, InvalidRequest, Overloaded, ServingError, Unavailable
from phasewise.targets import Targets


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `max_retries` after the first attempt, on all targets together; anew where a stream went on meanwhile.

    Going on to the next target costs no wait. Once all targets have had their turn the wait is `backoff_s`, doubled
    with every further round up to `max_backoff_s`; between half and all of it is waited, at random, so that clients
    that failed together do not return together. A server's own hint (`retry_after_s`) is a lower bound there.
    """

    max_retries: int = 3
    backoff_s: float = 0.1
    max_backoff_s: float = 5.0

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise InvalidRequest(f"max_retries must be 0 or more, not {self.max_retries}", field="max_retries")
        if not 0 <= self.backoff_s <= self.max_backoff_s:
            raise InvalidRequest(
                f"retry_backoff_s must be from 0 to {self.max_backoff_s}, not {self.backoff_s}", field="retry_backoff_s"
            )


class Attempts:
    """The attempts at one call. `target` is the index of the target to use now.

    All attempts share one deadline: `time_left_s` shrinks from one to the next.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        targets: Targets,
        *,
        timeout_s: float | None,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise InvalidRequest(f"timeout_s must be more than 0 or None, not {timeout_s}", field="timeout_s")
        self.target = targets.choose()
        self._policy = policy
        self._targets = targets
        self._clock = clock
        self._rng = rng
        self._deadline_s = None if timeout_s is None else clock.now_s() + timeout_s
        self._num_retries = 0
        self._num_rounds = 0
        self._tried: set[int] = set()  # in this round
        self._has_progress = False
        self._not_before_s: dict[int, float] = {}

    def time_left_s(self) -> float | None:
        """Seconds until the deadline, never negative; None when there is none."""
        return None if self._deadline_s is None else max(self._deadline_s - self._clock.now_s(), 0.0)

    def answered(self) -> None:
        """The target has taken the call, and sent something."""
        self._has_progress = True
        self._targets.answered(self.target)

    def next_delay_s(self, error: ServingError, *, delivered: bool) -> float | None:
        """Moves on to the next target and says how long to wait before using it; None means: give up with `error`.

        An answer of which something was `delivered` to the caller goes on elsewhere only where its gateway is away: the
        gateway itself has tried again what else may be. That an earlier attempt is still open (DuplicateRequest) can
        only be news on a retry: its connection broke, and the server has not noticed yet.
        """
        is_away = isinstance(error, Unavailable)
        if is_away:
            self._targets.was_away(self.target)
            if self._has_progress:
                self._num_retries, self._num_rounds = 0, 0
                self._tried.clear()
        self._has_progress = False
        if not self._may_go_on(error, delivered) or self._num_retries >= self._policy.max_retries:
            return None
        now_s = self._clock.now_s()
        if error.retry_after_s is not None:
            self._not_before_s[self.target] = now_s + error.retry_after_s
        self._num_retries += 1
        backoff_s = self._end_turn()
        self.target = self._targets.choose(self._tried)
        delay_s = max(backoff_s, self._not_before_s.get(self.target, now_s) - now_s)
        time_left_s = self.time_left_s()
        return None if time_left_s is not None and delay_s >= time_left_s else delay_s

    def _may_go_on(self, error: ServingError, delivered: bool) -> bool:
        if isinstance(error, DuplicateRequest):
            return self._num_retries > 0
        return isinstance(error, Unavailable | Overloaded) if delivered else error.retry_safe

    def _end_turn(self) -> float:
        """The target's turn is over. The wait before the next one: 0 within a round."""
        self._tried.add(self.target)
        if len(self._tried) < self._targets.num_targets:
            return 0.0
        self._tried.clear()
        full_s = min(self._policy.backoff_s * 2**self._num_rounds, self._policy.max_backoff_s)
        self._num_rounds += 1
        return full_s * (0.5 + 0.5 * self._rng.random())
