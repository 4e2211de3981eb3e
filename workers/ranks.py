"""The other ranks of a tensor-parallel worker, as its child processes: start, commands, and what happens when one ends.

    worker (rank 0)                          child (rank r), workers/follower.py
    spawn, settings      ──────────────────► loads its part of the weights
                         ◄──────────────────  Loaded, or the error that a user can mend
    Join: sizes of cache ──────────────────► joins the group, makes cache and runner (so does rank 0)
                         ◄──────────────────  Ready
    commands of a step   ──────────────────► computes what rank 0 computes
    pipe closed          ──────────────────► ends at once, even in the middle of a step

Nothing comes back after Ready. A rank that is gone leaves the others waiting on their devices for ever, where no
exception reaches them: so the worker's process ends with it, within a second, and the cluster goes on as it does
after any lost worker.
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
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from engine.kv_cache import PagedKVCache
from engine.tensor_parallel import Command
from phasewise.core.errors import InternalError, ServingError
from phasewise.core.kv_spec import KVCacheSpec
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

    def wait_loaded(self) -> None:
        """Raises the ServingError that a rank met, or InternalError when one ended."""
        for rank, pipe in enumerate(self._pipes, start=1):
            self._answer(rank, pipe, Loaded)

    def join(self, join: Join) -> None:
        """Tells all ranks to join the group; the caller must do so now, too."""
        self._send(join)

    def wait_ready(self) -> None:
        """As `wait_loaded`. From here on the end of a rank is the end of this process."""
        for rank, pipe in enumerate(self._pipes, start=1):
            self._answer(rank, pipe, Ready)
        self._is_up = True

    def tell(self, command: Command) -> None:
        """Sends a command to all ranks, before rank 0 does the same."""
        self._send(command)

    def broken(self, reason: str) -> None:
        """Ends this process: rank 0 failed where the others wait for it."""
        self._on_lost(f"rank 0 of {self._worker_id}: {reason}; so the whole worker ends")

    def close(self) -> None:
        """Ends the ranks: they end when the pipe does."""
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

    # ---- inside

    def _spawn(self, rank: int, settings: WorkerSettings) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "workers.follower", str(theirs.fileno())]
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
        os._exit(1)  # the step loop's thread may hang on its device: nothing gentler gets through


class LeadingKVCache(PagedKVCache):
    """Rank 0's cache: what moves in it moves in the other ranks' caches, too (`follow_cache`)."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: str, ranks: Ranks) -> None:
        super().__init__(spec, num_blocks, device)
        self._ranks = ranks
        self._num_swaps = 0
        self._keys: dict[int, int] = {}  # by id of what was given out
        self._dropped: list[int] = []  # swaps that nobody will copy in any more

    def copy_block(self, source: int, target: int) -> None:
        self._ranks.tell(("copy_block", source, target))
        super().copy_block(source, target)

    def copy_out(self, blocks: Sequence[int]) -> torch.Tensor:
        key, self._num_swaps = self._num_swaps, self._num_swaps + 1
        dropped, self._dropped = self._dropped, []
        self._ranks.tell(("copy_out", key, list(blocks), dropped))
        content = super().copy_out(blocks)
        self._keys[id(content)] = key
        weakref.finalize(content, self._forget, id(content)).atexit = False
        return content

    def copy_in(self, content: torch.Tensor, blocks: Sequence[int]) -> None:
        self._ranks.tell(("copy_in", self._keys[id(content)], list(blocks)))
        super().copy_in(content, blocks)

    def _forget(self, content_id: int) -> None:
        self._dropped.append(self._keys.pop(content_id))


def follow_cache(cache: PagedKVCache, swapped: dict[int, torch.Tensor], command: Command) -> bool:
    """Does what a LeadingKVCache did; False when the command is not about the cache. `swapped`: this rank's copies."""
    match command:
        case ("copy_block", source, target):
            cache.copy_block(source, target)
        case ("copy_out", key, blocks, dropped):
            for old in dropped:
                swapped.pop(old, None)  # gone already when it was copied in
            swapped[key] = cache.copy_out(blocks)
        case ("copy_in", key, blocks):
            cache.copy_in(swapped.pop(key), blocks)
        case _:
            return False
    return True
