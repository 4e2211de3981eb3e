"""Where a worker's direct links from others arrive: accepts connections, each an epoch of a sender's link."""

from __future__ import annotations

import logging
import socket
import threading

from kv_transfer.channel import Channel, Hello, LinkIdentity, differences
from kv_transfer.epoch import LinkResources
from kv_transfer.epoch_runner import EpochRunner
from kv_transfer.receiving_end import ReceivingEnd
from kv_transfer.wire import WireError
from phasewise.core.placement import WorkerId

logger = logging.getLogger(__name__)

_GREETING_S = 5.0  # for the first message of whoever connects
_PAUSE_S = 0.1


class LinkListener:
    """The receiving ends of one worker. `address` is where it listens."""

    def __init__(self, resources: LinkResources, identity: LinkIdentity, runner: EpochRunner, host: str) -> None:
        self.resources = resources
        self._identity = identity
        self._runner = runner
        self._lock = threading.Lock()
        self._newest: dict[WorkerId, ReceivingEnd] = {}  # of each sender, also when its epoch is over
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        runner.start("accept", self._accept)

    def forget(self, peer: WorkerId) -> None:
        with self._lock:
            end = self._newest.pop(peer, None)
        if end is not None:
            end.epoch.break_(f"worker {peer} is gone")

    def stop(self) -> None:
        """After the runner's `is_closed`: accepts nothing more."""
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which closing would not

    def close(self) -> None:
        """After the runner's `close`."""
        self._socket.close()

    def _accept(self) -> None:
        while not self._runner.is_closed.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError as error:  # closed, or out of descriptors
                if not self._runner.is_closed.wait(_PAUSE_S):
                    logger.error("cannot accept a link: %s", error)
                continue
            self._runner.start("receive", lambda connection=connection: self._run(connection))  # type: ignore[misc]

    def _run(self, connection: socket.socket) -> None:
        """One epoch, to its end."""
        channel = Channel(connection)
        resources = self.resources
        end = ReceivingEnd(resources, channel, resources.clock.now_s() + _GREETING_S)

        def work() -> None:
            theirs = end.greet()
            identity = self._identity
            ours = identity.hello(theirs.sender, identity.worker_id, theirs.process, theirs.epoch, theirs.time_left_s)
            reason = differences(ours, theirs) or self._succeed(end, theirs)
            if reason:
                end.refuse(reason)
                raise WireError(reason)
            end.open(ours)
            end.serve()

        self._runner.run(end, channel, work)

    def _succeed(self, end: ReceivingEnd, hello: Hello) -> str:
        """Makes `end` its sender's newest, once the epoch before is over; or says why it cannot be."""
        with self._lock:
            old = self._newest.get(hello.sender)
            if old is not None and old.process == end.process and old.number >= end.number:
                return f"epoch {end.number} is over, {old.number} has begun"
            self._newest[hello.sender] = end
        if old is not None:
            old.epoch.break_(f"{hello.sender} began a new epoch")
            if not old.epoch.is_gone.wait(hello.time_left_s):
                return f"epoch {old.number} has not ended yet"
        return ""
