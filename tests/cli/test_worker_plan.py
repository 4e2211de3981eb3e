"""Which workers a configuration asks for."""

from __future__ import annotations

import os
from typing import Any

import pytest

from cli.worker_plan import choose_device, worker_settings
from phasewise.core.config import ServingConfig, build_config
from phasewise.core.errors import ConfigError


def config(device: str = "auto", **pools: Any) -> ServingConfig:
    return build_config({"model": {"device": device}, "pools": pools}, source="test")


@pytest.mark.parametrize(
    ("device", "num_gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("auto", 8, "cuda"), ("cpu", 8, "cpu"), ("cuda", 2, "cuda")],
)
def test_auto_takes_gpus_where_there_are_any(device: str, num_gpus: int, expected: str) -> None:
    assert choose_device(config(device), num_gpus, num_gpus) == expected


@pytest.mark.parametrize(("device", "num_gpus"), [("auto", 1), ("cuda", 1), ("cuda", 0)])
def test_too_few_gpus_are_an_error_that_says_how_many(device: str, num_gpus: int) -> None:
    with pytest.raises(ConfigError, match=f"2 workers need 2 GPUs and Ray sees {num_gpus}; .+ --device cpu"):
        choose_device(config(device), num_gpus, num_gpus)


def test_gpus_that_others_have_taken_do_not_count() -> None:
    with pytest.raises(ConfigError, match="need 2 GPUs and Ray sees 8, of which 7 are taken"):
        choose_device(config("auto"), 8, 1)
    assert choose_device(config("auto"), 8, 2) == "cuda"


def test_each_rank_of_a_worker_is_a_gpu() -> None:
    ranks = config("auto", prefill={"tensor_parallel": 2}, decode={"tensor_parallel": 1})
    assert choose_device(ranks, 3, 3) == "cuda"
    with pytest.raises(ConfigError, match="2 workers need 3 GPUs and Ray sees 2"):
        choose_device(ranks, 2, 2)


def test_workers_are_numbered_in_their_pools_and_share_the_cores_that_nobody_claimed() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    plan = worker_settings(config(prefill={"workers": 2, "threads": 3}, mixed={"workers": 1}), "cpu", "/log")
    assert [s.worker_id for s in plan] == ["prefill-0", "prefill-1", "decode-0", "mixed-0"]
    assert [s.num_threads for s in plan] == [3, 3, max(cores // 4, 1), max(cores // 4, 1)]
    assert {(s.device, s.log_collector) for s in plan} == {("cpu", "/log")}
