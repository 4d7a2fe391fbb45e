"""Token shards: raw little-endian token files, an index of documents, and random access to them.

A split is one long sequence of tokens, documents separated by end-of-text, cut into files of at most so many tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from factory_train.data.manifest import DataManifest, FileRecord

SHARD_TOKENS = 2**27
_MOST_OPEN = 128


def token_dtype(vocab_size: int) -> str:
    """Returns how tokens are stored: the narrowest type that holds the vocabulary."""
    return "uint16" if vocab_size <= 65535 else "uint32"


def stored(dtype: str) -> np.dtype[Any]:
    """Returns the little-endian numpy type named in a manifest."""
    return np.dtype(dtype).newbyteorder("<")


class HashedFile:
    """A file that is hashed while it is written, and durable when it is closed.

    Args:
        path: what was there is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._hash, self._size = path, hashlib.sha256(), 0
        self._file: BinaryIO = path.open("wb")

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> FileRecord:
        """Makes the file durable and returns its record."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self._path.name, self._size, self._hash.hexdigest())


class ShardWriter:
    """Writes one split.

    Args:
        folder: where `<split>-00000.bin` and so on, and `<split>-documents.bin`, go.
        split: "train" or "validation".
        dtype: "uint16" or "uint32".
        shard_tokens: most tokens of one file.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, stored(dtype), shard_tokens
        self._file: HashedFile | None = None
        self._room = 0
        self._shards: list[FileRecord] = []
        self._starts: list[int] = []
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._starts)

    def begin_document(self) -> None:
        """Marks the next token as the first of a document."""
        self._starts.append(self.num_tokens)

    def append(self, tokens: npt.ArrayLike) -> None:
        """Appends tokens (N,) to the split."""
        array = np.asarray(tokens, dtype=self._dtype)
        while len(array):
            if self._file is None:
                self._file = HashedFile(self._folder / f"{self._split}-{len(self._shards):05d}.bin")
                self._room = self._shard_tokens
            part, array = array[: self._room], array[self._room :]
            self._file.write(part.tobytes())
            self._room -= len(part)
            self.num_tokens += len(part)
            if self._room == 0:
                self._end_shard()

    def _end_shard(self) -> None:
        if self._file is not None:
            self._shards.append(self._file.close())
            self._file = None

    def close(self) -> tuple[list[FileRecord], FileRecord]:
        """Ends the split; returns the records of its shards and of its document index."""
        self._end_shard()
        index = HashedFile(self._folder / f"{self._split}-documents.bin")
        index.write(np.asarray([*self._starts, self.num_tokens], dtype="<i8").tobytes())
        return self._shards, index.close()


class TokenStream:
    """The tokens of one split, memory-mapped.

    Args:
        folder: prepared data, or the data folder of a run.
        split: "train" or "validation".
    Raises:
        IntegrityError: a file is missing or has the wrong size.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.manifest = DataManifest.load(folder)
        self.manifest.check_sizes(folder, (split,))
        self._record = self.manifest.splits[split]
        self._dtype = stored(self.manifest.dtype)
        self._open: OrderedDict[int, np.memmap[Any, np.dtype[Any]]] = OrderedDict()
        # Where each shard begins and, last, where the split ends.
        self._borders = np.cumsum([0, *(shard.num_bytes // self._dtype.itemsize for shard in self._record.shards)])

    @property
    def num_tokens(self) -> int:
        return int(self._borders[-1])

    def __len__(self) -> int:
        return self.num_tokens

    def slice(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Returns tokens [start, start + length) as int64 (length,), across shard borders.

        Raises:
            IndexError: the split is not that long.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start}..{start + length} of a split of {self.num_tokens}")
        out = np.empty(length, dtype=np.int64)
        shard = int(np.searchsorted(self._borders, start, side="right")) - 1
        done = 0
        while done < length:
            part = self._shard(shard)[start + done - self._borders[shard] :][: length - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    def _shard(self, number: int) -> np.memmap[Any, np.dtype[Any]]:
        """Returns the tokens of a shard; those used least are closed, since each costs a file descriptor and there may be thousands."""
        shard = self._open.get(number)
        if shard is None:
            shard = np.memmap(self.folder / self._record.shards[number].name, dtype=self._dtype, mode="r")
            self._open[number] = shard
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return shard

    def document_starts(self) -> npt.NDArray[np.int64]:
        """Returns the positions at which documents begin (num_documents,)."""
        return np.fromfile(self.folder / self._record.documents.name, dtype="<i8")[:-1]

    def verify(self) -> None:
        """Compares every file of the split, and the tokenizer, with its sha256.

        Raises:
            IntegrityError: names the file that differs.
        """
        self.manifest.verify(self.folder, (self.split,))
