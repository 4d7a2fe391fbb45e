"""The launchers a job.json can name."""

from __future__ import annotations

from factory_train import storage
from factory_train.errors import ConfigError, FactoryTrainError, did_you_mean
from factory_train.launchers.allocation import AllocationLauncher
from factory_train.launchers.job import Launcher
from factory_train.launchers.local import LocalLauncher
from factory_train.launchers.ray_jobs import RayHandle, RayLauncher
from factory_train.launchers.slurm import SlurmHandle, SlurmLauncher
from factory_train.run_dir import RunDir

LAUNCHERS: dict[str, type[Launcher]] = {
    "local": LocalLauncher,
    "allocation": AllocationLauncher,
    "slurm": SlurmLauncher,
    "ray": RayLauncher,
}


def launcher_named(name: str) -> Launcher:
    """Returns the launcher called `name`.

    Raises:
        ConfigError: this version knows no such launcher.
    """
    if name not in LAUNCHERS:
        guess = did_you_mean(name, LAUNCHERS)
        raise ConfigError(f"unknown launcher '{name}'", where="launcher.name", fix=f"launcher.name={guess}" if guess else None)
    return LAUNCHERS[name]()


def scheduled(run: RunDir) -> SlurmHandle | RayHandle | None:
    """Returns the job of the newest attempt where a scheduler has it; a job it may yet start counts as alive."""
    attempt = run.last_attempt()
    job = storage.read_json(attempt.job_path) if attempt else None
    if job is None:
        return None
    if job.get("launcher") == RayLauncher.name:
        return RayHandle(job)
    return SlurmHandle(job) if job.get("launcher") == SlurmLauncher.name else None


def is_alive(run: RunDir) -> bool:
    """Returns whether a run goes on or will: by its scheduler, which knows of jobs that wait, else by its files."""
    handle = scheduled(run)
    if handle is None:
        return run.is_alive()
    try:
        return handle.status() != "ended"
    except FactoryTrainError:
        # On a machine without Slurm's commands, or out of reach of the Ray cluster, only the run directory can tell.
        return run.is_alive()
