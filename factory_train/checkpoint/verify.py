"""Comparing the bytes of a checkpoint with its manifest, several files at a time. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from factory_train.checkpoint.chunk_file import BLOCK_BYTES, ChunkFile
from factory_train.checkpoint.format import Chunk, Manifest, iterate
from factory_train.errors import IntegrityError

# Reads under way at once; enough for the streams of a parallel filesystem, few enough for a node with eight ranks.
READ_THREADS = 4
_buffers = threading.local()


@dataclass(frozen=True)
class Part:
    """A chunk, and the tensor it is of."""

    tensor: str
    dtype: str
    chunk: Chunk


def parts_of(manifest: Manifest, sections: Collection[str] | None = None) -> list[Part]:
    """Returns all chunks of the given sections; default: of all."""
    return [
        Part(f"{section} {name}", record.dtype, chunk)
        for section, name, record in iterate(manifest.contents.tensors)
        if sections is None or section in sections
        for chunk in record.chunks
    ]


def verify_files(
    folder: Path,
    manifest: Manifest,
    *,
    files: Collection[str] | None = None,
    sections: Collection[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Reads files of a checkpoint and compares every byte that counts with the manifest; returns the bytes read.

    Args:
        folder: the checkpoint.
        files: names of the files to look at; default: all.
        sections: tensors to look at; default: all.
        progress: called with the bytes just read, from several threads.

    Raises:
        IntegrityError: names the file, and the tensor where the difference is in one.
    """
    parts = [part for part in parts_of(manifest, sections) if files is None or part.chunk.file in files]
    names = {part.chunk.file for part in parts}
    if sections is None:
        names |= set(manifest.contents.files) if files is None else set(files)
    opened = {name: ChunkFile(folder / name, manifest.contents.files.get(name)) for name in sorted(names)}
    heads = sum(file.head_bytes for file in opened.values())
    if progress:
        progress(heads)
    return heads + verify_parts(parts, lambda name: opened[name], progress)


def verify_parts(parts: Iterable[Part], opened: Callable[[str], ChunkFile], progress: Callable[[int], None] | None = None) -> int:
    """Compares chunks with their checksums, several at a time; returns their bytes.

    Args:
        opened: returns a file by name.
    """

    def verify(part: Part) -> int:
        size = opened(part.chunk.file).verify(part.chunk, part.dtype, part.tensor, _buffer())
        if progress:
            progress(size)
        return size

    # The largest first, so that no thread is left with one at the end.
    ordered = sorted(parts, key=lambda part: -part.chunk.box.numel)
    with ThreadPoolExecutor(READ_THREADS, "checkpoint-verify") as pool:
        return sum(pool.map(verify, ordered))


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Checks that every file is there and as long as it was; a stat a file.

    Raises:
        IntegrityError: names the file that is not.
    """
    for name, record in manifest.contents.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.bytes:
            raise IntegrityError("is missing" if size is None else f"has {size} bytes instead of {record.bytes}", where=str(path))


def _buffer() -> bytearray:
    """Returns this thread's room for a block: memory that is fresh at every read would cost more than the read."""
    if not hasattr(_buffers, "block"):
        _buffers.block = bytearray(BLOCK_BYTES)
    return _buffers.block
