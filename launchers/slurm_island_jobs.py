"""Islands that are Slurm jobs of their own: what they are told, what one of them does for all, and when the run has ended.

There is no job above them. Each runs `slurm_island_batch` in the directory of its island, is preempted, requeued and judged by
itself, and what belongs to the run is done by the first that comes to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from factory_train import storage, switches
from factory_train.errors import ExitCode, FactoryTrainError
from factory_train.gangs import island_run, new_island_attempt
from factory_train.launchers import slurm_queue
from factory_train.launchers.islands import repeat_error
from factory_train.launchers.job import MAIN_GANG, JobSpec
from factory_train.run_dir import Attempt, Verdict

# How islands can end for good, the one that speaks for the run first.
_WORST_FIRST = ("failed-user", "failed-transient", "killed", "interrupted", "preempted", "done")


def are_meant(job: JobSpec) -> bool:
    """Returns whether a job is to be submitted as one for each of its islands."""
    return job.options.island_jobs == "separate" and len(job.gangs) > 1 and job.gangs[0].name != MAIN_GANG


def parts(job: JobSpec, attempts: Sequence[Attempt]) -> list[JobSpec]:
    """Returns the jobs of the islands.

    Args:
        attempts: of the islands.
    """
    return [replace(job, attempt=attempt, gangs=(gang,)) for attempt, gang in zip(attempts, job.gangs, strict=True)]


def new_attempts(job: JobSpec) -> list[Attempt]:
    """Makes an attempt of each island."""
    attempts = [new_island_attempt(job.attempt.run, gang.name, job.attempt.config()) for gang in job.gangs]
    for attempt in attempts:
        # An island of one job is asked to stop with its own switch.
        switches.turn_off(attempt.run, switches.STOP)
    return attempts


def next_attempts(job: JobSpec) -> list[Attempt]:
    """Returns the attempts that `new_attempts` would make, of which nothing is there."""
    homes = [island_run(job.attempt.run, gang.name) for gang in job.gangs]
    return [Attempt(home, (home.attempt_numbers() or [0])[-1] + 1 if home.path.is_dir() else 1) for home in homes]


class Claims:
    """Things that one of the islands does for all. A claim is its job's, and free again when this job does not run any more.

    Args:
        main: attempt of the run.
        job_id: of the island that asks.
    """

    def __init__(self, main: Attempt, job_id: str) -> None:
        self._folder, self._job_id = main.launch, job_id

    def take(self, what: str) -> bool:
        """Returns whether it is for this job to do it; a later look may tell otherwise."""
        numbers = sorted(int(path.name.rpartition("-")[2]) for path in self._folder.glob(f"{what}.claim-*"))
        if numbers:
            holder = storage.read_json(self._folder / f"{what}.claim-{numbers[-1]}")["job_id"]
            if holder == self._job_id:
                return True
            slurm_queue.forget()
            try:
                job = slurm_queue.my_jobs().get(holder)
            except FactoryTrainError:
                return False
            if job is not None and job.status == "running":
                return False
        number = numbers[-1] + 1 if numbers else 1
        return storage.write_json_once(self._folder / f"{what}.claim-{number}", {"job_id": self._job_id})


def write_over(main: Attempt, of_island: Attempt, verdict: Verdict) -> None:
    """Notes that an island has ended and will not start again; the last one ends the run.

    Args:
        main: attempt of the run.
        verdict: on the island.
    """
    facts = {"attempt": of_island.number, "outcome": verdict.outcome, "exit_code": verdict.exit_code, "reason": verdict.reason}
    storage.write_json(main.launch / f"over-{of_island.run.name}.json", facts | {"step": verdict.step})
    _end_run(main)


def _end_run(main: Attempt) -> None:
    """Writes the run's verdict if no island is left that could."""
    job = storage.read_json(main.job_path)
    ends: dict[str, dict[str, Any]] = {
        name: storage.read_json(main.launch / f"over-{name}.json") for name in (job or {}).get("islands", ())
    }
    if not ends or not all(ends.values()) or main.verdict() is not None:
        return
    name, end = min(ends.items(), key=lambda item: _WORST_FIRST.index(item[1]["outcome"]))
    if end["outcome"].startswith("failed"):
        repeat_error(main, Attempt(island_run(main.run, name), end["attempt"]))
    step = max((each["step"] for each in ends.values() if each["step"] is not None), default=None)
    main.write_verdict(end["outcome"], end["exit_code"], step=step, reason=f"{name}: {end['reason']}")


def conclude(main: Attempt, step: int | None) -> None:
    """Ends a run that is done, and takes islands that wait in the queue out of it: nothing is left for them."""
    main.write_verdict("done", ExitCode.OK, step=step, reason="all stages ended well")
    job = storage.read_json(main.job_path) or {}
    try:
        slurm_queue.forget()
        known = slurm_queue.my_jobs()
        slurm_queue.cancel([job_id for job_id in job.get("job_ids", ()) if job_id in known and known[job_id].status == "pending"])
    except FactoryTrainError as error:
        reason = re.sub(r"\s+", " ", str(error))
        main.record_launch_event("islands-left", reason=reason)
