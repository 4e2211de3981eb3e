"""`phasewise serve`: starts a cluster, says where it is, and stops it in order."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections import Counter
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from cli.cluster import Cluster, ClusterEnd, Ends
from cli.errors import CommandError
from cli.launch import Launcher
from cli.ray_runtime import RayRuntime
from phasewise.core.config import ServingConfig, load_config
from phasewise.core.logs import setup_logging

logger = logging.getLogger(__name__)


def serve_command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="smollm2-135m (default), a Hugging Face directory, a .gguf file, or random:<config.json>",
            show_default=False,
        ),
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers [default: 1]", show_default=False)] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers [default: 1]", show_default=False)] = None,
    mixed: Annotated[
        int | None, typer.Option(help="Workers that do both phases [default: 0]", show_default=False)
    ] = None,
    http: Annotated[
        str | None, typer.Option(help="HOST:PORT of HTTP [default: 127.0.0.1:8000]", show_default=False)
    ] = None,
    grpc: Annotated[
        str | None, typer.Option(help="HOST:PORT of gRPC [default: 127.0.0.1:50051]", show_default=False)
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML file of the whole cluster; flags win over it", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32 or bfloat16 [default: auto]", show_default=False)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="auto, or fp8 on a GPU [default: auto]", show_default=False)
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="auto, or fp8_e4m3 on a GPU [default: auto]", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [default: auto]", show_default=False)] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="Share of a GPU's memory that a worker may fill [default: 0.9]", show_default=False),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json [default: text]", show_default=False)] = None,
    admin: Annotated[
        str | None, typer.Option(help="HOST:PORT of the admin API [default: 127.0.0.1:8001]", show_default=False)
    ] = None,
) -> None:
    """Start a cluster on this machine: a gateway, prefill workers and decode workers.

    Examples:

    \b
      phasewise serve
      phasewise serve ./my-model --prefill 1 --decode 2
      phasewise serve --mixed 1 --prefill 0 --decode 0 --http 0.0.0.0:8080
      phasewise serve --config cluster.yaml
    """
    overrides = _overrides(
        model,
        prefill,
        decode,
        mixed,
        http,
        grpc,
        dtype,
        weights,
        kv_cache_dtype,
        device,
        gpu_memory_utilization,
        log_format,
        admin,
    )
    serve(load_config(config, overrides))


def serve(config: ServingConfig) -> None:
    """Runs a cluster until Ctrl-C or SIGTERM.

    Raises:
        CommandError: it could not start, or cannot serve any more: a process or a whole pool is gone.
    """
    setup_logging("serve", log_format=config.logging.format, level=config.logging.level)
    stop = _StopSignals()
    with contextlib.ExitStack() as exits:
        exits.enter_context(stop)
        display = exits.enter_context(_StartUpDisplay(config.logging.format == "text"))

        def progress(step: str, share: float) -> None:
            stop.install()  # Ray puts handlers of its own in place when it starts
            display.show(step, share)

        runtime = RayRuntime(config.ray, config.pools.num_workers)
        launcher = exits.enter_context(Launcher(config, runtime, progress))
        cluster = launcher.start()
        display.close()
        stop.take_over(cluster.ends)
        _announce(cluster)
        end = cluster.ends.get()
        stop.is_stopping()
        drain_s = config.gateway.drain_s if end.drains else 0.0
        if end.fault:
            logger.error("stopping: %s; open requests have %g s", end.fault, drain_s)
        else:
            logger.info("stopping; open requests have %g s (press Ctrl-C again to stop at once)", drain_s)
        launcher.stop(drain_s=drain_s)
    if end.fault:
        raise CommandError(f"{end.fault}; the cluster was stopped. Start it again with: phasewise serve")
    logger.info("stopped")


class _StopSignals:
    """Ctrl-C and SIGTERM: an exception while starting, an orderly end while serving, an end at once the second time."""

    def __init__(self) -> None:
        self._ends: Ends | None = None
        self._count = 0
        self._is_cleaning = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        self._old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Puts the handlers in place, whoever has replaced them meanwhile."""
        for number in self._old:
            signal.signal(number, self._handle)

    def take_over(self, ends: Ends) -> None:
        """From now on a signal asks for an end."""
        self._ends = ends
        self.install()

    def is_stopping(self) -> None:
        """The cluster stops, by a signal or by itself. The next signal ends it at once."""
        self._count = max(self._count, 1)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._ends is not None and self._count == 1:
            self._ends.put(ClusterEnd())
        elif not self._is_cleaning:
            self._is_cleaning = True  # once is enough: what is being cleaned up must not be interrupted
            raise KeyboardInterrupt


class _StartUpDisplay:
    """A progress bar on a terminal, a line per step in a log."""

    def __init__(self, is_text: bool) -> None:
        console = Console(stderr=True)
        self._progress: Progress | None = None
        if is_text and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task("starting", total=1.0)
        self._shown: tuple[str, int] = ("", -1)

    def __enter__(self) -> _StartUpDisplay:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, step: str, share: float) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=step, completed=share)
            return
        quarter = int(share * 4) * 25
        if (step, quarter) != self._shown:
            self._shown = (step, quarter)
            logger.info("%s: %d %%", step, quarter)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _announce(cluster: Cluster) -> None:
    """The one line that says that all is well, and one to try."""
    counts = Counter(info.role.value for info in cluster.workers)
    pools = " + ".join(f"{count} {role}" for role, count in counts.items())
    first = cluster.workers[0]
    http, grpc, admin = (cluster.addresses[name] for name in ("http", "grpc", "admin"))
    if cluster.config.logging.format == "json":
        logger.info("ready: %s, %s, http://%s, grpc %s, admin %s", cluster.model_name, pools, http, grpc, admin)
        return
    print(
        f"Phasewise serves {cluster.model_name} ({first.dtype} on {first.device}, context {cluster.context_length}) "
        f"with {pools} at http://{http} and grpc {grpc} (admin {admin})\n"
        f"Try:  curl http://{http}/v1/chat/completions -H 'Content-Type: application/json' "
        """-d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'""",
        flush=True,
    )


def _overrides(
    model: str | None,
    prefill: int | None,
    decode: int | None,
    mixed: int | None,
    http: str | None,
    grpc: str | None,
    dtype: str | None,
    weights: str | None,
    kv_cache_dtype: str | None,
    device: str | None,
    gpu_memory_utilization: float | None,
    log_format: str | None,
    admin: str | None,
) -> dict[str, Any]:
    """The flags that were given, in the form of the configuration."""
    pools = {"prefill": prefill, "decode": decode, "mixed": mixed}
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": model, "dtype": dtype, "weights": weights, "device": device},
        "cache": {"dtype": kv_cache_dtype, "gpu_memory_utilization": gpu_memory_utilization},
        "gateway": {"http": http, "grpc": grpc},
        "admin": {"http": admin},
        "logging": {"format": log_format},
        "pools": {name: None if workers is None else {"workers": workers} for name, workers in pools.items()},
    }
    given = {
        name: {key: value for key, value in section.items() if value is not None} for name, section in sections.items()
    }
    return {name: section for name, section in given.items() if section}
