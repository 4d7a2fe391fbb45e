"""Reading one checkpoint in one process: tensors whole or in part, run state, verification."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.checkpoint.format import STATE_NAME, Chunk, TensorRecord, read_manifest
from factory_train.checkpoint.verify import verify_files
from factory_train.distributed.box import Box
from factory_train.errors import FactoryTrainError, IntegrityError, NotFoundError
from factory_train.run_dir import RunDir

# Each open file is a mapping of it; a checkpoint of a thousand ranks has as many files.
_MAX_OPEN_FILES = 32


class CheckpointReader:
    """A checkpoint on disk.

    Args:
        path: its folder.
        notes: one line for each newer checkpoint that was passed over to get here.

    Raises:
        NotFoundError: there is no such folder.
        IntegrityError: the manifest is missing or was changed.
        ConfigError: a newer version of factory_train wrote it.
    """

    def __init__(self, path: Path, notes: Sequence[str] = ()) -> None:
        if not path.is_dir():
            raise NotFoundError("no checkpoint here", where=str(path))
        self.path, self.manifest, self.notes = path, read_manifest(path), tuple(notes)
        self._open: dict[str, Any] = {}

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

    def read(self, section: str, name: str) -> torch.Tensor:
        """Returns a whole tensor, on the CPU. Checksums are not looked at: call `verify` first."""
        return self.read_box(section, name, Box.whole(self.record(section, name).shape))

    def read_box(self, section: str, name: str, box: Box) -> torch.Tensor:
        """Returns part of a tensor, on the CPU, reading only the chunks that have a share in it."""
        values = torch.empty(box.shape, dtype=getattr(torch, self.record(section, name).dtype))
        self.fill(section, name, box, values)
        return values

    def fill(self, section: str, name: str, box: Box, target: torch.Tensor) -> None:
        """Copies part of a tensor into `target` (shape `box.shape`, any device), converting its type.

        Raises:
            IntegrityError: a file cannot be read, or the chunks do not cover the box.
        """
        filled = 0
        for chunk in self.record(section, name).chunks:
            common = chunk.box.intersection(box)
            if common is not None:
                with torch.no_grad():
                    target[common.slices(within=box)].copy_(self._values(chunk, common))
                filled += common.numel
        if filled != box.numel:
            raise IntegrityError(f"chunks of tensor '{section} {name}' hold {filled} of {box.numel} elements", where=str(self.path))

    def _values(self, chunk: Chunk, box: Box) -> torch.Tensor:
        path = self.path / chunk.file
        try:
            if chunk.file not in self._open:
                if len(self._open) == _MAX_OPEN_FILES:
                    del self._open[next(iter(self._open))]
                self._open[chunk.file] = safe_open(path, framework="pt")
            file = self._open[chunk.file]
            return file.get_slice(chunk.key)[box.slices(within=chunk.box)] if box.shape else file.get_tensor(chunk.key)
        except (OSError, SafetensorError) as error:
            raise IntegrityError(f"cannot be read ({error})", where=str(path)) from error


def open_checkpoint(run: RunDir, step: int | None = None, *, sections: Collection[str] | None = ("weights",)) -> CheckpointReader:
    """Opens a checkpoint for one process to read, after verifying it.

    Args:
        step: which one; None is the newest that verifies.
        sections: what is verified, and so may be read; None is everything.

    Raises:
        NotFoundError: the run has no checkpoint, or none of that step.
        IntegrityError: the one asked for is damaged, or all are.
    """
    found = list_checkpoints(run)
    if not found:
        raise NotFoundError("the run has no checkpoint yet", where=run.name, fix="train it first")
    if step is not None:
        have = ", ".join(str(info.step) for info in found)
        found = [info for info in found if info.step == step][:1]
        if not found:
            raise NotFoundError(f"no checkpoint of step {step}", where=run.name, fix=f"step= one of {have}")
    notes: list[str] = []
    for info in found:
        try:
            reader = CheckpointReader(info.path, notes)
            reader.verify(sections=sections)
        except (IntegrityError, NotFoundError) as error:
            if step is not None:
                raise
            notes.append(passed_over(info.path.name, error))
            continue
        return reader
    raise all_damaged(run, notes)


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
