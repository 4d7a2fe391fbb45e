"""From a draft to a checkpoint: the order in which names and bytes become durable, and the fence between. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from factory_train.checkpoint.catalog import LATEST_NAME, draft_path, place
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.format import MANIFEST_NAME, Contents, Manifest, merge_contents
from factory_train.checkpoint.part import list_name
from factory_train.checkpoint.retention import Retention, clear_leftovers, retain
from factory_train.run_dir import Attempt


@dataclass(frozen=True)
class Committed:
    """What a commit did.

    Args:
        name: the checkpoint's folder.
        num_bytes: of all its files but the manifest.
        removed: older checkpoints that went.
        warning: why older ones that should have gone are still there; empty when they went.
    """

    name: str
    num_bytes: int
    removed: list[str]
    warning: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def open_draft(attempt: Attempt, step: int, files: DurableFiles) -> Path:
    """Clears what earlier saves left unfinished and returns the folder to write into; one rank calls it.

    Raises:
        FencedError: a newer attempt exists.
    """
    draft = draft_path(attempt, step)
    clear_leftovers(attempt, files, keep=draft)
    return draft


def commit(attempt: Attempt, step: int, writers: Sequence[str], retention: Retention, files: DurableFiles) -> Committed:
    """Turns a draft that all writers have finished into a checkpoint; one rank calls it.

    Nothing that a reader takes for a checkpoint exists before the rename, and nothing older is touched before that
    either. The folder's name follows `catalog.place`; if the newest checkpoint already holds exactly the same, that
    one stands.

    Raises:
        CheckpointError: ranks disagree about a tensor, or its chunks do not tile it.
        FencedError: a newer attempt exists; nothing was committed.
        OSError: something could not be written.
    """
    draft = draft_path(attempt, step)
    lists = [draft / list_name(writer) for writer in writers]
    contents = merge_contents(Contents.from_json(json.loads(path.read_bytes())) for path in lists)
    manifest = Manifest(step, attempt.run.id, attempt.number, time.time(), len(writers), contents)
    files.write(draft / MANIFEST_NAME, manifest.encode())
    for path in lists:
        # All that is in them is in the manifest now.
        files.remove_file(path)
    files.sync_folder(draft)
    target = _give_name(attempt, draft, manifest, files)
    attempt.check_fence("moving the pointer to the latest checkpoint")
    files.point(target.parent / LATEST_NAME, target.name)
    total = sum(record.bytes for record in contents.files.values())
    try:
        return Committed(target.name, total, retain(attempt, retention, files))
    except OSError as error:
        # The new one is there all the same; the next save tries again.
        return Committed(target.name, total, [], f"old checkpoints could not be removed: {error.strerror or error}")


def _give_name(attempt: Attempt, draft: Path, manifest: Manifest, files: DurableFiles) -> Path:
    attempt.check_fence("committing a checkpoint")
    target, is_there = place(attempt.run, manifest)
    if is_there:
        files.remove_folder(draft)
        return target
    # Comparing with what is there may have taken a while.
    attempt.check_fence("committing a checkpoint")
    files.rename(draft, target)
    files.sync_folder(target.parent)
    # The first checkpoint of a run made the folder of checkpoints too.
    files.sync_folder(target.parent.parent)
    return target
