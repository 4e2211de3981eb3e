"""The frames of one worker for one gateway, from their making until the gateway has taken them. Pure.

    unsent         still to go over the connection, all or the rest of one
    sent           gone, and not acknowledged. They are sent again when the connection has to be opened again
    forgotten      the gateway has acknowledged them

Frames have numbers, from 0 on. So a connection that breaks loses nothing and repeats nothing: both ends say what they
have, and the worker goes on with the first frame that the gateway lacks.

A gateway that takes nothing makes the queue grow. Beyond `max_bytes` all of it is dropped, and the numbers go on. The
gateway learns of that from the next Hello, whose `first` is above what it expects, and gives up the attempts that may
lack tokens (attempts.py).
"""

from __future__ import annotations

from collections import deque

MAX_QUEUED_BYTES = 128 * 2**20
"""Some two million tokens."""


class FrameQueue:
    """Args:
        max_bytes: a frame that finds more queued makes the queue be dropped.

    Attributes:
        first: the number of the oldest frame that is here, or of the next one where none is.
        num_dropped: frames that were dropped.
    """

    def __init__(self, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.first = 0
        self.num_dropped = 0
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._sent: deque[bytes] = deque()
        self._unsent: deque[bytes] = deque()
        self._offset = 0  # bytes of the first unsent frame that have gone

    @property
    def is_all_sent(self) -> bool:
        return not self._unsent

    @property
    def is_empty(self) -> bool:
        """Whether the gateway has taken everything."""
        return not self._unsent and not self._sent

    def push(self, frame: bytes) -> bool:
        """Adds a frame. False: all before it were dropped, so the connection has to be opened again."""
        is_full = self._num_bytes > self._max_bytes
        if is_full:
            num_dropped = len(self._sent) + len(self._unsent)
            self.num_dropped += num_dropped
            self.first += num_dropped
            self._sent.clear()
            self._unsent.clear()
            self._num_bytes = self._offset = 0
        self._unsent.append(frame)
        self._num_bytes += len(frame)
        return not is_full

    def to_send(self) -> memoryview | None:
        """What is to go next: a frame, or the rest of one."""
        return memoryview(self._unsent[0])[self._offset :] if self._unsent else None

    def went(self, num_bytes: int) -> None:
        """So many bytes of what `to_send` gave have gone."""
        self._offset += num_bytes
        if self._offset == len(self._unsent[0]):
            self._sent.append(self._unsent.popleft())
            self._offset = 0

    def acknowledged(self, next_number: int) -> None:
        """The gateway has taken all frames below `next_number`."""
        while self.first < next_number and self._sent:
            self._num_bytes -= len(self._sent.popleft())
            self.first += 1

    def begin(self, next_number: int) -> None:
        """A new connection has been opened, and the gateway expects `next_number`. What it lacks is unsent again."""
        self._unsent.extendleft(reversed(self._sent))
        self._sent.clear()
        self._offset = 0
        while self.first < next_number and self._unsent:
            self._num_bytes -= len(self._unsent.popleft())
            self.first += 1
