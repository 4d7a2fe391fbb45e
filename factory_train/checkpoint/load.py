"""Loading: verify first, then fill each rank's shards by intersecting boxes, whatever strategy saved them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.entries import NATIVE, TensorEntry
from factory_train.checkpoint.reader import CheckpointReader, all_damaged, newest_first, passed_over
from factory_train.checkpoint.verify import READ_THREADS
from factory_train.distributed.encoded import EncodedTensor
from factory_train.errors import ConfigError, IntegrityError, NotFoundError
from factory_train.run_dir import RunDir

_OPTIMIZER = "optimizer/"


@dataclass(frozen=True)
class LoadedState:
    """What a load found.

    Args:
        path: the checkpoint.
        step: completed optimizer steps.
        state: the run state.
        sections: what was loaded; "native/..." is among them only where the layouts match.
        left_alone: tensors that kept their values ("section name"), in a load that is not strict.
        notes: one line for each newer checkpoint that was passed over, with the reason.
    """

    path: Path
    step: int
    state: dict[str, Any]
    sections: tuple[str, ...]
    left_alone: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def has_optimizer(self) -> bool:
        """Whether the optimizer's state was loaded; it is not where another optimizer saved."""
        return any(section.startswith(_OPTIMIZER) for section in self.sections)


def load_checkpoint(
    reader: CheckpointReader,
    entries: Sequence[TensorEntry],
    *,
    sections: Collection[str] | None = None,
    strict: bool = True,
    ranks: Ranks | None = None,
) -> LoadedState:
    """Fills the tensors of `entries` in place; every rank calls it with the same checkpoint.

    Each rank compares the chunks it needs with their checksums, and no tensor of any rank is touched before all have.

    Args:
        entries: what this rank holds; every rank names every tensor, with an empty box where it holds nothing.
            Floating types are converted, so an fp32 checkpoint fills bf16 weights.
        sections: what to load, e.g. ("weights",); default: all sections of `entries`, without the optimizer's where
            the checkpoint is of another optimizer.
        strict: whether names and shapes must be the same on both sides; otherwise tensors that match are filled and
            the others left alone.
        ranks: default: the default process group.

    Raises:
        ConfigError: tensors are missing, left over, or of another shape: the model is not the one that was saved.
        IntegrityError: bytes differ from the manifest. The same error is raised on all ranks.
    """
    ranks = ranks or Ranks.current()
    wanted = _wanted_sections(reader, entries) if sections is None else set(sections)
    chosen = [entry for entry in entries if entry.section in wanted]
    chosen, left_alone = _matching(reader, chosen) if not strict else (chosen, [])
    ranks.agree("comparing the model with the checkpoint", lambda: _check_matches(reader, chosen) if strict else None)
    usable = ranks.agree("comparing layouts", lambda: _native_fits(reader, entries) if sections is None else False)
    loaded = tuple(sorted({entry.section for entry in chosen}))
    if all(usable):
        # What is taken as it stands need not be read in float32 as well.
        native = [entry for entry in entries if entry.section.startswith(NATIVE)]
        chosen = [entry for entry in chosen if not _has_native(entry)] + native
        loaded += tuple(sorted({entry.section for entry in native}))
    held = [(entry.section, entry.name, entry.box) for entry in chosen if entry.box.numel]
    ranks.agree("verifying a checkpoint", lambda: reader.verify_boxes(held))
    ranks.agree("loading a checkpoint", lambda: _fill(reader, chosen))
    # Read once and shared, so that all ranks continue from the very same state.
    state = ranks.agree_on_main("reading the run state", lambda: reader.state)
    return LoadedState(reader.path, reader.manifest.step, state, loaded, tuple(left_alone))


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
    candidates, notes = newest_first(run), list[str]()
    while True:
        # Rank 0 alone looks: others could see a listing of another moment.
        name = ranks.agree_on_main("looking for checkpoints", lambda: next((info.path.name for info in candidates), None))
        if name is None:
            break
        try:
            loaded = _open_and_load(run.checkpoints / name, entries, sections, ranks)
        except NotFoundError:
            # Retention was faster; what it made room for comes next.
            continue
        except IntegrityError as error:
            notes.append(passed_over(name, error))
            continue
        return replace(loaded, notes=tuple(notes))
    if notes:
        raise all_damaged(run, notes)
    return None


def _open_and_load(path: Path, entries: Sequence[TensorEntry], sections: Collection[str] | None, ranks: Ranks) -> LoadedState:
    opened: list[CheckpointReader] = []
    try:
        ranks.agree("opening a checkpoint", lambda: opened.append(CheckpointReader(path)))
        return load_checkpoint(opened[0], entries, sections=sections, ranks=ranks)
    finally:
        for reader in opened:
            reader.close()


def _wanted_sections(reader: CheckpointReader, entries: Sequence[TensorEntry]) -> set[str]:
    """Returns the sections of the entries, without those of an optimizer that is not the one that saved."""
    asked = {entry.section for entry in entries if not entry.section.startswith(NATIVE)}
    ours = {section for section in asked if section.startswith(_OPTIMIZER)}
    theirs = {section for section in reader.sections() if section.startswith(_OPTIMIZER)}
    return asked if ours == theirs else asked - ours


def _has_native(entry: TensorEntry) -> bool:
    return isinstance(entry.tensor, EncodedTensor) and bool(entry.tensor.natives)


def _native_fits(reader: CheckpointReader, entries: Sequence[TensorEntry]) -> bool:
    """Returns whether this rank can take the native encoding as it stands: every box is made of whole stored chunks."""
    native = [entry for entry in entries if entry.section.startswith(NATIVE)]
    for entry in native:
        record = reader.manifest.contents.tensors.get(entry.section, {}).get(entry.name)
        if record is None or record.shape != entry.global_shape or record.dtype != entry.dtype:
            return False
        if any(common != chunk.box for chunk, common in record.overlapping(entry.box)):
            return False
    return bool(native)


def _matching(reader: CheckpointReader, entries: Sequence[TensorEntry]) -> tuple[list[TensorEntry], list[str]]:
    """Returns the entries that the checkpoint has in the same shape, and the names of the others."""
    saved = reader.manifest.contents.tensors
    same, other = list[TensorEntry](), list[str]()
    for entry in entries:
        record = saved.get(entry.section, {}).get(entry.name)
        fits = record is not None and record.shape == entry.global_shape and _same_kind(record.dtype, entry)
        (same.append(entry) if fits else other.append(f"{entry.section} {entry.name}"))
    return same, sorted(other)


def _same_kind(dtype: str, entry: TensorEntry) -> bool:
    return bool(getattr(torch, dtype).is_floating_point == entry.tensor.dtype.is_floating_point)


def _check_matches(reader: CheckpointReader, entries: Sequence[TensorEntry]) -> None:
    sections = sorted({entry.section for entry in entries})
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
        if not _same_kind(saved[key].dtype, asked[key])
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ConfigError(
            f"the checkpoint holds another model: {'; '.join(problems[:4])}{more}",
            where=str(reader.path),
            fix="use the model.* the run was started with, or start a new run with run=NEW_ID",
        )


def _fill(reader: CheckpointReader, entries: Sequence[TensorEntry]) -> None:
    held = sorted((entry for entry in entries if entry.box.numel), key=lambda entry: -entry.num_bytes)
    with ThreadPoolExecutor(READ_THREADS, "checkpoint-load") as pool:
        for _ in pool.map(lambda entry: reader.fill(entry.section, entry.name, entry.box, entry.tensor), held):
            pass
