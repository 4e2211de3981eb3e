"""Ctrl-C while the SDK is at work.

A KeyboardInterrupt may be raised between any two steps of the main thread, also between taking and using a lock inside
grpcio: the lock then stays taken, and the next call hangs. So while a call runs, Ctrl-C raises nothing; it has the
call ended from another thread, which makes the call return in its ordinary way.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from types import FrameType


@dataclass(slots=True)
class Interrupt:
    """Whether Ctrl-C came while the block ran."""

    came: bool = False


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[Interrupt]:
    """In this block Ctrl-C calls `stop`, on another thread, in place of raising. A second one raises, to get out.

    For the main thread only, where signals arrive. `stop` must make the block's blocking call return.
    """
    interrupt = Interrupt()
    asked: SimpleQueue[bool] = SimpleQueue()  # its put may be called from a signal handler

    def watch() -> None:
        if asked.get():
            stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.came:
            raise KeyboardInterrupt
        interrupt.came = True
        asked.put(True)

    watcher = threading.Thread(target=watch, name="interrupt-watcher", daemon=True)
    watcher.start()
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
        asked.put(False)
        watcher.join()
