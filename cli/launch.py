"""The composition root: starts Ray, makes every process of a cluster, wires them, and takes them down in order.

Start:   check model and ports → Ray → all processes at once → load (with progress) → connect → serve
Stop:    gateway drains → control plane expects ends → workers stop → gateway closes its ports → Ray goes
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cli.model_check import check_model
from cli.private_ray import private_ray_environment
from control_plane.gateway.service import ModelCard
from phasewise.core.config import PoolConfig, ServingConfig, split_address
from phasewise.core.errors import ConfigError, ServingError
from phasewise.core.handles import ActorHandle
from phasewise.core.logs import LogCollector
from phasewise.core.messages import WorkerInfo
from phasewise.core.model_source import ModelFacts, ModelSource, resolve_model
from phasewise.core.placement import WorkerId, WorkerRole
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

GATEWAY_ID = "gateway-0"
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Where a private Ray listens. On Linux it replaces 127.0.0.1 itself by an address that the network can reach."""
_PROGRESS_INTERVAL_S = 0.2
_CALL_TIMEOUT_S = 120.0

Progress = Callable[[str, float], None]
"""Called with (what is being done, share done 0 … 1)."""


@dataclass(frozen=True, slots=True)
class ClusterEnd:
    """Why a cluster is to end: a fault, or "" when somebody asked for it. `drains`: open requests may finish first."""

    fault: str = ""
    drains: bool = True


@dataclass(slots=True)
class Cluster:
    """A running cluster. `addresses` has the `http` and `grpc` addresses that are really listened on.

    Whoever wants it to end says so in `ends`. (A SimpleQueue, because a signal handler puts it there: an Event's lock
    could be held by the very thread that the handler interrupts.)
    """

    config: ServingConfig
    model_name: str
    workers: list[WorkerInfo] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)
    context_length: int = 0
    ends: queue.SimpleQueue[ClusterEnd] = field(default_factory=queue.SimpleQueue)


