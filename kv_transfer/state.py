"""The states of one handoff on either side, and the legal moves.

    sender                                          receiver
    PLANNED    nothing is asked for                 RESERVED   blocks set aside, nothing has come
    OFFERED    asked for blocks                     RECEIVING  parts come in, are checked and written
    ACCEPTED   may send; prompt may run             DONE       committed: the decode phase owns the blocks
    SENDING    parts go out as layers are done      FAILED     gave up; the blocks are free
    COMMITTED  all parts and the commit are out
    DONE       the receiver owns the sequence
    FAILED     refused, aborted, lost or timed out

The sender's blocks stay with the prefill worker until DONE or FAILED; the receiver's belong to the receiver until DONE.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar


class SendStatus(StrEnum):
    PLANNED = "planned"
    OFFERED = "offered"
    ACCEPTED = "accepted"
    SENDING = "sending"
    COMMITTED = "committed"
    DONE = "done"
    FAILED = "failed"


class ReceiveStatus(StrEnum):
    RESERVED = "reserved"
    RECEIVING = "receiving"
    DONE = "done"
    FAILED = "failed"


Status = TypeVar("Status", SendStatus, ReceiveStatus)

SEND_TRANSITIONS: dict[SendStatus, frozenset[SendStatus]] = {
    SendStatus.PLANNED: frozenset({SendStatus.OFFERED}),
    # Straight to DONE when an earlier attempt had arrived and only the receiver's word was lost.
    SendStatus.OFFERED: frozenset({SendStatus.ACCEPTED, SendStatus.DONE, SendStatus.FAILED}),
    SendStatus.ACCEPTED: frozenset({SendStatus.SENDING, SendStatus.COMMITTED, SendStatus.FAILED}),
    SendStatus.SENDING: frozenset({SendStatus.COMMITTED, SendStatus.FAILED}),
    SendStatus.COMMITTED: frozenset({SendStatus.DONE, SendStatus.FAILED}),
    SendStatus.DONE: frozenset(),
    SendStatus.FAILED: frozenset(),
}

RECEIVE_TRANSITIONS: dict[ReceiveStatus, frozenset[ReceiveStatus]] = {
    ReceiveStatus.RESERVED: frozenset({ReceiveStatus.RECEIVING, ReceiveStatus.DONE, ReceiveStatus.FAILED}),
    ReceiveStatus.RECEIVING: frozenset({ReceiveStatus.DONE, ReceiveStatus.FAILED}),
    ReceiveStatus.DONE: frozenset(),
    ReceiveStatus.FAILED: frozenset(),
}


def check(transitions: Mapping[Status, frozenset[Status]], old: Status, new: Status) -> None:
    """Raises ValueError on an illegal move of one side: a bug of ours."""
    if new not in transitions[old]:
        raise ValueError(f"illegal handoff transition {old.value} -> {new.value}")
