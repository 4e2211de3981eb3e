"""The configuration of a cluster: read-only, checked when built, one YAML file, one schema.

Precedence: command-line flags over the YAML file over the defaults here. Unknown keys are refused with the nearest
right name. Every component takes its own section, or the few numbers that it needs.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from phasewise.core.errors import ConfigError
from phasewise.core.placement import WorkerRole


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelConfigSection(_Section):
    """Which model, and how it is computed."""

    path: str = Field(
        "smollm2-135m",
        description="smollm2-135m, a Hugging Face directory, a .gguf file, or random:<config.json>",
    )
    served_name: str | None = Field(None, description="Name in the API; default: from the path")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on a CPU, bfloat16 on a GPU"
    )
    weights: Literal["auto", "fp8"] = Field(
        "auto", description="auto: in model.dtype; fp8: e4m3 with a scale per output channel (GPUs only)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    seed: int = Field(0, ge=0, description="Seed of random weights (random:<config.json> only)")
    max_model_len: int | None = Field(
        None, ge=16, description="Longest prompt plus output in tokens; default: the model's context"
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto", description="auto: requests that give no value have that of the model's generation_config.json"
    )
    profile: str | None = Field(
        None, description="File that phasewise profile wrote; default: each worker measures itself when it starts"
    )


class PoolConfig(_Section):
    """One pool of equal workers."""

    workers: int = Field(0, ge=0, le=1024, description="Number of workers")
    threads: int | None = Field(None, ge=1, description="CPU threads per worker; default: the cores shared out evenly")
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs per worker: each holds a part of the model")
    block_size: Literal[8, 16, 32, 64] | None = Field(None, description="Of this pool; default: cache.block_size")
    cache_dtype: Literal["auto", "fp8_e4m3"] | None = Field(None, description="Of this pool; default: cache.dtype")
    resources: dict[str, float] = Field(
        {}, description="Ray resources that a worker of this pool takes of its node, beside GPUs: {name: amount}"
    )


class PoolsConfig(_Section):
    """The pools. A cluster needs prefill and decode workers, or mixed ones, or all three."""

    prefill: PoolConfig = PoolConfig(workers=1)
    decode: PoolConfig = PoolConfig(workers=1)
    mixed: PoolConfig = PoolConfig(workers=0)

    @model_validator(mode="before")
    @classmethod
    def _keep_default_sizes(cls, values: Any) -> Any:
        """A section that sets only, say, `threads` leaves the pool's own number of workers as it is."""
        if not isinstance(values, dict):
            return values
        sized = {
            name: {"workers": 1, **values[name]} for name in ("prefill", "decode") if isinstance(values.get(name), dict)
        }
        return {**values, **sized}

    @model_validator(mode="after")
    def _can_serve(self) -> PoolsConfig:
        if self.mixed.workers == 0 and not (self.prefill.workers and self.decode.workers):
            raise ValueError(
                "no request could be served: set at least one prefill and one decode worker, or one mixed worker"
            )
        return self

    @property
    def num_workers(self) -> int:
        return self.prefill.workers + self.decode.workers + self.mixed.workers

    @property
    def num_devices(self) -> int:
        """Of all workers: GPUs, or on CPUs processes."""
        return sum(pool.workers * pool.tensor_parallel for pool in (self.prefill, self.decode, self.mixed))


class CacheConfig(_Section):
    """The paged KV cache of each worker."""

    block_size: Literal[8, 16, 32, 64] = Field(16, description="Tokens per block")
    dtype: Literal["auto", "fp8_e4m3"] = Field("auto", description="auto: model.dtype; fp8_e4m3: GPUs only")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="Memory for KV blocks per worker, in GiB; default: 1 on a CPU, measured on a GPU"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory that may be in use, where kv_cache_gib is not given"
    )
    prefix_caching: bool = Field(True, description="Reuse KV of equal prompt beginnings")
    swap_gib: float = Field(2.0, ge=0, description="Host memory for preempted sequences per worker, in GiB")


