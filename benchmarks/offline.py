"""What the benchmarks of a whole worker share: loads, models, one mixed worker without a cluster, the result's file."""

from __future__ import annotations

import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cli.worker_plan import worker_settings
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import ServingConfig
from phasewise.core.messages import PrefillTask, WorkerLoad, WorkerMessage, WorkerOutput
from phasewise.core.placement import Placement
from phasewise.core.request import Request, SamplingParams
from workers.assemble import Ports, assemble
from workers.build import LoadedEngine, load_engine, worker_info
from workers.driver import WorkerDriver
from workers.settings import WorkerSettings

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1024,
    },
}
"""8b: Llama-3.1-8B. tiny: so little work that on a CPU everything around the engine shows."""
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def model_path(name: str, folder: Path) -> str:
    """`model.path` of a shape above, written to `folder` for random weights, or of any other model, as it is."""
    if name not in SHAPES:
        return name
    file = folder / f"{name}.json"
    file.write_text(json.dumps({**_LLAMA, **SHAPES[name]}))
    return f"random:{file}"


@dataclass(frozen=True)
class Load:
    """Requests that all come at once: greedy, random prompts, no stop."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    @staticmethod
    def parse(text: str) -> Load:
        """From REQUESTSxPROMPTxOUTPUT, such as 512x512x128."""
        return Load(*(int(number) for number in text.split("x")))

    @property
    def name(self) -> str:
        return f"offline {self.num_requests} x {self.num_prompt_tokens} -> {self.num_output_tokens}"

    @property
    def total_output_tokens(self) -> int:
        return self.num_requests * self.num_output_tokens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        rng = random.Random(0)
        return [[rng.randrange(vocab_size) for _ in range(self.num_prompt_tokens)] for _ in range(self.num_requests)]


class LoneWorker:
    """One mixed worker, made as the cluster makes it, without processes: `on_output` gets what it has to say.

    `engine` may be used for one worker after another. `on_output` and `on_load` are called by the thread that runs
    `worker.run`.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        engine: LoadedEngine,
        on_output: Callable[[WorkerOutput], None],
        on_load: Callable[[WorkerLoad], None] = lambda load: None,
    ) -> None:
        self._on_output = on_output
        self._on_load = on_load
        info = worker_info(settings, engine)
        ports = Ports(self, self, self, self)
        self.worker: WorkerDriver = assemble(info, engine.runner, engine.port, settings.config, ports, MonotonicClock())

    def generate(self, request: Request, time_left_s: float = 1e6) -> None:
        worker_id = self.worker.info.worker_id
        placement = Placement(request.request_id, worker_id, worker_id)
        self.worker.post(PrefillTask(request, placement, "gateway", time_left_s))

    # ---- ports of the worker

    def send(self, worker_id: str, message: WorkerMessage) -> None:
        raise AssertionError("a mixed worker has nobody to talk to")

    def send_part(self, *_: object) -> None:
        raise AssertionError("a mixed worker hands nothing off")

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        self._on_output(output)

    def report(self, load: WorkerLoad) -> None:
        self._on_load(load)


def load_lone_engine(config: ServingConfig) -> tuple[WorkerSettings, LoadedEngine]:
    """The engine of the cluster's first worker, in this process. The configuration names the device."""
    settings = worker_settings(config, config.model.device, None)[0]
    return settings, load_engine(settings, lambda share: None, MonotonicClock())


def offline_seconds(settings: WorkerSettings, engine: LoadedEngine, load: Load, vocab_size: int) -> float:
    """The load through one worker alone: scheduler, blocks, step loop."""
    num_left = load.total_output_tokens
    end_s = 0.0

    def on_output(output: WorkerOutput) -> None:
        nonlocal num_left, end_s
        assert not output.failures, output.failures
        num_left -= sum(len(chunk.tokens) for chunk in output.chunks)
        if num_left == 0:
            end_s = time.perf_counter()
            lone.worker.stop()

    lone = LoneWorker(settings, engine, on_output)
    sampling = SamplingParams(temperature=0.0, max_tokens=load.num_output_tokens)
    for i, prompt in enumerate(load.prompts(vocab_size)):
        lone.generate(Request(f"r{i}", tuple(prompt), sampling))
    start_s = time.perf_counter()
    lone.worker.run()
    return end_s - start_s


def local_device() -> str:
    """For `model.device`, which here is never `auto`: a GPU that Ray does not find must not become a CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


class Rows:
    """The rows of a result, printed as they come and written each time, so that a run that is cut off leaves some."""

    def __init__(self, output: Path | None, device: str, packages: Sequence[str]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {}
        self._output = output
        self._device = device
        self._packages = packages

    def add(
        self,
        case: str,
        unit: str,
        ours: float,
        *,
        floor: float | None = None,
        peer: float | None = None,
        must: float | None = None,
        goal: float | None = None,
        better: str = "low",
    ) -> None:
        figures = {"ours": ours, "floor": floor, "peer": peer, "must": must, "goal": must if goal is None else goal}
        rounded = {name: None if value is None else round(value, 4) for name, value in figures.items()}
        self.rows.append({"case": case, "unit": unit, **rounded, "better": better})
        print(row_line(self.rows[-1]), flush=True)
        self.write()

    def write(self) -> None:
        if self._output is not None:
            write_result(self._output, self._device, self._packages, self.rows, **self.more)


def row_line(row: dict[str, Any]) -> str:
    """A row as a line of a table; `MISSED` where it does not reach what it must."""
    shown = [f"{name} {row[name]:g}" for name in ("floor", "peer", "must", "goal") if row[name] is not None]
    is_met = row["must"] is None or (
        row["ours"] <= row["must"] if row["better"] == "low" else row["ours"] >= row["must"]
    )
    return " ".join([f"{row['case']:72} {row['ours']:11.4g} {row['unit']:9}", *shown, *([] if is_met else ["MISSED"])])


def write_result(file: Path, device: str, packages: Sequence[str], rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """The one form of all results: where and with what it was measured, and rows."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "source tree"
    result = {
        "device": device,
        "versions": versions,
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
        **more,
    }
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
