"""Logging of all processes of a cluster, in one form: text for people, or one JSON object per line.

Every record may carry `request_id` and `worker_id` (`extra={…}`). On a one-machine cluster the processes send their
lines to the command that started them, over a local datagram socket, so that all of it appears in one place.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]
_EXTRA = ("request_id", "worker_id")
_MAX_BYTES = 60_000  # of one line on the socket


class TextFormatter(logging.Formatter):
    """`12:00:01 INFO  decode-0: message [request_id=…]`"""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {process}: %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        extra = " ".join(f"{name}={value}" for name in _EXTRA if (value := getattr(record, name, None)))
        line = super().format(record)
        return f"{line} [{extra}]" if extra else line


class JsonFormatter(logging.Formatter):
    """One object per line: time, level, process, logger, message, and what the record carries."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: value for name in _EXTRA if (value := getattr(record, name, None))}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class _DatagramHandler(logging.Handler):
    """Sends formatted lines to a `LogCollector`, without waiting: lines are lost while it is gone or busy."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendto(self.format(record).encode("utf-8", "replace")[:_MAX_BYTES], self._path)

    def close(self) -> None:
        self._socket.close()
        super().close()


def setup_logging(
    process: str, *, log_format: LogFormat, level: str, collector: str | None = None, stream: TextIO | None = None
) -> None:
    """Sends this process's log to `stream` (default: standard error), or to the collector's socket at `collector`."""
    handler: logging.Handler = _DatagramHandler(collector) if collector else logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for noisy in ("asyncio", "httpx", "httpcore", "uvicorn.access", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class LogCollector:
    """Prints what the cluster's processes log. Use as a context manager; `path` is the socket's address."""

    def __init__(self, path: str, out: TextIO | None = None) -> None:
        self.path = path
        self._out = out or sys.stderr
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._thread = threading.Thread(target=self._run, name="log-collector", daemon=True)

    def __enter__(self) -> LogCollector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self.path)  # an empty line is the end: everything sent before it is printed first
        self._thread.join()
        self._socket.close()
        os.unlink(self.path)

    def _run(self) -> None:
        while line := self._socket.recv(_MAX_BYTES):
            # When the reader of our output has left, lines are lost; the socket must be emptied all the same.
            with contextlib.suppress(OSError, ValueError):
                print(line.decode("utf-8", "replace"), file=self._out, flush=True)
