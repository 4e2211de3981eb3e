"""Slabs of any size out of one allocation: never two at one place, in the order asked for, behind their last use."""

from __future__ import annotations

import random
import threading

import torch

from kv_transfer.slabs import Slab, SlabPool

LARGEST = 4096


class _Mark:
    def __init__(self, number: int) -> None:
        self.number = number

    def wait(self) -> None: ...


def pool_of(num_bytes: int) -> SlabPool:
    return SlabPool(torch.zeros(num_bytes, dtype=torch.uint8), LARGEST)


def test_slabs_do_not_overlap_and_all_room_comes_back() -> None:
    rng, pool, held = random.Random(0), pool_of(4 * LARGEST), list[tuple[Slab, int]]()
    owner = torch.zeros(4 * LARGEST, dtype=torch.int64)
    for turn in range(1, 4000):
        if held and rng.random() < 0.5:
            slab, number = held.pop(rng.randrange(len(held)))
            assert (owner[slab.start : slab.start + slab.size] == number).all()
            owner[slab.start : slab.start + slab.size] = 0
            pool.give_back(slab)
        elif (slab_or_none := pool.try_take(num_bytes := rng.randint(1, LARGEST))) is not None:
            slab = slab_or_none
            assert slab.buffer.numel() == num_bytes <= slab.size
            assert slab.start % 256 == 0
            assert not owner[slab.start : slab.start + slab.size].any()
            owner[slab.start : slab.start + slab.size] = turn
            held.append((slab, turn))
        assert pool.num_free_bytes == int((owner == 0).sum())
    for slab, _ in held:
        pool.give_back(slab)
    assert pool.num_free_bytes == pool.num_bytes and pool.try_take(pool.num_bytes) is not None


def test_who_asks_for_much_is_not_passed_by_who_asks_for_little() -> None:
    pool, taken = pool_of(LARGEST), list[str]()
    first = pool.try_take(LARGEST // 2)
    assert first is not None

    def take(name: str, slab: Slab) -> bool:
        taken.append(name)
        return True

    pool.ask("a", LARGEST, lambda slab: take("large", slab))
    pool.ask("b", 256, lambda slab: take("small", slab))
    assert not taken and pool.try_take(256) is None
    pool.give_back(first)
    assert taken == ["large"]
    pool.withdraw("b")
    assert not pool.num_waiting


def test_those_behind_one_that_is_withdrawn_get_their_slabs() -> None:
    pool, has_small = pool_of(LARGEST), threading.Event()
    first = pool.try_take(LARGEST // 2)
    pool.ask("a", LARGEST, lambda slab: True)
    pool.ask("b", 256, lambda slab: has_small.set() or True)
    pool.withdraw("a")
    assert first is not None and has_small.is_set()


def test_what_nobody_wants_any_more_goes_to_the_next() -> None:
    pool, taken = pool_of(LARGEST), list[Slab]()
    held = pool.try_take(LARGEST)
    assert held is not None
    pool.ask("gone", LARGEST, lambda slab: False)
    pool.ask("next", 100, lambda slab: taken.append(slab) or True)
    pool.give_back(held)
    assert len(taken) == 1


def test_a_slab_over_several_old_ones_waits_for_the_newest_of_their_last_uses() -> None:
    pool = pool_of(4 * 1024)
    slabs = [pool.try_take(1024) for _ in range(4)]
    for number, index in enumerate((2, 0, 3, 1)):
        slab = slabs[index]
        assert slab is not None and slab.last_use is None
        pool.give_back(slab, _Mark(number) if index != 3 else None)
    whole = pool.try_take(4096)
    assert whole is not None and isinstance(whole.last_use, _Mark) and whole.last_use.number == 3
    pool.give_back(whole)
    one, other = pool.try_take(2048), pool.try_take(2048)
    assert one is not None and other is not None
    pool.give_back(other, _Mark(4))
    pool.give_back(one)  # as one that an abort took before anybody wrote to it: its last use is the old one
    again = pool.try_take(4096)
    assert again is not None and isinstance(again.last_use, _Mark) and again.last_use.number == 4
