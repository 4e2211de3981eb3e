"""Reads large bodies and messages in a process of its own: a parser holds the interpreter's lock until it has ended.

One is read at a time. The process starts with the first one. It ends after a very large one, which frees its
memory, and with the gateway, because its input ends then.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

from pydantic import ValidationError

from control_plane.gateway.grpc_front.codec import decode_raw
from control_plane.gateway.http_front.openai_errors import from_validation
from control_plane.gateway.http_front.openai_schema import SCHEMAS, Body
from phasewise.core.errors import InternalError, ServingError

logger = logging.getLogger(__name__)

VERY_LARGE_BYTES = 1 << 20
"""From here on a body's memory is given back by ending the process."""

_TIMEOUT_S = 60.0  # a body of 16 MiB takes some 2 s

_Schema = TypeVar("_Schema", bound=Body)


class LargeBodies:
    """The process, as the gateway sees it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="large-bodies")
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    async def parse(self, kind: str, raw: bytes) -> Any:
        """What `raw` says: a body of the schema of that name, or a message of that gRPC method.

        Raises:
            InvalidRequest: as for a small one.
            InternalError: the process died while it parsed the body.
        """
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._thread, self._exchange, kind, raw)
        if isinstance(answer, ServingError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._end()

    def _exchange(self, kind: str, raw: bytes) -> Any:
        """Asks once more where the process that was there already has died: it may have been killed meanwhile."""
        is_new = self._process is None
        try:
            return self._ask(kind, raw)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._end()
            if not is_new and not self._is_closed:
                return self._exchange(kind, raw)
            logger.error("the process that parses large bodies has died over one of %d bytes", len(raw))
            return InternalError("the body could not be parsed; the gateway's log has the cause")
        finally:
            if len(raw) >= VERY_LARGE_BYTES:
                self._end()

    def _ask(self, kind: str, raw: bytes) -> Any:
        process = self._process = self._process or _start()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(_TIMEOUT_S, process.kill)
        timer.start()
        try:
            pickle.dump((kind, raw), process.stdin, protocol=5)
            process.stdin.flush()
            return pickle.load(process.stdout)
        finally:
            timer.cancel()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):  # input that was not sent is discarded
                process.communicate()


def _start() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "control_plane.gateway.large_bodies"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def parse_body(raw: bytes, schema: type[_Schema]) -> _Schema:
    """A JSON body as `schema`. Raises InvalidRequest."""
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise from_validation(error, schema) from None


def _read(kind: str, raw: bytes) -> Any:
    if kind not in SCHEMAS:
        return decode_raw(kind, raw)
    body = parse_body(raw, SCHEMAS[kind])
    body.compact()
    return body


def _serve(bodies: IO[bytes], answers: IO[bytes]) -> None:
    """Answers each (kind, body) with what it says, or with what is wrong with it."""
    while True:
        try:
            kind, raw = pickle.load(bodies)
        except EOFError:
            return
        try:
            answer = _read(kind, raw)
        except ServingError as error:
            answer = error
        pickle.dump(answer, answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher
    os.nice(10)  # streams go first
    gc.disable()  # JSON has no cycles, and looking for them among millions of lists takes longer than parsing them
    _serve(sys.stdin.buffer, sys.stdout.buffer)
