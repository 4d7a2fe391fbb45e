"""Which files a corpus is made of, and what each is: found, named, and looked at before any work is done."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory_train.errors import DataError, did_you_mean

FORMATS = ("text", "jsonl", "parquet")
_FORMAT_OF = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
_UNREADABLE = {".zst": "zstd -d", ".xz": "xz -d", ".bz2": "bzip2 -d", ".zip": "unzip", ".tar": "tar -xf", ".tgz": "tar -xf"}


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus.

    Args:
        path: absolute.
        name: relative to the folder that was asked for; with an offset it identifies a document, wherever the folder lies.
        format: "text", "jsonl" or "parquet".
        gzipped: whether its bytes are to be unpacked first.
        num_bytes: on disk.
        mtime_ns: when it was changed last.
    """

    path: str
    name: str
    format: str
    gzipped: bool
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Inputs:
    """The files of a corpus, in the order in which they become tokens.

    Args:
        ignored: endings of the files in folders that were left out, and how many have each.
    """

    files: tuple[InputFile, ...]
    ignored: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def find_inputs(words: Sequence[str], file_format: str) -> Inputs:
    """Finds the files behind paths, folders and globs; folders are searched to the bottom, files that begin with a dot left out.

    Args:
        words: paths of files or folders, or glob patterns that the shell left alone.
        file_format: "auto" goes by the ending (and takes only known endings from folders), or one of FORMATS.
    Raises:
        DataError: a path does not exist, a file cannot be read or is of no known format, or nothing is left.
    """
    files: dict[str, InputFile] = {}
    ignored: Counter[str] = Counter()
    for word in words:
        for path, name, asked_for in _expand(word):
            found = _format(path, file_format)
            if found is None and not asked_for:
                ignored[path.suffix.lower() or "(none)"] += 1
                continue
            if found is None:
                _refuse_ending(path)
            entry = _look_at(path, name, found or "text")
            if entry.num_bytes or asked_for:
                files.setdefault(entry.path, entry)
            if asked_for and not entry.num_bytes:
                raise DataError("the file is empty", where=str(path), fix="leave it out")
    if not files:
        endings = ", ".join(f"{count} of {ending}" for ending, count in ignored.most_common(5))
        what = f"no file with text in {' '.join(words)}" + (f"; other endings: {endings}" if ignored else "")
        raise DataError(what, where="prepare", fix="format=text takes files of any ending" if ignored else "prepare FILE, FOLDER or 'GLOB'")
    return Inputs(tuple(files.values()), dict(ignored))


def _expand(word: str) -> Iterator[tuple[Path, str, bool]]:
    """Yields path, name and whether it was asked for by name, sorted."""
    path = Path(word).expanduser()
    if path.is_dir():
        for file in _below(path):
            yield file, file.relative_to(path).as_posix(), False
        return
    if path.exists():
        yield path, path.name, True
        return
    if not glob.has_magic(word):
        parent = path.parent
        guess = did_you_mean(path.name, os.listdir(parent)) if parent.is_dir() else None
        raise DataError("no such file or folder", where=word, fix=f"did you mean {parent / guess}?" if guess else "a path that exists")
    root = Path(*_fixed_parts(path))
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise DataError("no file matches the pattern", where=word, fix="quote it, and look with: ls " + word)
    for match in matches:
        for file in _below(match) if match.is_dir() else [match]:
            yield file, file.relative_to(root).as_posix(), False


def _fixed_parts(path: Path) -> list[str]:
    """Returns the parts of a pattern before the first that has magic in it."""
    parts = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _below(folder: Path) -> Iterator[Path]:
    for inner, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(inner, name) for name in sorted(names) if not name.startswith("."))


def _format(path: Path, asked: str) -> str | None:
    """Returns the format of a file; None if its ending says nothing."""
    if asked != "auto":
        return asked
    return _FORMAT_OF.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower())


def _refuse_ending(path: Path) -> None:
    """Refuses a file that was named and is not what it would be taken for: plain text."""
    suffix = path.suffix.lower()
    if suffix in _UNREADABLE:
        raise DataError(f"{suffix} files are not unpacked here", where=str(path), fix=f"{_UNREADABLE[suffix]} {path}")
    if suffix == ".json":
        what = "one JSON value, or one a line? The ending does not say"
        raise DataError(what, where=str(path), fix="format=jsonl if each line is an object; else write one object a line first")


def _look_at(path: Path, name: str, file_format: str) -> InputFile:
    path = path.absolute()
    try:
        if not path.is_file():
            raise DataError("is not a regular file", where=str(path), fix="leave it out")
        stat = path.stat()
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix=f"chmod a+r {path}, or leave it out") from None
    gzipped = path.suffix == ".gz"
    if file_format == "parquet" and head and head != b"PAR1":
        raise DataError("is not a parquet file", where=str(path), fix="format=text or format=jsonl if it is one of these")
    if file_format != "parquet" and head == b"PAR1":
        raise DataError(f"is a parquet file, not {file_format}", where=str(path), fix="format=parquet, or format=auto")
    if gzipped and head and head[:2] != b"\x1f\x8b":
        raise DataError("is not gzipped, whatever its ending says", where=str(path), fix=f"mv {path} {path.with_suffix('')}")
    return InputFile(str(path), name, file_format, gzipped, stat.st_size, stat.st_mtime_ns)


def open_parquet(path: str) -> Any:
    """Returns a `pyarrow.parquet.ParquetFile`.

    Raises:
        DataError: it is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"is not a parquet file that can be read: {error}", where=path, fix="leave it out, or write it again") from None


def check_column(path: str, schema: Any, field: str) -> None:
    """Checks that a parquet file has a column of text.

    Args:
        schema: its `pyarrow.Schema`.
        field: the column; dots lead into structs.
    Raises:
        DataError: it has no such column, or the column holds something else.
    """
    import pyarrow.types as types

    names, here = list(schema.names), schema
    kind = None
    for part in [field] if field in names else field.split("."):
        names = [inner.name for inner in here] if kind is None or types.is_struct(kind) else []
        if part not in names:
            texts = [inner.name for inner in schema if _is_text(inner.type)]
            raise DataError(f"no column '{field}'; it has {', '.join(schema.names)}", where=path, fix=which_field(field, texts))
        kind = here.field(part).type
        here = kind
    if not _is_text(kind):
        raise DataError(f"column '{field}' holds {kind}, not text", where=path, fix="field=NAME of a column of strings")


def which_field(asked: str, texts: Sequence[str]) -> str:
    """Returns the setting that would do, when there is no field or column of the name that was asked for.

    Args:
        texts: names of those that hold text.
    """
    guess = did_you_mean(asked, texts)
    return " or ".join(f"field={name}" for name in ([guess] if guess else texts[:3])) or "field=NAME of one that holds text"


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
