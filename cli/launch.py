"""The composition root: makes every process of a cluster, wires them, and takes them down in order.

Start:   check model and ports → Ray → all processes at once → load (with progress) → connect → serve
Stop:    gateway drains → control plane expects ends → workers stop → gateway closes its ports → Ray goes
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from cli.cluster import Cluster, watch_for_ends
from cli.model_check import check_model
from cli.ray_runtime import RayRuntime
from cli.worker_plan import choose_device, worker_settings
from control_plane.gateway.listening import check_port
from control_plane.gateway.service import ModelCard
from phasewise.core.config import ServingConfig
from phasewise.core.handles import ActorHandle
from phasewise.core.messages import WorkerInfo
from phasewise.core.model_source import ModelFacts, ModelSource, resolve_model
from phasewise.core.placement import WorkerId, WorkerRole

logger = logging.getLogger(__name__)

GATEWAY_ID = "gateway-0"
_PROGRESS_INTERVAL_S = 0.2

Progress = Callable[[str, float], None]
"""Called with (what is being done, share done 0 … 1)."""


class Launcher:
    """Starts one cluster and stops it. Use as a context manager: leaving it leaves no process, no memory, no port."""

    def __init__(self, config: ServingConfig, runtime: RayRuntime, progress: Progress) -> None:
        self._config = config
        self._runtime = runtime
        self._progress = progress
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
        config, ask = self._config, self._runtime.ask
        source = resolve_model(config.model.path)
        facts = check_model(source, config)
        check_port(config.gateway.http, "http")
        check_port(config.gateway.grpc, "grpc")
        self._progress("starting processes", 0.0)
        collector = self._runtime.start()
        self._progress("starting processes", 0.5)
        self._make_actors(collector)
        http = ask(self._gateway.bind.remote())
        infos = self._load()
        self._connect(infos)
        card = self._model_card(source, facts, infos)
        grpc = ask(self._gateway.serve.remote(card, infos, self._workers, self._control_plane))
        self._is_up = True
        cluster = Cluster(config, card.name, card.context_length, infos, {"http": http, "grpc": grpc})
        watch_for_ends(cluster.ends, self._gateway, self._control_plane)
        return cluster

    def stop(self, *, drain_s: float) -> None:
        """Stops in order; requests that are open get `drain_s` to finish. May be called again, and half-way up."""
        try:
            if self._is_up:
                self._is_up = False
                self._stop_in_order(drain_s)
        finally:
            self._runtime.close()

    def _stop_in_order(self, drain_s: float) -> None:
        ask, wait_all = self._runtime.ask, self._runtime.wait_all
        for step in (
            lambda: ask(self._gateway.drain.remote(drain_s), drain_s + 10.0),
            lambda: ask(self._control_plane.stop.remote(), 10.0),
            lambda: wait_all([w.stop.remote() for w in self._workers.values()], 15.0),
            lambda: ask(self._gateway.stop.remote(), 15.0),
        ):
            try:
                step()
            except Exception as error:  # a process that is gone must not keep the others from ending
                logger.warning("while stopping: %s", " ".join(str(error).split())[:300])

    def _make_actors(self, collector: str | None) -> None:
        from control_plane.actors import ControlPlaneActor, GatewayActor, GatewaySettings  # Ray: once it is set up
        from workers.actor import WorkerActor

        config, make = self._config, self._runtime.make
        device = choose_device(config, self._runtime.num_gpus())
        head, secret = self._runtime.head_address(), secrets.token_hex(16)
        self._control_plane = make(ControlPlaneActor, "control-plane", config, collector)
        self._gateway = make(
            GatewayActor,
            GATEWAY_ID,
            GatewaySettings(GATEWAY_ID, config, collector, secret, head),
            max_concurrency=10_000,
        )
        for s in worker_settings(config, device, collector, secret, head):
            num_gpus = 0 if s.device == "cpu" else s.tensor_parallel
            self._workers[s.worker_id] = make(WorkerActor, s.worker_id, s, num_gpus=num_gpus, max_concurrency=1000)

    def _load(self) -> list[WorkerInfo]:
        """Waits until every process has loaded, and reports the slowest worker's progress meanwhile."""
        loads = [worker.load.remote() for worker in self._workers.values()]
        waiting = [self._gateway.load.remote(), *loads]
        while waiting:
            waiting = self._runtime.ask_next(waiting, _PROGRESS_INTERVAL_S)
            asked = [worker.progress.remote() for worker in self._workers.values()]
            shares = self._runtime.ask_all(asked, timeout_s=None)  # a process that loads may be busy for long
            self._progress("loading the model", min(shares))
        return self._runtime.ask_all(loads)

    def _connect(self, infos: list[WorkerInfo]) -> None:
        ask, ask_all, workers = self._runtime.ask, self._runtime.ask_all, self._workers
        gateways = {GATEWAY_ID: ask(self._gateway.listen_for_tokens.remote())}
        ask_all([w.connect.remote(workers, gateways, self._control_plane) for w in workers.values()])
        self._open_links(infos)
        ask_all([w.start.remote() for w in workers.values()])
        ask_all([self._control_plane.join.remote(info, workers[info.worker_id]) for info in infos])
        ask(self._control_plane.join_gateway.remote(GATEWAY_ID, self._gateway))
        ask(self._control_plane.start_health_checks.remote())

    def _open_links(self, infos: list[WorkerInfo]) -> None:
        """Between every prefill and every decode worker, all at once."""
        targets = {i.worker_id: i.link_address for i in infos if i.role is WorkerRole.DECODE and i.link_address}
        senders = [i.worker_id for i in infos if i.role is WorkerRole.PREFILL and i.link_address]
        if targets and senders:
            self._progress("opening links", 0.0)
            self._runtime.ask_all([self._workers[worker_id].open_links.remote(targets) for worker_id in senders])

    def _model_card(self, source: ModelSource, facts: ModelFacts, infos: list[WorkerInfo]) -> ModelCard:
        return ModelCard(
            name=self._config.model.served_name or source.name,
            context_length=min(info.max_model_len for info in infos),
            vocab_size=facts.vocab_size,
            dtype=infos[0].dtype,
            created_unix_s=int(source.path.stat().st_mtime),
            eos_token_ids=facts.eos_token_ids,
            has_chat_template=self._runtime.ask(self._gateway.has_chat_template.remote()),
            sampling=facts.sampling,
        )
