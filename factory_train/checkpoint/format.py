"""What is in a checkpoint folder: the manifest, its canonical JSON, and the header of a tensor file. No torch.

The format is specified in docs/checkpoint-format.md; change both together.
"""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from factory_train.distributed.box import Box
from factory_train.errors import CheckpointError, ConfigError, IntegrityError

FORMAT_VERSION = 1
MANIFEST_NAME = "MANIFEST.json"
STATE_NAME = "state.json"
# Name in the manifest -> (name in safetensors headers, bytes an element).
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


@dataclass(frozen=True)
class Chunk:
    """One stored box of a tensor.

    Args:
        file: name of the safetensors file inside the folder.
        key: name of the tensor in that file.
        offset, shape: the box, in elements of the whole tensor.
        xxh3: XXH3-64 of the stored bytes, 16 hexadecimal digits.
    """

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    xxh3: str

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)


@dataclass(frozen=True)
class TensorRecord:
    """One whole tensor: its type (a key of `DTYPES`), its shape, and the chunks that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def overlapping(self, box: Box) -> Iterator[tuple[Chunk, Box]]:
        """Yields the chunks that have elements in `box`, and which.

        Along the dimension that is cut most, chunks outside of the box are not looked at: loading all boxes of a
        tensor costs about as many looks as there are chunks and boxes, not their product.
        """
        dim, starts, longest, ordered = self._along_most_cut
        first = bisect.bisect_right(starts, box.offset[dim] - longest) if self.shape else 0
        last = bisect.bisect_left(starts, box.end[dim]) if self.shape else len(ordered)
        for chunk in ordered[first:last]:
            common = chunk.box.intersection(box)
            if common is not None:
                yield chunk, common

    @functools.cached_property
    def _along_most_cut(self) -> tuple[int, list[int], int, list[Chunk]]:
        """The dimension with most different offsets; the offsets in it, the longest extent, and the chunks in that order."""
        dim = most_cut([chunk.box for chunk in self.chunks], len(self.shape))
        if not self.shape:
            return dim, [], 0, list(self.chunks)
        ordered = sorted(self.chunks, key=lambda chunk: chunk.offset[dim])
        return dim, [chunk.offset[dim] for chunk in ordered], max((chunk.shape[dim] for chunk in ordered), default=0), ordered


@dataclass(frozen=True)
class FileRecord:
    """One file: its length, and the XXH3-64 of its first `head_bytes` (what no chunk's checksum covers)."""

    bytes: int
    head_bytes: int
    xxh3: str


# {section: {fully qualified name: record}}
Tensors = dict[str, dict[str, TensorRecord]]


@dataclass(frozen=True)
class Contents:
    """Tensors and files: what one rank wrote, or what a whole checkpoint holds."""

    tensors: Tensors
    files: dict[str, FileRecord]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Contents:
        tensors = {section: {name: _record(record) for name, record in records.items()} for section, records in value["tensors"].items()}
        return Contents(tensors, {name: FileRecord(**record) for name, record in value["files"].items()})


@dataclass(frozen=True)
class Manifest:
    """MANIFEST.json: everything needed to find, check and reassemble what a checkpoint holds.

    Args:
        step: completed optimizer steps.
        run_id, attempt: who wrote it.
        created: seconds since the epoch.
        world_size: number of ranks that wrote it.
        contents: tensors and files.
    """

    step: int
    run_id: str
    attempt: int
    created: float
    world_size: int
    contents: Contents

    def encode(self) -> bytes:
        """Returns the file's bytes: canonical JSON that carries the hash of itself."""
        value = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "run_id": self.run_id,
            "attempt": self.attempt,
            "created": self.created,
            "world_size": self.world_size,
            **self.contents.to_json(),
        }
        value["xxh3"] = xxhash.xxh3_64_hexdigest(canonical_json(value))
        return canonical_json(value)

    @staticmethod
    def decode(raw: bytes, where: str) -> Manifest:
        """Reads what `encode` wrote.

        Raises:
            IntegrityError: the bytes are not what was written.
            ConfigError: a newer version of factory_train wrote it.
        """
        try:
            value = json.loads(raw)
            stated = value.pop("xxh3")
            # Comparing bytes too leaves no byte that could change unnoticed.
            intact = canonical_json({**value, "xxh3": stated}) == raw and xxhash.xxh3_64_hexdigest(canonical_json(value)) == stated
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            intact = False
        if not intact:
            raise IntegrityError("the manifest was changed or is incomplete", where=where)
        version = value["format_version"]
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"checkpoint format {version} is newer than this version reads ({FORMAT_VERSION})", where=where, fix="upgrade factory_train"
            )
        facts = {name: value[name] for name in ("step", "run_id", "attempt", "created", "world_size")}
        return Manifest(**facts, contents=Contents.from_json(value))


