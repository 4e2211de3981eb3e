"""Recorded requests through a whole cluster in virtual time, in processes without torch, ray, grpc and asyncio."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.virtual_cluster.scenario import read_requests

pytestmark = pytest.mark.timeout(3600)  # a run takes a minute or two of processor time, however busy the machine is

ROOT = Path(__file__).resolve().parents[2]


def run_cluster(*arguments: str) -> dict[str, Any]:
    """What `python -m tests.virtual_cluster` says; whatever it checks fails the test."""
    command = [sys.executable, "-m", "tests.virtual_cluster", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    print(f"{result['num_events']} events, {result['events_per_s']} per second of processor time")
    return result


def assert_all_finished(result: dict[str, Any], trace: Literal["code", "conv"], num_requests: int) -> None:
    """Each request once, with all its tokens. That they were the right ones, in order, the run has checked."""
    requests = read_requests(trace, num_requests)
    assert result["statuses"] == {"finished": num_requests}
    assert result["num_ended"] == num_requests
    assert result["num_tokens"] == sum(request.num_output_tokens for request in requests)
    assert result["errors"] == {}


def test_ten_thousand_requests_of_the_code_trace_end_once_with_their_tokens() -> None:
    result = run_cluster("--trace", "code", "--requests", "10000", "--speed", "8", "--seed", "1")
    assert_all_finished(result, "code", 10_000)
    assert result["num_given_up"] == 0
    handed_off = [request for request in read_requests("code", 10_000) if request.num_output_tokens > 1]
    assert result["num_handoffs"] <= len(handed_off)  # the word of some comes behind their last token
    assert result["num_handoffs"] >= 0.99 * len(handed_off)


@pytest.mark.slow
def test_the_conversation_trace_ends_once_with_its_tokens() -> None:
    result = run_cluster("--trace", "conv", "--requests", "10000", "--speed", "2", "--seed", "1")
    assert_all_finished(result, "conv", 10_000)
    assert result["num_given_up"] == 0


@pytest.mark.parametrize("arguments", [("code", 500, 4, 1024), ("conv", 200, 4, 150)], ids=["code", "conv"])
def test_requests_recover_from_lost_workers_broken_links_and_messages_that_come_late(
    arguments: tuple[Literal["code", "conv"], int, int, int],
) -> None:
    trace, num_requests, speed, num_blocks = arguments
    result = run_cluster(
        *("--trace", trace, "--requests", str(num_requests), "--speed", str(speed), "--blocks", str(num_blocks)),
        *("--faults", "--seed", "2"),
    )
    assert_all_finished(result, trace, num_requests)
    assert [worker_id.split("-")[0] for worker_id in result["lost_workers"]] == ["prefill", "decode"]
    assert result["num_broken_transfers"] > 0
    assert result["num_preempted"] > 0 or trace == "code"
    assert result["num_given_up"] > 0


def test_the_same_seed_takes_the_same_course_and_another_seed_another() -> None:
    digests = [
        run_cluster("--requests", "200", "--speed", "4", "--faults", "--seed", seed)["digest"]
        for seed in ("7", "7", "8")
    ]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


@pytest.mark.parametrize("package", ["torch", "ray", "grpc.aio", "asyncio"])
def test_a_run_would_end_at_the_first_import_of_what_decisions_do_without(package: str) -> None:
    code = (
        "import sys\n"
        "from tests.virtual_cluster.__main__ import ImportBlocker\n"
        "sys.meta_path.insert(0, ImportBlocker())\n"
        f"try:\n    import {package}\nexcept ImportError:\n    pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"ForbiddenImport: {package.split('.')[0]}" in done.stderr
    assert done.returncode != 0
