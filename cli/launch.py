"""Starts a cluster and stops it. What a cluster consists of is the control plane's affair: it makes all members.

Start:   check model and ports → Ray → control plane → until every member is ready (with progress)
Stop:    a private Ray's cluster: gateways drain → workers stop → Ray goes. One on a Ray of others goes on

More than 15 of our modules are imported: here the classes of all processes are known.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable

from cli.cluster import Cluster, ClusterWatch
from cli.model_check import check_model
from cli.ray_runtime import RayRuntime
from cli.worker_plan import choose_device
from control_plane.births import ClusterFacts
from control_plane.control_plane import StartReport
from control_plane.gateway.listening import check_port
from control_plane.gateway.service import ModelCard
from phasewise.core.birth import CONTROL_PLANE_NAME
from phasewise.core.config import ServingConfig
from phasewise.core.handles import ActorHandle
from phasewise.core.messages import WorkerInfo
from phasewise.core.model_source import resolve_model
from phasewise.core.view import GatewayInfo, View

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.2
_STOP_S = 60.0
"""For all members to end, behind their drain."""

Progress = Callable[[str, float], None]
"""Called with (what is being done, share done 0 … 1)."""


class Launcher:
    """Starts one cluster. Use as a context manager: leaving it leaves nothing of a private Ray, and of a cluster on
    another Ray nothing unless it was up."""

    def __init__(self, config: ServingConfig, runtime: RayRuntime, progress: Progress) -> None:
        self._config = config
        self._runtime = runtime
        self._progress = progress
        self._control_plane: ActorHandle = None
        self._watch: ClusterWatch | None = None
        self._is_up = False

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(drain_s=0.0)

    @property
    def outlives_us(self) -> bool:
        """Whether the cluster goes on when this process ends."""
        return self._is_up and not self._runtime.is_private

    def start(self) -> Cluster:
        """Brings the cluster up.

        Raises:
            ConfigError, ModelLoadError: something that the user can mend; nothing is left running.
        """
        config, ask = self._config, self._runtime.ask
        check_model(resolve_model(config.model.path), config)
        check_port(config.gateway.http, "http")
        check_port(config.gateway.grpc, "grpc")
        check_port(config.admin.http, "admin")
        self._progress("starting processes", 0.0)
        collector = self._runtime.start()
        self._progress("starting processes", 0.5)
        self._control_plane = self._make_control_plane(collector)
        self._wait_until_up()
        view: View = ask(self._control_plane.view.remote())
        gateway = next(m.info for m in view.gateways() if isinstance(m.info, GatewayInfo))
        card: ModelCard = ask(self._runtime.find(gateway.gateway_id).wait_serving.remote())
        infos = [member.info for member in view.workers() if isinstance(member.info, WorkerInfo)]
        addresses = {"http": gateway.http, "grpc": gateway.grpc, "admin": view.admin}
        self._is_up = True
        cluster = Cluster(config, card.name, card.context_length, infos, addresses)
        self._watch = ClusterWatch(cluster.ends, self._runtime, self._control_plane)
        self._watch.start()
        return cluster

    def stop(self, *, drain_s: float) -> None:
        """Stops in order; requests that are open get `drain_s` to finish. May be called again, and half-way up."""
        try:
            if self._watch is not None:
                self._watch.stop()
            control_plane, self._control_plane = self._control_plane, None
            if control_plane is not None and not self.outlives_us:
                self._stop_cluster(control_plane, drain_s)
        finally:
            self._runtime.close()

    def _stop_cluster(self, control_plane: ActorHandle, drain_s: float) -> None:
        if not self._runtime.is_alive():
            return  # nobody would answer
        try:
            self._runtime.ask(control_plane.stop.remote(drain_s), drain_s + _STOP_S)
        except Exception as error:  # a process that is gone must not keep the others from ending
            logger.warning("while stopping: %s", " ".join(str(error).split())[:300])
        if not self._runtime.is_private:
            self._runtime.kill(control_plane)

    def _make_control_plane(self, collector: str | None) -> ActorHandle:
        from control_plane.actors import GatewayActor  # Ray: once it is set up
        from control_plane.control_plane_actor import ControlPlaneActor, ControlPlaneSettings
        from workers.actor import WorkerActor

        config, runtime = self._config, self._runtime
        device = choose_device(config, *runtime.gpus())
        facts = ClusterFacts(config, device, collector, secrets.token_hex(16), runtime.head_address())
        settings = ControlPlaneSettings(facts, WorkerActor, GatewayActor, outlives_launcher=not runtime.is_private)
        return runtime.make(ControlPlaneActor, CONTROL_PLANE_NAME, settings, max_restarts=-1, max_concurrency=10_000)

    def _wait_until_up(self) -> None:
        """Until every member is ready. Who is not within `health.start_s` is ended by the control plane."""
        pause = threading.Event()
        while True:
            report: StartReport = self._runtime.ask(self._control_plane.start_report.remote())
            if report.failure is not None:
                raise report.failure
            if report.is_up:
                return
            self._progress("loading the model", report.share)
            pause.wait(_PROGRESS_INTERVAL_S)
