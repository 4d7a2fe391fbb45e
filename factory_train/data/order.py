"""The order of samples: a fixed function of the seed, random access in constant time, nothing to store.

Epoch e is samples [e * num_rows, (e + 1) * num_rows). Each epoch is a permutation of all rows of its own, so that every
row is seen once before any is seen twice. Steps know nothing of epochs: one may hold the end of one and the
beginning of the next, and no row is dropped.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
_MASK = 2**64 - 1
# An int, or uint64 (N,), whose arithmetic is modulo 2**64 by itself.
_Bits = TypeVar("_Bits", int, npt.NDArray[Any])


class Permutation:
    """A keyed bijection of 0..size-1 that is computed element by element.

    A Feistel network over the next power of four, walked along its cycles until it is back within the size: at most
    four steps on average. Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.

    Args:
        size: number of elements, at least 1.
        seed, epoch: the key.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        assert size >= 1, size
        self._size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        key = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys: tuple[int, ...] = struct.unpack(f"<{_ROUNDS}Q", key)

    def __call__(self, index: int) -> int:
        """Returns where element `index` goes."""
        assert 0 <= index < self._size, index
        while True:
            index = self._encrypt(index)
            if index < self._size:
                return index

    def many(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns where elements (N,) go, (N,); for thousands at once some thirty times faster than one by one."""
        assert index.size == 0 or (index.min() >= 0 and index.max() < self._size), index
        out = index.astype(np.uint64)
        beyond = np.arange(len(out))
        while len(beyond):
            out[beyond] = self._encrypt(out[beyond])
            beyond = beyond[out[beyond] >= self._size]
        return out.astype(np.int64)

    def _encrypt(self, index: _Bits) -> _Bits:
        left, right = index >> self._half_bits, index & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (scramble(right ^ key) & self._half_mask)
        return left << self._half_bits | right


def scramble(value: _Bits) -> _Bits:
    """Scrambles 64 bits. Source: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


class SampleOrder:
    """Which row each sample of a run is; samples are numbered from 0 over all epochs."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self._seed = num_rows, seed
        self._epoch, self._permutation = 0, Permutation(num_rows, seed, 0)

    def row_of_sample(self, sample: int) -> int:
        """Returns the row, in 0..num_rows-1, of global sample number `sample`."""
        epoch, index = divmod(sample, self.num_rows)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, Permutation(self.num_rows, self._seed, epoch)
        return self._permutation(index)

    def rows_of_samples(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the rows of samples (N,): `row_of_sample` of each."""
        epochs, indices = np.divmod(samples, self.num_rows)
        rows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            own = epochs == epoch
            rows[own] = Permutation(self.num_rows, self._seed, int(epoch)).many(indices[own])
        return rows
