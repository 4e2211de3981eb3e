"""A worker's links: the object store's, and beside it a direct one where the device has such.

Made before the model is loaded, so that the memory of parts on their way is in use when the KV cache is sized. Every
worker has what every role needs. Direct links are opened while workers serve, as the view shows them; until one is up,
the object store carries.

More than 15 of our modules are imported: here the kinds of links meet.
"""

from __future__ import annotations

import logging
import threading
from functools import partial

import numpy as np
import torch

from kv_transfer.direct_link import DirectLinks
from kv_transfer.link import Link, Post, PrepareWrite
from kv_transfer.object_store_link import ObjectStoreLink
from kv_transfer.routed_link import RoutedLink
from kv_transfer.staging import check
from kv_transfer.tcp_wire import TcpDevice
from kv_transfer.wire import WireDevice
from phasewise.core.errors import ConfigError, TransferFailed
from phasewise.core.handles import WorkerHandles
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVPart
from phasewise.core.own_address import own_address
from phasewise.core.placement import WorkerId
from workers.link_sizes import link_sizes
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

_OPEN_TIMEOUT_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0  # before another try


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
        self._wanted: dict[WorkerId, threading.Event] = {}  # set when they are wanted no more

    def agree_on(self, spec: KVCacheSpec) -> None:
        """Says what the other ends must have, too. Before any of them opens a link to this worker."""
        if self._direct is not None:
            self._direct.identity.fingerprint = spec.content

    def want(self, peer: WorkerId, address: str) -> None:
        """Opens the direct link to a worker in the background, again and again until it is up or not wanted."""
        if self._direct is not None and address and peer not in self._wanted:
            is_over = self._wanted[peer] = threading.Event()
            work = partial(self._open, self._direct, peer, address, is_over)
            threading.Thread(target=work, name=f"open-{peer}", daemon=True).start()

    def unwant(self, peer: WorkerId) -> None:
        """Tries no more. A link that is up ends when the worker's loop hears that the peer is lost."""
        if (is_over := self._wanted.pop(peer, None)) is not None:
            is_over.set()

    def receive(self, sender: WorkerId, part: KVPart, array: np.ndarray) -> None:
        """A part that came through the object store. From one thread."""
        self._object_store.receive(sender, part, array)

    def close(self) -> None:
        for peer in list(self._wanted):
            self.unwant(peer)
        self.link.close()

    def _open(self, direct: DirectLinks, peer: WorkerId, address: str, is_over: threading.Event) -> None:
        pause_s = _FIRST_PAUSE_S
        while not is_over.is_set():
            try:
                direct.open(peer, address, _OPEN_TIMEOUT_S)
            except TransferFailed as error:
                if not is_over.is_set():
                    logger.warning("%s; the object store carries meanwhile", error.message)
                is_over.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                if is_over.is_set():
                    direct.forget(peer)
                return


def _direct_links(settings: WorkerSettings, post: Post, prepare_write: PrepareWrite) -> DirectLinks | None:
    transfer, link, sizes = settings.config.transfer, settings.config.transfer.link, link_sizes(settings.config)
    if link == "auto":
        link = "object_store" if settings.device == "cpu" else "nccl"
    if link == "object_store":
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
            num_slabs_out=sizes.num_slabs,
            num_slabs_in=sizes.num_slabs,
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
