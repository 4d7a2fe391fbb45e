"""Documents out of a span of a file, and what becomes of those that are malformed."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from factory_train.data.corpus.chunks import Span
from factory_train.data.corpus.inputs import InputFile, check_column, open_parquet, which_field
from factory_train.data.source import is_held_out
from factory_train.errors import DataError

_BOM = b"\xef\xbb\xbf"
_ROWS_AT_ONCE = 1024
_MOST_EXAMPLES = 5


@dataclass(frozen=True)
class Passage:
    """A document, or a part of one that is large.

    Args:
        name: identifies the document within the corpus.
        text: never interpreted.
        split: where it belongs, or None where its name decides.
        begins, ends: whether the document's first and last part are in here.
    """

    name: str
    text: str
    split: str | None = None
    begins: bool = True
    ends: bool = True

    def is_held_out(self, validation_fraction: float) -> bool:
        """Returns whether it belongs to the validation split."""
        return self.split == "validation" if self.split else is_held_out(self.name, validation_fraction)


@dataclass
class Rejects:
    """What to do with malformed documents: stop at the first, or count them and keep some places for the person to look at.

    Args:
        skip: count instead of stopping.
    """

    skip: bool
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, where: str, what: str, fix: str) -> None:
        """Takes note of one.

        Args:
            reason: in two or three words, to count by.
            where: file and line, row or byte.
            what, fix: for a person.
        Raises:
            DataError: malformed documents are to stop the work.
        """
        if not self.skip:
            raise DataError(what, where=where, fix=f"{fix}, or on_error=skip")
        self.counts[reason] += 1
        if len(self.examples) < _MOST_EXAMPLES:
            self.examples.append(f"{where}: {what}")


def passages(
    file: InputFile, span: Span, *, column: str, by_line: bool, rejects: Rejects, read: Callable[[int], None]
) -> Iterator[Passage]:
    """Yields the documents of a span, empty ones included.

    Args:
        column: field of JSON lines and column of parquet; dots lead inwards.
        by_line: each line of a text file is a document.
        rejects: told of malformed ones.
        read: told of bytes of the file that have been read.
    Raises:
        DataError: a malformed document, unless `rejects` counts them.
    """
    if file.format == "parquet":
        yield from _rows(file, span, column, rejects, read)
    elif file.format == "text" and not by_line:
        yield from _whole(file, span, rejects, read)
    else:
        for offset, line in _lines(file, span, read):
            text = _decoded(line, file, offset, rejects)
            if text is not None and file.format == "jsonl" and text.strip():
                text = _value(text, file, offset, column, rejects)
            if text is not None:
                yield Passage(f"{file.name}:{offset}", text, span.split)


def _opened(file: InputFile) -> BinaryIO:
    if file.gzipped:
        return io.BufferedReader(gzip.open(file.path, "rb"))
    return open(file.path, "rb")


def _whole(file: InputFile, span: Span, rejects: Rejects, read: Callable[[int], None]) -> Iterator[Passage]:
    with _opened(file) as stream:
        if not file.gzipped:
            stream.seek(span.start)
        data = _readable(file, lambda: stream.read() if file.gzipped else stream.read(span.stop - span.start))
    read(span.num_bytes)
    if span.start == 0:
        data = data.removeprefix(_BOM)
    text = _decoded(data, file, span.start, rejects)
    if text is not None:
        yield Passage(file.name, text, span.split, span.begins, span.ends)


def _lines(file: InputFile, span: Span, read: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """Yields where each line of the span begins, and the line without its end."""
    with _opened(file) as stream:
        stream.seek(span.start)
        offset = span.start
        while file.gzipped or offset < span.stop:
            line = _readable(file, stream.readline)
            if not line:
                break
            yield offset, (line.removeprefix(_BOM) if offset == 0 else line).rstrip(b"\r\n")
            offset += len(line)
            if not file.gzipped:
                read(len(line))
    if file.gzipped:
        read(span.num_bytes)


def _readable(file: InputFile, get: Callable[[], bytes]) -> bytes:
    try:
        return get()
    except (OSError, EOFError) as error:
        # A gzipped file that was cut short, or a disk that fails: no row to skip, the whole file is not to be trusted.
        raise DataError(f"cannot be read to its end: {error}", where=file.path, fix="write it again, or leave it out") from None


def _decoded(data: bytes, file: InputFile, offset: int, rejects: Rejects) -> str | None:
    """Returns UTF-8 bytes as text; None if they are something else."""
    nul = data.find(b"\0")
    if nul >= 0:
        what = f"is binary, not text: NUL byte at offset {offset + nul:,}"
        rejects.add("binary", _place(file, offset + nul), what, f"if it is UTF-16: iconv -f UTF-16 -t UTF-8 {file.path}")
        return None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        what = f"is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start:,}"
        rejects.add("not UTF-8", _place(file, offset + error.start), what, f"if it is Latin-1: iconv -f LATIN1 -t UTF-8 {file.path}")
        return None


def _place(file: InputFile, offset: int) -> str:
    """Returns file and line; lines are only counted when there is something to say."""
    line, left = 1, offset
    with _opened(file) as stream:
        while left > 0 and (data := stream.read(min(left, 2**20))):
            line += data.count(b"\n")
            left -= len(data)
    return f"{file.path}:{line}"


def _value(line: str, file: InputFile, offset: int, column: str, rejects: Rejects) -> str | None:
    """Returns the text in a line of JSON."""
    try:
        row = json.loads(line)
    except ValueError as error:
        rejects.add("not JSON", _place(file, offset), f"is not JSON: {error}", "mend the line")
        return None
    if not isinstance(row, dict):
        rejects.add("not an object", _place(file, offset), f"is {_kind(row)}, not an object", 'each line needs {"text": "..."}')
        return None
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or part not in value:
            names = [name for name, inner in row.items() if isinstance(inner, str)]
            known = ", ".join(row) or "no fields at all"
            rejects.add("no such field", _place(file, offset), f"no field '{column}'; the line has {known}", which_field(column, names))
            return None
        value = value[part]
    if not isinstance(value, str):
        rejects.add("not a string", _place(file, offset), f"field '{column}' is {_kind(value)}, not a string", "field=NAME of a string")
        return None
    return _sound(value, file, lambda: _place(file, offset), rejects)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}
    return names[type(value)]


def _sound(text: str, file: InputFile, place: Callable[[], str], rejects: Rejects) -> str | None:
    """Returns a text unless it holds half a surrogate pair, which is no character and has no bytes (JSON can spell one)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"has half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start:,}"
        rejects.add("not UTF-8", place(), what, "mend the line")
        return None
    return text


