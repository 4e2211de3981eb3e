"""Small clusters whose messages come in any order, late or never, while workers die and links break.

Whatever happens, a stream gives the tokens of a run without cache, or a beginning of them and an error that the fault
explains; and afterwards nothing of any request is left anywhere. A seed makes the whole of a run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from kv_transfer.link import ArrivedPart, WriteOutcome
from phasewise.core.errors import RequestCancelled, TransferFailed, Unavailable, WorkerLost
from phasewise.core.messages import KVCommit, KVPart, LinkLost, PeerLost, WorkerMessage, WorkerOutput
from phasewise.core.placement import WorkerId
from tests.support.delayed_writes import delayed_write
from tests.support.gateway_box import GatewayBox
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import corrupt
from tests.workers.test_request_life import prompt_of

_MAX_TURNS = 4000
SEEDS_PER_TEST = 30


class ChaosBox(GatewayBox):
    """`hold`: how likely a message stays where it is for a round. `bad`: how likely a part is damaged or lost."""

    def __init__(self, rng: random.Random, roles: dict[WorkerId, str], *, hold: float, bad: float, **options: Any):
        self._rng = rng
        self._hold = hold
        self._bad = bad
        self._said_by: WorkerId | None = None
        self._writing: list[Callable[[], None]] = []  # of the part that is on its way into the mailbox
        self._under_way: list[tuple[WorkerId | None, WorkerId | None, Callable[[], None]]] = []  # (to, from, arrival)
        super().__init__(roles, fault=self._fault, **options)
        mailboxes = next(iter(self.links.values())).mailboxes
        for name, worker in self.workers.items():
            mailboxes[name] = self._late(name, worker.post)
            if rng.random() < 0.5:
                self.links[name].send_commit = self._commits_of(name, mailboxes)  # type: ignore[method-assign]
            self.runners[name].on_look = lambda: rng.random() < 0.7
        if self.links_write:
            writers = next(iter(self.links.values())).writers
            for name in self.workers:
                writers[name] = delayed_write(self, name, writers[name], self._writing.append)

    def _late(self, to: WorkerId, post: Callable[..., None]) -> Callable[..., None]:
        def put(message: Any, arrived: Any = None) -> None:
            if arrived is None or arrived.written is None:
                self._under_way.append((to, self._said_by, lambda: post(message, arrived)))
            else:  # whoever dies, the link's own end says what became of it
                self._under_way.append((to, None, partial(self._end_write, to, message, arrived, self._writing.pop())))

        return put

    def _end_write(self, to: WorkerId, part: KVPart, arrived: ArrivedPart, write: Callable[[], None]) -> None:
        """The device has written a part, or the link broke meanwhile, which both ends hear of."""
        is_lost = self._rng.random() < self._bad
        if not is_lost or self._rng.random() < 0.5:
            write()
        if not is_lost:
            self.workers[to].post(part, arrived)
            return
        self.workers[to].post(part, ArrivedPart(None, lambda: None, WriteOutcome.LOST))
        sender = part.transfer_id.rpartition("#")[2].rpartition(".")[0]
        for end, peer in ((to, sender), (sender, to)):
            if end not in self.lost:
                post = self.workers[end].post
                news = LinkLost(peer, "chaos", frozenset({part.transfer_id}))
                self._under_way.append((end, None, partial(post, news)))

    def _commits_of(self, sender: WorkerId, mailboxes: dict[WorkerId, Any]) -> Callable[[WorkerId, KVCommit], bool]:
        """A link that brings commits, or breaks under one: its sender hears of that, at some time."""

        def send_commit(peer: WorkerId, commit: KVCommit) -> bool:
            if self._rng.random() < self._bad:
                post = self.workers[sender].post
                self._under_way.append((sender, None, lambda: post(LinkLost(peer, "chaos", frozenset()))))
            else:
                mailboxes[peer](commit)
            return True

        return send_commit

    def _fault(self, part: KVPart, wire: torch.Tensor) -> torch.Tensor | None:
        draw = self._rng.random()
        if draw < self._bad:
            return corrupt(wire)
        return wire if draw > 1.5 * self._bad else None

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        self.sent.append((worker_id, message))
        post = self.workers[worker_id].post
        self._under_way.append((worker_id, self._said_by, lambda: post(message)))

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        arrival = super().deliver
        self._under_way.append((None, output.worker_id, lambda: arrival(gateway_id, output)))

    def lose(self, worker_id: WorkerId, *, gateway_first: bool = True) -> None:
        """Some of what it said dies with it, and everybody hears of its death at another time."""
        self.lost.add(worker_id)
        self.scheduler.worker_lost(worker_id)
        keep = self._rng.random()
        self._under_way = [m for m in self._under_way if m[1] != worker_id or self._rng.random() < keep]
        self._under_way.append((None, None, lambda: self.loop.worker_lost(worker_id)))
        for other in self.workers.keys() - self.lost:
            post = self.workers[other].post
            self._under_way.append((other, None, lambda post=post: post(PeerLost(worker_id))))  # type: ignore[misc]

    def break_link(self, worker_id: WorkerId, peer: WorkerId) -> None:
        """The news alone, which may be wrong: as if it were late."""
        transfers = self.outgoing(worker_id).transfer_ids
        named = frozenset(name for name in transfers if self._rng.random() < 0.5)
        self.workers[worker_id].post(LinkLost(peer, "chaos", named))

    def round(self) -> None:
        self._arrive()
        for worker_id, worker in self.workers.items():
            if worker_id not in self.lost and self._rng.random() < 0.8:
                self._said_by = worker_id
                worker.round()
                self._said_by = None
        self._arrive()

    def calm_down(self) -> None:
        self._hold = 0.0

    @property
    def is_quiet(self) -> bool:
        return not self._under_way and not any(self.holds(w) for w in self.workers.keys() - self.lost)

    def _arrive(self) -> None:
        messages, self._under_way = self._under_way, []
        self._rng.shuffle(messages)
        for message in messages:
            to, _, arrival = message
            if self._rng.random() < self._hold:
                self._under_way.append(message)
            elif to not in self.lost:
                arrival()


class Asked:
    """A request with random parameters, and the tokens that each of its samples must give."""

    def __init__(self, rng: random.Random, index: int) -> None:
        self.name = f"r{index}"
        self.prompt = prompt_of(rng.choice([1, 5, 16, 17, 33, 60, 100]), rng.choice([0, index]))
        self.sampling: dict[str, Any] = {"n": rng.choice([1, 1, 1, 2, 3]), "max_tokens": rng.choice([1, 2, 3, 10, 30])}
        num_tokens = self.sampling["max_tokens"]
        self.expected = [expected_tokens(self.prompt, num_tokens, i) for i in range(self.sampling["n"])]
        if rng.random() < 0.3:
            stop = self.expected[0][rng.randrange(num_tokens)]
            self.sampling |= {"stop_token_ids": (stop,)} if rng.random() < 0.5 else {"stop": (f"<{stop}>",)}
            self.expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in self.expected]
        if rng.random() < 0.15:
            self.sampling["prompt_logprobs"] = 0


def random_box(rng: random.Random) -> ChaosBox:
    roles = {f"prefill-{i}": "prefill" for i in range(rng.randint(1, 3))}
    roles |= {f"decode-{i}": "decode" for i in range(rng.randint(1, 3))}
    roles |= {f"mixed-{i}": "mixed" for i in range(rng.randint(0, 2))}
    order = rng.sample(list(roles), len(roles))
    return ChaosBox(
        rng,
        {name: roles[name] for name in order},
        hold=rng.choice([0.0, 0.3, 0.6]),
        bad=rng.choice([0.0, 0.0, 0.02, 0.1]),
        num_blocks=rng.choice([12, 20, 64]),
        transfer={
            "layerwise_threshold_tokens": rng.choice([20, 100, 10_000]),
            "layers_per_part": rng.choice([1, 2, 4]),
        },
        scheduler={
            "token_budget": rng.choice([16, 48, 128]),
            "reserve_headroom": rng.choice([0.0, 0.05]),
            "max_running": rng.choice([4, 16]),
        },
        cache={"prefix_caching": rng.random() < 0.7},
    )


async def run(seed: int) -> int:
    """One cluster's life; the number of its recoveries."""
    rng = random.Random(seed)
    box = random_box(rng)
    waiting = [Asked(rng, i) for i in range(rng.randint(2, 8))]
    num_losses, has_bad_links = rng.randint(0, 3), rng.random() < 0.3
    asked: list[Asked] = []
    cancelled: set[str] = set()
    for _ in range(_MAX_TURNS):
        live = [request.name for request in asked if not box._readers[request.name].done()]
        if not waiting and not live:
            break
        if waiting and rng.random() < 0.3:
            request = waiting.pop()
            try:
                await box.ask(request.name, request.prompt, **request.sampling)
            except (Unavailable, WorkerLost):
                continue  # nobody is left
            asked.append(request)
        workers = sorted(box.workers.keys() - box.lost)
        if workers and num_losses and rng.random() < 0.03:
            box.lose(rng.choice(workers))
            num_losses -= 1
        if live and rng.random() < 0.004:
            cancelled.add(name := rng.choice(live))
            box.streams[name].close()
        if len(workers) > 1 and has_bad_links and rng.random() < 0.02:
            box.break_link(*rng.sample(workers, 2))
        if rng.random() < 0.05:
            box.clock.advance(0.5)
        await box.turn()
    else:
        raise AssertionError(f"{live} hang")
    for request in asked:
        error = box._readers[request.name].exception()
        for index, expected in enumerate(request.expected):
            ids = box.ids[(request.name, index)]
            assert ids == (expected if error is None else expected[: len(ids)]), (request.name, index)
        may_fail = (WorkerLost, TransferFailed, Unavailable)
        assert isinstance(error, RequestCancelled if request.name in cancelled else may_fail) or error is None, error
    box.calm_down()
    for _ in range(400):
        if box.is_quiet:
            break
        await box.turn()
        box.clock.advance(rng.choice([0.0, 5.0]))  # what nobody answers any more runs out of time
    await box.assert_nothing_left()
    for worker_id in box.workers.keys() - box.lost:
        parts = box.workers[worker_id].rounds.parts
        assert not parts.sender.outgoing.transfer_ids and not parts.decode.scheduler.job_of
        assert parts.prefill.next_deadline_s() == float("inf"), "a prompt that is in no queue"
        assert box.caches[worker_id].swap.num_free == box.num_swap_blocks
    return sum(box.metrics._recoveries.values())


@pytest.mark.parametrize("first", range(0, 10 * SEEDS_PER_TEST, SEEDS_PER_TEST))
async def test_any_order_of_messages_and_any_loss_change_no_token(first: int) -> None:
    recoveries = 0
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            recoveries += await run(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert recoveries > 0, "workers were lost under requests"
