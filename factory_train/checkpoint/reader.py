"""Reading one checkpoint in one process: tensors whole or in part, run state, verification."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from factory_train.checkpoint.catalog import CheckpointInfo, list_checkpoints, select
from factory_train.checkpoint.chunk_file import ChunkFile
from factory_train.checkpoint.format import STATE_NAME, Chunk, TensorRecord, read_manifest
from factory_train.checkpoint.lease import Lease
from factory_train.checkpoint.verify import Part, verify_files, verify_parts
from factory_train.distributed.box import Box
from factory_train.distributed.encoded import EncodedTensor, Stored
from factory_train.errors import FactoryTrainError, IntegrityError, NotFoundError
from factory_train.run_dir import RunDir

# A checkpoint of a thousand ranks has as many files.
_MAX_OPEN_FILES = 64


class CheckpointReader:
    """A checkpoint on disk, held against retention until it is closed; safe to use from several threads.

    Args:
        path: its folder.
        notes: one line for each newer checkpoint that was passed over to get here.

    Raises:
        NotFoundError: there is no such folder, or it is being removed.
        IntegrityError: the manifest is missing or was changed.
        ConfigError: a newer version of factory_train wrote it.
    """

    def __init__(self, path: Path, notes: Sequence[str] = ()) -> None:
        self._lease = Lease.to_read(path)
        self.path, self.manifest, self.notes = path, read_manifest(path), tuple(notes)
        self._opened: dict[str, ChunkFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the checkpoint; it may be removed from now on."""
        self._opened.clear()
        self._lease.close()

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """The run state, checked against the manifest; raises IntegrityError."""
        self.verify(files=[STATE_NAME])
        return json.loads((self.path / STATE_NAME).read_bytes())

    def sections(self) -> list[str]:
        """Returns the sections it has: "weights", "optimizer/exp_avg", ..."""
        return list(self.manifest.contents.tensors)

    def names(self, section: str) -> list[str]:
        """Returns the tensors of a section."""
        return list(self.manifest.contents.tensors.get(section, {}))

    def record(self, section: str, name: str) -> TensorRecord:
        """Returns type, shape and chunks of a tensor; raises NotFoundError."""
        try:
            return self.manifest.contents.tensors[section][name]
        except KeyError:
            raise NotFoundError(f"no tensor '{section} {name}' in this checkpoint", where=str(self.path)) from None

    def verify(self, files: Collection[str] | None = None, sections: Collection[str] | None = None) -> int:
        """Compares files (default: all) with the manifest; returns the bytes read, raises IntegrityError naming what differs."""
        return verify_files(self.path, self.manifest, files=files, sections=sections)

    def verify_boxes(self, wanted: Sequence[tuple[str, str, Box]]) -> int:
        """Compares the chunks that hold these boxes (section, name, box) with their checksums; returns the bytes read."""
        parts: dict[tuple[str, str], Part] = {}
        for section, name, box in wanted:
            record = self.record(section, name)
            for chunk, _ in record.overlapping(box):
                parts[chunk.file, chunk.key] = Part(f"{section} {name}", record.dtype, chunk)
        return verify_parts(parts.values(), self._file)

    def read(self, section: str, name: str) -> torch.Tensor:
        """Returns a whole tensor, on the CPU. Checksums are not looked at: call `verify` first."""
        return self.read_box(section, name, Box.whole(self.record(section, name).shape))

    def read_box(self, section: str, name: str, box: Box) -> torch.Tensor:
        """Returns part of a tensor, on the CPU, reading only the chunks that have a share in it."""
        values = torch.empty(box.shape, dtype=getattr(torch, self.record(section, name).dtype))
        self.fill(section, name, box, values)
        return values

    def fill(self, section: str, name: str, box: Box, target: Stored) -> None:
        """Copies part of a tensor into `target` (shape `box.shape`, any device), converting its type or encoding.

        Raises:
            IntegrityError: a file cannot be read, or the chunks do not cover the box.
        """
        if isinstance(target, EncodedTensor):
            target.copy_(self.read_box(section, name, box))
            return
        record, filled = self.record(section, name), 0
        for chunk, common in record.overlapping(box):
            with torch.no_grad():
                self._copy(Part(f"{section} {name}", record.dtype, chunk), common, target[common.slices(within=box)])
            filled += common.numel
        if filled != box.numel:
            raise IntegrityError(f"chunks of tensor '{section} {name}' hold {filled} of {box.numel} elements", where=str(self.path))

    def _copy(self, part: Part, common: Box, target: torch.Tensor) -> None:
        """Copies `common`, a box within the chunk, into `target`: straight from the file where layout and type allow it."""
        dtype: torch.dtype = getattr(torch, part.dtype)
        whole_rows, skip = _rows(part.chunk, common, dtype.itemsize)
        direct = whole_rows.shape == common.shape and target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()
        values = target if direct else torch.empty(whole_rows.shape, dtype=dtype)
        data = values.detach().reshape(-1).view(torch.uint8).numpy().data
        self._file(part.chunk.file).read_into(data, part.chunk, part.dtype, part.tensor, skip)
        if not direct:
            target.copy_(values[common.slices(within=whole_rows)])

    def _file(self, name: str) -> ChunkFile:
        with self._lock:
            if name not in self._opened:
                if len(self._opened) >= _MAX_OPEN_FILES:
                    # Another thread may be reading from it; it closes when the last of them lets go.
                    del self._opened[next(iter(self._opened))]
                self._opened[name] = ChunkFile(self.path / name, self.manifest.contents.files.get(name))
            return self._opened[name]


