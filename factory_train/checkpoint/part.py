"""What one rank writes of a checkpoint: a description that travels as JSON, and the writing itself. No torch.

The bytes come from wherever the caller has them: live tensors of this process, or a copy in shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from factory_train.checkpoint.files import DurableFiles, NewFile
from factory_train.checkpoint.format import (
    DTYPES,
    FORMAT_VERSION,
    STATE_NAME,
    Chunk,
    Contents,
    FileRecord,
    TensorRecord,
    Tensors,
    canonical_json,
    encode_header,
)

# Large enough for a parallel filesystem's stripes, small enough to stay in cache between checksum and write.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Piece:
    """One chunk to be written.

    Args:
        section, name: the tensor it is of.
        dtype: a key of `DTYPES`.
        global_shape: shape of the whole tensor.
        offset, shape: the box, in elements of the whole tensor.
        start: where its bytes begin in the caller's buffer.
    """

    section: str
    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int = 0

    @property
    def key(self) -> str:
        """Name of the chunk inside the safetensors file; a chunk that is not a rank's whole box carries its offset."""
        return f"{self.section}/{self.name}" if not any(self.offset) else f"{self.section}/{self.name}@{','.join(map(str, self.offset))}"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Empty:
    """A tensor without elements: no bytes anywhere, but a reader must still find its shape."""

    section: str
    name: str
    dtype: str
    global_shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What one rank writes.

    Args:
        step: completed optimizer steps.
        writer: begins the names of its files; unique in the checkpoint ("rank-00003"; "island1-rank-00003").
        pieces: in the order of the file, wider types first, so that each is aligned to its type.
        empty: tensors without elements that this rank speaks for.
        state: the run state, on the rank that writes it.
    """

    step: int
    writer: str
    pieces: tuple[Piece, ...]
    empty: tuple[Empty, ...] = ()
    state: Mapping[str, Any] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Part:
        pieces = tuple(Piece(**{**row, **_tuples(row, "global_shape", "offset", "shape")}) for row in value["pieces"])
        empty = tuple(Empty(**{**row, **_tuples(row, "global_shape")}) for row in value["empty"])
        return Part(value["step"], value["writer"], pieces, empty, value["state"])


def _tuples(row: Mapping[str, Any], *names: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(row[name]) for name in names}


def writer_name(rank: int) -> str:
    return f"rank-{rank:05d}"


def list_name(writer: str) -> str:
    """Returns the file in which a writer lists what it wrote; its presence in a draft says that all of it is durable."""
    return f"{writer}.json"


def write_part(draft: Path, part: Part, read: Callable[[Piece], memoryview], files: DurableFiles) -> int:
    """Writes a part into a draft, checksums taken on the way, and then the list of what was written; returns its bytes.

    Args:
        draft: the folder; made if it is not there.
        read: returns the bytes of a piece, valid until the next call.

    Raises:
        CheckpointError: the run state holds something JSON cannot.
        OSError: it could not be written.
    """
    files.ensure_folder(draft.parent)
    files.ensure_folder(draft)
    contents = Contents({}, {})
    if part.pieces:
        contents = _write_pieces(_fresh(draft / f"{part.writer}.safetensors", files), part, read, files)
    for empty in part.empty:
        contents.tensors.setdefault(empty.section, {})[empty.name] = TensorRecord(empty.dtype, empty.global_shape, ())
    if part.state is not None:
        data = canonical_json(part.state)
        files.write(_fresh(draft / STATE_NAME, files), data)
        contents.files[STATE_NAME] = FileRecord(len(data), len(data), xxhash.xxh3_64_hexdigest(data))
    listed = canonical_json(contents.to_json())
    files.write(_fresh(draft / list_name(part.writer), files), listed)
    return sum(record.bytes for record in contents.files.values())


def _fresh(path: Path, files: DurableFiles) -> Path:
    """Takes away what this writer left when it failed at this very step before."""
    if path.exists():
        files.remove_file(path)
    return path


def _write_pieces(path: Path, part: Part, read: Callable[[Piece], memoryview], files: DurableFiles) -> Contents:
    layout = {piece.key: (piece.dtype, piece.shape) for piece in part.pieces}
    assert len(layout) == len(part.pieces), "two pieces of the same name"
    head = encode_header(layout, {"format": "pt", "factory_train_checkpoint": str(FORMAT_VERSION), "step": str(part.step)})
    tensors: Tensors = {}
    with files.create(path) as file:
        file.write(head)
        for piece in part.pieces:
            chunk = Chunk(path.name, piece.key, piece.offset, piece.shape, _write_bytes(file, read(piece), piece.num_bytes))
            records = tensors.setdefault(piece.section, {})
            before = records[piece.name].chunks if piece.name in records else ()
            records[piece.name] = TensorRecord(piece.dtype, piece.global_shape, (*before, chunk))
    return Contents(tensors, {path.name: FileRecord(len(head) + part.num_bytes, len(head), xxhash.xxh3_64_hexdigest(head))})


def _write_bytes(file: NewFile, data: memoryview, num_bytes: int) -> str:
    assert data.nbytes == num_bytes, (data.nbytes, num_bytes)
    digest = xxhash.xxh3_64()
    for start in range(0, num_bytes, _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        digest.update(block)
        file.write(block)
    return digest.hexdigest()
