"""The validation text of a mixture: that of its sets, in the shares of the last phase."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from factory_train import storage
from factory_train.data.catalog import dataset_folder
from factory_train.data.manifest import SOURCE_NAME, TOKENIZER_NAME, DataManifest, FileRecord, SplitRecord
from factory_train.data.mixture import Mixture
from factory_train.data.shards import ShardWriter, TokenStream
from factory_train.errors import IntegrityError, PreflightError

# More would not be read: a run takes validation_rows from the start.
_MOST_TOKENS = 2**22


def prepare_mixture(mixture: Mixture, cache: Path, report: Callable[[str], None]) -> Path:
    """Returns the folder of a mixture as a dataset, making it if it is not there.

    Args:
        cache: folder of prepared data that runs share.
        report: called with one line at each stage.
    Raises:
        PreflightError: the cache cannot be written.
    """
    folder = dataset_folder(cache, mixture.manifest.id)
    report(f"data: mixture: {mixture}")
    try:
        with storage.locked(cache / "locks" / f"{folder.name}.lock"):
            if not _is_intact(folder):
                with storage.replacing_folder(folder) as building:
                    _fill(mixture, building)
    except OSError as error:
        what = f"the validation text of the mixture cannot be written: {error.strerror or error}"
        raise PreflightError(what, where=str(cache), fix="data.cache_dir=FOLDER where you may write") from error
    return folder


def _is_intact(folder: Path) -> bool:
    try:
        DataManifest.load(folder).verify(folder)
    except IntegrityError:
        return False
    return True


def _fill(mixture: Mixture, folder: Path) -> None:
    first = next(iter(mixture.folders.values()))
    shutil.copyfile(first / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    sets = [
        {"name": name, "folder": str(path), "id": manifest.id}
        for (name, path), manifest in zip(mixture.folders.items(), mixture.manifests, strict=True)
    ]
    storage.write_json(folder / SOURCE_NAME, {"sets": sets, "phases": [dataclasses.asdict(phase) for phase in mixture.phases]})
    writer = ShardWriter(folder, "train", mixture.manifest.dtype)
    shards, index = writer.close()
    train = dataclasses.replace(mixture.manifest.splits["train"], shards=shards, documents=index)
    manifest = dataclasses.replace(
        mixture.manifest,
        tokenizer_file=FileRecord.of(folder / TOKENIZER_NAME),
        source_file=FileRecord.of(folder / SOURCE_NAME),
        splits={"train": train, "validation": _validation(mixture, folder)},
    )
    manifest.save(folder)


def _validation(mixture: Mixture, folder: Path) -> SplitRecord:
    """Takes whole documents, always from the set that is furthest behind its share, until one has no more."""
    writer = ShardWriter(folder, "validation", mixture.manifest.dtype)
    streams = [TokenStream(path, "validation") for path in mixture.folders.values()]
    borders = [[*stream.document_starts().tolist(), stream.num_tokens] for stream in streams]
    taken, documents, num_bytes = [0] * len(streams), [0] * len(streams), 0.0
    bytes_per_token = [manifest.bytes_per_token for manifest in mixture.manifests]
    while writer.num_tokens < _MOST_TOKENS:
        behind = [share * (writer.num_tokens + 1) - done for share, done in zip(mixture.final_shares, taken, strict=True)]
        number = max(range(len(streams)), key=behind.__getitem__)
        if documents[number] + 1 >= len(borders[number]):
            break
        start, stop = borders[number][documents[number] : documents[number] + 2]
        writer.begin_document()
        writer.append(streams[number].slice(start, stop - start))
        taken[number] += stop - start
        documents[number] += 1
        num_bytes += (stop - start) * bytes_per_token[number]
    shards, index = writer.close()
    # Of this part of each set the bytes are not counted; a run counts those of its own part exactly.
    return SplitRecord(writer.num_tokens, round(num_bytes), writer.num_documents, shards, index)
