"""A worker's links: the object store's, and beside it a direct one where the device has such.

Made before the model is loaded, so that the memory of parts on their way is in use when the KV cache is sized; opened
when all workers are loaded and know each other's addresses, before any of them takes work.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from kv_transfer.direct_link import DirectLinks
from kv_transfer.link import Link, Post
from kv_transfer.object_store_link import ObjectStoreLink
from kv_transfer.routed_link import RoutedLink
from kv_transfer.staging import is_intact
from kv_transfer.wire import WireDevice
from phasewise.core.errors import ConfigError, ServingError
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.mailboxes import WorkerMailboxes
from phasewise.core.messages import KVPart
from phasewise.core.placement import WorkerId, WorkerRole
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

_OPEN_TIMEOUT_S = 60.0


class Links:
    """Links of one worker. `link` is what its sender uses; `address` is where its direct link listens, "" for none.

    Raises:
        ConfigError: `transfer.link` asks for one that this worker cannot have.
    """

    def __init__(self, settings: WorkerSettings, workers: WorkerMailboxes, post: Post) -> None:
        self._is_required = settings.config.transfer.link not in ("auto", "object_store")
        device = torch.device("cuda" if settings.device != "cpu" else "cpu")
        self._object_store = ObjectStoreLink(settings.worker_id, workers, device, post)
        self._direct = _direct_links(settings, post)
        self.link: Link = self._object_store
        if self._direct is not None:
            self.link = RoutedLink(self._direct, self._object_store)
        self.address = self._direct.address if self._direct is not None else ""

    def agree_on(self, spec: KVCacheSpec) -> None:
        """Says what the other ends must have, too. Before any of them opens a link to this worker."""
        if self._direct is not None:
            self._direct.fingerprint = spec.content

    def open(self, peers: Mapping[WorkerId, str]) -> ServingError | None:
        """Opens the links to these workers, by address, all at once.

        A link that cannot be opened is an error where `transfer.link` asks for it, else a warning: the object store
        serves that pair then.
        """
        direct = self._direct
        if direct is None or not peers:
            return None
        with ThreadPoolExecutor(len(peers), "open-links") as pool:
            tries = {peer: pool.submit(direct.open, peer, address, _OPEN_TIMEOUT_S) for peer, address in peers.items()}
        for attempt in tries.values():
            error = attempt.exception()
            if error is None:
                continue
            if self._is_required or not isinstance(error, ServingError):
                return ConfigError(f"transfer.link: {error}", field="transfer.link")
            logger.warning("%s; the object store is used instead", error)
        return None

    def receive(self, sender: WorkerId, part: KVPart, array: np.ndarray) -> None:
        """A part that came through the object store. From one thread."""
        self._object_store.receive(sender, part, array)

    def close(self) -> None:
        self.link.close()


def _direct_links(settings: WorkerSettings, post: Post) -> DirectLinks | None:
    transfer = settings.config.transfer
    if transfer.link == "object_store" or settings.role is WorkerRole.MIXED:
        return None
    device = _wire_device(settings)
    if device is None:
        return None
    try:
        return DirectLinks(
            settings.worker_id,
            device,
            post,
            is_intact,
            fingerprint="",
            host=settings.host or socket.gethostbyname(socket.gethostname()),
            secret=settings.secret,
            num_slabs_out=transfer.num_slabs if settings.role.can_prefill else 0,
            num_slabs_in=transfer.num_slabs if settings.role.can_decode else 0,
            slab_bytes=transfer.slab_mib * 2**20,
            stall_s=transfer.stall_s,
        )
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"transfer.slab_mib: the GPU has no room for {transfer.num_slabs} slabs of {transfer.slab_mib} MiB; "
            "lower transfer.slab_mib or transfer.num_slabs, or end other processes on it",
            field="transfer.slab_mib",
        ) from None


def _wire_device(settings: WorkerSettings) -> WireDevice | None:
    """What moves the bytes of a direct link; None where there is nothing and nobody insists on it."""
    transfer = settings.config.transfer
    if settings.device == "cpu":
        if transfer.link == "nccl":
            raise ConfigError("transfer.link nccl needs GPUs; use auto or object_store", field="transfer.link")
        return None
    try:
        from kv_transfer.nccl_wire import NcclDevice  # needs CuPy, which CPU machines do not have

        return NcclDevice(torch.cuda.current_device(), transfer.nccl_channels)
    except (ImportError, ConfigError) as error:
        if transfer.link == "nccl":
            raise ConfigError(f"transfer.link nccl: {error}; install phasewise[gpu]", field="transfer.link") from None
        logger.warning("no direct links, the object store is used instead: %s", error)
        return None
