"""Ranks of a tensor-parallel group as processes of a test: each runs a function by name, together."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.sharding import Shard
from engine.tensor_parallel import Group

_TIMEOUT_S = 120.0


class Ranks:
    """`size` processes of one group on the CPU. `run` gives every rank's result, by rank."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, Shard(rank, size), str(Path(self._folder.name) / "store"))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(group, *arguments) on every rank, which must be importable. Raises what a rank raised."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for pipe in self._pipes:
            assert pipe.poll(_TIMEOUT_S), "a rank does not answer"
            results.append(pipe.recv())
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10.0)
            process.kill()
        self._folder.cleanup()


def _serve(pipe: Any, shard: Shard, store: str) -> None:
    torch.set_num_threads(1)
    group = Group(shard)
    group.connect(store, torch.device("cpu"))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            result = function(group, *arguments)
        except Exception as error:  # crosses to the test
            result = error
        pipe.send(result)
    group.close()
