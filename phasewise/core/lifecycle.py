"""The states of a request and the legal moves between them.

    RECEIVED    the gateway has checked and tokenised it; no worker knows it
    PLACED      both workers are chosen; the prefill task is on its way
    WAITING     in the prefill worker's queue; holds no KV blocks
    RESERVING   the decode worker was asked for blocks; the prompt does not run yet
    PREFILLING  its chunks run; holds blocks on the prefill worker, and a reservation on the decode worker
    HANDOFF     the prompt is computed, the first token is out, KV parts are still moving
    DECODING    in the decode worker's running batch; holds blocks there only
    PREEMPTED   out of the running batch for lack of blocks; its KV is in host memory
    RECOVERING  a worker was lost or could not go on; prompt and tokens so far are about to be placed again
    FINISHED, FAILED, CANCELLED   the end, exactly one of them; holds nothing anywhere

A request that stays on one worker (mixed role) skips RESERVING and HANDOFF. A gateway's own record knows PLACED,
RECOVERING and the ends: what happens in between is the workers' knowledge, and comes to it as a timeline.
"""

from __future__ import annotations

from enum import StrEnum


class RequestStatus(StrEnum):
    RECEIVED = "received"
    PLACED = "placed"
    WAITING = "waiting"
    RESERVING = "reserving"
    PREFILLING = "prefilling"
    HANDOFF = "handoff"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    RECOVERING = "recovering"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_S = RequestStatus
_ENDS = frozenset({_S.FINISHED, _S.FAILED, _S.CANCELLED})
_BROKEN = frozenset({_S.FAILED, _S.CANCELLED, _S.RECOVERING})

TRANSITIONS: dict[RequestStatus, frozenset[RequestStatus]] = {
    # FINISHED: the answer broke off behind its last token, and nothing is left to be run.
    _S.RECEIVED: frozenset({_S.PLACED, _S.FINISHED, _S.FAILED, _S.CANCELLED}),
    _S.PLACED: frozenset({_S.WAITING, _S.FINISHED}) | _BROKEN,
    _S.WAITING: frozenset({_S.RESERVING, _S.PREFILLING}) | _BROKEN,
    _S.RESERVING: frozenset({_S.PREFILLING, _S.WAITING}) | _BROKEN,
    _S.PREFILLING: frozenset({_S.HANDOFF, _S.DECODING, _S.FINISHED}) | _BROKEN,
    _S.HANDOFF: frozenset({_S.DECODING, _S.FINISHED}) | _BROKEN,
    _S.DECODING: frozenset({_S.PREEMPTED, _S.FINISHED}) | _BROKEN,
    _S.PREEMPTED: frozenset({_S.DECODING, _S.FINISHED}) | _BROKEN,
    _S.RECOVERING: frozenset({_S.PLACED, _S.FAILED, _S.CANCELLED}),
    _S.FINISHED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}


def is_end(status: RequestStatus) -> bool:
    """True for the three states in which a request holds nothing."""
    return status in _ENDS


def check_transition(old: RequestStatus, new: RequestStatus) -> None:
    """Raises ValueError when a request may not move from `old` to `new`: a bug of ours, never bad input."""
    if new not in TRANSITIONS[old]:
        raise ValueError(f"illegal request transition {old.value} -> {new.value}")


class Stage(StrEnum):
    """The moments that a request's timeline records, in the order in which they normally happen."""

    RECEIVED = "received"
    PLACED = "placed"
    WAITING = "waiting"
    RESERVE_ASKED = "reserve_asked"
    RESERVED = "reserved"
    PREFILL_START = "prefill_start"
    PREFILL_END = "prefill_end"
    FIRST_TOKEN = "first_token"
    HANDOFF_START = "handoff_start"
    HANDOFF_END = "handoff_end"
    DECODE_START = "decode_start"  # the first decode step that this request is part of has ended
    PREEMPTED = "preempted"
    RESUMED = "resumed"
    RECOVERING = "recovering"  # an attempt was given up: the stages from `placed` on come again
    FINISHED = "finished"
