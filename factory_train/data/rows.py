"""Rows of a split: seq_len inputs, and the token that each of these places is to predict.

Shape suffix: T = seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from factory_train.data.shards import TokenStream

IGNORE_INDEX = -100
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        tokens_T: inputs.
        targets_T: what each place is to predict; IGNORE_INDEX where it is nothing.
        positions_T: place of each token in its document; None where the whole row is one context.
    """

    tokens_T: Int64s
    targets_T: Int64s
    positions_T: Int64s | None = None


class Rows(Protocol):
    """The rows of a split, numbered from 0.

    `seq_len` is T; `has_positions` tells whether rows hold positions: all of them or none.
    """

    seq_len: int
    has_positions: bool

    def __len__(self) -> int: ...

    def row(self, number: int) -> Row:
        """Returns a row."""
        ...

    def num_targets(self, numbers: Int64s) -> int:
        """Returns how many targets rows (N,) have together, without reading their tokens."""
        ...


class ConcatenatedRows:
    """Rows cut from the split as it is: the end of a document and the beginning of the next are one context.

    Row j is tokens [j T, (j + 1) T], one more than T: the inputs are all but the last, the targets all but the first.

    Args:
        stream: the split.
        seq_len: T, in tokens.
    """

    has_positions = False

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        self.seq_len, self._stream = seq_len, stream
        self._num_rows = max(0, stream.num_tokens - 1) // seq_len

    def __len__(self) -> int:
        return self._num_rows

    def row(self, number: int) -> Row:
        tokens = self._stream.slice(number * self.seq_len, self.seq_len + 1)
        return Row(tokens[:-1], tokens[1:])

    def num_targets(self, numbers: Int64s) -> int:
        return len(numbers) * self.seq_len
