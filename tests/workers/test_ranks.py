"""A worker of two ranks as processes: what it computes, what moves in its caches, and what happens when one ends."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.batch import ScheduledBatch, ScheduledSequence
from engine.models.llama import LlamaModel
from engine.sequence import Sequence
from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import Codec, part_layout
from kv_transfer.plan import PartSpan
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError, InternalError, ModelLoadError
from phasewise.core.placement import WorkerRole
from phasewise.core.request import SamplingParams
from tests.support.tiny_model import save_tiny_model
from workers import build
from workers.build import LoadedEngine, load_engine
from workers.ranks import Ranks
from workers.settings import WorkerSettings

PROMPTS = [[5, 6, 7, 8, 9] * 6, [100], list(range(40))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path, context=512)
    return path


def settings_for(path: Path, size: int) -> WorkerSettings:
    sections = {
        "model": {"path": str(path), "device": "cpu"},
        "cache": {"kv_cache_gib": 0.01},
        "pools": {"mixed": {"workers": 1, "tensor_parallel": size}},
    }
    config = build_config(sections, source="test")
    return WorkerSettings("mixed-0", WorkerRole.MIXED, "cpu", 1, config, tensor_parallel=size)


@pytest.fixture(autouse=True)
def _engines() -> None:
    """Once is enough: these tests have engines of their own."""


class Started:
    """An engine of two ranks, and why it was lost."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        monkeypatch.setattr(build, "Ranks", lambda settings: Ranks(settings, self.lost.put))
        self.engine = load_engine(settings_for(folder, 2), lambda share: None, MonotonicClock())
        assert self.engine.ranks is not None
        self.ranks = self.engine.ranks

    def close(self) -> None:
        self.ranks.close()
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture
def started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    started = Started(folder, monkeypatch)
    yield started
    started.close()


def generate(engine: LoadedEngine, num_tokens: int, swap: bool = False, **sampling: Any) -> list[list[int]]:
    """All prompts together; with `swap` the first sequence's KV leaves and comes back elsewhere in between."""
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    sequences = [
        Sequence("r", params, list(p), len(p), block_table=list(range(16 * i, 16 * i + 16)))
        for i, p in enumerate(PROMPTS)
    ]
    for step in range(num_tokens):
        items = tuple(ScheduledSequence(s, s.num_unscheduled_tokens, 1) for s in sequences)
        result = engine.runner.run(ScheduledBatch(items))
        for sequence, tokens in zip(sequences, result.tokens, strict=True):
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.token_ids.append(tokens[0].token_id)
        if swap and step == 3:
            first = sequences[0]
            dropped = engine.cache.copy_out([0])
            places = engine.cache.copy_out(first.block_table)
            engine.cache.swap.give_back(dropped)
            first.block_table = list(range(100, 116))
            engine.cache.copy_in(places, first.block_table)
            engine.cache.copy_block(100, 120)
            first.block_table[0] = 120
    return [s.token_ids[s.num_prompt_tokens :] for s in sequences]


def test_two_ranks_give_the_tokens_of_one(folder: Path, started: Started) -> None:
    one = load_engine(settings_for(folder, 1), lambda share: None, MonotonicClock())
    assert one.ranks is None
    half = started.engine.cache.spec
    assert half.num_kv_heads * 2 == one.cache.spec.num_kv_heads
    assert half.model_fingerprint == one.cache.spec.model_fingerprint
    assert started.engine.cache.swap.num_free == one.cache.swap.num_free > 0, "swap_gib is the worker's, not a rank's"
    assert (started.engine.profile.facts.tensor_parallel, one.profile.facts.tensor_parallel) == (2, 1)
    assert generate(started.engine, 12) == generate(one, 12)
    assert generate(started.engine, 12, swap=True) == generate(one, 12)
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": 4, "logprobs": 3, "prompt_logprobs": 2}
    assert generate(started.engine, 12, **sampled) == generate(one, 12, **sampled)
    started.close()
    assert started.lost.empty(), "an orderly end is no loss"


