"""One tensor file of a checkpoint, open for reading: its head is checked when it is opened. No torch.

Plain reads, not a memory mapping: a failing disk or a file that was cut short is an error that the caller can pass
over, where a mapping would end the process with SIGBUS.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from factory_train.checkpoint.format import DTYPES, Chunk, FileRecord, decode_header
from factory_train.errors import IntegrityError

BLOCK_BYTES = 4 << 20


class ChunkFile:
    """A safetensors file of a checkpoint.

    Args:
        path: the file.
        record: what the manifest says of it; None when the manifest does not list it.

    Raises:
        IntegrityError: it is missing, or its length or head is not that of the manifest.
    """

    def __init__(self, path: Path, record: FileRecord | None) -> None:
        self.path = path
        self._fd: int | None = None
        if record is None:
            raise IntegrityError("the manifest does not list this file", where=str(path))
        try:
            self._fd = os.open(path, os.O_RDONLY)
            size = os.fstat(self._fd).st_size
        except OSError as error:
            raise self._unreadable(error) from error
        if size != record.bytes:
            raise IntegrityError(f"has {size} bytes instead of {record.bytes}", where=str(path))
        head = bytearray(record.head_bytes)
        self._read(memoryview(head), 0)
        if xxhash.xxh3_64_hexdigest(head) != record.xxh3:
            raise IntegrityError("its first bytes differ from the manifest", where=str(path))
        self.head_bytes = record.head_bytes
        self._header = decode_header(bytes(head)) if path.suffix == ".safetensors" else {}

    def verify(self, chunk: Chunk, dtype: str, tensor: str, buffer: bytearray) -> int:
        """Compares a chunk with its checksum; returns its bytes.

        Args:
            dtype: of the tensor.
            tensor: its name, for the message.
            buffer: room for `BLOCK_BYTES`, used again from call to call.

        Raises:
            IntegrityError: they differ, or the chunk is not in the file as the manifest says.
        """
        start, end = self.span(chunk, dtype, tensor)
        digest = xxhash.xxh3_64()
        for position in range(start, end, BLOCK_BYTES):
            block = memoryview(buffer)[: min(BLOCK_BYTES, end - position)]
            self._read(block, position)
            digest.update(block)
        if digest.hexdigest() != chunk.xxh3:
            raise IntegrityError(f"the bytes of tensor '{tensor}' differ from their checksum", where=str(self.path))
        return end - start

    def span(self, chunk: Chunk, dtype: str, tensor: str) -> tuple[int, int]:
        """Returns where in the file the bytes of a chunk are: first, and one past the last."""
        entry = self._header.get(chunk.key)
        if entry is None or entry["dtype"] != DTYPES[dtype][0] or tuple(entry["shape"]) != chunk.shape:
            raise IntegrityError(f"tensor '{tensor}' is not in it as the manifest says", where=str(self.path))
        start, end = entry["data_offsets"]
        return self.head_bytes + start, self.head_bytes + end

    def read_into(self, target: memoryview, chunk: Chunk, dtype: str, tensor: str, skip: int) -> None:
        """Fills `target` with the bytes of a chunk from byte `skip` of it on; checksums are not looked at.

        Raises:
            IntegrityError: it cannot be read.
        """
        start, end = self.span(chunk, dtype, tensor)
        assert start + skip + target.nbytes <= end, (chunk, skip, target.nbytes)
        self._read(target, start + skip)

    def close(self) -> None:
        """Closes the file. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        self.close()

    def _read(self, target: memoryview, position: int) -> None:
        assert self._fd is not None, "the file is closed"
        rest = target
        while rest:
            try:
                count = os.preadv(self._fd, [rest], position)
            except OSError as error:
                raise self._unreadable(error) from error
            if not count:
                raise IntegrityError("ends too early", where=str(self.path))
            rest, position = rest[count:], position + count

    def _unreadable(self, error: OSError) -> IntegrityError:
        return IntegrityError(f"cannot be read ({error.strerror})", where=str(self.path))
