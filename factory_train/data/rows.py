"""Rows of a split: seq_len inputs, and the token that each of these places is to predict.

Shape suffix: T = seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from factory_train.config import Config
from factory_train.data.packing import Packing, pack_at_once
from factory_train.data.packing_index import load_packing, packing_folder
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


class PackedRows:
    """Rows of whole documents, and of pieces of those that are longer than a row, each a context of its own.

    Positions count from 0 in each piece. Places that are left over are a context of their own too, and predict nothing.

    Args:
        stream: the split.
        packing: which pieces are in which row.
        seq_len: T, in tokens.
    """

    has_positions = True

    def __init__(self, stream: TokenStream, packing: Packing, seq_len: int) -> None:
        self.seq_len, self._stream, self._packing = seq_len, stream, packing

    def __len__(self) -> int:
        return len(self._packing.targets_R)

    def row(self, number: int) -> Row:
        tokens_T, targets_T = np.zeros(self.seq_len, np.int64), np.full(self.seq_len, IGNORE_INDEX, np.int64)
        pieces = slice(self._packing.borders_S[number], self._packing.borders_S[number + 1])
        starts, lengths = self._packing.starts_P[pieces].tolist(), self._packing.lengths_P[pieces].tolist()
        end = 0
        for start, length in zip(starts, lengths, strict=True):
            piece = self._stream.slice(start, length + 1)
            tokens_T[end : end + length], targets_T[end : end + length] = piece[:-1], piece[1:]
            end += length
        positions_T = np.concatenate([np.arange(length) for length in (*lengths, self.seq_len - end)])
        return Row(tokens_T, targets_T, positions_T)

    def num_targets(self, numbers: Int64s) -> int:
        return int(self._packing.targets_R[numbers].sum(dtype=np.int64))


def training_rows(cfg: Config, cache: Path, dataset: Path) -> Rows:
    """Returns the rows of a data set's training split, as `data.packing` makes them.

    Args:
        cfg: `data.packing` and `train.seq_len` are read from it.
        cache: folder of prepared data that runs share; it holds the packing.
        dataset: folder of the data set.
    Raises:
        DataError: documents are to be packed, and the prepare stage has not done it.
    """
    stream, seq_len = TokenStream(dataset, "train"), cfg.train.seq_len
    if cfg.data.packing == "concatenate":
        return ConcatenatedRows(stream, seq_len)
    return PackedRows(stream, load_packing(packing_folder(cache, stream.manifest.id, seq_len)), seq_len)


def validation_rows(cfg: Config, stream: TokenStream) -> Rows:
    """Returns the rows of a run's own validation tokens, in the way of its training rows.

    Args:
        cfg: `data.packing` and `train.seq_len` are read from it.
        stream: the validation split of the run's data folder. It is small enough to pack it each time anew.
    """
    seq_len = cfg.train.seq_len
    if cfg.data.packing == "concatenate":
        return ConcatenatedRows(stream, seq_len)
    return PackedRows(stream, pack_at_once(stream.document_starts(), stream.num_tokens, seq_len), seq_len)
