"""Ends what a private Ray's launcher left behind when it could not end it itself: `python -m cli.ray_keeper FOLDER`.

The launcher holds the other end of this process's standard input. It writes a byte before it closes that in order. An
end without one means that it was killed: then every process that was started with FOLDER as its TMPDIR is killed, and
FOLDER is removed. Where there is no /proc, Ray's own processes notice their launcher's end within a minute.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_END_S = 10.0


class RayKeeper:
    """The launcher's side. Use as a context manager around the life of a private Ray."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __enter__(self) -> RayKeeper:
        # Of a session of its own, so that Ctrl-C at a terminal does not end it with the launcher.
        command = [sys.executable, "-m", "cli.ray_keeper", self._folder]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Ray was shut down; what it did not end, for its own control process was gone, ends here."""
        self._process.communicate(b".", timeout=_END_S)
        end_all(self._folder)


def processes_of(folder: str) -> list[int]:
    """Those that were started with this TMPDIR."""
    wanted, found = f"TMPDIR={folder}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end_all(folder: str) -> None:
    """Kills them, and those that they start meanwhile, for a bounded time; then removes the folder."""
    end_s = time.monotonic() + _END_S
    while (left := processes_of(folder)) and time.monotonic() < end_s:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)  # until the kernel has ended them
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if not sys.stdin.buffer.read(1):
        end_all(sys.argv[1])
