"""NCCL for tests: also one that never posts a receive, so that the other end's kernel waits on its GPU."""

from __future__ import annotations

import threading
from typing import Any

import torch

from kv_transfer.nccl_wire import CudaMark, NcclDevice, NcclWire
from kv_transfer.wire import Check
from tests.support.host_wire import NUM_TRIALS


def gpu_device(index: int, is_deaf: bool = False) -> NcclDevice:
    torch.cuda.set_device(index)
    return DeafDevice(index) if is_deaf else NcclDevice(index)


class _Never:
    def __init__(self, aborted: threading.Event) -> None:
        self._aborted = aborted

    def wait(self) -> bool:
        return self._aborted.wait(60.0)


class DeafWire(NcclWire):
    """Receives the trial messages and no part."""

    def __init__(self, index: int, token: bytes, rank: int) -> None:
        super().__init__(index, token, rank)
        self._num_received = 0
        self._aborted = threading.Event()

    def receive(self, data: torch.Tensor, after: CudaMark | None, check: Check) -> Any:
        self._num_received += 1
        return super().receive(data, after, check) if self._num_received <= NUM_TRIALS else _Never(self._aborted)

    def abort(self) -> None:
        super().abort()
        self._aborted.set()


class DeafDevice(NcclDevice):
    def make(self, token: bytes, rank: int) -> NcclWire:
        return DeafWire(self.index, token, rank)
