"""Loading: verify first, then fill each rank's shards by intersecting boxes, whatever strategy saved them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.catalog import CheckpointInfo, list_checkpoints
from factory_train.checkpoint.format import STATE_NAME, Chunk, TensorRecord, read_manifest
from factory_train.checkpoint.save import TensorEntry
from factory_train.checkpoint.verify import verify_files
from factory_train.distributed.box import Box
from factory_train.errors import ConfigError, FactoryTrainError, IntegrityError, NotFoundError
from factory_train.run_dir import RunDir

__all__ = ["CheckpointInfo", "CheckpointReader", "LoadedState", "list_checkpoints", "load_checkpoint", "load_newest", "open_checkpoint"]

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


@dataclass(frozen=True)
class LoadedState:
    """What a load found.

    Args:
        path: the checkpoint.
        step: completed optimizer steps.
        state: the run state.
        notes: one line for each newer checkpoint that was passed over, with the reason.
    """

    path: Path
    step: int
    state: dict[str, Any]
    notes: tuple[str, ...] = ()


def load_checkpoint(
    reader: CheckpointReader,
    entries: Sequence[TensorEntry],
    *,
    sections: Collection[str] | None = None,
    ranks: Ranks | None = None,
) -> LoadedState:
    """Fills the tensors of `entries` in place; every rank calls it with the same checkpoint.

    All checksums are compared before the first tensor is touched, each rank taking a share of the bytes.

    Args:
        entries: what this rank holds; every rank names every tensor, with an empty box where it holds nothing.
            Floating types are converted, so an fp32 checkpoint fills bf16 weights.
        sections: what to load, e.g. ("weights",); default: all sections of `entries`.
        ranks: default: the default process group.

    Raises:
        ConfigError: tensors are missing, left over, or of another shape: the model is not the one that was saved.
        IntegrityError: bytes differ from the manifest. The same error is raised on all ranks.
    """
    ranks = ranks or Ranks.current()
    chosen = [entry for entry in entries if sections is None or entry.section in sections]
    wanted = sorted({entry.section for entry in chosen})
    ranks.agree("comparing the model with the checkpoint", lambda: _check_matches(reader, chosen, wanted))
    ranks.agree(
        "verifying a checkpoint",
        lambda: verify_files(reader.path, reader.manifest, sections=wanted, rank=ranks.rank, world_size=ranks.world_size),
    )
    ranks.agree("loading a checkpoint", lambda: _fill(reader, chosen))
    # Read once and shared, so that all ranks continue from the very same state.
    state = ranks.agree_on_main("reading the run state", lambda: reader.state)
    return LoadedState(reader.path, reader.manifest.step, state)


def load_newest(
    run: RunDir,
    entries: Sequence[TensorEntry],
    *,
    rank: int = 0,
    world_size: int = 1,
    sections: Collection[str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> LoadedState | None:
    """Loads the newest checkpoint of a run that verifies, going back past damaged ones; None when the run has none.

    Args: as for `load_checkpoint`; rank, world_size: place of this process.

    Raises:
        IntegrityError: there are checkpoints, and every one is damaged.
        ConfigError: the newest intact one does not fit the model.
    """
    ranks = Ranks(rank, world_size, group)
    # Rank 0 alone looks: others could see a listing of another moment.
    names = ranks.agree_on_main("looking for checkpoints", lambda: [info.path.name for info in list_checkpoints(run)])
    notes: list[str] = []
    for name in names:
        try:
            loaded = _open_and_load(run.checkpoints / name, entries, sections, ranks)
        except (IntegrityError, NotFoundError) as error:
            notes.append(_note(name, error))
            continue
        return LoadedState(loaded.path, loaded.step, loaded.state, tuple(notes))
    if notes:
        raise _all_damaged(run, notes)
    return None


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
        raise NotFoundError("the run has no checkpoint yet", where=run.name)
    if step is not None:
        have = ", ".join(str(info.step) for info in found)
        found = [info for info in found if info.step == step][:1]
        if not found:
            raise NotFoundError(f"no checkpoint of step {step}", where=run.name, fix=f"choose one of its steps: {have}")
    notes: list[str] = []
    for info in found:
        try:
            reader = CheckpointReader(info.path, notes)
            reader.verify(sections=sections)
        except (IntegrityError, NotFoundError) as error:
            if step is not None:
                raise
            notes.append(_note(info.path.name, error))
            continue
        return reader
    raise _all_damaged(run, notes)


def _note(name: str, error: FactoryTrainError) -> str:
    return f"{name} skipped: {error.where}: {error.what}"


def _all_damaged(run: RunDir, notes: Sequence[str]) -> IntegrityError:
    return IntegrityError(
        "every checkpoint is damaged: " + "; ".join(notes),
        where=str(run.checkpoints),
        fix="restore one from a copy, or start again under a new name: run=NEW_ID",
    )


def open_checkpoint(run: RunDir, step: int | None = None) -> CheckpointReader:
    """Opens one checkpoint of a run for reading in one process, its weights verified.

    Args:
        step: which one; None is the newest that verifies.

    Raises:
        NotFoundError: the run has no checkpoint, or none of that step.
        IntegrityError: every candidate is damaged.
    """
    found = [info for info in list_checkpoints(run) if step is None or info.step == step]
    if not found:
        steps = ", ".join(str(info.step) for info in list_checkpoints(run))
        what = "the run has no checkpoint yet" if not steps else f"the run has no checkpoint of step {step}"
        raise NotFoundError(what, where=run.name, fix=f"step= one of {steps}" if steps else "train it first")
    damage: IntegrityError | None = None
    for info in found:
        try:
            reader = CheckpointReader(info.path)
            reader.verify(sections=["weights"])
        except IntegrityError as error:
            damage = damage or error
            continue
        return reader
    assert damage is not None
    raise damage


def _open_and_load(path: Path, entries: Sequence[TensorEntry], sections: Collection[str] | None, ranks: Ranks) -> LoadedState:
    opened: list[CheckpointReader] = []
    ranks.agree("opening a checkpoint", lambda: opened.append(CheckpointReader(path)))
    return load_checkpoint(opened[0], entries, sections=sections, ranks=ranks)


def _check_matches(reader: CheckpointReader, entries: Sequence[TensorEntry], sections: Sequence[str]) -> None:
    saved = {(section, name): reader.record(section, name) for section in sections for name in reader.names(section)}
    asked = {(entry.section, entry.name): entry for entry in entries}
    shared = saved.keys() & asked.keys()
    problems = [f"not in the checkpoint: {' '.join(key)}" for key in sorted(asked.keys() - saved.keys())]
    problems += [f"not in the model: {' '.join(key)}" for key in sorted(saved.keys() - asked.keys())]
    problems += [
        f"{' '.join(key)} is {list(saved[key].shape)} in the checkpoint, {list(asked[key].global_shape)} in the model"
        for key in sorted(shared)
        if saved[key].shape != asked[key].global_shape
    ]
    problems += [
        f"{' '.join(key)} is {saved[key].dtype} in the checkpoint, {asked[key].dtype} in the model"
        for key in sorted(shared)
        if getattr(torch, saved[key].dtype).is_floating_point != asked[key].tensor.dtype.is_floating_point
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ConfigError(
            f"the checkpoint holds another model: {'; '.join(problems[:4])}{more}",
            where=str(reader.path),
            fix="use the model.* and optim.name the run was started with, or start a new run with run=NEW_ID",
        )


def _fill(reader: CheckpointReader, entries: Sequence[TensorEntry]) -> None:
    for entry in entries:
        if entry.box.numel:
            reader.fill(entry.section, entry.name, entry.box, entry.tensor)
