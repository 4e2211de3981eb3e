"""Processes for the benchmarks of handoffs, each with devices of its own: they do what their parent tells them.

What they hold is in benchmarks/link_nodes.py and benchmarks/link_worker.py.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from workers.actor import SWITCH_S

TIMEOUT_S = 120.0  # of whatever a process was told to do


class Node:
    """A process that holds `kind(*arguments)`; `call` runs a method there. `begin` and `end` are its two halves.

    `gpus` count among those that this process sees. The first `end` returns when it is up.
    """

    def __init__(self, kind: type, gpus: Sequence[int], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, arguments), daemon=True)
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = [str(gpu) if before is None else before.split(",")[gpu] for gpu in gpus]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen)  # the process has it from the start
        try:
            self._process.start()
        finally:
            if before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
        theirs.close()

    def begin(self, name: str, *arguments: Any) -> None:
        self._pipe.send((name, arguments))

    def end(self) -> Any:
        """Raises RuntimeError with what the process raised, or that it says nothing."""
        if not self._pipe.poll(TIMEOUT_S):
            raise RuntimeError(f"a process says nothing for {TIMEOUT_S:.0f} s")
        try:
            is_right, result = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process is gone") from None
        if not is_right:
            raise RuntimeError(result)
        return result

    def call(self, name: str, *arguments: Any) -> Any:
        self.begin(name, *arguments)
        return self.end()

    def leave(self) -> None:
        """Lets the process end."""
        self._pipe.close()

    def close(self) -> None:
        """Waits for its end; kills it when it takes long."""
        self.leave()
        self._process.join(20.0)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, kind: type, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_S)
    try:
        end = kind(*arguments)
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return
    pipe.send((True, None))
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            end.close()
            return
        try:
            answer = (True, getattr(end, name)(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def pipes(*pairs: tuple[str, str]) -> dict[str, dict[str, Connection]]:
    """Control connections between ends: name → peer → connection."""
    found: dict[str, dict[str, Connection]] = defaultdict(dict)
    for one, other in pairs:
        found[one][other], found[other][one] = multiprocessing.get_context("spawn").Pipe()
    return found


def open_links(nodes: Mapping[str, Node], *links: tuple[str, str]) -> dict[tuple[str, str], float]:
    """From the first to the second of each; their rates in bytes/s."""
    addresses = {name: node.call("address") for name, node in nodes.items()}
    return {(one, other): nodes[one].call("open", other, addresses[other]) for one, other in links}
