"""Which checkpoints stay, which may go, and how they go. No torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.checkpoint.catalog import CheckpointInfo, list_checkpoints
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.format import STATE_NAME
from factory_train.checkpoint.lease import Lease
from factory_train.checkpoint.verify import check_sizes
from factory_train.config import CheckpointConfig
from factory_train.errors import FactoryTrainError
from factory_train.run_dir import Attempt, RunDir

_MARKS = "kept"
_DRAFT = re.compile(r"step-\d{8,}\.tmp-(\d+)")
_REMOVED = re.compile(r"step-.*\.removed-\d+")


@dataclass(frozen=True)
class Retention:
    """What is kept beside the marked checkpoints.

    Args:
        keep_last: newest ones, at least 1.
        keep_every_steps: those of every so many steps, for good; 0 keeps none for that.
        keep_best: so many with the best `best_metric`.
        best_metric: name in `metrics` of the run state.
        best_is: "min" or "max".
    """

    keep_last: int
    keep_every_steps: int = 0
    keep_best: int = 0
    best_metric: str = "validation/loss"
    best_is: str = "min"

    @staticmethod
    def of(cfg: CheckpointConfig) -> Retention:
        return Retention(cfg.keep_last, cfg.keep_every_steps, cfg.keep_best, cfg.best_metric, cfg.best_is)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def reasons_to_keep(run: RunDir, found: Sequence[CheckpointInfo], policy: Retention) -> dict[CheckpointInfo, list[str]]:
    """Returns why each checkpoint is kept: "last", "every 1000", "best", "marked"; nothing for those that may go.

    Args:
        found: newest first, as `list_checkpoints` gives them.
    """
    assert policy.keep_last >= 1, policy
    reasons: dict[CheckpointInfo, list[str]] = {info: [] for info in found}
    for info in found[: policy.keep_last]:
        reasons[info].append("last")
    if policy.keep_every_steps:
        for info in found:
            if info.step % policy.keep_every_steps == 0:
                reasons[info].append(f"every {policy.keep_every_steps}")
    if policy.keep_best:
        measured = [(value, info) for info in found if (value := metric_of(info.path, policy.best_metric)) is not None]
        # Of equals the newer one; `found` is newest first and sorting is stable.
        measured.sort(key=lambda pair: pair[0], reverse=policy.best_is == "max")
        for _, info in measured[: policy.keep_best]:
            reasons[info].append("best")
    for info in found:
        if is_marked(run, info.path.name):
            reasons[info].append("marked")
    return reasons


def metric_of(path: Path, name: str) -> float | None:
    """Returns a figure that was measured on exactly this state; None when there is none or it is not finite."""
    try:
        value = json.loads((path / STATE_NAME).read_bytes())["metrics"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _mark_path(run: RunDir, name: str) -> Path:
    return run.checkpoints / _MARKS / name


def is_marked(run: RunDir, name: str) -> bool:
    return _mark_path(run, name).is_file()


def mark(run: RunDir, name: str, note: str = "") -> None:
    """Keeps a checkpoint for good, whatever the policy says; the mark is a file beside the checkpoints."""
    storage.write_atomic(_mark_path(run, name), note + "\n")


def unmark(run: RunDir, name: str) -> bool:
    """Takes the mark away; returns whether there was one."""
    path = _mark_path(run, name)
    there = path.is_file()
    path.unlink(missing_ok=True)
    return there


def retain(attempt: Attempt, policy: Retention, files: DurableFiles) -> list[str]:
    """Removes what the policy does not keep, after a commit; returns the names of what went.

    Nothing goes while the newest checkpoint is not whole, and nothing that somebody reads.
    """
    found = list_checkpoints(attempt.run)
    if not found or not _looks_whole(found[0]):
        return []
    removed = []
    for info, reasons in reasons_to_keep(attempt.run, found, policy).items():
        if not reasons:
            attempt.check_fence("removing an old checkpoint")
            if discard(info.path, attempt, files):
                removed.append(info.path.name)
    return removed


def _looks_whole(info: CheckpointInfo) -> bool:
    try:
        check_sizes(info.path, info.manifest())
    except FactoryTrainError:
        return False
    return True


def removable(run: RunDir, policy: Retention, is_good: Callable[[CheckpointInfo], bool]) -> list[CheckpointInfo]:
    """Returns the checkpoints that the policy does not keep, without the last good one if none that is kept is good.

    Args:
        is_good: reads a checkpoint and compares it with its manifest; asked no more often than needed.
    """
    found = list_checkpoints(run)
    reasons = reasons_to_keep(run, found, policy)
    going = [info for info in found if not reasons[info]]
    if not going or any(is_good(info) for info in found if reasons[info]):
        return going
    spared = next((info for info in going if is_good(info)), None)
    return [info for info in going if info != spared]


def discard(path: Path, attempt: Attempt, files: DurableFiles) -> bool:
    """Removes a checkpoint unless it is being read; returns whether it went.

    The name goes before the files, so that no reader finds a complete name with half of them.
    """
    lease = None
    with contextlib.suppress(FileNotFoundError):
        lease = Lease.to_remove(path)
        if lease is None:
            return False
    doomed = path.with_name(f"{path.name}.removed-{attempt.number:04d}")
    try:
        files.rename(path, doomed)
    finally:
        if lease is not None:
            lease.close()
    _remove(doomed, files)
    return True


def clear_leftovers(attempt: Attempt, files: DurableFiles, keep: Path | None = None) -> None:
    """Removes unfinished checkpoints of earlier attempts and of this one, and what an interrupted removal left.

    A rank of an earlier attempt that still lives then has nothing left to rename.

    Args:
        keep: the draft being written.
    """
    attempt.check_fence("removing unfinished checkpoints")
    if not attempt.run.checkpoints.is_dir():
        return
    for name in sorted(os.listdir(attempt.run.checkpoints)):
        entry = attempt.run.checkpoints / name
        draft = _DRAFT.fullmatch(name)
        if draft and int(draft[1]) <= attempt.number and entry != keep:
            _take_away(entry, attempt, files)
        elif _REMOVED.fullmatch(name):
            _remove(entry, files)


def _take_away(draft: Path, attempt: Attempt, files: DurableFiles) -> None:
    """Removes a draft, its name first: a writer that still lives can neither finish nor rename it."""
    doomed = draft.with_name(f"{draft.name}.removed-{attempt.number:04d}")
    files.rename(draft, doomed)
    _remove(doomed, files)


def _remove(path: Path, files: DurableFiles) -> None:
    # On NFS a file that somebody still reads keeps its folder alive: the next save tries again.
    with contextlib.suppress(OSError):
        files.remove_folder(path)
