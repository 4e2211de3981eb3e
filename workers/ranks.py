"""The other ranks of a tensor-parallel worker, as its child processes: start, commands, and what happens when one ends.

    worker (rank 0)                          child (rank r), workers/rank_process.py
    spawn, settings      ──────────────────► loads its part of the weights
                         ◄──────────────────  Loaded, or the error that a user can mend
    Join: sizes of cache ──────────────────► joins the group, makes cache and runner (so does rank 0)
                         ◄──────────────────  Ready
    commands of a step   ──────────────────► computes what rank 0 computes
    pipe closed          ──────────────────► ends at once, even in the middle of a step

Nothing comes back after Ready. When a rank ends, the others wait on their devices for ever, where no exception reaches
them. So the worker's process ends too, within a second, and the cluster goes on as after any lost worker.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine.tensor_parallel import Command
from phasewise.core.errors import InternalError, ServingError
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 1800.0  # weights of a large model from a slow disk


@dataclass(frozen=True, slots=True)
class Loaded:
    """A rank has its weights."""


@dataclass(frozen=True, slots=True)
class Join:
    """Everything that ranks must agree on; rank 0 decides it."""

    num_blocks: int
    max_model_len: int
    max_batch: int
    num_swap_blocks: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A rank has a runner and takes commands."""


class Ranks:
    """Ranks 1 … of one worker. Used by one thread at a time; `on_lost` is called by another.

    `on_lost(reason)` must end this process; tests give another.
    """

    def __init__(self, settings: WorkerSettings, on_lost: Callable[[str], None] | None = None) -> None:
        self._worker_id = settings.worker_id
        self._on_lost = on_lost or self._end_process
        self._is_closing = False
        self._is_up = False
        self._folder = tempfile.TemporaryDirectory(prefix="pw-ranks-")  # private to this user, as is what is in it
        self.store_path = str(Path(self._folder.name) / "store")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        for rank in range(1, settings.tensor_parallel):
            self._spawn(rank, settings)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank from 1 on."""
        return [process.pid for process in self._processes]

    def wait_loaded(self) -> None:
        """Waits until every rank has its weights.

        Raises:
            ServingError: the one that a rank met.
            InternalError: a rank ended, or was not ready in time.
        """
        for rank, pipe in enumerate(self._pipes, start=1):
            self._answer(rank, pipe, Loaded)

    def join(self, join: Join) -> None:
        """Tells all ranks to join the group; the caller must do so now, too. Raises as `tell`."""
        self._send(join)

    def wait_ready(self) -> None:
        """Waits until every rank takes commands. From then on this process ends when a rank does.

        Raises as `wait_loaded`.
        """
        for rank, pipe in enumerate(self._pipes, start=1):
            self._answer(rank, pipe, Ready)
        self._is_up = True

    def tell(self, command: Command) -> None:
        """Sends a command to all ranks, before rank 0 does the same.

        Raises:
            InternalError: a rank cannot be reached.
        """
        self._send(command)

    def broken(self, reason: str) -> None:
        """Ends this process, because rank 0 failed while the others wait for it."""
        self._on_lost(f"rank 0 of {self._worker_id}: {reason}; so the whole worker ends")

    def close(self) -> None:
        """Ends the ranks, which end when their pipe is closed, and waits for them."""
        self._is_closing = True
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def _spawn(self, rank: int, settings: WorkerSettings) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "workers.rank_process", str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        pipe = Connection(ours.detach())
        pipe.send((rank, settings, self.store_path))
        self._processes.append(process)
        self._pipes.append(pipe)
        threading.Thread(target=self._watch, args=(rank, process), daemon=True, name=f"rank-{rank}").start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self._is_up and not self._is_closing:
            self._on_lost(f"rank {rank} of {self._worker_id} ended (exit code {code}); so the whole worker ends")

    def _answer(self, rank: int, pipe: Connection, expected: type) -> None:
        """Raises as `wait_loaded`."""
        try:
            if not pipe.poll(_START_TIMEOUT_S):
                raise InternalError(f"rank {rank} of {self._worker_id} was not ready after {_START_TIMEOUT_S:.0f} s")
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            code = self._processes[rank - 1].wait(5.0)
            raise InternalError(
                f"rank {rank} of {self._worker_id} ended while it started (exit code {code}); its log has the cause"
            ) from None
        if isinstance(answer, ServingError):
            raise answer
        assert isinstance(answer, expected), answer

    def _send(self, message: Any) -> None:
        """Raises as `tell`."""
        data = pickle.dumps(message, protocol=5)
        for pipe in self._pipes:
            try:
                pipe.send_bytes(data)
            except (ConnectionError, OSError) as error:
                if self._is_closing:
                    raise
                raise InternalError(f"a rank of {self._worker_id} cannot be reached: {error}") from None

    def _end_process(self, reason: str) -> None:
        logger.critical("%s", reason)
        shutil.rmtree(self._folder.name, ignore_errors=True)
        os._exit(1)  # the step loop's thread may wait for its device, where no exception reaches it
