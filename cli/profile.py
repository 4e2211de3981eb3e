"""`phasewise profile`: measures one engine in this process, without a cluster, and writes what placement reads."""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import UsageProblem

if TYPE_CHECKING:
    from phasewise.core.config import ServingConfig
    from phasewise.core.profile import DeviceProfile, Point

DEFAULT_BUDGET_S = 100.0


def profile_command(
    model: Annotated[
        str | None, typer.Option(help="As of phasewise serve [default: smollm2-135m]", show_default=False)
    ] = None,
    output: Annotated[str | None, typer.Option(help="Write the profile as JSON to this file.")] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML file as of phasewise serve; flags win over it", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32 or bfloat16 [default: auto]", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [default: auto]", show_default=False)] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="Share of a GPU's memory that may be filled [default: 0.9]", show_default=False),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads, as the workers will have. Default: all cores.")
    ] = None,
    budget: Annotated[
        float, typer.Option(min=1.0, help="Seconds to measure; larger steps are left out when they run out.")
    ] = DEFAULT_BUDGET_S,
) -> None:
    """Measure prefill and decode of a model on this device, and write a profile.

    Examples:

    \b
      phasewise profile --output smollm2-cpu.json

    \b
      phasewise profile --model ./my-model --device cuda --output my-model-h100.json
    """
    from phasewise.core.config import load_config

    if output is not None and not Path(output).absolute().parent.is_dir():
        raise UsageProblem(f"--output {output}: its folder does not exist")
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": model, "dtype": dtype, "device": device},
        "cache": {"gpu_memory_utilization": gpu_memory_utilization},
    }
    overrides = {
        name: {key: value for key, value in section.items() if value is not None} for name, section in sections.items()
    }
    profile = measure(load_config(config, overrides), threads, budget)
    typer.echo(table(profile))
    if output is not None:
        Path(output).write_text(profile.to_json(), encoding="utf-8")
        typer.echo(f"written to {output}; workers take it with model.profile: {output}")


def measure(config: ServingConfig, threads: int | None, budget_s: float) -> DeviceProfile:
    """Loads the model of `config` as a worker does and measures the full grid.

    Raises:
        ModelLoadError, ConfigError: as a worker's start.
    """
    from engine.loader import resolve_device
    from phasewise.core.clock import MonotonicClock
    from phasewise.core.placement import WorkerRole
    from workers.prepare import prepare_engine
    from workers.profiler import full_grid, measure_profile, measure_rates
    from workers.settings import WorkerSettings, token_budget

    clock = MonotonicClock()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device = resolve_device(config.model.device)
    settings = WorkerSettings("profile", WorkerRole.MIXED, device, threads or cores, config)
    start_s = clock.now_s()
    engine = prepare_engine(settings, lambda share: None)
    loaded_s = clock.now_s() - start_s
    typer.echo(f"{engine.facts.model}: ready after {loaded_s:.1f} s; measuring for {budget_s:g} s at most", err=True)
    grid = full_grid(token_budget(config, device), config.scheduler.max_running)
    profile = measure_profile(engine, grid, clock, budget_s)
    facts = replace(
        measure_rates(engine, clock),
        versions={package: _version(package) for package in ("phasewise", "torch", "triton")},
        command=shlex.join(["phasewise", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d", time.gmtime(clock.unix_s())),
    )
    return replace(profile, facts=facts)


def table(profile: DeviceProfile) -> str:
    """The profile for a person: a row per size, milliseconds by context."""
    facts = profile.facts
    kv_gib = facts.kv_blocks * facts.block_size * facts.kv_bytes_per_token / 2**30
    lines = [
        f"{facts.model}, {facts.dtype} on {facts.device}",
        f"KV cache {facts.kv_blocks * facts.block_size} tokens ({kv_gib:.2f} GiB); memory copy "
        f"{facts.memory_bytes_per_s / 1e9:.1f} GB/s; KV to host memory {facts.kv_to_host_bytes_per_s / 1e9:.2f} GB/s",
    ]
    prefill, decode = profile.prefill.points, profile.decode.points
    each = tuple(replace(point, context_tokens=point.context_tokens // point.size) for point in decode)
    lines += ["", "prefill, ms", *_rows("tokens", "behind", prefill)]
    lines += ["", "decode step, ms", *_rows("sequences", "tokens each", each)]
    return "\n".join(lines)


def _rows(size_name: str, context_name: str, points: tuple[Point, ...]) -> list[str]:
    contexts = sorted({point.context_tokens for point in points})
    seconds = {(point.size, point.context_tokens): point.seconds for point in points}
    head = f"{size_name:>10} |" + "".join(f"{context_name} {context:g}".rjust(20) for context in contexts)
    rows = [head]
    for size in sorted({point.size for point in points}):
        cells = (seconds.get((size, context)) for context in contexts)
        rows.append(f"{size:>10g} |" + "".join(f"{'-' if s is None else f'{s * 1e3:.2f}':>20}" for s in cells))
    return rows


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
