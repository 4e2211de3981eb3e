"""What every member of a cluster does beside its work: it joins, follows the view, gives heartbeats, and leaves.

1. made
2. loading    the member loads; `loading` says how far, `failed` that it cannot
3. joined     `join`: it has the whole view and takes work; the view's changes come as deltas, or with a heartbeat
4. left       `leave`, at its own wish; or it is called gone, and ends at once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phasewise.core.clock import Clock
from phasewise.core.errors import ServingError
from phasewise.core.handles import ActorHandle, answer_of
from phasewise.core.heartbeat import Description, Joining, OpenAttempt
from phasewise.core.identity import MemberId
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import WorkerRole
from phasewise.core.pulse import Pulse, PulseEvents
from phasewise.core.view import GatewayInfo, View, ViewChange, ViewDelta, ViewFollower

logger = logging.getLogger(__name__)

_CALL_S = 5.0
_JOIN_PAUSE_S = 0.5
_LOADING_S = 0.2  # between two words of how far the loading is

End = Callable[[str, int], None]
"""Ends the process at once, whatever it does: with a reason, "" when it ends in order, and an exit code."""


@dataclass(frozen=True, slots=True)
class MemberEvents:
    """What a member hears of the view, on its event loop, and how it ends.

    `step_began_s`: when the step that runs began, by the member's clock; None between steps. Asked by another thread.
    """

    on_change: Callable[[ViewChange], None]
    end: End
    step_began_s: Callable[[], float | None] = lambda: None


class ClusterMember:
    """One member, on its event loop. `report` and `loading` may be called by any thread."""

    def __init__(
        self, member_id: MemberId, control_plane: ActorHandle, heartbeat_s: float, events: MemberEvents, clock: Clock
    ) -> None:
        self.member_id = member_id
        self._control_plane = control_plane
        self._events = events
        self._clock = clock
        self._follower = ViewFollower()
        self._info: WorkerInfo | GatewayInfo | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told_loading_s = float("-inf")
        self._has_left = False
        pulse = PulseEvents(self._view_version, events.step_began_s, self._on_view, self._on_gone)
        self._pulse = Pulse(member_id, control_plane, heartbeat_s, pulse, clock)

    @property
    def view(self) -> View:
        return self._follower.view

    # ---- before it is there

    def loading(self, share: float) -> None:
        """Says how far the loading is, 0 … 1; not too often."""
        now_s = self._clock.now_s()
        if now_s - self._told_loading_s >= _LOADING_S:
            self._told_loading_s = now_s
            self._control_plane.loading.remote(self.member_id, share)

    async def failed(self, error: ServingError) -> None:
        """Says that the member cannot be had."""
        await self._say(self._control_plane.failed.remote(self.member_id, error))

    async def join(self, info: WorkerInfo | GatewayInfo) -> None:
        """Joins the cluster; from now on the view is followed and heartbeats are given.

        A control plane that does not answer is being started again: it is asked until it does. The process that asks
        for ever is ended by the control plane, which has made it.

        Raises:
            ServingError: the control plane does not take this member.
        """
        self._loop = asyncio.get_running_loop()
        view: View | None = None
        while view is None:
            try:
                view = await answer_of(self._control_plane.join.remote(Joining(info)), _CALL_S)
            except ServingError:
                raise
            except Exception as error:  # Ray's own, or no answer
                logger.warning("the control plane does not answer (%s); asking again", type(error).__name__)
                await asyncio.sleep(_JOIN_PAUSE_S)
        self._info = info
        self._take(view)
        self._pulse.start()

    # ---- while it is there

    def view_changed(self, delta: ViewDelta) -> None:
        """A change of the view. What comes before the whole view, or behind a gap, asks for the whole."""
        if self._info is None or self._has_left:
            return
        self._heed(self._follower.apply(delta))
        if self._follower.is_behind:
            self._pulse.beat()

    def report(self, load: WorkerLoad) -> None:
        """LoadPort (ports.py): the load goes out with a heartbeat, at once."""
        self._pulse.report(load)

    def describe(self, load: WorkerLoad | None = None, open_attempts: tuple[OpenAttempt, ...] = ()) -> Description:
        """For a control plane that was started again."""
        return Description(self._info, self.view, load, open_attempts)

    async def draining(self) -> None:
        """Says that this member drains at its own wish."""
        await self._say(self._control_plane.draining.remote(self.member_id))

    async def role_changed(self, role: WorkerRole) -> None:
        await self._say(self._control_plane.role_changed.remote(self.member_id, role))

    async def leave(self) -> None:
        """Says that this member has ended its work in order."""
        self.close()
        await self._say(self._control_plane.left.remote(self.member_id))

    def close(self) -> None:
        """Gives no heartbeats any more, and does not follow the view."""
        self._has_left = True
        self._pulse.stop()

    # ---- inside

    async def _say(self, call: Any) -> None:
        """A control plane that does not answer finds out by itself."""
        try:
            await answer_of(call, _CALL_S)
        except Exception as error:
            logger.warning("the control plane did not hear of it (%s)", type(error).__name__)

    def _take(self, view: View) -> None:
        self._heed(self._follower.replace(view))

    def _heed(self, change: ViewChange) -> None:
        if self.member_id not in self.view.members:
            self._on_gone()
            return
        self._events.on_change(change)

    def _view_version(self) -> int:
        return 0 if self._follower.is_behind else self._follower.view.version

    def _on_view(self, view: View) -> None:
        """By the thread of an answer."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._take, view)

    def _on_gone(self) -> None:
        if self._has_left:
            return
        self._events.end("it was taken for lost, and is in the view no more", 1)
