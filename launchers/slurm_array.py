"""Points of a sweep as one job array: an element a point, its index the number of the point, at most so many at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.errors import ConfigError
from factory_train.launchers import slurm_island_jobs, slurm_queue, slurm_script
from factory_train.launchers.job import JobSpec
from factory_train.launchers.slurm import SPEC_NAME, SlurmHandle, SlurmLauncher


@dataclass(frozen=True)
class Array:
    """Points that ask Slurm for the same.

    Args:
        points: by their number in the sweep.
        parameters: what submitit is told.
        orders: file that says which run each element is.
        command: last lines of the script.
    """

    points: Mapping[int, JobSpec]
    parameters: Mapping[str, Any]
    orders: Path
    command: str


def arrays(points: Mapping[int, JobSpec], name: str, folder: Path, parallel: int, code: Path) -> list[Array]:
    """Returns the arrays that hold all points: one, unless they differ in what they ask Slurm for.

    Args:
        points: by their number in the sweep.
        name: of the jobs.
        folder: for scripts and logs.
        parallel: elements of an array that run at once.
        code: folder with the snapshot of the package.

    Raises:
        ConfigError: a Slurm key that cannot be right for an array.
    """
    alike: dict[str, dict[int, JobSpec]] = {}
    for number, job in points.items():
        slurm_script.check(job.options)
        if job.options.requeue == "chain":
            raise ConfigError(
                "the jobs of a chain go by one name, and so would wait for other points of the sweep",
                where="launcher.requeue",
                fix="launcher.requeue=requeue, or never",
            )
        if slurm_island_jobs.are_meant(job):
            raise ConfigError("a point of a sweep is one job", where="launcher.island_jobs", fix="launcher.island_jobs=one")
        asked = slurm_script.parameters(job, name, folder)
        alike.setdefault(json.dumps(asked, sort_keys=True), {})[number] = job
    return [_array(found, name, folder, parallel, code, index) for index, found in enumerate(alike.values(), start=1)]


def _array(points: Mapping[int, JobSpec], name: str, folder: Path, parallel: int, code: Path, index: int) -> Array:
    first = next(iter(points.values()))
    elements = f"{_ranges(sorted(points))}%{min(parallel, len(points))}"
    orders = folder / f"array-{index}.json"
    command = slurm_script.batch_command(code, "factory_train.launchers.slurm_batch", [str(orders)], os.environ)
    return Array(points, slurm_script.parameters(first, name, folder, array=elements), orders, command)


def _ranges(numbers: Sequence[int]) -> str:
    """Returns sorted numbers as sbatch writes them: 1-3,7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def submit(launcher: SlurmLauncher, found: Sequence[Array]) -> dict[int, SlurmHandle]:
    """Gives the arrays to sbatch and returns a handle for each point; if one is refused, none is left in the queue.

    Raises:
        PreflightError, PolicyError: sbatch refuses.
        UnavailableError: there is no Slurm here, or it does not answer.
    """
    ids: list[str] = []
    handles: dict[int, SlurmHandle] = {}
    try:
        for array in found:
            for job in array.points.values():
                storage.write_json(job.attempt.launch / SPEC_NAME, launcher.spec(job))
            elements = {str(number): [str(job.attempt.run.path), job.attempt.number] for number, job in array.points.items()}
            storage.write_json(array.orders, {"format_version": 1, "elements": elements})
            folder = array.orders.parent
            array_id = slurm_script.submit(array.parameters, folder, array.command)
            ids.append(array_id)
            for number, job in array.points.items():
                element = f"{array_id}_{number}"
                ids_after = {verb: slurm_script.submit(*launcher.follower(job, verb, element)) for verb in job.options.then}
                ids += ids_after.values()
                facts = launcher.job_json(job, [element]) | {"then": ids_after, "batch_log": str(folder / f"slurm-{element}.log")}
                storage.write_json(job.attempt.job_path, facts)
                handles[number] = SlurmHandle(facts)
    except BaseException:
        slurm_queue.cancel(ids)
        raise
    return handles


def describe(found: Sequence[Array]) -> str:
    """Returns the script of each array, for --dry-run."""
    lines = []
    for array in found:
        folder = array.orders.parent
        lines += [f"slurm: sbatch of the script below, from {folder}", "", slurm_script.text(array.parameters, folder, array.command)]
    return "\n".join(lines).rstrip()


def point_of(orders: Path, element: str) -> tuple[str, int]:
    """Returns the run directory and the attempt of an element of an array."""
    folder, attempt = storage.read_json(orders)["elements"][element]
    return folder, attempt
