"""Carries out a worker's rounds (workers/round.py): the thread, the mailbox, the engine, and the wait between rounds.

    mailbox → take       messages are taken between steps; inside one only that parts have arrived elsewhere
    begin → submit       one ragged batch to the engine
    collect → end        an engine on a GPU computes one step while the next is prepared: the results of the one before
    outbox, report       one message to each gateway; a load report when something changed

Messages to other workers that the step need not wait for (`deferred`, phasewise/core/outbox.py) are sent when the
device has something to do, and at the end of the round.

When there is nothing to run the loop sleeps in the mailbox, until a message comes that may lead to a step or the next
deadline is due.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.batch import DeviceLost, PendingStep, ScheduledBatch
from kv_transfer.cache_protocol import WireBuffer
from kv_transfer.link import ArrivedPart, WriteReceived
from kv_transfer.plan import WIRE_VERSION
from kv_transfer.prober import ProbeLink
from phasewise.core.clock import Clock
from phasewise.core.links import WorkerLinks
from phasewise.core.messages import KVPart, KVPartAck, WorkerInfo, WorkerLoad, WorkerMessage
from workers.round import Step, WorkerRound

logger = logging.getLogger(__name__)

_ACK_S = 0.0005  # how long after a step's end it may be noticed while parts are held back


class Runner(Protocol):
    """The engine as the loop sees it (engine/model_runner.py)."""

    @property
    def num_steps_ahead(self) -> int: ...

    def submit(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> PendingStep: ...


_Entry = tuple[WorkerMessage | ProbeLink, ArrivedPart | None]


class WorkerDriver:
    """One worker. `post`, `prepare_write` and `links` may be called from any thread; all else belongs to that of `run`.

    With `layers_per_part` KV leaves behind each such group of layers, while later ones compute. None: it leaves behind
    the step, for several ranks take part in packing, and they are not between two layers together.
    """

    def __init__(self, rounds: WorkerRound, runner: Runner, clock: Clock, layers_per_part: int | None) -> None:
        self.rounds = rounds
        self._runner = runner
        self._clock = clock
        self._layers_per_part = layers_per_part
        self._outbox, self._peers = rounds.parts.outbox, rounds.parts.peers
        self._mailbox: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._kept: deque[_Entry] = deque()  # came inside a step
        self._in_flight: deque[tuple[Step, PendingStep]] = deque()
        self._stopping = False

    # ---- from any thread

    @property
    def info(self) -> WorkerInfo:
        return self.rounds.info

    def post(self, message: WorkerMessage | ProbeLink, arrived: ArrivedPart | None = None) -> None:
        """Puts a message, and what came with the header of a part, into the mailbox."""
        self._mailbox.put((message, arrived))

    def prepare_write(self, part: KVPart, wire: WireBuffer) -> WriteReceived:
        """`PrepareWrite` (kv_transfer/link.py), for links."""
        return self.rounds.parts.receiver.prepare_write(part, wire)

    def links(self, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        """The ways to other workers, as far as they are known."""
        facts = tuple(self.rounds.parts.sender.paths.facts(peer.worker_id, peer.kv_spec) for peer in peers)
        layers = self._layers_per_part or self.info.kv_spec.num_layers
        return WorkerLinks(self.info.worker_id, WIRE_VERSION, layers, self.rounds.limits.token_budget, facts)

    def stop(self) -> None:
        """Makes `run` return after the round that it is in."""
        self._stopping = True
        self._mailbox.put(None)

    # ---- the loop's thread

    def run(self) -> None:
        """Rounds until `stop`. Raises DeviceLost: only a new process can use the device again."""
        while not self._stopping:
            if not self.round():
                self.rounds.report(idle=True)
                self.wait()
        self.rounds.stop()

    def round(self) -> bool:
        """One round without waiting. True when there may be more to do at once."""
        self._drain_mailbox()
        step = self.rounds.begin()
        has_work = step is not None
        # Behind no new step, all are taken: the one after them may not find their newest tokens on the device.
        num_ahead = self._runner.num_steps_ahead if step is not None and self._submit(step) else 0
        self._peers.flush_deferred()
        while len(self._in_flight) > num_ahead:
            has_work = True
            self._collect(*self._in_flight.popleft())
        self._outbox.flush()
        self._peers.flush_deferred()
        self.rounds.report(idle=False)
        return has_work or self.rounds.has_more

    def wait(self) -> None:
        """Sleeps until a message comes that may lead to a step, or a deadline is due.

        A round for each part of a handoff would keep the interpreter from the link's threads.
        """
        due_s = self.rounds.next_deadline_s()
        while (left_s := due_s - self._clock.now_s()) > 0:
            try:
                entry = self._mailbox.get(timeout=left_s)
            except queue.Empty:
                return
            if entry is None or self.rounds.take(*entry):
                return

    def load(self) -> WorkerLoad:
        """What this worker holds, right now."""
        return self.rounds.load()

    # ---- inside

    def _submit(self, step: Step) -> bool:
        """False when the engine broke on the step."""
        rounds, is_behind = self.rounds, self._layers_per_part is None

        def on_layers_done(first_layer: int, num_layers: int) -> None:
            if not is_behind:
                rounds.layers_done(step, first_layer, num_layers)
            self._peers.flush_deferred()  # the device has something to do meanwhile

        hook = on_layers_done if step.prompts else None
        try:
            pending = self._runner.submit(step.batch, hook, self._layers_per_part or 0)
            if is_behind:
                rounds.layers_done(step, 0, self.info.kv_spec.num_layers)
        except Exception as error:
            self._broke(error, step)
            return False
        rounds.submitted(step)
        self._in_flight.append((step, pending))
        return True

    def _collect(self, step: Step, pending: PendingStep) -> None:
        while self.rounds.is_held_back and not pending.is_done():
            self._take_ack_inside()
        try:
            result = pending.collect()
        except Exception as error:
            self._broke(error, step, [step, *self._drop_in_flight()])
        else:
            self.rounds.end(step, result)

    def _broke(self, error: Exception, step: Step, dropped: Sequence[Step] = ()) -> None:
        """As WorkerRound.failed. Raises DeviceLost again: no later step would do."""
        if isinstance(error, DeviceLost):
            raise error
        logger.error("a step broke", exc_info=error, extra={"worker_id": self.info.worker_id})
        if (request_id := self.rounds.failed(step, dropped)) is not None:
            names = {"worker_id": self.info.worker_id, "request_id": request_id}
            logger.error("a request breaks steps alone, and ends", extra=names)

    def _drop_in_flight(self) -> list[Step]:
        """Waits for the steps that were built on one that broke, in their order. Raises DeviceLost."""
        dropped = []
        while self._in_flight:
            step, pending = self._in_flight.popleft()
            try:
                pending.collect()
            except DeviceLost:
                raise
            except Exception as error:
                names = {"worker_id": self.info.worker_id}
                logger.error("a step broke behind another one", exc_info=error, extra=names)
            dropped.append(step)
        return dropped

    def _take_ack_inside(self) -> None:
        """Inside a step: takes the word that a part has arrived, whose room others wait for. All else waits."""
        try:
            entry = self._mailbox.get(timeout=_ACK_S)
        except queue.Empty:
            return
        if entry is None:
            return  # `stop`: seen behind this round
        if isinstance(entry[0], KVPartAck):
            self.rounds.take(*entry)
        else:
            self._kept.append(entry)

    def _drain_mailbox(self) -> None:
        while self._kept:
            self.rounds.take(*self._kept.popleft())
        while not self._mailbox.empty():  # nobody else takes from it
            if (entry := self._mailbox.get()) is not None:
                self.rounds.take(*entry)
