"""Ray for one cluster: starts a private one or joins one that runs, makes actors in it, and asks them.

Ray is imported by `start` and not before: it reads its environment then. What its calls return is a *ref*, to be asked
or waited for here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from enum import Enum
from typing import Any

from cli.private_ray import private_ray_environment
from cli.ray_keeper import RayKeeper
from phasewise.core.config import RayConfig
from phasewise.core.errors import ConfigError
from phasewise.core.handles import ActorHandle, value_of
from phasewise.core.logs import LogCollector

LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Where a private Ray listens. On Linux it replaces 127.0.0.1 itself by an address that the network can reach."""

_CALL_TIMEOUT_S = 120.0


class Outcome(Enum):
    """Of a call to an actor.

    OPEN        no answer yet
    ANSWERED    it has returned
    UNREACHED   the actor's process has ended, and may be started again; or the call failed
    ENDED       the actor has ended for good
    """

    OPEN = "open"
    ANSWERED = "answered"
    UNREACHED = "unreached"
    ENDED = "ended"


class RayRuntime:
    """A Ray for a cluster of `num_workers`. `close` leaves no process and no memory of a private one.

    What an actor answers with a ServingError as a value (handles.py) is raised by the asking methods.
    """

    def __init__(self, config: RayConfig, num_workers: int) -> None:
        self._config = config
        self._num_workers = num_workers
        self._exit = contextlib.ExitStack()
        self._ray: Any = None  # the module

    def start(self) -> str | None:
        """Starts or joins Ray. Gives the path of the socket that collects logs, if this Ray is private.

        Raises:
            ConfigError: there is no Ray at the configured address.
        """
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a question behind `close` would start another Ray
        if self._config.address == "local":
            os.environ.update(private_ray_environment(self._config, secrets.token_hex(32)))
        else:
            check_ray_address(self._config.address)
        import ray

        self._ray = ray
        options = {
            "namespace": self._config.namespace,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if self._config.address == "local":
            return self._start_private(options)
        self._join(options)
        return None

    def close(self) -> None:
        """Shuts Ray down, at whatever point of its life this is; a joined one goes on for others."""
        self._exit.close()

    @property
    def is_private(self) -> bool:
        """Whether this Ray was started here, and ends here."""
        return self._config.address == "local"

    def gpus(self) -> tuple[int, int]:
        """How many GPUs there are, and how many of them nobody has taken."""
        there, free = self._ray.cluster_resources(), self._ray.available_resources()
        return int(there.get("GPU", 0)), int(free.get("GPU", 0))

    def head_address(self) -> str:
        """The address of the cluster's first node."""
        nodes = self._ray.nodes()
        return next(str(n["NodeManagerAddress"]) for n in nodes if "node:__internal_head__" in n["Resources"])

    def make(self, actor_class: type, name: str, *arguments: Any, **options: Any) -> ActorHandle:
        """A process with one object of `actor_class`, made of `arguments`. It lives on when this process ends.

        `options`: of Ray's actors. Raises ConfigError when there is one of that name.
        """
        options |= {"name": name, "lifetime": "detached", "num_cpus": 0}
        try:
            return self._ray.remote(actor_class).options(**options).remote(*arguments)
        except ValueError:
            raise ConfigError(
                f"ray.namespace: a cluster runs in {self._config.namespace!r} already; stop it with 'phasewise stop', "
                "or give this one another namespace",
                field="ray.namespace",
            ) from None

    def find(self, name: str) -> ActorHandle:
        """The actor of that name."""
        return self._ray.get_actor(name)

    def kill(self, actor: ActorHandle) -> None:
        """Ends an actor for good."""
        self._ray.kill(actor)

    def ask(self, ref: Any, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        return value_of(self._ray.get(ref, timeout=timeout_s))

    def outcome(self, ref: Any, timeout_s: float) -> Outcome:
        """What became of a call within `timeout_s`."""
        from ray.exceptions import ActorDiedError, RayError

        try:
            self._ray.get(ref, timeout=timeout_s)
        except self._ray.exceptions.GetTimeoutError:
            return Outcome.OPEN
        except ActorDiedError:
            return Outcome.ENDED
        except RayError:
            return Outcome.UNREACHED
        return Outcome.ANSWERED

    def is_alive(self) -> bool:
        """Whether Ray's own control process takes connections. False before `start` and after `close`."""
        if self._ray is None or not self._ray.is_initialized():
            return False
        host, _, port = self._ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
        except OSError:
            return False
        return True

    def _join(self, options: dict[str, Any]) -> None:
        address = self._config.address
        try:
            self._ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"ray.address: no Ray cluster at {address}: {reason}") from None
        self._exit.callback(self._ray.shutdown)

    def _start_private(self, options: dict[str, Any]) -> str:
        folder = tempfile.mkdtemp(prefix="pw-")  # short: Unix socket paths end at 107 bytes
        self._exit.callback(shutil.rmtree, folder, ignore_errors=True)
        self._exit.enter_context(RayKeeper(folder))
        self._exit.callback(os.environ.update, {"TMPDIR": tempfile.gettempdir()})
        os.environ["TMPDIR"] = folder  # what a killed process leaves goes with the folder
        collector = self._exit.enter_context(LogCollector(f"{folder}/log"))
        self._exit.callback(self._ray.shutdown)
        self._ray.init(
            address="local",
            num_cpus=self._num_workers + 2,
            include_dashboard=False,
            object_store_memory=self._config.object_store_mib * 2**20,
            _temp_dir=f"{folder}/r",
            _node_ip_address=LOOPBACK,
            **options,
        )
        return collector.path


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
