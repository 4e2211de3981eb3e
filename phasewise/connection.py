"""Targets and the channels to them: opened when first used, kept until closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from phasewise.core.errors import ConfigError
from phasewise.rpc.phasewise_pb2_grpc import InferenceStub

ChannelT = TypeVar("ChannelT")

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # Long prompts and log-probabilities; the server bounds what it accepts.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A gateway that hangs, or whose host is gone, sends no reset. While a call is open and nothing comes, it is asked
    # for a sign of life; without one, the call goes on at another gateway.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_500),
    ("grpc.http2.max_pings_without_data", 0),
    # A refused connection is tried again soon: between attempts our own backoff rules.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Two clients of one program share no connection, so closing one closes it.
    ("grpc.use_local_subchannel_pool", 1),
)


def parse_targets(target: str | Sequence[str]) -> tuple[str, ...]:
    """One target or several, each as gRPC writes them: `HOST:PORT`, `dns:///NAME:PORT`, `unix:PATH`.

    A text may hold several with commas between them, but for gRPC's own lists (`ipv4:HOST:PORT,HOST:PORT`).
    """
    if isinstance(target, str):
        is_one = target.startswith(("ipv4:", "ipv6:"))
        targets = (target,) if is_one else tuple(name.strip() for name in target.split(","))
    else:
        targets = tuple(target)
    if not targets or not all(isinstance(name, str) and name.strip() for name in targets):
        raise ConfigError(f"target must be HOST:PORT or a list of them, not {target!r}", field="target")
    return targets


class Connections(Generic[ChannelT]):
    """One channel per target. Safe to use from several threads."""

    def __init__(self, targets: tuple[str, ...], open_channel: Callable[[str], ChannelT]) -> None:
        self.targets = targets
        self._open_channel = open_channel
        self._lock = threading.Lock()
        self._channels: dict[int, tuple[ChannelT, InferenceStub]] = {}
        self._pid: int | None = None
        self._is_closed = False

    def stub(self, index: int) -> InferenceStub:
        """The stub for a target. Raises RuntimeError after `take_all`, and in a forked child of the first user."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("this client is closed: make a new one")
            if self._pid is None:
                self._pid = os.getpid()
            if self._pid != os.getpid():
                # gRPC's threads do not survive a fork: a call would hang for ever.
                raise RuntimeError("this client was used before the process forked: make and use clients in the child")
            if index not in self._channels:
                channel = self._open_channel(self.targets[index])
                self._channels[index] = (channel, InferenceStub(channel))
            return self._channels[index][1]

    def take_all(self) -> list[ChannelT]:
        """Closes this pool and hands its channels over for closing."""
        with self._lock:
            self._is_closed = True
            channels = [channel for channel, _ in self._channels.values()]
            self._channels.clear()
            return channels
