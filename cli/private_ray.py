"""What a private Ray is told by its environment: who may call it, and how little of the host it takes.

Ray reads these variables in every process that it starts, so they are set before it starts. A Ray cluster that runs
already (`ray.address`) has been told by whoever started it.
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
        # Nobody looks at Ray's list of tasks, and each request is some hundred of them: gcs_server would keep them.
        "RAY_task_events_report_interval_ms": "0",
        # The autoscaler's metrics would listen on every interface, without the token and on one port for all clusters
        # of a host. A port that cannot be is Ray's only way to leave them out; its log says so, and nothing else fails.
        "AUTOSCALER_METRIC_PORT": "-1",
    }
