"""SIGTERM as a call on an event loop, and the end of a process.

Python runs the handler of a signal on the main thread, as soon as that runs Python again. In an actor's process the
main thread waits in Ray, and the event loop is on another thread, which may not set handlers. So the handler is set
where the main thread passes by, and what wakes the event loop is a pipe that the interpreter writes to at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Termination:
    """SIGTERM of this process, from `catch` on, for `listen`."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)

    def catch(self) -> bool:
        """Takes the signal from whoever had it. False, and nothing is done, where this is not the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return False
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        return True

    def listen(self, loop: asyncio.AbstractEventLoop, terminate: Callable[[], None]) -> None:
        """Calls `terminate` on `loop` for each SIGTERM, also for one that has come before."""
        loop.add_reader(self._read_fd, self._read, terminate)

    def _read(self, terminate: Callable[[], None]) -> None:
        if signal.SIGTERM in os.read(self._read_fd, 64):
            logger.info("SIGTERM: this process drains and ends")
            terminate()


def end_process(reason: str, code: int) -> None:
    """Ends this process at once, whatever its threads do. `reason`: for the log; "" when it ends in order."""
    if reason:
        logger.error("this process ends: %s", reason)
    logging.shutdown()
    os._exit(code)
