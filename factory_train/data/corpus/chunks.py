"""How the work is cut: a plan that follows from the files alone, so that any number of processes makes the same shards."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from factory_train.data.corpus.inputs import InputFile, check_column, open_parquet

_MIB = 2**20
# Enough chunks to keep the cores of one machine busy, few enough files in the result.
_FEWEST_CHUNKS, _MOST_CHUNKS = 16, 2000
_SMALLEST, _USUAL = _MIB, 32 * _MIB
# A line end after visible ASCII: no token of a byte-level vocabulary reaches across it (see `tokenizer.pieces`).
_SAFE_CUT = re.compile(rb"(?<=[!-~])\n")
_SEARCH_BYTES = _MIB
# Of so many text files or more, whole files are held out; of fewer, the last part of each.
MANY_FILES = 200


@dataclass(frozen=True)
class Span:
    """A part of a file that one process reads.

    Args:
        file: index of the file.
        start, stop: bytes of text and JSON lines, cut where a line begins; row groups of parquet; (0, 1) for a gzipped file.
        num_bytes: on disk, for progress.
        split: "train" or "validation", or None where each document decides by its name.
        begins, ends: of a text file that is one document: whether its first and last part are in here.
    """

    file: int
    start: int
    stop: int
    num_bytes: int
    split: str | None = None
    begins: bool = True
    ends: bool = True


Chunk = tuple[Span, ...]


def plan_chunks(files: Sequence[InputFile], *, field: str, by_line: bool, validation_fraction: float) -> list[Chunk]:
    """Returns the chunks, in the order of their tokens.

    Args:
        field: column of parquet files.
        by_line: each line of a text file is a document; else a file is one.
        validation_fraction: part that is held out.
    Raises:
        DataError: a parquet file without the column.
    """
    total = sum(file.num_bytes for file in files)
    size = max(min(_USUAL, max(_SMALLEST, total // _FEWEST_CHUNKS)), total // _MOST_CHUNKS)
    few_texts = not by_line and sum(file.format == "text" for file in files) < MANY_FILES
    chunks: list[Chunk] = []
    spans: list[Span] = []
    room = size
    for index, file in enumerate(files):
        for span in _spans(index, file, size, field, by_line, validation_fraction if few_texts else None):
            spans.append(span)
            room -= span.num_bytes
            if room <= 0:
                chunks.append(tuple(spans))
                spans, room = [], size
    if spans:
        chunks.append(tuple(spans))
    return chunks


def _spans(index: int, file: InputFile, size: int, field: str, by_line: bool, tail_fraction: float | None) -> Iterator[Span]:
    if file.format == "parquet":
        yield from _row_groups(index, file, size, field)
    elif file.gzipped:
        yield Span(index, 0, 1, file.num_bytes)
    elif file.format == "jsonl" or by_line:
        cuts = _cuts(file, 0, file.num_bytes, size, after_line_end=True)
        yield from (Span(index, start, stop, stop - start) for start, stop in itertools.pairwise(cuts))
    elif tail_fraction is None:
        yield from _document(index, file, 0, file.num_bytes, size, None)
    else:
        tail = _cut(file, int(file.num_bytes * (1 - tail_fraction)), after_line_end=False)
        yield from _document(index, file, 0, tail, size, "train")
        yield from _document(index, file, tail, file.num_bytes, size, "validation")


def _document(index: int, file: InputFile, start: int, stop: int, size: int, split: str | None) -> Iterator[Span]:
    """Yields the spans of a document that is bytes [start, stop) of a text file."""
    cuts = _cuts(file, start, stop, size, after_line_end=False)
    for here, there in itertools.pairwise(cuts):
        yield Span(index, here, there, there - here, split, begins=here == start, ends=there == stop)


def _cuts(file: InputFile, start: int, stop: int, size: int, *, after_line_end: bool) -> list[int]:
    """Returns increasing positions from start to stop, about `size` apart."""
    cuts = [start]
    for near in range(start + size, stop - size // 2, size):
        cut = _cut(file, near, after_line_end=after_line_end)
        if cuts[-1] < cut < stop:
            cuts.append(cut)
    return [*cuts, stop] if stop > start else []


def _cut(file: InputFile, near: int, *, after_line_end: bool) -> int:
    """Returns the first position at or after `near` at which the file may be cut."""
    with open(file.path, "rb") as stream:
        stream.seek(max(near - 1, 0))
        if after_line_end:
            # A line begins at `near` itself if the byte before is a line end.
            if near:
                stream.readline()
            return stream.tell()
        data = stream.read(_SEARCH_BYTES + 1)
    found = _SAFE_CUT.search(data)
    if found is not None:
        return max(near - 1, 0) + found.start()
    plain = data.find(b"\n", 1)
    # Without a line end in a megabyte, any place between two characters will do.
    place = plain if plain > 0 else next((at for at in range(1, len(data)) if data[at] & 0xC0 != 0x80), len(data))
    return max(near - 1, 0) + place


def _row_groups(index: int, file: InputFile, size: int, field: str) -> Iterator[Span]:
    with open_parquet(file.path) as parquet:
        check_column(file.path, parquet.schema_arrow, field)
        metadata = parquet.metadata
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    start, taken = 0, 0
    for number, count in enumerate(rows):
        taken += count
        num_bytes = file.num_bytes * taken // max(1, sum(rows))
        if num_bytes >= size or number == len(rows) - 1:
            yield Span(index, start, number + 1, num_bytes)
            start, taken = number + 1, 0