def _rows(file: InputFile, span: Span, column: str, rejects: Rejects, read: Callable[[int], None]) -> Iterator[Passage]:
    with open_parquet(file.path) as parquet:
        schema = parquet.schema_arrow
        check_column(file.path, schema, column)
        parts = [column] if column in schema.names else column.split(".")
        number = sum(parquet.metadata.row_group(group).num_rows for group in range(span.start))
        groups = list(range(span.start, span.stop))
        total = max(1, sum(parquet.metadata.row_group(group).num_rows for group in groups))
        done = 0
        for batch in _batches(file, parquet, groups, column):
            for value in _texts(batch, parts):
                if value is None:
                    rejects.add("null", f"{file.path}: row {number}", f"column '{column}' is null", "leave the row out")
                else:
                    yield Passage(f"{file.name}:{number}", value, span.split)
                number += 1
            before, done = done, done + batch.num_rows
            read(span.num_bytes * done // total - span.num_bytes * before // total)


def _batches(file: InputFile, parquet: Any, groups: list[int], column: str) -> Iterator[Any]:
    import pyarrow

    try:
        yield from parquet.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=groups, columns=[column])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot be read to its end: {error}", where=file.path, fix="write it again, or leave it out") from None


def _texts(batch: Any, parts: list[str]) -> list[str | None]:
    values: list[Any] = batch.column(parts[0]).to_pylist()
    for part in parts[1:]:
        values = [None if value is None else value[part] for value in values]
    return values
