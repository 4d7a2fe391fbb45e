"""Jobs of a Slurm cluster: submitted through submitit, watched with squeue, and resumed by what is in the run directory."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import factory_train
from factory_train import storage, switches
from factory_train.errors import ExitCode, PreflightError
from factory_train.gangs import is_island, island_run, title
from factory_train.launchers import slurm_island_jobs, slurm_islands, slurm_preflight, slurm_queue, slurm_script
from factory_train.launchers.job import MAIN_GANG, STAGES, Gang, JobSpec, failed_first
from factory_train.launchers.scheduler_handle import SchedulerHandle
from factory_train.launchers.slurm_queue import QueuedJob
from factory_train.run_dir import Verdict

SPEC_NAME = "slurm.json"


@dataclass
class SlurmHandle(SchedulerHandle):
    """A job in Slurm's hands."""

    @property
    def parts(self) -> list[SlurmHandle]:
        """The jobs of the islands, where each has its own; else this one."""
        islands = self.job.get("islands") or {}
        homes = {name: str(island_run(self.attempt.run, name).path) for name in islands}
        shared = {key: value for key, value in self.job.items() if key != "islands"}
        return [SlurmHandle({**shared, "run_dir": homes[name], **facts}) for name, facts in islands.items()] or [self]

    def queued(self) -> QueuedJob | None:
        """Returns the line of squeue about the job that runs, else the first that waits; None when none is left.

        Raises:
            UnavailableError: Slurm does not answer.
        """
        known = slurm_queue.my_jobs()
        alive = [known[job_id] for job_id in self.job_ids if job_id in known and known[job_id].status != "ended"]
        alive.sort(key=lambda job: job.status != "running")
        return alive[0] if alive else None

    def status(self) -> str:
        job = self.queued()
        return job.status if job else "ended"

    def waits_for(self) -> str | None:
        job = self.queued()
        return job.why if job and job.status == "pending" else None

    def logs(self) -> list[Path]:
        newest = self.attempt.run.last_attempt() or self.attempt
        batch = Path(self.job["batch_log"]) if "batch_log" in self.job else None
        batches = [batch] if batch and batch.is_file() else [path for part in self.parts for path in part.batch_logs()]
        paths = sorted((newest.path / "logs").glob("*.log")) + batches
        return failed_first(paths, newest)

    def batch_logs(self) -> list[Path]:
        """Returns what the batch script of this job wrote."""
        return sorted(self.attempt.launch.glob("slurm-*.log"))

    def signal(self, signum: int) -> None:
        asked = switches.is_on(self.attempt.run, switches.STOP)
        self.cancel(now=asked)

    def cancel(self, *, now: bool = False) -> None:
        """Asks the job to save and stop; one that waits in the queue is taken out of it.

        Raises:
            UnavailableError: Slurm does not answer.
        """
        switches.turn_on(self.attempt.run, switches.STOP)
        slurm_queue.forget()
        for part in self.parts:
            verdict = part._end(now=now)
            if part is not self and verdict is not None:
                slurm_island_jobs.write_over(self.attempt, part.attempt, verdict)

    def _end(self, *, now: bool) -> Verdict | None:
        """Ends one job; returns the verdict where this, and not the job, had to write it."""
        run = self.attempt.run
        job = self.queued()
        behind = [job_id for job_id in self.job_ids if job is None or job_id != job.id]
        slurm_queue.cancel([job_id for job_id in behind if job_id in slurm_queue.my_jobs()])
        if job is None:
            return None
        if job.status == "pending" or now:
            slurm_queue.cancel([job.id])
            newest = run.last_attempt() or self.attempt
            outcome, code, reason = (
                ("killed", ExitCode.INTERRUPTED, "ended at once on request; what followed the last checkpoint is lost")
                if job.status == "running"
                else ("interrupted", ExitCode.INTERRUPTED, "taken out of the queue")
            )
            newest.write_verdict(outcome, code, step=None, reason=reason)
            return newest.verdict()
        # The file alone would be seen within seconds; the signal makes it sooner.
        slurm_queue.signal_steps(job.id, "INT")
        return None


