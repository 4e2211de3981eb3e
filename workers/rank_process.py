"""A rank of a tensor-parallel worker other than its first: the process that workers/ranks.py starts and commands."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import shutil
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from engine.sharding import Shard
from engine.tensor_parallel import Group
from phasewise.core.errors import ServingError
from phasewise.core.logs import setup_logging
from workers.rank_parts import load_part, make_part
from workers.ranked_cache import CacheCommands
from workers.ranks import Join, Loaded, Ready
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)


def main() -> None:
    """The descriptor of the pipe to rank 0 is the only argument."""
    pipe = Connection(int(sys.argv[1]))
    rank, settings, store_path = pipe.recv()
    logs, name = settings.config.logging, f"{settings.worker_id}.{rank}"
    setup_logging(name, log_format=logs.format, level=logs.level, collector=settings.log_collector)
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # This thread ends the process: the main thread may hang on a device whose other ranks are gone.
    threading.Thread(target=_receive, args=(pipe, commands, store_path), daemon=True).start()
    try:
        _serve(pipe, commands, settings, Group(Shard(rank, settings.tensor_parallel)), store_path)
    except Exception:
        logger.exception("the rank broke", extra={"worker_id": settings.worker_id})
        logging.shutdown()
        os._exit(1)


def _receive(pipe: Connection, commands: queue.SimpleQueue[Any], store_path: str) -> None:
    """Puts received commands into the queue; ends the process when rank 0 has closed the pipe, or is gone."""
    while True:
        try:
            commands.put(pickle.loads(pipe.recv_bytes()))
        except (EOFError, OSError):
            shutil.rmtree(Path(store_path).parent, ignore_errors=True)  # rank 0's, which may have been killed
            os._exit(0)


def _serve(
    pipe: Connection, commands: queue.SimpleQueue[Any], settings: WorkerSettings, group: Group, store_path: str
) -> None:
    """Loads this rank's part, joins the group, and carries out commands for ever."""
    torch.set_num_threads(settings.num_threads)
    try:
        loaded = load_part(settings, group, progress=lambda share: None)
    except ServingError as error:
        pipe.send(error)
        return
    pipe.send(Loaded())
    join: Join = commands.get()
    cache, runner = make_part(loaded, settings, group, join, store_path)
    pipe.send(Ready())
    cache_commands = CacheCommands(cache, group)
    while True:
        command = commands.get()
        if not cache_commands.carry_out(command):
            runner.carry_out(command)


if __name__ == "__main__":
    main()
