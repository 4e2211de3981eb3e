"""Wires between GPUs: a NCCL communicator of two ranks over torch's memory, through CuPy. The only file with CuPy.

CuPy lets other threads run during all calls of NCCL. Of what can hang there, `connect` is ended by NCCL's own abort
flag, which its bootstrap polls, and an operation under way by the same flag, which its kernel polls.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch  # first: so that CuPy finds the NCCL that torch has loaded
from cupy.cuda import Device, nccl

from kv_transfer.wire import Check, Mark, WireError
from phasewise.core.errors import ConfigError

_ENQUEUE_TIMEOUT_S = 1.0
_CONNECT_GRACE_S = 2.0


class NcclDevice:
    """One GPU as the end of links (`WireDevice`).

    `num_channels` is how many multiprocessors a transfer takes, at both ends the same. NCCL reads it once in a process,
    so it must be made before any other communicator, and an operator's own NCCL_MAX_P2P_NCHANNELS wins. Each
    communicator has memory for all of its channels, whether they are used or not; so where nothing else in the process
    uses NCCL (`is_only_user`), collectives are bound by the number, too. Multicast stays off: two ranks gain nothing by
    it, and it takes memory of the switches.

    Raises:
        ConfigError: CuPy finds no NCCL.
    """

    def __init__(self, index: int, num_channels: int = 16, *, is_only_user: bool = False) -> None:
        if not nccl.available:
            raise ConfigError("links over NCCL need the library that CuPy was built for: pip install nvidia-nccl-cu13")
        os.environ.setdefault("NCCL_MAX_P2P_NCHANNELS", str(num_channels))
        if is_only_user:
            os.environ.setdefault("NCCL_MAX_CTAS", str(num_channels))
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        self.index = index
        self._torch_device = torch.device("cuda", index)

    @property
    def kind(self) -> str:
        return f"nccl {nccl.get_version()}, {os.environ['NCCL_MAX_P2P_NCHANNELS']} channels"

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._torch_device)

    def mark(self) -> CudaMark:
        return CudaMark(torch.cuda.current_stream(self._torch_device))

    def token(self) -> bytes:
        return nccl.get_unique_id()

    def make(self, token: bytes, rank: int) -> NcclWire:
        return NcclWire(self.index, token, rank)


class CudaMark:
    """An event. Waiting for it blocks, or spins outside of the interpreter: a blocking wait adds one wake-up of the
    scheduler."""

    def __init__(self, stream: torch.cuda.Stream, *, spins: bool = False) -> None:
        self.event = torch.cuda.Event(blocking=not spins)
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class NcclReceipt:
    """The answer of a check, which the device writes to the host. After an abort it says anything."""

    def __init__(self, data: torch.Tensor, check: Check, stream: torch.cuda.Stream) -> None:
        self._is_right = torch.empty(1, dtype=torch.bool, pin_memory=True)
        check(data, self._is_right)
        self._mark = CudaMark(stream, spins=True)  # the bytes are on their way: it is a matter of a millisecond

    def wait(self) -> bool:
        self._mark.wait()
        return bool(self._is_right.item())


class NcclWire:
    """One end (`Wire`), with a stream of its own of high priority: a transfer is short, and others wait for it."""

    def __init__(self, index: int, token: bytes, rank: int) -> None:
        self._index = index
        self._token = token
        self._rank = rank
        # Made before it is initialised, so that `abort` can reach it while `connect` blocks in there.
        self._communicator = nccl.NcclCommunicator.__new__(nccl.NcclCommunicator)
        self._stream = torch.cuda.Stream(index, priority=-1)
        self._lock = threading.Lock()  # held while operations are enqueued: an abort frees what they use
        self._is_aborted = False
        self._is_idle = threading.Event()  # not in `connect`
        self._is_idle.set()

    def connect(self) -> None:
        self._is_idle.clear()
        try:
            if self._is_aborted:
                raise WireError("aborted")
            with torch.cuda.device(self._index), Device(self._index):
                self._communicator.__init__(2, self._token, self._rank)
        except nccl.NcclError as error:
            raise WireError(f"NCCL does not connect: {error}") from None
        finally:
            self._is_idle.set()

    def send(self, data: torch.Tensor, after: Mark | None = None) -> CudaMark:
        with self._lock:
            self._call(self._communicator.send, data, after)
            return CudaMark(self._stream, spins=True)

    def receive(self, data: torch.Tensor, after: Mark | None, check: Check) -> NcclReceipt:
        with self._lock:
            # First of all: until it is there, the sender's kernel keeps multiprocessors from the prompts beside it.
            self._call(self._communicator.recv, data, after)
            with torch.cuda.stream(self._stream):
                return NcclReceipt(data, check, self._stream)

    def error(self) -> str:
        if not self._lock.acquire(blocking=False):
            return ""  # in use, or being aborted
        try:
            if not self._is_aborted:
                self._communicator.check_async_error()
        except nccl.NcclError as error:
            return str(error)
        finally:
            self._lock.release()
        return ""

    def abort(self) -> None:
        self._is_aborted = True
        # An abort in the last steps of making a communicator frees what they still use; a dead peer ends those anyway.
        is_idle = self._is_idle.wait(_CONNECT_GRACE_S)
        while not is_idle:
            self._end_communicator()
            is_idle = self._is_idle.wait(0.1)
        # A call that hangs in NCCL does not let go of the lock before it is aborted.
        has_lock = self._lock.acquire(timeout=_ENQUEUE_TIMEOUT_S)
        try:
            self._end_communicator()
            self._stream.synchronize()
        finally:
            if has_lock:
                self._lock.release()

    def _end_communicator(self) -> None:
        with torch.cuda.device(self._index), Device(self._index):
            self._communicator.abort()

    def _call(self, function: Callable[..., None], data: torch.Tensor, after: Mark | None) -> None:
        if self._is_aborted:
            raise WireError("aborted")
        torch.cuda.set_device(self._index)  # of this thread, which a context manager would give back, for 10 us
        if after is not None:
            assert isinstance(after, CudaMark)
            self._stream.wait_event(after.event)
        try:
            function(data.data_ptr(), data.numel(), nccl.NCCL_UINT8, 1 - self._rank, self._stream.cuda_stream)
        except nccl.NcclError as error:
            raise WireError(str(error)) from None
