"""`phasewise profile` end to end on a tiny model, and workers that take what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.main import run
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError
from phasewise.core.placement import WorkerRole
from phasewise.core.profile import DeviceProfile
from tests.support.tiny_model import save_tiny_model
from workers.build import LoadedEngine, load_engine
from workers.settings import WorkerSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, context=1024)
    return folder


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(model: Path, profile: Path | None, /, *, num_threads: int = 1, **sections: Any) -> LoadedEngine:
    """As a worker starts."""
    path = None if profile is None else str(profile)
    values = {"cache": {"kv_cache_gib": 0.02}, **sections}
    values["model"] = {"path": str(model), "profile": path, **values.get("model", {})}
    config = build_config(values, source="test")
    settings = WorkerSettings("mixed-0", WorkerRole.MIXED, "cpu", num_threads, config)
    return load_engine(settings, lambda share: None, MonotonicClock())


def test_a_written_profile_is_what_workers_take(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profile.json"
    options = ["--device", "cpu", "--threads", "1", "--budget", "4", "--output", str(file)]
    assert run(["profile", "--model", str(model), *options]) == 0
    shown = capsys.readouterr().out
    assert "Llama, 4 layers of 64, 4/2 heads of 16, MLP 128, vocabulary 320, float32 on" in shown
    assert "prefill, ms" in shown and "decode step, ms" in shown and f"written to {file}" in shown
    profile = DeviceProfile.read(file)
    assert {point.size for point in profile.prefill.points} >= {16, 32}
    assert {point.size for point in profile.decode.points} >= {1, 2}
    facts = profile.facts
    assert (facts.dtype, facts.tensor_parallel, facts.block_size) == ("float32", 1, 16)
    assert facts.kv_blocks == 2**30 // (facts.kv_bytes_per_token * 16)
    assert min(facts.memory_bytes_per_s, facts.kv_to_host_bytes_per_s) > 1e6
    assert set(facts.versions) == {"phasewise", "torch", "triton"} and facts.command and facts.date

    assert start(model, file).profile == profile
    measured = start(model, None).profile
    assert measured != profile and measured.facts.model == facts.model
    with pytest.raises(ConfigError, match=r"was measured with device '.*, 1 threads' and this worker has '.*, 2 thr"):
        start(model, file, num_threads=2)
    with pytest.raises(ConfigError, match=r"measured with dtype 'float32' and this worker has 'bfloat16'"):
        start(model, file, model={"dtype": "bfloat16"})
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps({**json.loads((model / "config.json").read_text()), "num_hidden_layers": 2}))
    with pytest.raises(ConfigError, match=r"measured with model 'Llama, 4 layers .*' and this worker has 'Llama, 2 la"):
        start(model, file, model={"path": f"random:{shape}"})


def test_a_profile_that_cannot_be_read_is_said_before_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.profile: cannot read .*none\.json: No such file"):
        start(model, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.profile: .*bad\.json is no device profile of version 1"):
        start(model, tmp_path / "bad.json")


def test_a_context_that_the_cache_does_not_hold_is_refused_when_it_was_asked_for(model: Path) -> None:
    blocks = {"kv_cache_gib": 0.0002}  # 13 blocks of 16 KiB
    assert start(model, None, cache=blocks).max_model_len == 208
    assert start(model, None, cache=blocks, model={"max_model_len": 208}).max_model_len == 208
    with pytest.raises(ConfigError, match=r"holds 208 tokens, and model\.max_model_len is 209; give at least 0\.0003"):
        start(model, None, cache=blocks, model={"max_model_len": 209})


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (["--output", "/no/such/folder/p.json"], 2, "its folder does not exist"),
        (["--budget", "0"], 2, "'--budget'"),
        (["--model", "./nowhere"], 1, "model path './nowhere' does not exist"),
        (["--gpu-memory-utilization", "1.5"], 1, "cache.gpu_memory_utilization"),
        (["--device", "tpu"], 1, "model.device"),
    ],
)
def test_what_is_wrong_is_one_line(
    options: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["profile", *options]) == code
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_built_in_model(tmp_path: Path) -> None:
    assert run(["profile", "--device", "cpu", "--budget", "20", "--output", str(tmp_path / "p.json")]) == 0
    profile = DeviceProfile.read(tmp_path / "p.json")
    assert profile.prefill_s(128) > 0 and profile.decode_step_s(1, 128) > 0
