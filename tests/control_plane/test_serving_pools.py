"""What a cluster can serve with the workers that are left."""

from __future__ import annotations

import pytest

from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.serving_pools import ServingPools, why_unservable
from phasewise.core.clock import ManualClock
from phasewise.core.errors import Unavailable
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import WorkerInfo
from phasewise.core.placement import PlaceRequest, WorkerId, WorkerRole
from phasewise.core.profile import DeviceProfile

CASES = [
    (("prefill-0", "decode-0"), (), ""),
    (("prefill-0", "decode-0"), ("decode-0",), "no decode worker is ready"),
    (("prefill-0", "decode-0"), ("prefill-0",), "no prefill worker is ready"),
    (("prefill-0", "decode-0"), ("prefill-0", "decode-0"), "no prefill and no decode worker is ready"),
    (("prefill-0", "decode-0", "decode-1"), ("decode-0",), ""),
    (("prefill-0", "decode-0", "decode-1"), ("decode-0", "decode-1"), "no decode worker is ready"),
    (("mixed-0",), (), ""),
    (("mixed-0",), ("mixed-0",), "no mixed worker is ready"),
    (("mixed-0", "mixed-1"), ("mixed-1",), ""),
    (("prefill-0", "decode-0", "mixed-0"), ("prefill-0", "decode-0"), ""),
    (("prefill-0", "decode-0", "mixed-0"), ("mixed-0",), ""),
    (("prefill-0", "decode-0", "mixed-0"), ("decode-0", "mixed-0"), "no decode and no mixed worker is ready"),
    (("prefill-0", "mixed-0"), ("mixed-0",), "no mixed worker is ready"),
]


@pytest.mark.parametrize(("workers", "lost", "reason"), CASES)
def test_gateway_and_control_plane_say_the_same(
    workers: tuple[WorkerId, ...], lost: tuple[WorkerId, ...], reason: str
) -> None:
    roles = {worker_id: WorkerRole(worker_id.split("-")[0]) for worker_id in workers}
    pools = ServingPools(roles)
    scheduler = ClusterScheduler(ManualClock(), max_waiting=9)
    spec, profile = KVCacheSpec(2, 1, 4, 16, "float32"), DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
    for worker_id, role in roles.items():
        scheduler.worker_joined(WorkerInfo(worker_id, role, 1, "h", "cpu", "float32", 1, spec, 9, 99, profile))
    for worker_id in (*lost, *lost):  # told twice is no harm
        pools.worker_lost(worker_id)
        scheduler.worker_lost(worker_id)
    assert pools.why_unservable == scheduler.why_unservable() == reason
    if reason:
        with pytest.raises(Unavailable, match=reason):
            scheduler.place(PlaceRequest("r", 10, 1, 8))
    else:
        scheduler.place(PlaceRequest("r", 10, 1, 8))


def test_who_is_ready_again_or_in_another_role_counts() -> None:
    pools = ServingPools({"prefill-0#1": WorkerRole.PREFILL, "decode-0#1": WorkerRole.DECODE})
    pools.worker_lost("decode-0#1")
    assert pools.why_unservable == "no decode worker is ready"
    pools.worker_ready("decode-0#2", WorkerRole.DECODE)
    assert pools.why_unservable == ""
    pools.worker_ready("decode-0#2", WorkerRole.PREFILL)
    assert pools.why_unservable == "no decode worker is ready"
    pools.worker_ready("prefill-0#1", WorkerRole.MIXED)
    assert pools.why_unservable == ""


def test_a_cluster_without_workers_serves_nothing() -> None:
    assert why_unservable((), ()) == "no prefill and no decode worker is ready"
