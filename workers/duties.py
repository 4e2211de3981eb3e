"""What a worker takes now, and how it lets go of what it does not do any more. Pure.

    READY      takes what its role now allows. The role may change while it works: what waits for the phase that is lost
               is given back, what runs in it goes on to its end
    DRAINING   takes nothing, and never does again. What waits is given back at once, what runs goes on to its end or to
               the end of the drain time, and is given back then. The worker is drained when its load is empty

To give a request back is to fail it with `Unavailable`: its gateway goes on with it elsewhere, from the token that it
has. An offer is given back to its prefill worker, which does the same. What happens to sequences that run in a phase
that is lost is in one place, `_leave_running`.
"""

from __future__ import annotations

from decode_workers.phase import DecodePhase
from kv_transfer.incoming import IncomingHandoffs
from phasewise.core.clock import Clock
from phasewise.core.errors import Unavailable
from phasewise.core.messages import Drain
from phasewise.core.placement import WorkerId, WorkerRole, WorkerState
from prefill_workers.phase import PrefillPhase


class Duties:
    """The role and the state of one worker. Used by one thread.

    Attributes:
        role: the one that it has now; `WorkerInfo.role` is the one that it was born with.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        role: WorkerRole,
        prefill: PrefillPhase,
        decode: DecodePhase,
        incoming: IncomingHandoffs,
        clock: Clock,
    ) -> None:
        self.role = role
        self.state = WorkerState.READY
        self._worker_id = worker_id
        self._prefill = prefill
        self._decode = decode
        self._incoming = incoming
        self._clock = clock
        self._end_s = float("inf")  # of the drain time

    def refused_prompts(self) -> str:
        """Why prompts are not taken now; "" when they are. Where a prompt is decoded its placement says, not a role."""
        return "" if self.state is WorkerState.READY and self.role.can_prefill else self._reason("prompts")

    def refused_offers(self) -> str:
        """Why offers are not taken now; "" when they are."""
        return "" if self.state is WorkerState.READY and self.role.can_decode else self._reason("handoffs")

    def drain(self, message: Drain) -> None:
        """Takes nothing new from now on. A second word may shorten the drain time."""
        self.state = WorkerState.DRAINING
        self._end_s = min(self._end_s, self._clock.now_s() + message.time_left_s)
        self._give_back_waiting()

    def change_role(self, role: WorkerRole) -> None:
        """Does what `role` says from now on. One that drains goes on draining."""
        self.role = role
        self._give_back_waiting()

    def poll(self) -> None:
        """Once a round, before a step is planned."""
        if self._end_s <= self._clock.now_s():
            self._leave_running()

    def next_deadline_s(self) -> float:
        """When the drain time is over; infinity when never, or when it is over already."""
        return self._end_s if self._end_s > self._clock.now_s() else float("inf")

    # ---- inside

    def _give_back_waiting(self) -> None:
        """Prompts that hold nothing here, and offers that were not accepted, go elsewhere."""
        if reason := self.refused_prompts():
            for job in list(self._prefill.scheduler.waiting):
                self._prefill.fail(job.request_id, Unavailable(reason))
        if reason := self.refused_offers():
            self._decode.refuse_offers(reason)

    def _leave_running(self) -> None:
        """The drain time is over: what still runs, or is being handed over, goes on elsewhere."""
        prompts, error = self._prefill.scheduler, Unavailable(self._reason("requests"))
        for job in (*prompts.waiting, *prompts.running, *prompts.handing_off):
            self._prefill.fail(job.request_id, error)
        for decoding in list(self._decode.scheduler.jobs()):
            self._decode.fail(decoding.sequence.request_id, error)
        for reservation in self._incoming.reservations:
            self._incoming.refuse(reservation.offer.transfer_id, error.message)

    def _reason(self, what: str) -> str:
        state = "drains" if self.state is WorkerState.DRAINING else f"is a {self.role.value} worker"
        return f"worker {self._worker_id} {state} and takes no {what} now"