def canonical_json(value: Any) -> bytes:
    """Returns the one way to write `value`: sorted keys, no spaces, ASCII.

    Raises:
        CheckpointError: there is something in it that JSON cannot hold (a tensor, NaN).
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"run state cannot be written as JSON ({error})") from error


def merge_contents(parts: Iterable[Contents]) -> Contents:
    """Joins what the ranks wrote, and checks that the chunks of every tensor tile it exactly.

    Raises:
        CheckpointError: ranks disagree about a tensor, or its chunks overlap or leave a hole.
    """
    files: dict[str, FileRecord] = {}
    found: dict[tuple[str, str], tuple[str, tuple[int, ...], list[Chunk]]] = {}
    for part in parts:
        files.update(part.files)
        for section, name, record in iterate(part.tensors):
            dtype, shape, chunks = found.setdefault((section, name), (record.dtype, record.shape, []))
            if (dtype, shape) != (record.dtype, record.shape):
                raise CheckpointError(
                    f"ranks disagree: {dtype} {list(shape)} against {record.dtype} {list(record.shape)}", where=f"{section} {name}"
                )
            chunks.extend(record.chunks)
    tensors: Tensors = {}
    for (section, name), (dtype, shape, chunks) in found.items():
        problem = tiling_problem(shape, [chunk.box for chunk in chunks])
        if problem:
            raise CheckpointError(problem, where=f"{section} {name}")
        ordered = tuple(sorted(chunks, key=lambda chunk: chunk.offset))
        tensors.setdefault(section, {})[name] = TensorRecord(dtype, shape, ordered)
    return Contents(tensors, files)


def most_cut(boxes: Sequence[Box], num_dims: int) -> int:
    """Returns the dimension in which the boxes begin at most different places."""
    return max(range(num_dims), key=lambda dim: len({box.offset[dim] for box in boxes}), default=0)


def tiling_problem(shape: tuple[int, ...], boxes: list[Box]) -> str | None:
    """Returns what is wrong with `boxes` as a tiling of `shape`, or None if each element is in exactly one."""
    for box in boxes:
        if not box.is_within(shape):
            return f"chunk {box.offset}+{box.shape} lies outside of {list(shape)}"
    # Boxes that are disjoint and add up to the whole leave no hole.
    if shape:
        # Sweeping along the dimension that is cut most keeps the number of open boxes small.
        sweep = most_cut(boxes, len(shape))
        open_boxes: list[Box] = []
        for box in sorted(boxes, key=lambda box: box.offset[sweep]):
            open_boxes = [other for other in open_boxes if other.end[sweep] > box.offset[sweep]]
            for other in open_boxes:
                if box.intersection(other):
                    return f"chunks {other.offset}+{other.shape} and {box.offset}+{box.shape} overlap"
            open_boxes.append(box)
    held, total = sum(box.numel for box in boxes), Box.whole(shape).numel
    return None if held == total else f"chunks hold {held} of {total} elements"


def iterate(tensors: Tensors) -> Iterator[tuple[str, str, TensorRecord]]:
    """Yields (section, name, record)."""
    for section, records in tensors.items():
        for name, record in records.items():
            yield section, name, record


def spread(sizes: list[int], bins: int) -> list[int]:
    """Returns a bin for each item so that bins get about equally much: the largest first, each to the emptiest bin.

    The answer depends on the arguments alone, so ranks that hold the same list agree without talking.
    """
    import heapq

    heap = [(0, index) for index in range(bins)]
    chosen = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        load, index = heap[0]
        chosen[item] = index
        heapq.heapreplace(heap, (load + sizes[item], index))
    return chosen


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Returns the head of a safetensors file whose data follows in the order of `tensors`.

    Args:
        tensors: {key: (dtype, shape)}; wider types first, so that every tensor is aligned to its type.
        metadata: text that any safetensors reader shows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, (dtype, shape) in tensors.items():
        code, itemsize = DTYPES[dtype]
        start, end = end, end + Box.whole(shape).numel * itemsize
        header[key] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def decode_header(head: bytes) -> dict[str, Any]:
    """Returns the tensors of a safetensors head: {key: {"dtype", "shape", "data_offsets"}}."""
    header = json.loads(head[8:])
    header.pop("__metadata__", None)
    return header


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks MANIFEST.json of a checkpoint folder.

    Raises:
        IntegrityError: it is missing or was changed.
        ConfigError: a newer version of factory_train wrote it.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"cannot read the manifest ({error.strerror})", where=str(path)) from error
    return Manifest.decode(raw, str(path))


def _record(value: Mapping[str, Any]) -> TensorRecord:
    chunks = tuple(
        Chunk(chunk["file"], chunk["key"], tuple(chunk["offset"]), tuple(chunk["shape"]), chunk["xxh3"]) for chunk in value["chunks"]
    )
    return TensorRecord(value["dtype"], tuple(value["shape"]), chunks)