def _rows(chunk: Chunk, common: Box, itemsize: int) -> tuple[Box, int]:
    """Returns the rows of a chunk that hold `common`, which are one range of bytes in the file, and where it begins."""
    if not chunk.shape:
        return common, 0
    rows = Box((common.offset[0], *chunk.offset[1:]), (common.shape[0], *chunk.shape[1:]))
    return rows, (common.offset[0] - chunk.offset[0]) * math.prod(chunk.shape[1:]) * itemsize


def open_checkpoint(run: RunDir, step: int | None = None, *, sections: Collection[str] | None = ("weights",)) -> CheckpointReader:
    """Opens a checkpoint for one process to read, after verifying it.

    Args:
        step: which one; None is the newest that verifies.
        sections: what is verified, and so may be read; None is everything.

    Raises:
        NotFoundError: the run has no checkpoint, or none of that step.
        IntegrityError: the one asked for is damaged, or all are.
    """
    if step is not None:
        reader = CheckpointReader(select(run, str(step)).path)
        reader.verify(sections=sections)
        return reader
    select(run, None)
    notes: list[str] = []
    for info in newest_first(run):
        try:
            reader = CheckpointReader(info.path, notes)
            reader.verify(sections=sections)
        except NotFoundError:
            continue
        except IntegrityError as error:
            notes.append(passed_over(info.path.name, error))
            continue
        return reader
    raise all_damaged(run, notes)


def newest_first(run: RunDir) -> Iterator[CheckpointInfo]:
    """Yields the checkpoints of a run, newest first, each once; what is saved meanwhile comes first.

    While a run is training, those of one look at the folder may all be gone by the time they are opened.
    """
    seen: set[Path] = set()
    while True:
        fresh = [info for info in list_checkpoints(run) if info.path not in seen]
        if not fresh:
            return
        seen.add(fresh[0].path)
        yield fresh[0]


def passed_over(name: str, error: FactoryTrainError) -> str:
    """Returns the line that says why a checkpoint was not used."""
    return f"{name} skipped: {error.where}: {error.what}"


def all_damaged(run: RunDir, notes: Sequence[str]) -> IntegrityError:
    """Returns the error of a run that has checkpoints, none of which can be used."""
    return IntegrityError(
        "every checkpoint is damaged: " + "; ".join(notes),
        where=str(run.checkpoints),
        fix="restore one from a copy, or start again under a new name: run=NEW_ID",
    )
