"""The environment of a private Ray: who may call it, and how much of the host it takes.

Ray reads these variables in every process that it starts, so they are set before it starts. A Ray cluster that runs
already (`ray.address`) has the environment in which it was started.
"""

from __future__ import annotations

from phasewise.core.config import RayConfig


def private_ray_environment(config: RayConfig, token: str) -> dict[str, str]:
    """The variables of a Ray that serves this cluster alone; `token` is what its calls must carry."""
    return {
        # Ray's own ports listen on every interface: without this anybody in the network could run code here.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # Added to the niceness that the command was started with. Ray's own default is 15: a proxy or another server
        # at 0 would take the cores from the workers.
        "RAY_worker_niceness": str(config.niceness),
        # Ray's list of tasks is not used, and each request adds some hundred to it: gcs_server would keep them.
        "RAY_task_events_report_interval_ms": "0",
        # The autoscaler's metrics would listen on every interface, without the token and on one port for all clusters
        # of a host. Ray leaves them out only if the port is invalid; its log says so, and nothing else fails.
        "AUTOSCALER_METRIC_PORT": "-1",
    }