class SchedulerConfig(_Section):
    """Bounds of the queues and batches."""

    token_budget: int | None = Field(
        None, ge=16, description="Most tokens in one step of a worker; default: 128 on a CPU, 2048 on a GPU"
    )
    max_running: int = Field(256, ge=1, description="Most sequences in a worker's running batch")
    max_waiting: int = Field(1024, ge=1, description="Most requests that wait per prefill worker; more are refused")
    reserve_headroom: float = Field(
        0.05, ge=0, lt=1, description="Share of decode blocks kept free for running sequences to grow into"
    )


class TransferConfig(_Section):
    """How KV moves from prefill to decode workers."""

    link: Literal["auto", "object_store", "nccl", "tcp"] = Field(
        "auto",
        description="object_store: Ray's shared memory; nccl: between GPUs; tcp: between CPU workers; "
        "auto: nccl on GPUs, object_store on CPUs",
    )
    codec: Literal["none", "fp8", "int8"] = Field(
        "none", description="How KV may be compressed on a link that is slower than compressing it; both lose precision"
    )
    nccl_channels: int | None = Field(
        None,
        ge=1,
        le=32,
        description="NCCL channels of a link: more are faster, and take GPU memory; default: by the number of peers",
    )
    slab_mib: int | None = Field(
        None, ge=1, description="Most KV in one part over a direct link, in MiB; default: by the number of peers"
    )
    num_slabs: int | None = Field(
        None,
        ge=2,
        description="Room for so many of the largest parts, in each direction of a worker; default: by the number of "
        "peers",
    )
    stall_s: float = Field(5.0, gt=0, description="A part on its way over a direct link for longer means a broken link")
    layerwise_threshold_tokens: int | None = Field(
        None,
        ge=1,
        description="Prompts from this length are pushed layer group by layer group; default: where that pays",
    )
    layers_per_part: int = Field(8, ge=1, description="Layers in one part of a layer-wise push")
    window_mib: int = Field(256, ge=1, description="Most bytes in flight per sending worker, in MiB")
    timeout_s: float = Field(30.0, gt=0, description="Longest time from reservation's end of prompt to commit")


def split_address(address: str, *, field: str) -> tuple[str, int]:
    """`HOST:PORT` → (host, port). Port 0 asks for any free port. Raises ValueError naming `field`."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{field} must be HOST:PORT with a port up to 65535, such as 127.0.0.1:8000, not {address!r}")
    return host.strip("[]"), int(port)


class GatewayConfig(_Section):
    """The gateway's two servers and their bounds."""

    http: str = Field("127.0.0.1:8000", description="HOST:PORT of the OpenAI-compatible HTTP server")
    grpc: str = Field("127.0.0.1:50051", description="HOST:PORT of the gRPC server")
    max_open_requests: int = Field(4096, ge=1, description="Most requests open at once; more are refused")
    max_open_per_client: int | None = Field(
        None, ge=1, description="Most of them from one network address; default: three quarters of max_open_requests"
    )
    default_timeout_s: float = Field(600.0, gt=0, description="Deadline of a request that names none")
    default_max_tokens: int | None = Field(
        None, ge=1, description="max_tokens of a chat request that names none; default: what the context leaves"
    )
    max_body_mib: int = Field(
        16, ge=1, description="Largest HTTP body or gRPC message accepted, where the model's context allows so much"
    )
    cors_origins: list[str] = Field(
        [], description="Origins of web pages whose scripts may call the HTTP server; '*': all; default: none"
    )
    special_tokens_in_messages: bool = Field(
        False, description="The text of a special token in a chat's messages becomes the token"
    )
    drain_s: float = Field(10.0, ge=0, description="How long a shutdown waits for open requests")

    @model_validator(mode="after")
    def _addresses(self) -> GatewayConfig:
        for name in ("http", "grpc"):
            split_address(getattr(self, name), field=f"gateway.{name}")
        if self.http == self.grpc and not self.http.endswith(":0"):
            raise ValueError("gateway.http and gateway.grpc must differ")
        return self


class AdminConfig(_Section):
    """Where the cluster is watched and changed, apart from its users."""

    http: str = Field("127.0.0.1:8001", description="HOST:PORT of the admin API, which the control plane serves")

    @model_validator(mode="after")
    def _address(self) -> AdminConfig:
        split_address(self.http, field="admin.http")
        return self


