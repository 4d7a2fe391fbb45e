"""The manifest of prepared data: what a folder holds, and whether it does.

Everything here is cheap and needs the standard library only: a login node asks it whether data is ready.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.data.source import MANIFEST_NAME, PREPARED, SPLITS, too_short
from factory_train.errors import ConfigError, IntegrityError

FORMAT_VERSION = 2
TOKENIZER_NAME = "tokenizer.json"
SOURCE_NAME = "source.json"


@dataclass(frozen=True)
class FileRecord:
    """A file of prepared data, its name relative to the manifest."""

    name: str
    num_bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> FileRecord:
        """Returns the record of a file on disk."""
        with path.open("rb") as file:
            return FileRecord(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class SplitRecord:
    """One split.

    Args:
        num_tokens: all tokens, end-of-text included.
        num_bytes: bytes of text that those tokens stand for; end-of-text stands for none.
        num_documents: documents that begin in it.
        shards: files of tokens, in order.
        documents: file of where each document begins and, last, where the split ends (little-endian int64).
    """

    num_tokens: int
    num_bytes: int
    num_documents: int
    shards: list[FileRecord]
    documents: FileRecord

    @staticmethod
    def from_json(value: dict[str, Any]) -> SplitRecord:
        shards = [FileRecord(**row) for row in value["shards"]]
        return SplitRecord(**{**value, "shards": shards, "documents": FileRecord(**value["documents"])})


@dataclass(frozen=True)
class DataManifest:
    """What a folder of prepared data holds.

    Args:
        format_version: of this file and of everything beside it.
        id: identifies source, tokenizer settings and split; the name of the folder in the cache.
        kind: name of the data source; "prepared" is what `prepare` made.
        description: the source, for people.
        tokenizer: "bpe", "byte", "char", or "given" for a user's own.
        vocab_size: token ids are below it.
        eos_id: id of the end-of-text token; None where there is none, as in a char tokenizer.
        dtype: "uint16" or "uint32", little-endian: how shards store a token.
        tokenizer_file: the tokenizer, as `tokenizers` and transformers read it.
        source_file: names and sha256 of the documents.
        splits: "train" and "validation".
        baselines: cross-entropy on the validation split, in nats per token, of models that only count; empty where they
            have not been computed.
        statistics: of what `prepare` read; None elsewhere.
        packing: of a run's manifest: how its documents are packed into rows; None where rows know no documents.
    """

    format_version: int
    id: str
    kind: str
    description: str
    tokenizer: str
    vocab_size: int
    eos_id: int | None
    dtype: str
    tokenizer_file: FileRecord
    source_file: FileRecord
    splits: dict[str, SplitRecord]
    baselines: dict[str, float]
    statistics: dict[str, Any] | None = None
    packing: str | None = None

    @property
    def tokenizer_sha256(self) -> str:
        return self.tokenizer_file.sha256

    @property
    def source_sha256(self) -> str:
        return self.source_file.sha256

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token of the validation split stands for, on average."""
        validation = self.splits["validation"]
        return validation.num_bytes / validation.num_tokens

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Returns a cross-entropy on the validation split in bits per byte of text: comparable between tokenizers."""
        return nats_per_token / math.log(2) / self.bytes_per_token

    def files(self, splits: Iterable[str] = SPLITS) -> Iterator[FileRecord]:
        """Yields the tokenizer's file and those of the given splits."""
        yield self.tokenizer_file
        for split in splits:
            yield from self.splits[split].shards
            yield self.splits[split].documents

    def check_sizes(self, folder: Path, splits: Iterable[str] = SPLITS) -> None:
        """Checks that every file is there and as long as it was; a stat a file.

        Raises:
            IntegrityError: names the file that is not.
        """
        for record in self.files(splits):
            path = folder / record.name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise IntegrityError(
                    "prepared data is incomplete: the file is missing", where=str(path), fix=_prepare_again(folder, self.kind)
                )
            if size != record.num_bytes:
                what = f"prepared data is damaged: {size:,} bytes where the manifest says {record.num_bytes:,}"
                raise IntegrityError(what, where=str(path), fix=_prepare_again(folder, self.kind))

    def verify(self, folder: Path, splits: Iterable[str] = SPLITS) -> None:
        """Reads every file and compares its sha256.

        Raises:
            IntegrityError: names the first file that differs.
        """
        splits = tuple(splits)
        self.check_sizes(folder, splits)
        for record in self.files(splits):
            if FileRecord.of(folder / record.name) != record:
                what = "prepared data is damaged: its sha256 is not the manifest's"
                raise IntegrityError(what, where=str(folder / record.name), fix=_prepare_again(folder, self.kind))

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for optional in ("statistics", "packing"):
            if values[optional] is None:
                del values[optional]
        return values

    @staticmethod
    def from_json(value: dict[str, Any]) -> DataManifest:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: it was written by a newer version of factory_train.
        """
        version = value["format_version"]
        if version > FORMAT_VERSION:
            raise ConfigError(f"data format {version} is newer than this version reads ({FORMAT_VERSION})", fix="upgrade factory_train")
        splits = {name: SplitRecord.from_json(split) for name, split in value["splits"].items()}
        files = {name: FileRecord(**value[name]) for name in ("tokenizer_file", "source_file")}
        return DataManifest(**{**value, "splits": splits, **files})

    def save(self, folder: Path) -> None:
        """Writes the manifest into `folder`: the last file, since its presence says that the others are complete."""
        storage.write_json(folder / MANIFEST_NAME, self.to_json())

    @staticmethod
    def load(folder: Path) -> DataManifest:
        """Reads the manifest in `folder`.

        Raises:
            IntegrityError: there is none, or it is not one.
        """
        path = folder / MANIFEST_NAME
        try:
            value = storage.read_json(path)
            if value is None:
                raise IntegrityError("no prepared data here: the manifest is missing", where=str(path), fix=_prepare_again(folder))
            return DataManifest.from_json(value)
        except (ValueError, KeyError, TypeError) as error:
            what = f"prepared data is damaged: not a manifest ({error})"
            raise IntegrityError(what, where=str(path), fix=_prepare_again(folder)) from None


def _prepare_again(folder: Path, kind: str | None = None) -> str:
    if kind == PREPARED:
        return f"remove {folder} and prepare it again: python -m factory_train prepare PATH out={folder}"
    return f"remove {folder} and start the run again: the data is prepared anew"


def check_length(manifest: DataManifest, seq_len: int) -> None:
    """Checks that both splits hold at least one row of seq_len tokens and its last target.

    Raises:
        DataError: the context is longer than the data.
    """
    for split in SPLITS:
        have = manifest.splits[split].num_tokens
        if have < seq_len + 1:
            raise too_short(split, have, "tokens", seq_len, where=manifest.description)


def check_vocabulary(manifest: DataManifest, model_vocab_size: int | None) -> None:
    """Checks that the model has an embedding for every token; None takes the tokenizer's vocabulary.

    Raises:
        ConfigError: the tokenizer's vocabulary is larger than the model's.
    """
    if model_vocab_size is not None and model_vocab_size < manifest.vocab_size:
        what = f"the model has {model_vocab_size:,} embeddings, the {manifest.tokenizer} tokenizer {manifest.vocab_size:,} tokens"
        raise ConfigError(what, where="model.vocab_size", fix=f"model.vocab_size={manifest.vocab_size} or larger, or model.vocab_size=null")


def digest(value: Any) -> str:
    """Returns a short name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]
