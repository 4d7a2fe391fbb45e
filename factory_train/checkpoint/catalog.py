"""Which checkpoints a run has, which is the newest, and what the next one is called. No torch.

Folder names: `step-00000100` is the state after 100 steps. When a run goes back to an earlier checkpoint and trains
on, its later folders carry `.r1` (`.r2` the next time), because a checkpoint is never overwritten. The newest is the
last one by (rewinds, step): what the run did last, even if an abandoned branch had got further.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from factory_train.checkpoint.format import MANIFEST_NAME, Manifest, read_manifest
from factory_train.errors import FactoryTrainError, NotFoundError
from factory_train.run_dir import Attempt, RunDir

LATEST_NAME = "latest"
_COMPLETE = re.compile(r"step-(\d{8,})(?:\.r([1-9]\d*))?")


@dataclass(frozen=True, order=True)
class CheckpointInfo:
    """A complete checkpoint, as its folder shows; comparing two says which is newer.

    Args:
        rewinds: how often the run had gone back to an earlier checkpoint.
        step: completed optimizer steps.
    """

    rewinds: int
    step: int
    path: Path

    def manifest(self) -> Manifest:
        """Reads the manifest; raises IntegrityError when it was changed."""
        return read_manifest(self.path)


def folder_name(step: int, rewinds: int) -> str:
    return f"step-{step:08d}" + (f".r{rewinds}" if rewinds else "")


def draft_path(attempt: Attempt, step: int) -> Path:
    """Returns where a checkpoint is written before it counts; the name says whose draft it is."""
    return attempt.run.checkpoints / f"step-{step:08d}.tmp-{attempt.number:04d}"


def list_checkpoints(run: RunDir) -> list[CheckpointInfo]:
    """Returns the complete checkpoints of a run, newest first.

    Complete means a final name and a MANIFEST.json inside. `latest` is believed only where that holds too; it is read
    because a name can be missing from a folder listing for a while on NFS.
    """
    folder = run.checkpoints
    if not folder.is_dir():
        return []
    names = {entry.name for entry in folder.iterdir()}
    latest = folder / LATEST_NAME
    if latest.is_file():
        names.add(latest.read_text(errors="replace").strip())
    found = []
    for name in names:
        info = _info(folder / name)
        if info is not None and (info.path / MANIFEST_NAME).is_file():
            found.append(info)
    return sorted(found, reverse=True)


def _info(path: Path) -> CheckpointInfo | None:
    match = _COMPLETE.fullmatch(path.name)
    return CheckpointInfo(int(match[2] or 0), int(match[1]), path) if match else None


def select(run: RunDir, word: str | None) -> CheckpointInfo:
    """Returns the checkpoint that `word` means: a folder's name, a step (its newest), or None for the newest of all.

    Raises:
        NotFoundError: the run has no such checkpoint.
    """
    found = list_checkpoints(run)
    if not found:
        raise NotFoundError("the run has no checkpoint yet", where=run.name, fix="train it first")
    chosen = found if word is None else [info for info in found if word in (info.path.name, str(info.step))]
    if not chosen:
        have = ", ".join(info.path.name if info.rewinds else str(info.step) for info in found)
        raise NotFoundError(f"no checkpoint of step {word}", where=run.name, fix=f"there are: {have}")
    return chosen[0]


def place(run: RunDir, manifest: Manifest) -> tuple[Path, bool]:
    """Returns the final path for a finished draft, and whether the same bytes are there already.

    A newer step than any before continues the current branch. Going back starts the next one. If the newest
    checkpoint is of the same step and holds exactly the same tensors and state, and its files are intact, there is
    nothing to add.
    """
    newest = next(iter(list_checkpoints(run)), None)
    rewinds = newest.rewinds if newest else 0
    if newest and manifest.step <= newest.step:
        if manifest.step == newest.step and _holds_the_same(newest, manifest):
            return newest.path, True
        rewinds += 1
    path = run.checkpoints / folder_name(manifest.step, rewinds)
    while path.exists():
        # A folder without a manifest is no checkpoint, yet its name is taken.
        rewinds += 1
        path = run.checkpoints / folder_name(manifest.step, rewinds)
    return path, False


def _holds_the_same(info: CheckpointInfo, manifest: Manifest) -> bool:
    from factory_train.checkpoint.verify import verify_files

    try:
        old = info.manifest()
        if old.contents != manifest.contents:
            return False
        verify_files(info.path, old)
    except FactoryTrainError:
        return False
    return True
