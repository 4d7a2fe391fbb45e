"""Where the text comes from, how it is divided, and what can be wrong with it.

`builtin` is the standard library of the running interpreter: its sources, and the topics of `help()`. `text` is one
UTF-8 file. Plugins add others (docs/extending.md). Nothing here needs more than the standard library, so that a login
node can check a request in milliseconds.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import platform
import shlex
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory_train.config import DataConfig
from factory_train.errors import ConfigError, DataError
from factory_train.registries import DATA_SOURCES

SPLITS = ("train", "validation")
# The kind of source that is a folder made by the verb `prepare`: its tokens are there already.
PREPARED = "prepared"
# The kind that is several of those.
MIXTURE = "mixture"
MANIFEST_NAME = "manifest.json"
# A BPE vocabulary starts from the 256 bytes and the end-of-text token.
MIN_BPE_VOCABULARY = 257
# Files up to this size are decoded whole when a request is checked; of larger ones only three samples are.
FULL_CHECK_BYTES = 32 * 2**20
SAMPLE_BYTES = 2**20

_NEED_PREPARING = (".jsonl", ".ndjson", ".parquet", ".gz")

# Installed packages are not the standard library, and its tests are deliberately strange text.
_EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# The topics come as documents of their own; build data holds paths of the machine that built the interpreter.
_EXCLUDED_FILES = ("pydoc_data/topics.py", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """One text with a name that identifies it within its source."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """All the text of a request, divided.

    Args:
        description: what it is, for people.
        splits: documents of "train" and "validation", in the order in which they become tokens.
        manifest: name, sha256 and bytes of every document, sorted by name.
    """

    description: str
    splits: dict[str, list[Document]]
    manifest: list[dict[str, Any]]

    def manifest_json(self) -> str:
        """Returns the manifest as text; its sha256 identifies the source."""
        return json.dumps(self.manifest, indent=1) + "\n"


def source_kind(config: DataConfig) -> str:
    """Returns the name of the data source; for a built-in one, setting data.path is enough to mean text, or prepared data.

    Raises:
        ConfigError: data.name=text without a path, or sets and a path.
    """
    if config.sets:
        if config.path is not None:
            raise ConfigError("either data.path or data.sets, not both", where="data.path", fix="data.path=null")
        return MIXTURE
    if not DATA_SOURCES.is_builtin(config.name):
        return config.name
    if config.path is not None:
        # os.path: a folder that may not be entered is reported by who reads it.
        return PREPARED if os.path.isfile(source_path(config) / MANIFEST_NAME) else "text"
    if config.name == "text":
        raise ConfigError("data.name=text needs a file", where="data.path", fix="data.path=FILE.txt")
    return "builtin"


def source_path(config: DataConfig) -> Path:
    """Returns the absolute path of the text file or the prepared data; the shell leaves the ~ of `data.path=~/x.txt` to us."""
    assert config.path is not None
    return Path(config.path).expanduser().absolute()


def read_source(config: DataConfig) -> Source:
    """Reads and divides all the text.

    Raises:
        ConfigError: there is no such data source.
        DataError: there is no text, or it is not text.
    """
    source: Source = DATA_SOURCES.get(source_kind(config))(config)
    return source


def read_builtin(config: DataConfig) -> Source:
    """Reads the standard library of this Python."""
    documents = sorted(_builtin_documents(), key=lambda document: document.name)
    if not documents:
        raise _no_builtin()
    return divide(f"standard library of Python {platform.python_version()}", documents, config.validation_fraction)


def read_text(config: DataConfig) -> Source:
    """Reads the file at data.path; its last part is held out."""
    path = source_path(config)
    data = _read_bytes(path)
    text = _decode(path, data)
    cut = _cut(len(text), config.validation_fraction)
    splits = {"train": [Document(path.name, text[:cut])], "validation": [Document(path.name, text[cut:])]}
    return Source(path.name, splits, [_manifest_row(path.name, data)])


def divide(description: str, documents: Iterable[Document], validation_fraction: float) -> Source:
    """Divides documents by their names: where one goes does not depend on the others.

    Args:
        description: what they are, for people.
        documents: in the order in which those for training become tokens; their names differ.
        validation_fraction: part of the documents that is held out, about.
    """
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        splits["validation" if is_held_out(document.name, validation_fraction) else "train"].append(document)
    # Validation may use only the first part: in order of the hash, any first part is a fair sample of the files.
    splits["validation"].sort(key=lambda document: _digest(document.name))
    manifest = [_manifest_row(document.name, document.text.encode()) for split in splits.values() for document in split]
    return Source(description, splits, sorted(manifest, key=lambda row: str(row["name"])))


def _manifest_row(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _cut(num_characters: int, validation_fraction: float) -> int:
    """Returns where the training part of a text file ends: the same character as `text[: int(n * 0.9)]` for 0.1."""
    return int(num_characters * (1 - validation_fraction))


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def is_held_out(name: str, validation_fraction: float) -> bool:
    """Returns whether a document belongs to the validation split: a fixed function of its name alone."""
    return int.from_bytes(_digest(name)[:8], "big") < validation_fraction * 2**64


def _builtin_files() -> Iterator[tuple[str, Path]]:
    """Yields name and path of every source of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _EXCLUDED_FOLDERS and not name.startswith("config-")]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if name.endswith(".py") and not name.startswith(_EXCLUDED_FILES):
                yield name, path