class RayConfig(_Section):
    """Where the processes run."""

    address: str = Field("local", description="local: a private one-machine cluster; else an existing Ray address")
    namespace: str = Field(
        "phasewise", min_length=1, description="Of the cluster's actors; two clusters on one Ray need two of them"
    )
    object_store_mib: int = Field(512, ge=80, description="Shared memory for KV on its way, in MiB (local only)")
    niceness: int = Field(
        0, ge=0, le=19, description="Of all processes of the cluster, above that of the command (local only)"
    )


class HealthConfig(_Section):
    """When a silent member of the cluster is suspected, and when it is ended."""

    heartbeat_s: float = Field(1.0, gt=0, description="Each worker and gateway gives a sign of life this often")
    suspect_s: float = Field(
        3.0, gt=0, description="One that is silent for this long gets nothing new; its streams move"
    )
    overdue_s: float = Field(
        30.0,
        gt=0,
        description="One that is silent for this long is ended; so is a worker whose step runs for this long",
    )
    start_s: float = Field(1800.0, gt=0, description="One that is not ready this long after its start is ended")

    @model_validator(mode="after")
    def _leaves_room(self) -> HealthConfig:
        if self.overdue_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"overdue_s {self.overdue_s:g} is less than two heartbeats of {self.heartbeat_s:g} s: workers with "
                "nothing to do would be killed; raise health.overdue_s or lower health.heartbeat_s"
            )
        if self.suspect_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"suspect_s {self.suspect_s:g} is less than two heartbeats of {self.heartbeat_s:g} s: members that are "
                "well would be suspected; raise health.suspect_s or lower health.heartbeat_s"
            )
        return self


class LoggingConfig(_Section):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class ServingConfig(_Section):
    """The whole of a cluster."""

    model: ModelConfigSection = ModelConfigSection()
    pools: PoolsConfig = PoolsConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    transfer: TransferConfig = TransferConfig()
    gateway: GatewayConfig = GatewayConfig()
    admin: AdminConfig = AdminConfig()
    ray: RayConfig = RayConfig()
    health: HealthConfig = HealthConfig()
    logging: LoggingConfig = LoggingConfig()

    def pool_of(self, role: WorkerRole) -> PoolConfig:
        """The pool of a role. Raises KeyError for one without a pool."""
        pools = self.pools
        return {WorkerRole.PREFILL: pools.prefill, WorkerRole.DECODE: pools.decode, WorkerRole.MIXED: pools.mixed}[role]

    def with_cache_of(self, pool: PoolConfig) -> ServingConfig:
        """What a worker of that pool is told: its own block size and cache dtype, where the pool has such."""
        own = {"block_size": pool.block_size, "dtype": pool.cache_dtype}
        cache = self.cache.model_copy(update={name: value for name, value in own.items() if value is not None})
        return self.model_copy(update={"cache": cache})


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `extra` laid over it, section by section."""
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def build_config(values: dict[str, Any], *, source: str) -> ServingConfig:
    """Checks `values` and builds the configuration.

    Raises:
        ConfigError: one line that names the key, what is wrong with it and, for an unknown key, the nearest right one.
    """
    try:
        return ServingConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors()[:3])) from None


def load_config(path: str | os.PathLike[str] | None, overrides: dict[str, Any] | None = None) -> ServingConfig:
    """Reads a YAML file (or none) and lays `overrides` (from flags) over it. Raises ConfigError."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path} is not valid YAML: {reason}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(
                f"{path} must hold sections such as 'pools:' and 'gateway:', not a {type(loaded).__name__}"
            )
        values = loaded or {}
    return build_config(merge(values, overrides or {}), source=str(path) if path else "configuration")


def _explain(error: Any) -> str:
    location = tuple(str(part) for part in error["loc"])
    where = ".".join(location) or "the file"
    if error["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        known = sorted(section.model_fields) if section else []
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {error['input']!r})" if location else message


def _section_at(location: tuple[str, ...]) -> type[BaseModel] | None:
    section: type[BaseModel] = ServingConfig
    for name in location:
        info = section.model_fields.get(name)
        annotation = info.annotation if info else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section
