"""The control messages of a direct link, and the TCP connection that carries them between two workers' processes.

One connection is one epoch of one link: nothing of an older epoch can come out of it. A frame is a length (four bytes)
and JSON: plain data, so that anybody else on the port can break a connection but not run code.

    sender → receiver     Hello, Token, Announce, Go, Commit
    receiver → sender     Hello or Refused, Ready, Grant, Left
    both, while it is up  Ping
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

from kv_transfer.plan import WIRE_VERSION
from phasewise.core.clock import Clock, MonotonicClock
from phasewise.core.messages import KVCommit, KVPart
from phasewise.core.placement import WorkerId
from phasewise.core.request import SampledToken

_LENGTH = struct.Struct(">I")
_MAX_FRAME_BYTES = 1 << 16
_SEND_TIMEOUT_S = 5  # frames are tiny and few: a connection that takes none for so long is dead


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of both ends. `process` names one life of the sending worker: its epochs only grow."""

    version: int
    kind: str = ""
    fingerprint: str = ""
    sender: WorkerId = ""
    receiver: WorkerId = ""
    process: str = ""
    epoch: int = 0
    time_left_s: float = 0.0
    secret: str = field(default="", repr=False)


@dataclass(slots=True)
class LinkIdentity:
    """What one worker says of itself in each Hello. `fingerprint` may be set later, before any link is opened."""

    worker_id: WorkerId
    kind: str
    fingerprint: str
    secret: str = field(default="", repr=False)
    version: int = WIRE_VERSION

    def hello(self, sender: WorkerId, receiver: WorkerId, process: str, epoch: int, time_left_s: float) -> Hello:
        kind, fingerprint, secret = self.kind, self.fingerprint, self.secret
        return Hello(self.version, kind, fingerprint, sender, receiver, process, epoch, time_left_s, secret)


@dataclass(frozen=True, slots=True)
class Refused:
    """The receiver will not have this link."""

    reason: str


@dataclass(frozen=True, slots=True)
class Token:
    """What both ends of the wire need to find each other, in hexadecimal."""

    data: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The wire has carried the trial messages; parts may be announced."""


@dataclass(frozen=True, slots=True)
class Announce:
    """A part is on its way through the sender's device."""

    seq: int
    part: KVPart


@dataclass(frozen=True, slots=True)
class Grant:
    """The receiver has a slab for the part."""

    seq: int


@dataclass(frozen=True, slots=True)
class Go:
    """The bytes start now: post the receive."""

    seq: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A handoff's commit."""

    commit: KVCommit


@dataclass(frozen=True, slots=True)
class Left:
    """The part is in and checked: the sender's slab is free."""

    seq: int


@dataclass(frozen=True, slots=True)
class Ping:
    """The process lives."""


ChannelMessage = Hello | Refused | Token | Ready | Announce | Grant | Go | Commit | Left | Ping
_TYPES = {cls.__name__: cls for cls in (Hello, Refused, Token, Ready, Announce, Grant, Go, Commit, Left, Ping)}
_HELLO_FIELDS = frozenset(field.name for field in dataclasses.fields(Hello))


def differences(ours: Hello, theirs: Hello) -> str:
    """What keeps two ends from talking, or ""."""
    if theirs.version != ours.version:
        return f"wire version {theirs.version} there, {ours.version} here"
    if not hmac.compare_digest(theirs.secret.encode(), ours.secret.encode()):
        return "the other end is not of this cluster: it does not know its secret"
    return "; ".join(
        f"{name} {there!r} there, {here!r} here"
        for name, there, here in (
            ("wire", theirs.kind, ours.kind),
            ("KV layout", theirs.fingerprint, ours.fingerprint),
            ("sender", theirs.sender, ours.sender),
            ("receiver", theirs.receiver, ours.receiver),
        )
        if there != here
    )


class Channel:
    """One end of a connection. `write` from any thread, `read` from one; `shutdown` makes both raise OSError."""

    def __init__(self, connection: socket.socket, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._socket = connection
        self._lock = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT_S, 0))
        connection.settimeout(None)
        self._file = connection.makefile("rb")
        self.last_heard_s = self._clock.now_s()

    @staticmethod
    def connect(address: str, timeout_s: float) -> Channel:
        """To a `host:port`. Raises OSError."""
        host, _, port = address.rpartition(":")
        return Channel(socket.create_connection((host, int(port)), timeout_s))

    def write(self, message: ChannelMessage) -> None:
        """Raises OSError when the peer is gone."""
        body = json.dumps([type(message).__name__, _plain(message)]).encode()
        with self._lock:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def read(self) -> ChannelMessage:
        """The next message but pings. Raises OSError (EOFError never) when there will be none, or it is no message."""
        while True:
            (length,) = _LENGTH.unpack(self._read_bytes(_LENGTH.size))
            if length > _MAX_FRAME_BYTES:
                raise ConnectionError(f"a frame of {length} bytes is none of this protocol")
            message = _decode(self._read_bytes(length))
            self.last_heard_s = self._clock.now_s()
            if not isinstance(message, Ping):
                return message

    def is_over(self) -> bool:
        """Whether the peer has closed the connection; for a thread that is not the one in `read`."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def shutdown(self) -> None:
        """Ends both directions; may be called from any thread, and twice."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the descriptor back. No other thread may use the channel any more."""
        self._file.close()
        self._socket.close()

    def _read_bytes(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        if len(data) < num_bytes:
            raise ConnectionError("the peer closed the connection")
        return data


def _plain(value: Any) -> Any:
    """Messages as what JSON knows; `dataclasses.asdict` takes ten times as long."""
    fields = getattr(value, "__dataclass_fields__", None)
    if fields is not None:
        return {name: _plain(getattr(value, name)) for name in fields}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _decode(body: bytes) -> ChannelMessage:
    try:
        name, fields = json.loads(body)
        cls = _TYPES[name]
        if cls is Hello:  # of another version, it may have other fields
            fields = {key: value for key, value in fields.items() if key in _HELLO_FIELDS}
        elif cls is Announce:
            fields["part"] = KVPart(**fields["part"])
        elif cls is Commit:
            (first,) = fields["commit"]["first_tokens"]
            token = None if first is None else SampledToken(int(first["token_id"]), first["logprob"])
            fields["commit"] = KVCommit(**{**fields["commit"], "first_tokens": (token,)})
        return cls(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConnectionError(f"{body[:60]!r} is no message of wire version {WIRE_VERSION}: {error}") from None