def _topics() -> Iterator[Document]:
    """Yields the texts of `help()`; some distributions ship an interpreter without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in topics.items():
        yield Document(f"pydoc_data/topics/{name}", text)


def _builtin_documents() -> Iterator[Document]:
    for name, path in _builtin_files():
        try:
            text = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            # A source in another encoding, or one the site keeps from us: the rest is still a corpus.
            continue
        if text:
            yield Document(name, text)
    yield from _topics()


def _no_builtin() -> DataError:
    return DataError("this Python comes without the sources of its standard library", where="data.name=builtin", fix="data.path=FILE.txt")


def too_short(split: str, have: int, unit: str, seq_len: int, *, where: str) -> DataError:
    """Returns the error for a split that does not hold one row of seq_len tokens and its last target."""
    fix = f"train.seq_len={have - 1} or smaller, or more text" if have > 1 else "a longer text: data.path=FILE.txt"
    what = f"the context is longer than the data: {seq_len + 1:,} tokens needed, the {split} part has {have:,} {unit}"
    return DataError(what, where=where, fix=fix)


def check_source(config: DataConfig, seq_len: int) -> None:
    """Checks a request for data before anything is started; cheap, and reads little of a large file.

    Args:
        config: section `data`.
        seq_len: length of a training row, in tokens. No split can have more tokens than bytes, which bounds it.
    Raises:
        ConfigError: the settings cannot be right.
        DataError: the file is missing, unreadable, empty or not text, or the context is longer than the data.
    """
    fraction = config.validation_fraction
    if not 0 < fraction < 1:
        raise ConfigError(f"must be between 0 and 1, not {fraction}", where="data.validation_fraction", fix="data.validation_fraction=0.05")
    if config.tokenizer == "bpe" and config.vocab_size < MIN_BPE_VOCABULARY:
        fix = f"data.vocab_size={MIN_BPE_VOCABULARY} or larger, or data.tokenizer=byte"
        raise ConfigError(f"a BPE vocabulary of {config.vocab_size} does not hold the 256 bytes", where="data.vocab_size", fix=fix)
    kind = source_kind(config)
    if not config.sets and (config.weights or config.phases):
        where = "data.weights" if config.weights else "data.phases"
        raise ConfigError("weights of what? There are no data.sets", where=where, fix="data.sets={web:FOLDER,code:FOLDER}")
    if kind in (PREPARED, MIXTURE):
        # Its manifest says all there is to check; whoever asks for the data looks at it.
        return
    if not DATA_SOURCES.is_builtin(kind):
        # How much text a plugin has shows when it is read.
        return
    if kind == "text":
        path = source_path(config)
        most, unit, where = _most_tokens_of_file(path, config), "characters" if config.tokenizer == "char" else "bytes", f"data.path={path}"
    else:
        most, unit, where = _most_tokens_of_builtin(fraction), "bytes", "data.name=builtin"
    for split in SPLITS:
        if most[split] < seq_len + 1:
            raise too_short(split, most[split], unit, seq_len, where=where)


def _most_tokens_of_builtin(validation_fraction: float) -> dict[str, int]:
    most = dict.fromkeys(SPLITS, 0)
    sizes = [(name, path.stat().st_size) for name, path in _builtin_files()]
    if not sizes:
        raise _no_builtin()
    for name, size in [*sizes, *((document.name, len(document.text.encode())) for document in _topics())]:
        # One token more than bytes: the end-of-text token.
        most["validation" if is_held_out(name, validation_fraction) else "train"] += size + 1
    return most


def _most_tokens_of_file(path: Path, config: DataConfig) -> dict[str, int]:
    size = _check_regular(path)
    if size > FULL_CHECK_BYTES:
        _sniff(path, size)
        # A character has at most four bytes, so neither part can have more than this.
        fractions = {"train": 1 - config.validation_fraction, "validation": config.validation_fraction}
        return {split: min(size, int(4 * size * fraction) + 4) for split, fraction in fractions.items()}
    text = _decode(path, _read_bytes(path))
    cut = _cut(len(text), config.validation_fraction)
    parts = {"train": text[:cut], "validation": text[cut:]}
    return {split: len(part if config.tokenizer == "char" else part.encode()) for split, part in parts.items()}


def _check_regular(path: Path) -> int:
    """Returns the size of a file that can be read and has something in it."""
    where, fix = f"data.path={path}", "data.path=FILE.txt, a UTF-8 text file"
    try:
        if not path.exists():
            raise DataError("no such file", where=where, fix="data.path=FILE.txt, a file that exists")
        if path.is_dir() or path.suffix in _NEED_PREPARING:
            what = "is a folder without prepared data" if path.is_dir() else f"{path.suffix} files are to be prepared first"
            out = f"{path.name.removesuffix(path.suffix)}-tokens"
            raise DataError(what, where=where, fix=f"python -m factory_train prepare {shlex.quote(str(path))}, then data.path={out}")
        if not path.is_file():
            raise DataError("is not a regular file", where=where, fix=fix)
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None
    if size == 0:
        raise DataError("the file is empty", where=where, fix=fix)
    return size


def _unreadable(path: Path, error: OSError) -> DataError:
    fix = f"chmod a+r {shlex.quote(str(path))}, or another data.path"
    return DataError(f"cannot be read: {error.strerror}", where=f"data.path={path}", fix=fix)


def _read_bytes(path: Path) -> bytes:
    _check_regular(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _sniff(path: Path, size: int) -> None:
    """Decodes the head, the middle and the tail of a large file."""
    try:
        with path.open("rb") as file:
            for start in (0, size // 2, size - SAMPLE_BYTES):
                file.seek(start)
                data = file.read(SAMPLE_BYTES)
                # A sample from within may begin inside a character: at most three bytes that continue one.
                skip = next((n for n in range(4) if n >= len(data) or data[n] & 0xC0 != 0x80), 0) if start else 0
                _decode(path, data[skip:], offset=start + skip, final=start + len(data) >= size)
    except OSError as error:
        raise _unreadable(path, error) from None


def _decode(path: Path, data: bytes, *, offset: int = 0, final: bool = True) -> str:
    """Returns UTF-8 bytes as text, line ends untouched; `offset` is where in the file they begin."""
    where, quoted = f"data.path={path}", shlex.quote(str(path))
    nul = data.find(b"\0")
    if nul >= 0:
        fix = f"data.path=FILE.txt, a UTF-8 text file (if it is UTF-16: iconv -f UTF-16 -t UTF-8 {quoted})"
        raise DataError(f"is binary, not text: NUL byte at offset {offset + nul:,}", where=where, fix=fix)
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final)
    except UnicodeDecodeError as error:
        fix = f"data.path=FILE.txt, a UTF-8 text file (if it is Latin-1: iconv -f LATIN1 -t UTF-8 {quoted})"
        what = f"is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start:,}"
        raise DataError(what, where=where, fix=fix) from None
