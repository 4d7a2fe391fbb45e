"""The packing of a data set's training split, made once and kept beside it: every rank, run and resume reads the same rows.

A folder `<cache>/packing/<dataset id>-<seq_len>/` of little-endian arrays (`packing.Packing`), and packing.json, which
holds their sizes and sha256 and is written last. Like a data set it is built beside its place and renamed into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from factory_train import storage
from factory_train.data.manifest import DataManifest, FileRecord, digest
from factory_train.data.packing import Packing, PackingFigures, pack
from factory_train.data.shards import HashedFile, TokenStream, stored
from factory_train.errors import DataError, IntegrityError, PreflightError

# Of the files and of the way rows are made: a run must not go on with rows made in another way.
FORMAT_VERSION = 1
INDEX_NAME = "packing.json"
_DTYPES = {"starts_P": "int64", "lengths_P": "int32", "borders_S": "int64", "targets_R": "int32"}


def packing_folder(cache: Path, dataset_id: str, seq_len: int) -> Path:
    return cache / "packing" / f"{dataset_id}-{seq_len}"


def prepare_packing(cache: Path, dataset: Path, seq_len: int, report: Callable[[str], None]) -> str:
    """Makes the packing of the training split, unless it is there and intact.

    Of several callers at once, one works and the others wait for its result.

    Args:
        cache: folder of prepared data that runs share.
        dataset: folder of the data set.
        seq_len: places of a row.
        report: called with a line that says how well rows are filled.
    Returns:
        That line, and the packing's identity: what a run notes of it.
    Raises:
        DataError: there is nothing to pack.
        PreflightError: the cache cannot be written.
    """
    manifest = DataManifest.load(dataset)
    check_pairs(manifest, "train")
    folder = packing_folder(cache, manifest.id, seq_len)
    try:
        with storage.locked(cache / "locks" / f"packing-{folder.name}.lock"):
            if (index := _intact(folder, report)) is None:
                with storage.replacing_folder(folder) as building:
                    _build(TokenStream(dataset, "train"), seq_len, building)
                index = storage.read_json(folder / INDEX_NAME)
    except OSError as error:
        num_bytes = 24 * manifest.splits["train"].num_documents
        what = f"the packing of documents cannot be written: {error.strerror or error}"
        raise PreflightError(what, where=str(folder), fix=f"data.cache_dir=FOLDER with {num_bytes / 1e6:.0f} MB to write") from error
    figures = PackingFigures(**index["figures"])
    report(f"packing: {manifest.description}: {figures}")
    return f"{figures} ({digest(index)})"


def check_pairs(manifest: DataManifest, split: str) -> None:
    """Checks that a document of the split has a second token, which its first can predict.

    Raises:
        DataError: none has.
    """
    record = manifest.splits[split]
    if record.num_tokens <= record.num_documents:
        what = f"no document of the {split} part has two tokens, so that there is nothing to predict"
        raise DataError(what, where=manifest.description, fix="data.packing=concatenate")


def load_packing(folder: Path) -> Packing:
    """Returns the packing in a folder, memory-mapped.

    Raises:
        DataError: it is not there, or not whole.
    """
    try:
        index = _read(folder)
        _check_sizes(folder, index)
    except (OSError, ValueError, KeyError, TypeError, IntegrityError) as error:
        what = f"the packing of documents has gone or is damaged ({error})"
        raise DataError(what, where=str(folder), fix="start again with the same run=: the prepare stage makes it anew") from None
    return Packing(**{name: np.memmap(folder / _file(name), dtype=stored(dtype), mode="r") for name, dtype in _DTYPES.items()})


def _file(name: str) -> str:
    return f"{name.partition('_')[0]}.bin"


def _intact(folder: Path, report: Callable[[str], None]) -> Any:
    """Returns what packing.json says, or None where not every byte is there and right."""
    if not folder.is_dir():
        return None
    try:
        index = _read(folder)
        _check_sizes(folder, index)
        for record in index["files"]:
            if FileRecord.of(folder / record["name"]) != FileRecord(**record):
                raise IntegrityError(f"the sha256 of {record['name']} is not that of {INDEX_NAME}")
    except (ValueError, KeyError, TypeError, IntegrityError) as error:
        report(f"packing: making it again; {folder}: {error}")
        return None
    return index


def _read(folder: Path) -> Any:
    index = storage.read_json(folder / INDEX_NAME)
    if index is None or index["format_version"] != FORMAT_VERSION:
        raise IntegrityError(f"no {INDEX_NAME} of format {FORMAT_VERSION}")
    return index


def _check_sizes(folder: Path, index: Any) -> None:
    for record in index["files"]:
        path = folder / record["name"]
        if not path.is_file() or path.stat().st_size != record["num_bytes"]:
            raise IntegrityError(f"{record['name']} has not its {record['num_bytes']:,} bytes")


def _build(stream: TokenStream, seq_len: int, folder: Path) -> None:
    files = {name: HashedFile(folder / _file(name)) for name in _DTYPES}

    def write(name: str, values: Any) -> None:
        files[name].write(np.asarray(values).astype(stored(_DTYPES[name])).tobytes())

    figures = PackingFigures(seq_len)
    write("borders_S", [0])
    # Each window numbers its pieces from 0, and its own first border is the last one before.
    for packing, now in pack(stream.document_starts(), stream.num_tokens, seq_len):
        write("starts_P", packing.starts_P)
        write("lengths_P", packing.lengths_P)
        write("borders_S", packing.borders_S[1:] + figures.pieces)
        write("targets_R", packing.targets_R)
        figures = now
    index = {
        "format_version": FORMAT_VERSION,
        "dataset_id": stream.manifest.id,
        "seq_len": seq_len,
        "figures": asdict(figures),
        "efficiency": round(figures.efficiency, 6),
        "files": [asdict(file.close()) for file in files.values()],
    }
    storage.write_json(folder / INDEX_NAME, index)
