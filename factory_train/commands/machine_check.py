"""What a run needs of this machine: devices for its ranks, and a disk with room."""

from __future__ import annotations

import os
from pathlib import Path

from factory_train import storage
from factory_train.config import Config
from factory_train.errors import PreflightError
from factory_train.hardware import visible_cards
from factory_train.plan import Plan
from factory_train.units import format_bytes

# Room for logs, metrics, the tokens of a small corpus and the tracking database.
_SLACK_BYTES = 64 * 2**20
_EXPORT_BYTES = {"float32": 4, "bfloat16": 2}


def check_devices(plan: Plan) -> None:
    """A plan may be made for another machine; ranks can be started only where their cards are."""
    have = len(visible_cards()) if plan.device == "cuda" else plan.tasks_per_node
    if have < plan.tasks_per_node:
        raise PreflightError(
            f"{plan.tasks_per_node} CUDA devices are needed, one a rank, and this machine has {have}",
            where="hardware",
            fix=f"launcher.tasks_per_node={have}" if have else "hardware=cpu, or --dry-run to plan for another machine",
        )


def check_disk(config: Config, plan: Plan, folder: Path, *, is_new: bool, dry_run: bool) -> None:
    """Checks that the folder of a run can be written and has room for its checkpoints, its export and its logs.

    Args:
        folder: where the run is or will be.
        is_new: nothing of the run is there yet.
        dry_run: write nothing, not even a probe.
    Raises:
        PreflightError: it cannot, or has not.
    """
    elsewhere = "runs_root=FOLDER on another disk"
    if not (_looks_writable(folder) if dry_run else storage.is_writable(folder)):
        raise PreflightError(
            "the folder of the runs cannot be written: no permission, or a read-only filesystem",
            where=str(folder),
            fix="runs_root=FOLDER where you may write",
        )
    # While a checkpoint is written, those that will be kept are still all there.
    have = 0 if is_new else min(config.checkpoint.keep_last, len(list((folder / "checkpoints").glob("step-*"))))
    export_bytes = plan.params.total * _EXPORT_BYTES[config.evaluation.export_dtype]
    need = plan.checkpoint_bytes * (config.checkpoint.keep_last + 1 - have) + export_bytes + _SLACK_BYTES
    free = storage.free_bytes(folder)
    if free < need:
        raise PreflightError(
            f"the disk is too full: {format_bytes(free)} free, about {format_bytes(need)} needed for "
            f"{config.checkpoint.keep_last + 1 - have} checkpoints of {format_bytes(plan.checkpoint_bytes)}, the export and logs",
            where=str(folder),
            fix=f"{elsewhere}, or checkpoint.keep_last=1" if config.checkpoint.keep_last > 1 else elsewhere,
        )


def _looks_writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
