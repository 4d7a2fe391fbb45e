"""Which set of a mixture each sample comes from, and which of the set's samples it is: a fixed function of the seed.

A phase is cut into blocks. In a block each set has its exact number of samples, spread evenly: any stretch of it has
nearly the shares of the whole. The samples of a set are taken in order, over all blocks and phases, so that its epochs
follow each other as they would without a mixture.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from factory_train.data.order import scramble

Int64s = npt.NDArray[np.int64]

# A set with a smaller share than one in so many still gives one sample to each block.
BLOCK = 2**16


class MixtureOrder:
    """The order of a mixture.

    Args:
        ends: first sample after each phase, increasing; one less than there are phases, since the last has no end.
        shares: of each set, by phase; each phase's sum to 1.
        seed: fixes the order.
    """

    def __init__(self, ends: Sequence[int], shares: Sequence[Sequence[float]], seed: int) -> None:
        assert len(shares) == len(ends) + 1, (len(shares), len(ends))
        self._starts, self._ends = [0, *ends], [*ends, None]
        self._shares = [np.asarray(phase, dtype=np.float64) for phase in shares]
        self._seed = seed
        # Samples of each set before each phase.
        self._before = [np.zeros(len(shares[0]), dtype=np.int64)]
        for phase, end in enumerate(ends):
            self._before.append(self._before[-1] + self._within(phase, end - self._starts[phase]))
        self._block: tuple[tuple[int, int], tuple[Int64s, Int64s]] | None = None

    def counts(self, num_samples: int) -> Int64s:
        """Returns how many of the first samples come from each set (num_sets,); exact at the ends of blocks and phases."""
        phase = bisect.bisect_right(self._starts, num_samples) - 1
        inside = num_samples - self._starts[phase]
        full, rest = divmod(inside, BLOCK)
        counts = self._before[phase] + full * self._quota(phase, BLOCK)
        if rest:
            sets, _ = self._of_block(phase, full)
            counts = counts + np.bincount(sets[:rest], minlength=len(counts))
        return counts

    def locate(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Returns the set of each sample (N,), and its number among the samples of that set (N,)."""
        sets, numbers = np.empty_like(samples), np.empty_like(samples)
        phases = np.searchsorted(self._starts, samples, side="right") - 1
        blocks, insides = np.divmod(samples - np.asarray(self._starts)[phases], BLOCK)
        for phase, block in sorted(set(zip(phases.tolist(), blocks.tolist(), strict=True))):
            here = (phases == phase) & (blocks == block)
            set_of, rank_of = self._of_block(phase, block)
            sets[here] = set_of[insides[here]]
            before = self._before[phase] + block * self._quota(phase, BLOCK)
            numbers[here] = before[sets[here]] + rank_of[insides[here]]
        return sets, numbers

    def _within(self, phase: int, length: int) -> Int64s:
        full, rest = divmod(length, BLOCK)
        return full * self._quota(phase, BLOCK) + (self._quota(phase, rest) if rest else 0)

    def _quota(self, phase: int, length: int) -> Int64s:
        """Returns how many of `length` samples come from each set: exact shares, rounded by the largest remainder."""
        exact = self._shares[phase] * length
        quota = np.floor(exact).astype(np.int64)
        order = np.argsort(quota - exact, kind="stable")
        quota[order[: length - int(quota.sum())]] += 1
        for starved in np.flatnonzero((self._shares[phase] > 0) & (quota == 0)):
            if quota.max() > 1:
                quota[quota.argmax()] -= 1
                quota[starved] = 1
        return quota

    def _of_block(self, phase: int, block: int) -> tuple[Int64s, Int64s]:
        """Returns set and rank within the set of every sample of a block; the last one is kept."""
        if self._block is not None and self._block[0] == (phase, block):
            return self._block[1]
        start, end = self._starts[phase] + block * BLOCK, self._ends[phase]
        length = BLOCK if end is None else min(BLOCK, end - start)
        quota = self._quota(phase, length)
        set_of = np.repeat(np.arange(len(quota)), quota)
        rank_of = np.concatenate([np.arange(count) for count in quota])
        # Sample j of n of a set falls into the j-th of n equal parts of the block, anywhere in it.
        key = int.from_bytes(hashlib.blake2b(f"{self._seed}:{phase}:{block}".encode(), digest_size=8).digest(), "little")
        anywhere = _uniform(np.arange(length, dtype=np.uint64), key)
        order = np.argsort((rank_of + anywhere) / quota[set_of], kind="stable")
        self._block = ((phase, block), (set_of[order], rank_of[order]))
        return self._block[1]


def _uniform(index: npt.NDArray[np.uint64], key: int) -> npt.NDArray[Any]:
    """Returns numbers in [0, 1) that are a fixed function of index (N,) and key."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        scrambled = scramble((index + np.uint64(1)) * golden + np.uint64(key))
    return (scrambled >> np.uint64(11)) / 2**53