def test_a_rank_that_is_killed_ends_the_worker_within_a_second(started: Started) -> None:
    generate(started.engine, 2)
    killed_s = time.monotonic()
    os.kill(started.ranks.pids[0], signal.SIGKILL)
    assert "rank 1 of mixed-0 ended (exit code -9); so the whole worker ends" in started.lost.get(timeout=5.0)
    assert time.monotonic() - killed_s < 1.0


def test_a_step_that_fails_on_rank_0_ends_the_worker(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(LlamaModel, "embed", fail)  # in this process, which is rank 0
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(started.engine, 1)
    assert "rank 0 of mixed-0: RuntimeError in a step: out of memory" in started.lost.get(timeout=1.0)


@pytest.mark.parametrize("does", ["pack", "unpack"])
def test_a_part_that_fails_on_rank_0_ends_the_worker(
    started: Started, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    """The other rank is in the middle of it: the next step would be computed with what belongs to the part."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for a part")

    port, span = started.engine.port, PartSpan(0, 1, 0, 16)
    layout = part_layout(port.spec, span, port.spec.dtype, Codec.NONE)
    monkeypatch.setattr("workers.ranked_cache.pack" if does == "pack" else "workers.ranked_cache.decode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        getattr(port, does)(KVPlace([0]), span, layout, torch.zeros(layout.num_bytes, dtype=torch.uint8))
    assert "OutOfMemoryError in a handoff: no memory for a part" in started.lost.get(timeout=1.0)


def test_ranks_end_with_a_worker_that_is_killed(folder: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.workers.test_ranks import settings_for\n"
        "from workers.ranks import Ranks\n"
        "ranks = Ranks(settings_for(Path(sys.argv[1]), 2))\n"
        "ranks.wait_loaded()\n"
        "print(ranks.pids[0], flush=True)\n"
        "time.sleep(100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    worker = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, env=environment)
    assert worker.stdout is not None
    rank_pid = int(worker.stdout.readline())
    descriptor = os.pidfd_open(rank_pid)
    worker.send_signal(signal.SIGKILL)
    worker.wait(10.0)
    worker.stdout.close()
    import select

    assert select.select([descriptor], [], [], 5.0)[0], "the rank lives on"
    os.close(descriptor)


def test_errors_at_the_start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match="tensor_parallel 3 cannot split this model evenly: 4 attention heads"
    ) as caught:
        load_engine(settings_for(folder, 3), lambda share: None, MonotonicClock())
    assert caught.value.field == "tensor_parallel"
    ranks = Ranks(settings_for(tmp_path / "nowhere", 2))
    with pytest.raises(ModelLoadError, match="does not exist"):
        ranks.wait_loaded()
    ranks.close()
    ranks = Ranks(settings_for(folder, 2))
    os.kill(ranks.pids[0], signal.SIGKILL)
    with pytest.raises(InternalError, match="rank 1 of mixed-0 ended while it started"):
        ranks.wait_loaded()
    ranks.close()


def test_ranks_count_as_devices() -> None:
    pools = {"prefill": {"workers": 1}, "decode": {"workers": 2}, "mixed": {"workers": 2, "tensor_parallel": 4}}
    config = build_config({"pools": pools}, source="test")
    assert config.pools.num_devices == 11 and config.pools.num_workers == 5


def test_values_that_cross_are_tensors_of_the_step_alone(started: Started) -> None:
    told: list[Any] = []
    started.ranks.tell, tell = (lambda command: (told.append(command), tell(command))[1]), started.ranks.tell  # type: ignore[method-assign]
    generate(started.engine, 2)
    assert [command[0] for command in told] == ["forward", "logits"] * 2
    assert not any(isinstance(value, torch.Tensor | Sequence) for command in told for value in command)