class Launcher:
    """Starts one cluster and stops it. Use as a context manager: leaving it leaves no process, no memory, no port."""

    def __init__(self, config: ServingConfig, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self._exit = contextlib.ExitStack()
        self._workers: dict[WorkerId, ActorHandle] = {}
        self._gateway: ActorHandle = None
        self._control_plane: ActorHandle = None
        self._is_up = False

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(drain_s=0.0)

    def start(self) -> Cluster:
        """Brings the cluster up.

        Raises:
            ConfigError, ModelLoadError: something that the user can mend; nothing is left running.
        """
        config = self._config
        source = resolve_model(config.model.path)
        facts = check_model(source, config)
        for name in ("http", "grpc"):
            check_port(getattr(config.gateway, name), name)
        self._progress("starting processes", 0.0)
        collector = self._start_ray()
        self._progress("starting processes", 0.5)
        cluster = Cluster(config, config.model.served_name or source.name)
        self._create_actors(collector)
        cluster.addresses["http"] = self._ask(self._gateway.bind.remote())
        cluster.workers = self._load()
        self._connect(cluster.workers)
        card = self._model_card(cluster, source, facts)
        cluster.context_length = card.context_length
        cluster.addresses["grpc"] = self._ask(
            self._gateway.serve.remote(card, cluster.workers, self._workers, self._control_plane)
        )
        self._is_up = True
        self._watch(cluster)
        return cluster

    def stop(self, *, drain_s: float) -> None:
        """Stops in order; requests that are open get `drain_s` to finish. May be called again, and half-way up."""
        try:
            if self._is_up:
                self._is_up = False
                self._stop_in_order(drain_s)
        finally:
            self._exit.close()

    def _stop_in_order(self, drain_s: float) -> None:
        for step in (
            lambda: self._ask(self._gateway.drain.remote(drain_s), drain_s + 10.0),
            lambda: self._ask(self._control_plane.stop.remote(), 10.0),
            lambda: self._wait_all([w.stop.remote() for w in self._workers.values()], 15.0),
            lambda: self._ask(self._gateway.stop.remote(), 15.0),
        ):
            try:
                step()
            except Exception as error:  # a process that is gone must not keep the others from ending
                logger.warning("while stopping: %s", " ".join(str(error).split())[:300])

    # ---- inside: start

    def _start_ray(self) -> str | None:
        """Ray, private to this cluster unless an address is given; the path of the log socket, if it is private."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        if self._config.ray.address == "local":
            os.environ.update(private_ray_environment(self._config.ray, secrets.token_hex(32)))
        import ray

        options: dict[str, Any] = {
            "namespace": f"phasewise-{os.getpid()}",
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if self._config.ray.address != "local":
            check_ray_address(self._config.ray.address)
            try:
                ray.init(address=self._config.ray.address, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ConfigError(f"ray.address: no Ray cluster at {self._config.ray.address}: {reason}") from None
            self._exit.callback(ray.shutdown)
            return None
        folder = tempfile.mkdtemp(prefix="pw-")  # short: Unix socket paths end at 107 bytes
        self._exit.callback(shutil.rmtree, folder, ignore_errors=True)
        collector = self._exit.enter_context(LogCollector(f"{folder}/log"))
        self._exit.callback(ray.shutdown)
        ray.init(
            address="local",
            num_cpus=self._config.pools.num_workers + 2,
            include_dashboard=False,
            object_store_memory=self._config.ray.object_store_mib * 2**20,
            _temp_dir=f"{folder}/r",
            _node_ip_address=LOOPBACK,
            **options,
        )
        return collector.path

    def _create_actors(self, collector: str | None) -> None:
        import ray

        from control_plane.actors import ControlPlaneActor, GatewayActor, GatewaySettings
        from workers.actor import WorkerActor

        config = self._config
        settings = worker_settings(config, self._devices(), collector, secrets.token_hex(16), self._head())
        make = ray.remote(num_cpus=0)
        self._control_plane = make(ControlPlaneActor).options(name="control-plane").remote(config, collector)
        self._gateway = (
            make(GatewayActor)
            .options(name=GATEWAY_ID, max_concurrency=10_000)
            .remote(GatewaySettings(GATEWAY_ID, config, collector))
        )
        for s in settings:
            num_gpus = 0 if s.device == "cpu" else s.tensor_parallel
            actor = make(WorkerActor).options(name=s.worker_id, num_gpus=num_gpus, max_concurrency=1000)
            self._workers[s.worker_id] = actor.remote(s)

    def _devices(self) -> str:
        """The device of every worker. `auto` takes GPUs where there are any, and then needs enough for all workers."""
        import ray

        wanted, num_needed = self._config.model.device, self._config.pools.num_devices
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
            return "cpu"
        if num_gpus < num_needed:
            raise ConfigError(
                f"pools: {self._config.pools.num_workers} workers need {num_needed} GPUs and Ray sees {num_gpus}; "
                "lower the number of workers or tensor_parallel, or set --device cpu"
            )
        return "cuda"

    def _head(self) -> str:
        """The address of the cluster's first node."""
        import ray

        return next(
            str(node["NodeManagerAddress"]) for node in ray.nodes() if "node:__internal_head__" in node["Resources"]
        )

    def _load(self) -> list[WorkerInfo]:
        """Waits until every process has loaded, and reports the slowest worker's progress meanwhile."""
        import ray

        gateway = self._gateway.load.remote()
        loads = [worker.load.remote() for worker in self._workers.values()]
        waiting = [gateway, *loads]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=_PROGRESS_INTERVAL_S)
            for ref in done:
                self._value(ray.get(ref))
            shares = ray.get([worker.progress.remote() for worker in self._workers.values()])
            self._progress("loading the model", min(shares))
        return [self._value(ray.get(ref)) for ref in loads]

    def _connect(self, infos: list[WorkerInfo]) -> None:
        gateways = {GATEWAY_ID: self._gateway}
        self._ask_all([w.connect.remote(self._workers, gateways, self._control_plane) for w in self._workers.values()])
        self._open_links(infos)
        self._ask_all([w.start.remote() for w in self._workers.values()])
        self._ask_all([self._control_plane.join.remote(info, self._workers[info.worker_id]) for info in infos])
        self._ask(self._control_plane.join_gateway.remote(GATEWAY_ID, self._gateway))
        self._ask(self._control_plane.start_health_checks.remote())

    def _open_links(self, infos: list[WorkerInfo]) -> None:
        """Between every prefill and every decode worker, all at once."""
        targets = {i.worker_id: i.link_address for i in infos if i.role is WorkerRole.DECODE and i.link_address}
        senders = [i.worker_id for i in infos if i.role is WorkerRole.PREFILL and i.link_address]
        if targets and senders:
            self._progress("opening links", 0.0)
            self._ask_all([self._workers[worker_id].open_links.remote(targets) for worker_id in senders])

    def _model_card(self, cluster: Cluster, source: ModelSource, facts: ModelFacts) -> ModelCard:
        return ModelCard(
            name=cluster.model_name,
            context_length=min(info.max_model_len for info in cluster.workers),
            vocab_size=facts.vocab_size,
            dtype=cluster.workers[0].dtype,
            created_unix_s=int(source.path.stat().st_mtime),
            eos_token_ids=facts.eos_token_ids,
            has_chat_template=self._ask(self._gateway.has_chat_template.remote()),
            sampling=facts.sampling,
        )

    def _watch(self, cluster: Cluster) -> None:
        """The cluster ends when the gateway, the control plane or a pool is gone: without them nothing is served."""

        def on_end(name: str) -> Callable[[Any], None]:
            def end(future: Any) -> None:
                if self._is_up:
                    cluster.ends.put(ClusterEnd(f"the {name} process has ended", drains=False))

            return end

        def on_unservable(future: Any) -> None:
            if self._is_up and future.exception() is None:  # else the control plane itself is gone
                cluster.ends.put(ClusterEnd(future.result()))

        self._gateway.wait_closed.remote().future().add_done_callback(on_end("gateway"))
        self._control_plane.wait_closed.remote().future().add_done_callback(on_end("control plane"))
        self._control_plane.wait_unservable.remote().future().add_done_callback(on_unservable)

    # ---- inside: calls

    def _ask(self, ref: Any, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        import ray

        return self._value(ray.get(ref, timeout=timeout_s))

    def _ask_all(self, refs: list[Any], timeout_s: float = _CALL_TIMEOUT_S) -> None:
        import ray

        for value in ray.get(refs, timeout=timeout_s):
            self._value(value)

    @staticmethod
    def _wait_all(refs: list[Any], timeout_s: float) -> None:
        """Waits for all answers, also where some are errors: a worker that is lost must not hurry the others."""
        import ray

        ray.wait(refs, num_returns=len(refs), timeout=timeout_s)

    @staticmethod
    def _value(value: Any) -> Any:
        if isinstance(value, ServingError):
            raise value
        return value


def worker_settings(
    config: ServingConfig, device: str, collector: str | None, secret: str = "", head: str = ""
) -> list[WorkerSettings]:
    """One entry per worker. Threads that are not given are the machine's cores shared out, at least one each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(cores // config.pools.num_devices, 1)
    pools: list[tuple[WorkerRole, PoolConfig]] = [
        (WorkerRole.PREFILL, config.pools.prefill),
        (WorkerRole.DECODE, config.pools.decode),
        (WorkerRole.MIXED, config.pools.mixed),
    ]
    return [
        WorkerSettings(
            f"{role.value}-{i}",
            role,
            device,
            pool.threads or share,
            config.with_cache_of(pool),
            collector,
            pool.tensor_parallel,
            secret,
            head,
        )
        for role, pool in pools
        for i in range(pool.workers)
    ]


def check_ray_address(address: str) -> None:
    """Raises ConfigError when nobody listens there: Ray itself would try for over a minute."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return  # "auto" and the like: Ray knows what they mean
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise ConfigError(
            f"ray.address: nothing answers at {address} ({error.strerror or error}); start Ray there with "
            "'ray start --head', or leave ray.address out for a private cluster"
        ) from None


def check_port(address: str, name: str) -> None:
    """Raises ConfigError when somebody listens on `address` already: said before anything is started."""
    host, port = split_address(address, field=f"gateway.{name}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--{name}: cannot listen on {address} ({error.strerror}); stop what uses the port, or choose another "
                f"with --{name} HOST:PORT (port 0 takes any that is free)"
            ) from None
