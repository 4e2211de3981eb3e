"""A worker's links without a worker: in the test's process (`LinkNode`), or in one to be killed (`NodeProcess`)."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

from kv_transfer.direct_link import DirectLinks
from kv_transfer.link import ArrivedPart
from kv_transfer.wire import WireDevice
from phasewise.core.messages import KVPart, KVPartAck, LinkLost
from tests.support.host_wire import HostDevice, HostWire

WAIT_S = 10.0
SLAB_BYTES = 1 << 16


def header(index: int, num_bytes: int) -> KVPart:
    return KVPart("t", index, 0, 1, 0, 1, num_bytes, "float32", "none")


def content(index: int, num_bytes: int) -> torch.Tensor:
    """Random bytes and their sum.  # uint8 [num_bytes]"""
    generator = torch.Generator().manual_seed(index)
    data = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    data[-8:].view(torch.int64)[0] = data[:-8].sum(dtype=torch.int64)
    return data


def is_intact(wire: torch.Tensor, answer: torch.Tensor) -> None:
    answer.copy_(wire[:-8].sum(dtype=torch.int64) == wire[-8:].view(torch.int64)[0], non_blocking=True)


class LinkNode:
    """Takes buffers, fills them, and keeps what its mailbox gets."""

    def __init__(self, worker_id: str, device: WireDevice | None = None, **changes: Any) -> None:
        self.device = device or HostDevice()
        self.mailbox: queue.Queue[tuple[Any, ArrivedPart | None]] = queue.Queue()
        settings: dict[str, Any] = {
            "fingerprint": "2 layers",
            "host": "127.0.0.1",
            "slab_bytes": SLAB_BYTES,
            "trial_bytes": 4096,
        }
        check = changes.pop("check", is_intact)
        self.links = DirectLinks(worker_id, self.device, self.post, check, **{**settings, **changes})
        self._num_bytes = self._num_free_bytes()

    def post(self, message: Any, arrived: ArrivedPart | None) -> None:
        self.mailbox.put((message, arrived))

    def try_send(self, peer: str, index: int, num_bytes: int) -> bool:
        buffer = self.links.buffer(peer, num_bytes)
        if buffer is None:
            return False
        buffer.copy_(content(index, num_bytes))
        self.links.send_part(peer, header(index, num_bytes), buffer)
        return True

    def next(self, kind: Any, timeout_s: float = WAIT_S) -> Any:
        """The next event, which must be of this kind; of a part, what arrived with it."""
        message, arrived = self.mailbox.get(timeout=timeout_s)
        assert isinstance(message, kind), message
        return (message, arrived) if kind is KVPart else message

    def take(self, index: int, num_bytes: int) -> None:
        """The next event is this part, and it is right."""
        part, arrived = self.next(KVPart)
        assert part == header(index, num_bytes)
        assert torch.equal(arrived.wire.cpu(), content(index, num_bytes))
        arrived.release()

    def take_both(self, index: int, num_bytes: int) -> None:
        """The next two events are this part and the acknowledgement of the one that went the other way."""
        events = [self.mailbox.get(timeout=WAIT_S) for _ in range(2)]
        assert sorted(type(message).__name__ for message, _ in events) == ["KVPart", "KVPartAck"], events
        for event in events:
            if event[1] is not None:
                self.mailbox.put(event)
        self.take(index, num_bytes)

    @property
    def num_free(self) -> tuple[int, int]:
        """The largest slabs that there is room for, to send from and to receive into."""
        out, into = self.links.outgoing.pool, self.links.incoming.pool
        return out.num_free_bytes // out.slab_bytes, into.num_free_bytes // into.slab_bytes

    @property
    def is_clean(self) -> bool:
        return self._num_free_bytes() == self._num_bytes

    def _num_free_bytes(self) -> tuple[int, int]:
        return self.links.outgoing.pool.num_free_bytes, self.links.incoming.pool.num_free_bytes

    def hold(self) -> None:
        """From here on, nothing is ever packed."""
        assert isinstance(self.device, HostDevice)
        self.device.packed = threading.Event()

    def close(self) -> None:
        self.links.close()


class NodeProcess:
    """A LinkNode in a process of its own, which does what `do` says and tells what its hook saw."""

    def __init__(self, worker_id: str, stop_at: str = "", **settings: Any) -> None:
        """`stop_at`: the stage at which its wire stops for good. `settings` of DirectLinks."""
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, worker_id, stop_at, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.address: str = self.hear()

    def do(self, name: str, *arguments: Any) -> Any:
        """Calls a method of the node, or of its links, and gives its result."""
        self._pipe.send((name, arguments))
        return self.hear()

    def hear(self) -> Any:
        assert self._pipe.poll(60.0), "the node says nothing"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self.process.kill()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def is_stopped(self) -> bool:
        """Whether a SIGSTOP has reached all threads."""
        states = Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        return all(state.read_text().rpartition(")")[2].split()[0] == "T" for state in states)

    def close(self) -> None:
        self.kill()
        self.process.join(10.0)
        self._pipe.close()
        self.process.close()

    @staticmethod
    def prepare() -> None:
        """Starts the server that forks nodes, with torch loaded."""
        multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.support.link_node"])
        forkserver.ensure_running()


def _serve(pipe: Any, worker_id: str, stop_at: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)

    if "gpu" in settings:
        from tests.support.deaf_wire import gpu_device

        device = gpu_device(settings.pop("gpu"), is_deaf=stop_at == "go")
    else:
        device = HostDevice(hook=partial(_stop, pipe, stop_at))
    node = LinkNode(worker_id, device, **settings)
    pipe.send(node.links.address)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = getattr(node if hasattr(node, name) else node.links, name)
            result = result(*arguments) if callable(result) else result
        except Exception as error:  # crosses to the test
            result = error
        pipe.send(None if isinstance(result, KVPartAck | LinkLost | tuple) else result)


def _stop(pipe: Any, stop_at: str, stage: str, part: int, wire: HostWire) -> None:
    if stage == stop_at:
        pipe.send(stage)
        wire.aborted.wait(60.0)