@dataclass(frozen=True)
class SlurmLauncher:
    """Submits jobs with sbatch.

    Args:
        worker_module: module each process of a stage runs as `python -m MODULE STAGE`.
        tracker_module: module of the syncer.
    """

    worker_module: str = "factory_train.worker"
    tracker_module: str = "factory_train.tracking.sync"

    name = "slurm"

    def submit(self, job: JobSpec, *, detach: bool = False) -> SlurmHandle:
        """Gives the job to sbatch and returns at once.

        Raises:
            ConfigError: a Slurm key that cannot be right.
            PreflightError, PolicyError: sbatch refuses.
            UnavailableError: there is no Slurm here, or it does not answer.
        """
        slurm_script.check(job.options)
        ids: list[str] = []
        try:
            facts = self._submit_apart(job, ids) if slurm_island_jobs.are_meant(job) else self._submit_one(job, self.spec(job), ids)
        except BaseException as error:
            slurm_queue.cancel(ids)
            if isinstance(error, OSError):
                raise PreflightError(f"cannot write: {error.strerror}", where=str(job.attempt.launch)) from error
            raise
        return SlurmHandle(facts)

    def _submit_one(self, job: JobSpec, spec: dict[str, Any], submitted: list[str]) -> dict[str, Any]:
        """Submits a job and what is behind it; returns its job.json. `submitted` gets the ids of all, one by one."""
        storage.write_json(job.attempt.launch / SPEC_NAME, spec)
        ids: list[str] = []
        for parameters in self._parameters(job):
            ids.append(slurm_script.submit(parameters, job.attempt.launch, self._command(job)))
            submitted.append(ids[-1])
        followers = {verb: slurm_script.submit(*self.follower(job, verb, ids[0])) for verb in job.options.then}
        facts = self.job_json(job, ids) | {"then": followers}
        storage.write_json(job.attempt.job_path, facts)
        return facts

    def _submit_apart(self, job: JobSpec, submitted: list[str]) -> dict[str, Any]:
        """Submits a job for each island; returns the job.json of the run."""
        # For the stages that are the run's, whoever runs them.
        storage.write_json(job.attempt.launch / SPEC_NAME, self.spec(job))
        attempts = slurm_island_jobs.new_attempts(job)
        try:
            islands = {}
            for part in slurm_island_jobs.parts(job, attempts):
                facts = self._submit_one(part, self._spec_apart(job, part), submitted)
                islands[part.gangs[0].name] = {"attempt": part.attempt.number, "job_id": facts["job_id"], "job_ids": facts["job_ids"]}
            facts = self.job_json(job, submitted) | {"then": {}, "islands": islands}
            storage.write_json(job.attempt.job_path, facts)
        except BaseException:
            for attempt in attempts:
                shutil.rmtree(attempt.path, ignore_errors=True)
            raise
        return facts

    def _spec_apart(self, job: JobSpec, part: JobSpec) -> dict[str, Any]:
        return self.spec(part) | {"main_attempt": job.attempt.number, "island_names": [gang.name for gang in job.gangs]}

    def attach(self, handle: dict[str, Any]) -> SlurmHandle:
        return SlurmHandle(handle)

    def describe(self, job: JobSpec) -> str:
        slurm_script.check(job.options)
        if slurm_island_jobs.are_meant(job):
            parts = slurm_island_jobs.parts(job, slurm_island_jobs.next_attempts(job))
            whose = "prepare is run by the island that comes to it first, finish by the first that has made all steps"
            return "\n\n".join([*(self._describe(part) for part in parts), whose])
        return self._describe(job)

    def _describe(self, job: JobSpec) -> str:
        scripts = [slurm_script.text(parameters, job.attempt.launch, self._command(job)) for parameters in self._parameters(job)]
        spec = self.spec(job)
        lines = [f"slurm: sbatch of the script below, from {job.attempt.launch}", "", scripts[0].rstrip(), ""]
        if len(scripts) > 1:
            lines.append(f"{len(scripts) - 1} more of it behind, each with --dependency=singleton")
        if job.options.preflight:
            look = slurm_preflight.command(spec, job.attempt.run.path, spec["num_nodes"], self.code(job))
            lines.append(f"  {'look':8} {shlex.join(look)}")
        lines += [f"  {stage:8} {shlex.join(command)}" for stage in job.stages for command in slurm_script.stage_commands(spec, stage)]
        if spec["islands"]:
            lines.append("  NODE1 and so on are the nodes that Slurm gives the job, in its order")
        for verb in job.options.then:
            lines.append(f"  then     {self.follower(job, verb, 'JOB')[2].splitlines()[-1]}   (a job with --dependency=afterok)")
        return "\n".join(lines)

    def _parameters(self, job: JobSpec) -> list[dict[str, Any]]:
        name = title(job.attempt.run)
        depends = ",".join(f"afterok:{job_id}" for job_id in job.depends_on) or None
        first = slurm_script.parameters(job, name, job.attempt.launch, dependency=depends)
        if job.options.requeue != "chain":
            return [first]
        # One at a time, in order of submission: Slurm lets jobs of one name and user wait for each other.
        return [first, *([slurm_script.parameters(job, name, job.attempt.launch, dependency="singleton")] * job.options.chain)]

    def follower(self, job: JobSpec, verb: str, after: str) -> tuple[dict[str, Any], Path, str]:
        """Returns what is submitted for a job that follows: parameters, folder and command."""
        name, launch = f"{job.attempt.run.name}-{verb}", job.attempt.launch
        alone = replace(job, gangs=(Gang(MAIN_GANG, 1, 1),), options=replace(job.options, requeue="never", nodelist=None))
        parameters = slurm_script.parameters(alone, name, launch, dependency=f"afterok:{after}")
        command = slurm_script.verb_command(self.spec(job), self.code(job), [verb, str(job.attempt.run.path)], os.environ)
        return parameters, launch, command

    def code(self, job: JobSpec) -> Path:
        """Returns the folder that a job imports this package from."""
        return job.code or Path(factory_train.__file__).absolute().parent.parent

    def _command(self, job: JobSpec) -> str:
        arguments = [str(job.attempt.run.path), str(job.attempt.number)]
        module = "slurm_island_batch" if is_island(job.attempt.run) else "slurm_batch"
        return slurm_script.batch_command(self.code(job), f"factory_train.launchers.{module}", arguments, os.environ)

    def spec(self, job: JobSpec) -> dict[str, Any]:
        """Returns what the batch script needs to know, and later attempts of the job after it."""
        assert set(job.stages) <= set(STAGES), job.stages
        gang, options = job.gangs[0], job.options
        whole = slurm_islands.whole(job.gangs, options.islands_per_node)
        in_container = options.container is not None
        root = job.attempt.run.path.parent
        mounts = [root, *(folder for folder in job.folders if root not in folder.parents)]
        return {
            "format_version": 1,
            "gang": asdict(gang),
            "islands": [asdict(gang) for gang in job.gangs] if gang.name != MAIN_GANG and options.island_jobs == "one" else None,
            "islands_per_node": options.islands_per_node,
            "num_nodes": whole.nodes,
            "stages": list(job.stages),
            "environ": dict(job.environ),
            "grace_s": job.grace_s,
            "hang_s": options.hang_s,
            "stall_s": options.stall_s,
            "requeue": options.requeue,
            "tracker": job.tracker,
            "fabric": options.fabric,
            "interface": options.interface,
            "tasks_per_node": whole.tasks_per_node,
            "cpus_per_task": options.cpus_per_task,
            "gpus": bool(options.gpus_per_node or options.gres),
            "srun_args": list(options.srun_args),
            "preflight": options.preflight,
            "python": options.python or ("python3" if in_container else sys.executable),
            "container": options.container,
            "container_runtime": options.container_runtime,
            "mounts": [*dict.fromkeys(map(str, mounts)), *options.container_mounts] if in_container else [],
            "worker_module": self.worker_module,
            "tracker_module": self.tracker_module,
        }

    def job_json(self, job: JobSpec, ids: list[str]) -> dict[str, Any]:
        """Returns what `attach` needs of a job that Slurm has taken."""
        return {
            "format_version": 1,
            "launcher": self.name,
            "cluster": os.environ.get("SLURM_CLUSTER_NAME"),
            "job_id": ids[0],
            "job_ids": ids,
            "submitted": time.time(),
            "run_dir": str(job.attempt.run.path),
            "attempt": job.attempt.number,
            "gangs": [asdict(gang) for gang in job.gangs],
            "stages": list(job.stages),
        }
