"""One uniform number per (seed, sample, position): counter-based, so that no state has to be kept or moved."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: list[int], sample_indices: list[int], positions: list[int]) -> np.ndarray:
    """[n] float64 in [0, 1), each a function of its own three integers alone; any sign and size of seed will do.

    One round of SplitMix64 per integer; the top 53 bits of the hash are the number.
    """
    state = splitmix64(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF for seed in seeds], dtype=np.uint64))
    state = splitmix64(state ^ np.array(sample_indices, dtype=np.uint64))
    state = splitmix64(state ^ np.array(positions, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def splitmix64(state: np.ndarray) -> np.ndarray:
    """[n] uint64 → [n] uint64: a step of SplitMix64's generator.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    with np.errstate(over="ignore"):
        state = state + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
