"""Which device a cluster's workers have, and which workers a configuration asks for at its start."""

from __future__ import annotations

from control_plane.births import Births, ClusterFacts
from phasewise.core.config import ServingConfig
from phasewise.core.desired import desired_of
from phasewise.core.errors import ConfigError
from workers.settings import WorkerSettings, settings_of


def choose_device(config: ServingConfig, num_gpus: int, num_free: int) -> str:
    """The device of every worker, `cpu` or `cuda`. `auto` takes GPUs where there are any.

    Args:
        num_free: of the `num_gpus`, those that nobody has taken.

    Raises:
        ConfigError: the workers need more GPUs than are free.
    """
    wanted, num_needed = config.model.device, config.pools.num_devices
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return "cpu"
    if num_free < num_needed:
        taken = f", of which {num_gpus - num_free} are taken" if num_free < num_gpus else ""
        raise ConfigError(
            f"pools: {config.pools.num_workers} workers need {num_needed} GPUs and Ray sees {num_gpus}{taken}; "
            "lower the number of workers or tensor_parallel, or set --device cpu"
        )
    return "cuda"


def worker_settings(config: ServingConfig, device: str, collector: str | None) -> list[WorkerSettings]:
    """One entry per worker, under its name, for whoever makes them all on this host without a cluster."""
    births, desired = Births(ClusterFacts(config, device, collector)), desired_of(config)
    return [
        settings_of(births.birth(f"{role.value}-{i}", role, desired, 1))
        for role, size in desired.pools.items()
        for i in range(size)
    ]
