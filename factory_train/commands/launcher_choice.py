"""Which launcher a run gets, and why, for people."""

from __future__ import annotations

import os
from dataclasses import replace

from factory_train.config import Config
from factory_train.errors import ConfigError
from factory_train.launchers import slurm_queue, slurm_script


def with_launcher(config: Config) -> tuple[Config, str]:
    """Returns the configuration with launcher and waiting decided, and why it is this launcher, for people."""
    name, reason = _choose_launcher(config)
    if name == "local" and config.launcher.nodes != 1:
        raise ConfigError(
            f"{config.launcher.nodes} nodes, and the local launcher has this machine only",
            where="launcher.nodes",
            fix="launcher.nodes=1, or launcher=slurm on a cluster",
        )
    if name == "slurm":
        slurm_script.check(config.launcher)
    wait = name == "local" if config.wait is None else config.wait
    return replace(config, wait=wait, launcher=replace(config.launcher, name=name)), f"{name} ({reason})"


def _choose_launcher(config: Config) -> tuple[str, str]:
    if config.launcher.name != "auto":
        return config.launcher.name, f"launcher={config.launcher.name}"
    if "SLURM_JOB_ID" in os.environ:
        return "local", f"inside allocation {os.environ['SLURM_JOB_ID']}: on this machine of it; launcher=slurm submits a job"
    if slurm_queue.is_installed():
        if slurm_queue.answers():
            return "slurm", "sbatch is here and a controller answers"
        return "local", "sbatch is here, but no controller answers"
    if "RAY_ADDRESS" in os.environ:
        return "local", "RAY_ADDRESS is set, but this version has no Ray launcher"
    return "local", "no Slurm and no Ray found, so everything runs on this machine"
