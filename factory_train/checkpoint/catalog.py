"""Which checkpoints a run has, which is the newest, and which may go. No torch.

Folder names: `step-00000100` is the state after 100 steps. When a run goes back to an earlier checkpoint and trains
on, its later folders carry `.r1` (`.r2` the next time), because a checkpoint is never overwritten. The newest is the
last one by (rewinds, step): what the run did last, even if an abandoned branch had got further.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.format import MANIFEST_NAME, Manifest, read_manifest
from factory_train.errors import FactoryTrainError
from factory_train.run_dir import Attempt, RunDir

LATEST_NAME = "latest"
_COMPLETE = re.compile(r"step-(\d{8,})(?:\.r([1-9]\d*))?")
_DRAFT = re.compile(r"step-\d{8,}\.tmp-(\d+)")
_REMOVED = re.compile(r"step-.*\.removed-\d+")


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
        match = _COMPLETE.fullmatch(name)
        if match and (folder / name / MANIFEST_NAME).is_file():
            found.append(CheckpointInfo(int(match[2] or 0), int(match[1]), folder / name))
    return sorted(found, reverse=True)


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


def clear_leftovers(attempt: Attempt, files: DurableFiles) -> None:
    """Removes drafts of earlier attempts and what an interrupted removal left.

    A rank of an earlier attempt that still lives then has nothing left to rename.
    """
    attempt.check_fence("removing unfinished checkpoints")
    for entry in sorted(attempt.run.checkpoints.iterdir()):
        draft = _DRAFT.fullmatch(entry.name)
        if draft and int(draft[1]) < attempt.number:
            _discard(entry, attempt, files)
        elif _REMOVED.fullmatch(entry.name):
            _remove(entry, files)


def retain(attempt: Attempt, keep_last: int, files: DurableFiles) -> None:
    """Removes all but the `keep_last` newest checkpoints; call it only after a good one was committed."""
    assert keep_last >= 1, keep_last
    for info in list_checkpoints(attempt.run)[keep_last:]:
        attempt.check_fence("removing an old checkpoint")
        _discard(info.path, attempt, files)


def _discard(path: Path, attempt: Attempt, files: DurableFiles) -> None:
    """Takes the name away before the files, so that no reader finds a complete name with half of them."""
    doomed = path.with_name(f"{path.name}.removed-{attempt.number:04d}")
    files.rename(path, doomed)
    _remove(doomed, files)


def _remove(path: Path, files: DurableFiles) -> None:
    # On NFS a file that somebody still reads keeps its folder alive: the next save tries again.
    with contextlib.suppress(OSError):
        files.remove_folder(path)
