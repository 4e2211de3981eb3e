"""`phasewise serve` as a user starts it: a process of its own, found through the line that it prints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PHASEWISE = str(Path(sys.executable).parent / "phasewise")
START_TIMEOUT_S = 180.0
_READY = re.compile(r"at http://(\S+) and grpc (\S+) \(admin (\S+)\)")


class Served:
    """A running cluster. `http`, `grpc` and `admin` are its addresses, `lines` all that it printed so far."""

    def __init__(self, arguments: list[str]) -> None:
        self._temp = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short: it holds Unix sockets
        self._process = subprocess.Popen(
            [PHASEWISE, "serve", *arguments],
            env={**os.environ, "TMPDIR": str(self._temp)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.http = self.grpc = self.admin = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        assert self._ready.wait(START_TIMEOUT_S), "\n".join(self.lines)
        assert self.http, "the cluster did not start:\n" + "\n".join(self.lines)

    def folders(self) -> list[str]:
        """What the cluster's processes have left in the folder for temporary files."""
        return [str(path) for path in self._temp.iterdir()] if self._temp.exists() else []

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait_end(self, timeout_s: float = 60.0) -> int:
        code = self._process.wait(timeout_s)
        self._reader.join(10.0)
        left = self.folders() if self._temp.exists() else []
        shutil.rmtree(self._temp, ignore_errors=True)
        assert left == [], left
        return code

    def status(self) -> dict[str, Any]:
        return self.get("/status")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.http}{path}", timeout=30) as response:
            return json.load(response)

    def health(self, path: str) -> tuple[int, str]:
        """The status of one of the health paths, and what it says is wrong."""
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=30) as response:
                return response.status, ""
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]

    def worker(self, name: str) -> dict[str, Any]:
        return next(w for w in self.status()["workers"] if w["name"] == name)

    def members(self) -> dict[str, dict[str, Any]]:
        """Workers and gateways by name, as the control plane has them."""
        status = self._ask_admin("/status")
        return {member["name"]: member for member in (*status["workers"], *status["gateways"])}

    def order(self, name: str, **fields: Any) -> Any:
        """An operator's order."""
        return self._ask_admin(f"/{name}", json.dumps(fields).encode())

    def _ask_admin(self, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(f"http://{self.admin}{path}", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as out:
            for line in out:
                self.lines.append(line.rstrip())
                if found := _READY.search(line):
                    self.http, self.grpc, self.admin = found.groups()
                    self._ready.set()
        self._ready.set()


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[Served]:
    """Starts a cluster on free ports; ends it with SIGTERM."""
    cluster = Served([*arguments, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
    try:
        cluster.wait_ready()
        yield cluster
    finally:
        if cluster._process.poll() is None:
            cluster.signal(signal.SIGTERM)
        cluster.wait_end()


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Asks again until it is so; for what another process does and only a question can tell."""
    expired = threading.Event()
    timer = threading.Timer(timeout_s, expired.set)
    timer.start()
    try:
        while not condition():
            assert not expired.wait(0.02), f"not within {timeout_s} s"
    finally:
        timer.cancel()


def held(status: dict[str, Any]) -> dict[str, Any]:
    """What is left of requests in a cluster, by worker; empty when nothing is."""
    names = ("waiting", "running", "preempted", "reservations", "handoffs", "kv_used_blocks")
    left = {w["id"]: {n: w[n] for n in names if w[n]} for w in status["workers"] if w["state"] == "ready"}
    left["gateway"] = {n: v for n, v in status["gateway"].items() if n in ("open_requests", "waiting") and v}
    return {name: values for name, values in left.items() if values}
