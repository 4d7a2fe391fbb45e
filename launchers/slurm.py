"""Jobs of a Slurm cluster: submitted through submitit, watched with squeue, and resumed by what is in the run directory."""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import factory_train
from factory_train import storage, switches
from factory_train.errors import ConfigError, ExitCode, PreflightError
from factory_train.launchers import slurm_preflight, slurm_queue, slurm_script
from factory_train.launchers.job import STAGES, Gang, JobSpec, failed_first
from factory_train.launchers.scheduler_handle import SchedulerHandle
from factory_train.launchers.slurm_queue import QueuedJob

SPEC_NAME = "slurm.json"


@dataclass
class SlurmHandle(SchedulerHandle):
    """A job in Slurm's hands."""

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
        batches = [batch] if batch and batch.is_file() else sorted(self.attempt.launch.glob("slurm-*.log"))
        paths = sorted((newest.path / "logs").glob("*.log")) + batches
        return failed_first(paths, newest)

    def signal(self, signum: int) -> None:
        asked = switches.is_on(self.attempt.run, switches.STOP)
        self.cancel(now=asked)

    def cancel(self, *, now: bool = False) -> None:
        """Asks the job to save and stop; one that waits in the queue is taken out of it.

        Raises:
            UnavailableError: Slurm does not answer.
        """
        run = self.attempt.run
        switches.turn_on(run, switches.STOP)
        slurm_queue.forget()
        job = self.queued()
        behind = [job_id for job_id in self.job_ids if job is None or job_id != job.id]
        slurm_queue.cancel([job_id for job_id in behind if job_id in slurm_queue.my_jobs()])
        if job is None:
            return
        if job.status == "pending" or now:
            slurm_queue.cancel([job.id])
            newest = run.last_attempt() or self.attempt
            outcome, code, reason = (
                ("killed", ExitCode.INTERRUPTED, "ended at once on request; what followed the last checkpoint is lost")
                if job.status == "running"
                else ("interrupted", ExitCode.INTERRUPTED, "taken out of the queue")
            )
            newest.write_verdict(outcome, code, step=None, reason=reason)
        else:
            # The file alone would be seen within seconds; the signal makes it sooner.
            slurm_queue.signal_steps(job.id, "INT")


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
        attempt = job.attempt
        storage.write_json(attempt.launch / SPEC_NAME, self.spec(job))
        ids: list[str] = []
        try:
            for parameters in self._parameters(job):
                ids.append(slurm_script.submit(parameters, attempt.launch, self._command(job)))
            followers = {verb: slurm_script.submit(*self.follower(job, verb, ids[0])) for verb in job.options.then}
            handle = SlurmHandle(self.job_json(job, ids) | {"then": followers})
            storage.write_json(attempt.job_path, handle.job)
        except BaseException as error:
            slurm_queue.cancel(ids)
            if isinstance(error, OSError):
                raise PreflightError(f"cannot write: {error.strerror}", where=str(attempt.launch)) from error
            raise
        return handle

    def attach(self, handle: dict[str, Any]) -> SlurmHandle:
        return SlurmHandle(handle)

    def describe(self, job: JobSpec) -> str:
        slurm_script.check(job.options)
        scripts = [slurm_script.text(parameters, job.attempt.launch, self._command(job)) for parameters in self._parameters(job)]
        spec = self.spec(job)
        (gang,) = job.gangs
        lines = [f"slurm: sbatch of the script below, from {job.attempt.launch}", "", scripts[0].rstrip(), ""]
        if len(scripts) > 1:
            lines.append(f"{len(scripts) - 1} more of it behind, each with --dependency=singleton")
        if job.options.preflight:
            look = slurm_preflight.command(spec, job.attempt.run.path, gang.nodes, self.code(job))
            lines.append(f"  {'look':8} {shlex.join(look)}")
        for stage in job.stages:
            nodes, tasks = (gang.nodes, gang.tasks_per_node) if stage == "train" else (1, 1)
            command = slurm_script.stage_command(spec, stage, nodes=nodes, tasks_per_node=tasks)
            lines.append(f"  {stage:8} {shlex.join(command)}")
        for verb in job.options.then:
            lines.append(f"  then     {self.follower(job, verb, 'JOB')[2].splitlines()[-1]}   (a job with --dependency=afterok)")
        return "\n".join(lines)

    def _parameters(self, job: JobSpec) -> list[dict[str, Any]]:
        (gang,) = job.gangs
        name, launch = job.attempt.run.name, job.attempt.launch
        depends = ",".join(f"afterok:{job_id}" for job_id in job.depends_on) or None
        first = slurm_script.parameters(job.options, gang, name, launch, dependency=depends)
        if job.options.requeue != "chain":
            return [first]
        # One at a time, in order of submission: Slurm lets jobs of one name and user wait for each other.
        return [first, *([slurm_script.parameters(job.options, gang, name, launch, dependency="singleton")] * job.options.chain)]

    def follower(self, job: JobSpec, verb: str, after: str) -> tuple[dict[str, Any], Path, str]:
        """Returns what is submitted for a job that follows: parameters, folder and command."""
        options = replace(job.options, requeue="never", nodelist=None)
        name, launch = f"{job.attempt.run.name}-{verb}", job.attempt.launch
        parameters = slurm_script.parameters(options, Gang("main", 1, 1), name, launch, dependency=f"afterok:{after}")
        command = slurm_script.verb_command(self.spec(job), self.code(job), [verb, str(job.attempt.run.path)], os.environ)
        return parameters, launch, command

    def code(self, job: JobSpec) -> Path:
        """Returns the folder that a job imports this package from."""
        return job.code or Path(factory_train.__file__).absolute().parent.parent

    def _command(self, job: JobSpec) -> str:
        arguments = [str(job.attempt.run.path), str(job.attempt.number)]
        return slurm_script.batch_command(self.code(job), "factory_train.launchers.slurm_batch", arguments, os.environ)

    def spec(self, job: JobSpec) -> dict[str, Any]:
        """Returns what the batch script needs to know, and later attempts of the job after it."""
        if len(job.gangs) != 1:
            raise ConfigError("a Slurm job runs one gang", where="launcher.name")
        assert set(job.stages) <= set(STAGES), job.stages
        (gang,), options = job.gangs, job.options
        in_container = options.container is not None
        root = job.attempt.run.path.parent
        mounts = [root, *(folder for folder in job.folders if root not in folder.parents)]
        return {
            "format_version": 1,
            "gang": asdict(gang),
            "stages": list(job.stages),
            "environ": dict(job.environ),
            "grace_s": job.grace_s,
            "hang_s": options.hang_s,
            "stall_s": options.stall_s,
            "requeue": options.requeue,
            "tracker": job.tracker,
            "fabric": options.fabric,
            "interface": options.interface,
            "tasks_per_node": gang.tasks_per_node,
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
