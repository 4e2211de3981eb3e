"""Runs the epochs of one worker's direct links: their threads, and what watches them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kv_transfer.channel import Channel
from kv_transfer.link import Post
from kv_transfer.receiving_end import ReceivingEnd
from kv_transfer.sending_end import SendingEnd
from kv_transfer.wire import WireError
from phasewise.core.messages import LinkLost

logger = logging.getLogger(__name__)

JOIN_S = 5.0


class EpochRunner:
    """Any thread. `is_closed`: no epoch begins any more, and nothing is posted of those that end."""

    def __init__(self, post: Post, stall_s: float) -> None:
        self.is_closed = threading.Event()
        self._post = post
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._ends: set[SendingEnd | ReceivingEnd] = set()
        self._threads: set[threading.Thread] = set()

    @property
    def ends(self) -> list[SendingEnd | ReceivingEnd]:
        """Of the epochs that are open, or being opened."""
        with self._lock:
            return list(self._ends)

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Runs `work` on a thread of its own, which `close` waits for."""

        def run() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, daemon=True, name=f"kv-link-{name}")
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def run(self, end: SendingEnd | ReceivingEnd, channel: Channel, work: Callable[[], None]) -> None:
        """One epoch, to its end, on the calling thread. `work` opens and serves it; what it raises breaks the epoch."""
        epoch = end.epoch
        with self._lock:
            self._ends.add(end)
        if self.is_closed.is_set():
            epoch.break_("this worker closes its links")
        try:
            work()
        except Exception as error:
            if not isinstance(error, OSError | WireError):
                logger.exception("the link with %s broke", epoch.peer)
            epoch.break_(str(error) or type(error).__name__)
        lost = end.tear_down()
        with self._lock:
            self._ends.discard(end)
        channel.close()
        if epoch.is_up and not self.is_closed.is_set():
            self._post(LinkLost(epoch.peer, epoch.reason, lost), None)
        epoch.is_gone.set()

    def close(self) -> None:
        """After `is_closed` is set: breaks all epochs and waits for the threads."""
        with self._lock:
            ends, threads = set(self._ends), set(self._threads)
        for end in ends:
            end.epoch.break_("this worker closes its links")
        for thread in threads:
            thread.join(JOIN_S)

    def watch(self) -> None:
        """Until `is_closed`: breaks epochs in which something is overdue."""
        while not self.is_closed.wait(self._stall_s / 8):
            for end in self.ends:
                end.epoch.watch()
