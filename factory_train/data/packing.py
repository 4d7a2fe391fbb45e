"""Packing: documents into rows of seq_len places, none of them spread over more rows than it needs.

A document of n tokens is n - 1 pairs of an input and its target: its first token is predicted from nothing, and so by
nobody. A document of more than seq_len pairs is cut into pieces of seq_len and a rest; every pair is in exactly one piece.
Pieces go into rows by best-fit decreasing: the longest first, each into the fullest row that has room for it.
Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830, section 3.

Shape suffixes: D documents, P pieces, R rows, S = R + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[Any]

# So many documents are packed at a time: it bounds memory, and more would hardly fill rows better.
WINDOW_DOCUMENTS = 2**20


@dataclass(frozen=True)
class Packing:
    """Which pieces of documents are in which row.

    Args:
        starts_P: token of the split at which each piece begins, in order of rows.
        lengths_P: its pairs, at least one.
        borders_S: pieces of row r are borders_S[r] to borders_S[r + 1].
        targets_R: pairs of each row.
    """

    starts_P: Ints
    lengths_P: Ints
    borders_S: Ints
    targets_R: Ints


@dataclass(frozen=True)
class PackingFigures:
    """What packing made of a split.

    Args:
        seq_len: places of a row.
        documents: that hold a pair.
        cut: of these, how many are longer than a row.
        pieces: of documents.
        rows: that hold them.
        targets: places of all rows that hold a pair.
    """

    seq_len: int
    documents: int = 0
    cut: int = 0
    pieces: int = 0
    rows: int = 0
    targets: int = 0

    @property
    def efficiency(self) -> float:
        """The part of all places that holds a pair."""
        return self.targets / (self.rows * self.seq_len) if self.rows else 0.0

    def plus(self, packing: Packing, documents: int, cut: int) -> PackingFigures:
        """Returns the figures with those of one more window."""
        return replace(
            self,
            documents=self.documents + documents,
            cut=self.cut + cut,
            pieces=self.pieces + len(packing.starts_P),
            rows=self.rows + len(packing.targets_R),
            targets=self.targets + int(packing.targets_R.sum(dtype=np.int64)),
        )

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents in {self.rows:,} rows of {self.seq_len:,}, {self.cut:,} longer than a row, "
            f"{self.efficiency:.2%} of the places hold a target"
        )


def pack(starts_D: Ints, end: int, seq_len: int, *, window_documents: int = WINDOW_DOCUMENTS) -> Iterator[tuple[Packing, PackingFigures]]:
    """Yields the packing of one window of documents after the other, and the figures of all of them so far.

    Args:
        starts_D: token at which each document begins, increasing; the first is 0.
        end: tokens of the split: where the last document ends.
        seq_len: most pairs of a row.
        window_documents: documents packed at a time.
    """
    figures = PackingFigures(seq_len)
    for first in range(0, len(starts_D), window_documents):
        window_D = np.asarray(starts_D[first : first + window_documents], dtype=np.int64)
        next_start = int(starts_D[first + len(window_D)]) if first + len(window_D) < len(starts_D) else end
        pairs_D = np.diff(window_D, append=next_start) - 1
        packing = _pack_pieces(*_cut(window_D, pairs_D, seq_len), seq_len)
        figures = figures.plus(packing, int((pairs_D > 0).sum()), int((pairs_D > seq_len).sum()))
        yield packing, figures


def pack_at_once(starts_D: Ints, end: int, seq_len: int) -> Packing:
    """Returns the packing of a split small enough to be one window, whatever its size."""
    whole = [packing for packing, _ in pack(starts_D, end, seq_len, window_documents=max(1, len(starts_D)))]
    return whole[0] if whole else _pack_pieces(np.empty(0, np.int64), np.empty(0, np.int64), seq_len)


def _cut(starts_D: Ints, pairs_D: Ints, seq_len: int) -> tuple[Ints, Ints]:
    """Returns start and pairs of the pieces of documents, in their order."""
    pieces_D = -(-np.maximum(pairs_D, 0) // seq_len)
    document_P = np.repeat(np.arange(len(starts_D)), pieces_D)
    offsets_P = (np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)) * seq_len
    return starts_D[document_P] + offsets_P, np.minimum(seq_len, pairs_D[document_P] - offsets_P)


def _pack_pieces(starts_P: Ints, lengths_P: Ints, seq_len: int) -> Packing:
    rows_P = best_fit_decreasing(lengths_P, seq_len)
    # Within a row in the order of the split.
    order_P = np.argsort(rows_P, kind="stable")
    lengths_P = lengths_P[order_P]
    borders_S = np.searchsorted(rows_P[order_P], np.arange(rows_P.max(initial=-1) + 2))
    targets_R = np.add.reduceat(lengths_P, borders_S[:-1]) if len(lengths_P) else np.empty(0, np.int64)
    return Packing(starts_P[order_P], lengths_P, borders_S, targets_R)


def best_fit_decreasing(lengths_P: Ints, capacity: int) -> Ints:
    """Returns the row of each piece, rows_P, numbered from 0.

    Pieces of one length are placed together, and rows with the same room are alike, so that the work is that of
    placing runs, not pieces. Which rooms there are is kept as the bits of one number: the best fit is its lowest bit from
    the length on.

    Args:
        lengths_P: each from 1 to `capacity`.
        capacity: of a row.
    """
    rows_P = np.empty(len(lengths_P), dtype=np.int64)
    full_P = lengths_P == capacity
    num_rows = int(np.count_nonzero(full_P))
    rows_P[full_P] = np.arange(num_rows)
    rest_P = np.flatnonzero(~full_P)
    rest_P = rest_P[np.argsort(-lengths_P[rest_P], kind="stable")]
    run_lengths, run_counts = np.unique(lengths_P[rest_P], return_counts=True)
    rows_of_room: list[list[int]] = [[] for _ in range(capacity)]
    rooms = 0
    placed: list[int] = []
    for length, left in zip(run_lengths[::-1].tolist(), run_counts[::-1].tolist(), strict=True):
        while left:
            if fitting := rooms >> length:
                room = length + (fitting & -fitting).bit_length() - 1
                each = room // length
                rows = rows_of_room[room]
                needed = -(-left // each)
                taken = rows[-needed:]
                del rows[-len(taken) :]
                if not rows:
                    rooms ^= 1 << room
            else:
                room, each = capacity, capacity // length
                taken = list(range(num_rows, num_rows - (-left // each)))
                num_rows += len(taken)
            # A row takes as many as fit before the next gets any: after the first it has the least room of all.
            full, some = divmod(left, each)
            for count, now in ((each, taken[:full]), (some, taken[full:])):
                if now:
                    placed += now if count == 1 else [row for row in now for _ in range(count)]
                    if still := room - count * length:
                        rows_of_room[still] += now
                        rooms |= 1 << still
            left -= min(left, each * len(taken))
    rows_P[rest_P] = placed
    return rows_P
