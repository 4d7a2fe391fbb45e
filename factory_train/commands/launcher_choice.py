"""Which launcher a run gets, and why, for people."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

from factory_train.config import Config, LauncherConfig
from factory_train.errors import ConfigError, PreflightError
from factory_train.launchers import ray_options, slurm_queue, slurm_script
from factory_train.launchers.allocation import check_started_once, fill_in, find_allocation


def with_launcher(config: Config) -> tuple[Config, str]:
    """Returns the configuration with launcher and waiting decided, and why it is this launcher, for people."""
    name, reason = _choose_launcher(config)
    if name == "local" and config.launcher.nodes != 1:
        raise ConfigError(
            f"{config.launcher.nodes} nodes, and the local launcher has this machine only",
            where="launcher.nodes",
            fix="launcher.nodes=1, or launcher=slurm or launcher=ray on a cluster",
        )
    if name == "slurm":
        slurm_script.check(config.launcher)
    options = replace(config.launcher, name=name)
    if name == "ray":
        # Resolved, so that `resume` in a shell of another environment finds the cluster.
        options = replace(options, address=ray_options.check(options, islands=config.diloco.islands > 0))
    if name == "allocation":
        options = replace(options, **_of_allocation(options, config.diloco.islands))
    wait = name in ("local", "allocation") if config.wait is None else config.wait
    return replace(config, wait=wait, launcher=options), f"{name} ({reason})"


def _of_allocation(options: LauncherConfig, islands: int) -> dict[str, Any]:
    allocation = find_allocation()
    if allocation is None:
        raise PreflightError(
            "this is not inside a Slurm allocation",
            where="launcher.name",
            fix="salloc first, or launcher.name=slurm (submits a job), or launcher.name=local (this machine)",
        )
    if shutil.which("srun") is None:
        raise PreflightError(
            f"no srun here to reach {', '.join(allocation.nodes)}",
            where="launcher.name",
            fix="run this outside of the container, or launcher=local for this machine alone",
        )
    return fill_in(options, allocation, islands)


def _choose_launcher(config: Config) -> tuple[str, str]:
    if config.launcher.name != "auto":
        return config.launcher.name, f"launcher={config.launcher.name}"
    allocation = find_allocation()
    if allocation is not None:
        check_started_once()
    if allocation is not None and allocation.is_here:
        return "local", f"inside allocation {allocation.job_id}, which is this machine; launcher=slurm submits a job"
    if allocation is not None:
        return "allocation", f"inside allocation {allocation.job_id}: {', '.join(allocation.nodes)}; launcher=slurm submits a job"
    if slurm_queue.is_installed():
        if slurm_queue.answers():
            return "slurm", "sbatch is here and a controller answers"
        return "local", "sbatch is here, but no controller answers"
    if "RAY_ADDRESS" in os.environ:
        return "ray", f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
    return "local", "no Slurm and no Ray found, so everything runs on this machine"
