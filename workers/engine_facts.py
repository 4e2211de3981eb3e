"""What the settings of a worker say about its engine before anything is loaded."""

from __future__ import annotations

from engine.gguf_config import read_gguf_config
from engine.loader import resolve_dtype
from engine.model_config import ModelConfig, read_model_config
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.model_source import ModelSource, config_file, resolve_model
from phasewise.core.profile import DeviceProfile, ProfileFacts
from workers.profiler import device_name, model_shape
from workers.settings import WorkerSettings


def read_config(source: ModelSource) -> ModelConfig:
    """The model's configuration, whatever the kind of its files. Raises ModelLoadError when it cannot be read."""
    if source.kind != "gguf":
        return read_model_config(config_file(source))
    with GGUFFile(source.path) as file:
        return read_gguf_config(file)


def profile_facts(
    settings: WorkerSettings, config: ModelConfig, spec: KVCacheSpec | None = None, num_blocks: int = 0
) -> ProfileFacts:
    """What a profile of this worker is a profile of; the capacity, where it is known."""
    model, dtype = settings.config.model, resolve_dtype(settings.config.model.dtype, settings.device)
    return ProfileFacts(
        device=device_name(settings.device, settings.num_threads),
        model=model_shape(config),
        dtype=dtype if model.weights == "auto" else f"{dtype}, {model.weights} weights",
        tensor_parallel=settings.tensor_parallel,
        kv_blocks=num_blocks,
        block_size=settings.config.cache.block_size,
        kv_bytes_per_token=spec.bytes_per_token if spec is not None else 0,
    )


def written_profile(settings: WorkerSettings) -> DeviceProfile | None:
    """The profile that `model.profile` names. Raises ConfigError when it is of another worker."""
    model = settings.config.model
    if model.profile is None:
        return None
    profile = DeviceProfile.read(model.profile)
    profile.check_is_of(profile_facts(settings, read_config(resolve_model(model.path))), source=model.profile)
    return profile


def cache_dtypes(settings: WorkerSettings) -> set[str]:
    """Those of the KV caches that this worker may hand over to, or take over from, its own among them."""
    config = settings.config
    pools = (config.pools.prefill, config.pools.decode, config.pools.mixed)
    named = {config.cache.dtype, *(pool.cache_dtype or "auto" for pool in pools)}
    return {resolve_dtype(config.model.dtype, settings.device) if dtype == "auto" else dtype for dtype in named}
