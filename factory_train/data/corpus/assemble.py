"""Chunks that have all been encoded, put together: the last step, and the only one that looks at all of them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from factory_train import storage
from factory_train.data.corpus.encode import CHUNKS, record_path
from factory_train.data.corpus.request import Request
from factory_train.data.corpus.statistics import Statistics
from factory_train.data.corpus.tokenizer_choice import ChosenTokenizer
from factory_train.data.manifest import FORMAT_VERSION, SOURCE_NAME, TOKENIZER_NAME, DataManifest, FileRecord, SplitRecord, digest
from factory_train.data.shards import HashedFile, ShardWriter, stored, token_dtype
from factory_train.data.source import PREPARED, SPLITS
from factory_train.data.tokenizer import Tokenizer
from factory_train.errors import DataError

_INDEX_AT_ONCE = 2**20


def assemble(folder: Path, num_chunks: int, chosen: ChosenTokenizer, request: Request, description: str) -> DataManifest:
    """Makes the folder a dataset: indexes, the shuffled validation split, statistics, and the manifest last.

    Args:
        folder: where all chunks are, and source.json and tokenizer.json.
        description: of the corpus, for people.
    Raises:
        DataError: one of the splits has no tokens.
    """
    records = [storage.read_json(record_path(folder, number)) for number in range(num_chunks)]
    statistics = Statistics()
    for record in records:
        statistics.documents += record["documents"]
        statistics.empty += record["empty"]
        statistics.skipped.update(record["skipped"])
        statistics.examples = [*statistics.examples, *record["examples"]][:5]
        for split in SPLITS:
            statistics.tokens += record[split]["num_tokens"]
            statistics.num_bytes += record[split]["num_bytes"]
    for split in SPLITS:
        if not any(record[split]["num_tokens"] for record in records):
            raise _nothing_left(split, statistics, request)
    tokenizer = Tokenizer.load(folder / TOKENIZER_NAME, chosen.eos_id)
    splits = {
        "train": _train(folder, records, statistics),
        "validation": _validation(folder, records, token_dtype(tokenizer.vocab_size)),
    }
    source = storage.read_json(folder / SOURCE_NAME)
    storage.write_json(folder / SOURCE_NAME, {**source, "text_sha256": [record["text_sha256"] for record in records]})
    tokenizer_file = FileRecord.of(folder / TOKENIZER_NAME)
    manifest = DataManifest(
        format_version=FORMAT_VERSION,
        # Of the tokens themselves: the same text with the same tokenizer is the same data, wherever it was and whatever it was called.
        id=digest([tokenizer_file.sha256, chosen.eos_id, {name: dataclasses.asdict(split) for name, split in splits.items()}]),
        kind=PREPARED,
        description=description,
        tokenizer=chosen.kind,
        vocab_size=tokenizer.vocab_size,
        eos_id=chosen.eos_id,
        dtype=token_dtype(tokenizer.vocab_size),
        tokenizer_file=tokenizer_file,
        source_file=FileRecord.of(folder / SOURCE_NAME),
        splits=splits,
        baselines={},
        statistics=statistics.to_json(),
    )
    manifest.save(folder)
    return manifest


def clear(folder: Path) -> None:
    """Removes what a complete dataset does not need."""
    shutil.rmtree(folder / CHUNKS, ignore_errors=True)
    for path in folder.glob("train-*.starts"):
        path.unlink()


def _nothing_left(split: str, statistics: Statistics, request: Request) -> DataError:
    if not statistics.documents:
        why = ", ".join(f"{count:,} {reason}" for reason, count in statistics.skipped.most_common()) or f"{statistics.empty:,} empty"
        return DataError(f"no document is left: {why}", where="prepare", fix=(statistics.examples or ["files with text in them"])[0])
    part = request.validation_fraction
    what = f"none of the {statistics.documents:,} documents fell to the {split} split (validation_fraction={part:g})"
    other = min(0.5, 4 * part) if split == "validation" else 0.05
    return DataError(what, where="prepare", fix=f"validation_fraction={other:g}")


def _train(folder: Path, records: list[dict[str, Any]], statistics: Statistics) -> SplitRecord:
    index = HashedFile(folder / "train-documents.bin")
    offset = num_documents = 0
    last: int | None = None
    for number, record in enumerate(records):
        for starts in _starts(folder / f"train-{number:05d}.starts"):
            starts = starts + offset
            index.write(starts.astype("<i8").tobytes())
            num_documents += len(starts)
            statistics.add_lengths(np.diff(starts if last is None else np.concatenate([[last], starts])))
            last = int(starts[-1])
        offset += record["train"]["num_tokens"]
    if last is not None:
        statistics.add_lengths(np.asarray([offset - last]))
    index.write(np.asarray([offset], dtype="<i8").tobytes())
    shards = [FileRecord(**record["train"]["shard"]) for record in records if record["train"]["shard"]]
    num_bytes = sum(record["train"]["num_bytes"] for record in records)
    return SplitRecord(offset, num_bytes, num_documents, shards, index.close())


def _starts(path: Path) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    with path.open("rb") as file:
        while len(starts := np.fromfile(file, dtype="<i8", count=_INDEX_AT_ONCE)):
            yield starts.astype(np.int64)


def _validation(folder: Path, records: list[dict[str, Any]], dtype: str) -> SplitRecord:
    """Writes the validation split in the order of hashes, so that any first part of it is a fair sample of the corpus."""
    chunks = folder / CHUNKS
    names, places = [], []
    for number, record in enumerate(records):
        starts = np.fromfile(chunks / f"validation-{number:05d}.starts", dtype="<i8")
        stops = np.append(starts[1:], record["validation"]["num_tokens"])
        names.append(np.fromfile(chunks / f"validation-{number:05d}.names", dtype="<u8"))
        places.append(np.stack([np.full(len(starts), number), starts, stops[: len(starts)]], axis=1))
    order = np.argsort(np.concatenate(names), kind="stable")
    writer = ShardWriter(folder, "validation", dtype)
    tokens: dict[int, Any] = {}
    for number, start, stop in np.concatenate(places)[order].tolist():
        if stop == start:
            continue
        if number not in tokens:
            # Read whole: a file descriptor for each of thousands would be too many.
            tokens[number] = np.fromfile(chunks / f"validation-{number:05d}.bin", dtype=stored(dtype))
        writer.begin_document()
        writer.append(tokens[number][start:stop])
    shards, index = writer.close()
    num_bytes = sum(record["validation"]["num_bytes"] for record in records)
    return SplitRecord(writer.num_tokens, num_bytes, writer.num_documents, shards, index)
