"""`phasewise status` against a real HTTP server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cli.main import run
from tests.cli.sse_server import SseServer, running, serve_app

STATUS: dict[str, Any] = {
    "cluster": {
        "model": "tiny", "state": "ready", "uptime_s": 3725.4, "http": "127.0.0.1:8000", "grpc": "127.0.0.1:50051",
    },
    "workers": [
        {
            "id": "prefill-0", "pid": 4242, "role": "prefill", "state": "ready", "device": "cpu", "threads": 1,
            "waiting": 3, "running": 1, "preempted": 0, "reservations": 0, "handoffs": 2, "kv_blocks": 200,
            "kv_used_blocks": 50, "kv_cached_blocks": 7, "waiting_prompt_tokens": 900,
            "counters": {"handoffs_out": 17.0},
        },
        {
            "id": "decode-0", "pid": 4243, "role": "mixed", "state": "draining", "device": "cpu", "threads": 1,
            "waiting": 0, "running": 8, "preempted": 1, "reservations": 5, "handoffs": 0, "kv_blocks": 0,
            "kv_used_blocks": 0, "kv_cached_blocks": 0, "waiting_prompt_tokens": 0, "counters": {},
        },
    ],
    "gateway": {"id": "gateway-0", "open_requests": 12, "waiting": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_the_table_shows_every_worker(capsys: pytest.CaptureFixture[str]) -> None:
    with running(SseServer(status=STATUS)) as server:
        assert run(["status", "--http", server.address]) == 0
    shown = capsys.readouterr().out
    assert "tiny: ready, up 1:02:05, http 127.0.0.1:8000, grpc 127.0.0.1:50051" in shown
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.startswith(("prefill", "decode"))}
    prefill = "prefill-0 4242 prefill ready 3 1 0 25% of 200 0 2 open, 17 out"
    assert rows["prefill-0"] == prefill.split()
    decode = "decode-0 4243 mixed draining 0 8 1 - 5 0 open"
    assert rows["decode-0"] == decode.split()
    assert "gateway-0: 12 open requests" in shown


def test_json_is_what_the_gateway_says(capsys: pytest.CaptureFixture[str]) -> None:
    with running(SseServer(status=STATUS)) as server:
        assert run(["status", "--json", "--http", f"http://{server.address}/"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_watch_goes_on_until_it_is_interrupted() -> None:
    top = Path(__file__).resolve().parents[2]
    with running(SseServer(status=STATUS)) as server:
        command = [sys.executable, "-m", "cli.main", "status", "--watch", "--json", "--interval", "0.1"]
        process = subprocess.Popen(
            [*command, "--http", server.address], cwd=top, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert [json.loads(line) for line in lines] == [STATUS] * 3
    assert process.returncode == 130
    assert errors == ""


@pytest.mark.parametrize("answer", ["not json", "[]", '{"workers": 5}'])
def test_other_servers_are_told_apart(answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def status(request: Request) -> Response:
        return PlainTextResponse(answer)

    with serve_app(Starlette(routes=[Route("/status", status)])) as address:
        assert run(["status", "--http", address]) == 1
    error = capsys.readouterr().err
    assert f"{address}/status is not that of Phasewise" in error
    assert error.count("\n") == 1


def test_a_server_without_status(capsys: pytest.CaptureFixture[str]) -> None:
    with running(SseServer()) as server:
        assert run(["status", "--http", server.address]) == 1
    assert "answers HTTP 404 to /status" in capsys.readouterr().err
