"""Samples: what is trained on, numbered from 0 over the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from factory_train.data.order import SampleOrder
from factory_train.data.rows import Row, Rows


class SampleSource(Protocol):
    """Which row each sample of a run is: a fixed function of its number, the same on every rank.

    `seq_len` and `has_positions` are those of all its rows.
    """

    seq_len: int
    has_positions: bool

    def row(self, sample: int) -> Row:
        """Returns the row of a sample."""
        ...

    def num_targets(self, samples: Sequence[int]) -> int:
        """Returns how many targets these samples have together; every rank asks it for all samples of a step."""
        ...


class ShuffledRows:
    """The rows of one split, each once an epoch, every epoch in another order.

    Args:
        rows: at least one.
        seed: fixes the order.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self.seq_len, self.has_positions = rows.seq_len, rows.has_positions
        self._rows, self._order = rows, SampleOrder(len(rows), seed)

    def row(self, sample: int) -> Row:
        return self._rows.row(self._order.row_of_sample(sample))

    def num_targets(self, samples: Sequence[int]) -> int:
        return self._rows.num_targets(self._order.rows_of_samples(np.asarray(samples, dtype=np.int64)))
