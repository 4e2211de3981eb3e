"""What members and the control plane tell each other besides requests. All of it can be pickled.

    member → control plane    loading(share); failed(error), or join(Joining) → View; from then on each
                              `health.heartbeat_s` heartbeat(Heartbeat) → HeartbeatAnswer;
                              draining(), role_changed(role), left()
    control plane → member    view_changed(ViewDelta); describe() → Description; drain(timeout_s); change_role(role);
                              stop()

A heartbeat comes from a thread of its own, so that it says how long a step of the worker's loop has been running
instead of waiting for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from phasewise.core.identity import MemberId
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import Placement
from phasewise.core.view import GatewayInfo, View

PROTOCOL_VERSION = 1
"""Of all messages between gateways, workers and the control plane. Whoever speaks another one is refused at join."""


@dataclass(frozen=True, slots=True)
class Joining:
    """A member's first word."""

    info: WorkerInfo | GatewayInfo
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A member's regular word.

    Attributes:
        view_version: of the view that it has; 0 when it needs the whole.
        step_s: seconds that the step of its loop has been running, counted while the process itself ran (listened.py);
            0.0 between steps, and for a gateway.
        load: a worker's load; None where it did not change since the last report.
    """

    member_id: MemberId
    view_version: int
    step_s: float = 0.0
    load: WorkerLoad | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatAnswer:
    """`view`: the whole view, for a member that lacks it. `is_gone`: the member was declared lost; it has to end."""

    view: View | None = None
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class OpenAttempt:
    """An attempt that a gateway has open, for a control plane that builds its ledger anew."""

    placement: Placement
    num_prompt_tokens: int
    num_samples: int
    max_tokens: int
    has_first_token: bool


@dataclass(frozen=True, slots=True)
class Description:
    """All that a control plane which was started again needs to hear of a member. `info` is None while it loads."""

    info: WorkerInfo | GatewayInfo | None
    view: View
    load: WorkerLoad | None = None
    open_attempts: tuple[OpenAttempt, ...] = ()
    protocol_version: int = PROTOCOL_VERSION
