"""Comparing the bytes of a checkpoint with its manifest. No torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from factory_train.checkpoint.format import DTYPES, STATE_NAME, Chunk, FileRecord, Manifest, decode_header, iterate, spread
from factory_train.errors import IntegrityError

_BLOCK_BYTES = 8 << 20
# (tensor as "section name", dtype, chunk)
_Part = tuple[str, str, Chunk]


def verify_files(
    folder: Path,
    manifest: Manifest,
    *,
    files: Collection[str] | None = None,
    sections: Collection[str] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Reads files of a checkpoint and compares every byte that counts with the manifest; returns the bytes read.

    Args:
        folder: the checkpoint.
        files: names of the files to look at; default: all.
        sections: tensors to look at; default: all. The run state is always looked at.
        rank, world_size: this rank checks its share of the chunks, even by bytes; together the ranks check all.

    Raises:
        IntegrityError: names the file, and the tensor where the difference is in one.
    """
    parts: dict[str, list[_Part]] = {STATE_NAME: []} if sections is not None else {name: [] for name in manifest.contents.files}
    for section, name, record in iterate(manifest.contents.tensors):
        if sections is None or section in sections:
            for chunk in record.chunks:
                parts.setdefault(chunk.file, []).append((f"{section} {name}", record.dtype, chunk))
    # One unit of work for the head of each file, one for each chunk.
    units: list[tuple[str, _Part | None]] = []
    for file in sorted(parts):
        if files is None or file in files:
            units.append((file, None))
            units.extend((file, part) for part in parts[file])
    sizes = [_size(manifest, file, part) for file, part in units]
    mine: dict[str, list[_Part]] = {}
    for (file, part), owner in zip(units, spread(sizes, world_size), strict=True):
        if owner == rank:
            mine.setdefault(file, []).extend([part] if part else [])
    return sum(_verify_file(folder / file, manifest.contents.files.get(file), mine[file]) for file in sorted(mine))


def _size(manifest: Manifest, file: str, part: _Part | None) -> int:
    if part is None:
        return manifest.contents.files[file].head_bytes if file in manifest.contents.files else 0
    _, dtype, chunk = part
    return chunk.box.numel * DTYPES[dtype][1]


def _verify_file(path: Path, record: FileRecord | None, parts: list[_Part]) -> int:
    if record is None:
        raise IntegrityError("the manifest does not list this file", where=str(path))
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            if size != record.bytes:
                raise IntegrityError(f"has {size} bytes instead of {record.bytes}", where=str(path))
            head = file.read(record.head_bytes)
            if xxhash.xxh3_64_hexdigest(head) != record.xxh3:
                raise IntegrityError("its first bytes differ from the manifest", where=str(path))
            header = decode_header(head) if parts else {}
            return len(head) + sum(_verify_chunk(path, file, record.head_bytes, header, part) for part in parts)
    except OSError as error:
        raise IntegrityError(f"cannot be read ({error.strerror})", where=str(path)) from error


def _verify_chunk(path: Path, file: BinaryIO, head_bytes: int, header: dict[str, Any], part: _Part) -> int:
    tensor, dtype, chunk = part
    entry = header.get(chunk.key)
    if entry is None or entry["dtype"] != DTYPES[dtype][0] or tuple(entry["shape"]) != chunk.shape:
        raise IntegrityError(f"tensor '{tensor}' is not in it as the manifest says", where=str(path))
    start, end = entry["data_offsets"]
    file.seek(head_bytes + start)
    digest = xxhash.xxh3_64()
    remaining = end - start
    while remaining:
        block = file.read(min(remaining, _BLOCK_BYTES))
        if not block:
            raise IntegrityError(f"ends inside tensor '{tensor}'", where=str(path))
        digest.update(block)
        remaining -= len(block)
    if digest.hexdigest() != chunk.xxh3:
        raise IntegrityError(f"the bytes of tensor '{tensor}' differ from their checksum", where=str(path))
    return end - start
