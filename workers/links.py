"""A worker's links: the object store's, and beside it a direct one where the device has such.

Made before the model is loaded, so that the memory of parts on their way is in use when the KV cache is sized; opened
when all workers are loaded and know each other's addresses, before any of them takes work.

More than 15 of our modules are imported: here the kinds of links meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from kv_transfer.direct_link import DirectLinks
from kv_transfer.link import Link, Post, PrepareWrite
from kv_transfer.object_store_link import ObjectStoreLink
from kv_transfer.routed_link import RoutedLink
from kv_transfer.staging import check
from kv_transfer.tcp_wire import TcpDevice
from kv_transfer.wire import WireDevice
from phasewise.core.errors import ConfigError, ServingError
from phasewise.core.handles import WorkerHandles
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVPart
from phasewise.core.own_address import own_address
from phasewise.core.placement import WorkerId, WorkerRole
from workers.link_sizes import link_sizes
from workers.settings import WorkerSettings

_OPEN_TIMEOUT_S = 60.0


class Links:
    """Links of one worker. `link` is what its sender uses; `address` is where its direct link listens, "" for none.

    Raises:
        ConfigError: `transfer.link` asks for one that this worker cannot have.
    """

    def __init__(
        self, settings: WorkerSettings, workers: WorkerHandles, post: Post, prepare_write: PrepareWrite
    ) -> None:
        device = torch.device("cuda" if settings.device != "cpu" else "cpu")
        self._direct = _direct_links(settings, post, prepare_write)
        self._object_store = ObjectStoreLink(settings.worker_id, workers, device, post)
        self.link: Link = self._object_store
        if self._direct is not None:
            self.link = RoutedLink(self._direct, self._object_store)
        self.address = self._direct.address if self._direct is not None else ""

    def agree_on(self, spec: KVCacheSpec) -> None:
        """Says what the other ends must have, too. Before any of them opens a link to this worker."""
        if self._direct is not None:
            self._direct.identity.fingerprint = spec.content

    def open(self, peers: Mapping[WorkerId, str]) -> ServingError | None:
        """Opens the links to these workers, by address, all at once. Gives the first error."""
        direct = self._direct
        if direct is None or not peers:
            return None
        with ThreadPoolExecutor(len(peers), "open-links") as pool:
            tries = [pool.submit(direct.open, peer, address, _OPEN_TIMEOUT_S) for peer, address in peers.items()]
        errors = [str(error) for error in (attempt.exception() for attempt in tries) if error is not None]
        if not errors:
            return None
        return ConfigError(f"transfer.link: {errors[0]}; or use transfer.link object_store", field="transfer.link")

    def receive(self, sender: WorkerId, part: KVPart, array: np.ndarray) -> None:
        """A part that came through the object store. From one thread."""
        self._object_store.receive(sender, part, array)

    def close(self) -> None:
        self.link.close()


def _direct_links(settings: WorkerSettings, post: Post, prepare_write: PrepareWrite) -> DirectLinks | None:
    transfer, link, sizes = settings.config.transfer, settings.config.transfer.link, link_sizes(settings.config)
    if link == "auto":
        link = "object_store" if settings.device == "cpu" else "nccl"
    if link == "object_store" or settings.role is WorkerRole.MIXED:
        return None
    host = own_address(settings.head or "127.0.0.1")
    device = wire_device(settings, link, host)
    try:
        return DirectLinks(
            settings.worker_id,
            device,
            post,
            check,
            prepare_write,
            fingerprint="",
            host=host,
            secret=settings.secret,
            num_slabs_out=sizes.num_slabs if settings.role.can_prefill else 0,
            num_slabs_in=sizes.num_slabs if settings.role.can_decode else 0,
            slab_bytes=sizes.slab_mib * 2**20,
            stall_s=transfer.stall_s,
        )
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"transfer.slab_mib: the GPU has no room for {sizes.num_slabs} slabs of {sizes.slab_mib} MiB; "
            "lower transfer.slab_mib or transfer.num_slabs, or end other processes on it",
            field="transfer.slab_mib",
        ) from None


def wire_device(settings: WorkerSettings, link: str, host: str) -> WireDevice:
    """What moves the bytes of a direct link. Raises ConfigError where this worker cannot have such a link."""
    is_cpu = settings.device == "cpu"
    if link == "tcp":
        if not is_cpu:
            raise ConfigError(
                "transfer.link tcp is for KV in host memory; use nccl or object_store, or set model.device to cpu",
                field="transfer.link",
            )
        return TcpDevice(host)
    if is_cpu:
        raise ConfigError("transfer.link nccl needs GPUs; use tcp or object_store", field="transfer.link")
    try:
        from kv_transfer.nccl_wire import NcclDevice  # needs CuPy, which CPU machines do not have

        channels = link_sizes(settings.config).channels
        return NcclDevice(torch.cuda.current_device(), channels, is_only_user=settings.tensor_parallel == 1)
    except (ImportError, ConfigError) as error:
        remedy = "install phasewise[gpu], or use transfer.link object_store, which is slower"
        raise ConfigError(f"transfer.link nccl: {error}; {remedy}", field="transfer.link") from None
