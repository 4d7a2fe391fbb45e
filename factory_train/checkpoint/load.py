"""Loading: verify first, then fill each rank's shards by intersecting boxes, whatever strategy saved them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.checkpoint.reader import CheckpointReader, all_damaged, open_checkpoint, passed_over
from factory_train.checkpoint.save import TensorEntry
from factory_train.checkpoint.verify import verify_files
from factory_train.errors import ConfigError, IntegrityError, NotFoundError
from factory_train.run_dir import RunDir

__all__ = ["CheckpointReader", "LoadedState", "list_checkpoints", "load_checkpoint", "load_newest", "open_checkpoint"]


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
            notes.append(passed_over(name, error))
            continue
        return LoadedState(loaded.path, loaded.step, loaded.state, tuple(notes))
    if notes:
        raise all_damaged(run, notes)
    return None


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
