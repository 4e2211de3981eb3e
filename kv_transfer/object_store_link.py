"""Parts through Ray's shared memory: for CPU workers, and for pairs without a NCCL path.

A large argument of an actor call is put into the object store by the caller (one copy) and read in place by the
callee on the same host, or fetched once by the callee's host. The store frees it when the callee has let go of it.

Parts of a GPU go through pinned memory. Two threads, one for each direction, wait for the device instead of the step
loop; a CPU worker needs neither.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from kv_transfer.link import ArrivedPart, DeviceFull, Post
from kv_transfer.staging import is_intact
from phasewise.core.handles import ActorHandle, WorkerHandles
from phasewise.core.messages import KVCommit, KVPart, KVPartAck, LinkLost
from phasewise.core.placement import WorkerId

logger = logging.getLogger(__name__)

_LARGEST_PART_BYTES = 128 * 2**20
_RATE_FROM_BYTES = 2**20  # smaller parts measure the call, not the bytes
_SMOOTHING = 0.2
_PART_S = 0.0003  # until an actor's call returns to its caller, Ray 2.60


class ObjectStoreLink:
    """Sends parts as arguments of calls to the peer's actor (`post_part`), which gives them to `receive`."""

    is_full = False
    uses_store = True

    def __init__(self, worker_id: WorkerId, workers: WorkerHandles, device: torch.device, post: Post) -> None:
        self._worker_id = worker_id
        self._workers = workers
        self._device = device
        self._post = post
        self._rates: dict[WorkerId, float] = {}
        self._is_closed = False
        self._threads: list[ThreadPoolExecutor] = []
        if device.type == "cuda":
            self._threads = [ThreadPoolExecutor(1, name) for name in ("kv-to-host", "kv-from-host")]
            self._streams = [torch.cuda.Stream(device) for _ in self._threads]

    def name(self, peer: WorkerId) -> str:
        return "object_store"

    def part_s(self, peer: WorkerId) -> float:
        return _PART_S

    def max_part_bytes(self, peer: WorkerId) -> int:
        return _LARGEST_PART_BYTES

    def bytes_per_s(self, peer: WorkerId) -> float:
        return self._rates.get(peer, 0.0)

    def buffer(self, peer: WorkerId, num_bytes: int) -> torch.Tensor | None:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise DeviceFull(str(error)) from None

    def give_back(self, wire: torch.Tensor) -> None:
        pass

    def send_part(self, peer: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        handle = self._workers.get(peer)
        if handle is None:
            return
        if not self._threads:
            self._run(0, peer, part, lambda: self._call(peer, handle, part, wire))
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._run(0, peer, part, lambda: self._send_from_device(peer, handle, part, wire, event))

    def receive(self, sender: WorkerId, part: KVPart, array: np.ndarray) -> None:
        """What came by a call: checked, brought to the device, and put into the mailbox. From one thread."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            wire = torch.from_numpy(array)
        receive = self._receive_on_device if self._threads else self._arrived
        self._run(1, sender, part, lambda: receive(sender, part, wire))

    def send_commit(self, peer: WorkerId, commit: KVCommit) -> bool:
        return False

    def forget(self, peer: WorkerId) -> None:
        self._rates.pop(peer, None)

    def close(self) -> None:
        self._is_closed = True
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    # ---- inside

    def _call(self, peer: WorkerId, handle: ActorHandle, part: KVPart, wire: torch.Tensor) -> None:
        started_s = time.perf_counter()
        ref = handle.post_part.remote(self._worker_id, part, wire.numpy())

        def ended(future: Future[None]) -> None:
            error = future.exception()
            if error is not None:
                self._lost(peer, part, error)
            elif part.num_bytes >= _RATE_FROM_BYTES:
                rate = part.num_bytes / max(time.perf_counter() - started_s, 1e-9)
                known = self._rates.get(peer, rate)
                self._rates[peer] = known + _SMOOTHING * (rate - known)

        ref.future().add_done_callback(ended)

    def _send_from_device(
        self, peer: WorkerId, handle: ActorHandle, part: KVPart, wire: torch.Tensor, event: torch.cuda.Event
    ) -> None:
        event.synchronize()
        host = torch.empty(wire.shape, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._streams[0]):
            host.copy_(wire, non_blocking=True)
        self._streams[0].synchronize()
        self._call(peer, handle, part, host)

    def _receive_on_device(self, sender: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        with torch.cuda.stream(self._streams[1]):
            on_device = wire.to(self._device)
            self._arrived(sender, part, on_device)

    def _arrived(self, sender: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        def release() -> None:
            if wire.is_cuda:
                wire.record_stream(torch.cuda.current_stream())  # its memory is not reused before it was read
            self._workers.send(sender, KVPartAck(part.transfer_id, part.part_index))

        self._post(part, ArrivedPart(wire if is_intact(wire).item() else None, release))

    def _run(self, thread: int, peer: WorkerId, part: KVPart, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as error:
                self._lost(peer, part, error)

        if self._threads:
            self._threads[thread].submit(guarded)
        else:
            guarded()

    def _lost(self, peer: WorkerId, part: KVPart, error: BaseException) -> None:
        if not self._is_closed:
            about = {"worker_id": self._worker_id}
            logger.error("a part was lost on its way through host memory", exc_info=error, extra=about)
            reason = f"{type(error).__name__}: {error}"
            self._post(LinkLost(peer, reason, frozenset({part.transfer_id})))
