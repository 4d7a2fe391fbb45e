"""Jobs inside a Slurm allocation that is there already (salloc, a batch script of one's own): steps of it, on all its nodes."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.config import LauncherConfig
from factory_train.errors import ConfigError, PreflightError
from factory_train.launchers import slurm_queue, slurm_script
from factory_train.launchers.job import JobSpec, failed_first
from factory_train.launchers.local import LocalHandle
from factory_train.launchers.slurm import SPEC_NAME, SlurmLauncher
from factory_train.plan import CPU_RANKS
from factory_train.run_dir import process_started_at


@dataclass(frozen=True)
class Allocation:
    """Nodes that Slurm has given to whoever runs this command.

    Args:
        job_id: of the job that holds them.
        nodes: their names, in Slurm's order.
        tasks_per_node: ranks of each node; None where that follows from the cards.
        gpus_per_node: of each node, None where none were asked for.
    """

    job_id: str
    nodes: tuple[str, ...]
    tasks_per_node: int | None
    gpus_per_node: int | None

    @property
    def is_here(self) -> bool:
        """Whether it is this very machine: salloc leaves its shell on the login node."""
        return self.nodes == (socket.gethostname().partition(".")[0],)


def find_allocation(environ: Mapping[str, str] = os.environ) -> Allocation | None:
    """Returns the allocation this process is inside of, None where there is none."""
    if "SLURM_JOB_ID" not in environ or "SLURM_JOB_NODELIST" not in environ:
        return None
    gpus = _last_number(environ.get("SLURM_GPUS_PER_NODE") or environ.get("SLURM_GPUS_ON_NODE"))
    nodes = tuple(slurm_queue.host_names(environ["SLURM_JOB_NODELIST"]))
    return Allocation(environ["SLURM_JOB_ID"], nodes, None if gpus else _tasks(environ), gpus)


def _tasks(environ: Mapping[str, str]) -> int:
    """Returns the tasks of each node as they were asked for, else as few as there is room for, at most `CPU_RANKS`."""
    asked = _last_number(environ.get("SLURM_NTASKS_PER_NODE"))
    # "2(x3),1": two on each of three nodes, one on the last.
    room = [int(number) for number in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", environ.get("SLURM_TASKS_PER_NODE", ""))]
    return asked or min([*room, CPU_RANKS])


def _last_number(text: str | None) -> int | None:
    """Returns 4 for "4" and for "a100:4"."""
    found = re.search(r"(\d+)$", text or "")
    return int(found.group(1)) if found else None


def check_started_once(environ: Mapping[str, str] = os.environ) -> None:
    """Checks that srun has not started this command once a task.

    Raises:
        ConfigError: it has; each of them would start all ranks.
    """
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ConfigError(
            f"srun has started this command {environ['SLURM_STEP_NUM_TASKS']} times, and it starts the ranks itself",
            where="launcher.name",
            fix="run it once, without srun: it uses every node of the allocation",
        )


def fill_in(options: LauncherConfig, allocation: Allocation, islands: int = 0) -> dict[str, Any]:
    """Returns the launcher keys that follow from the allocation: all of its nodes, unless fewer were asked for.

    Args:
        islands: that share them; 0 for an ordinary run.

    Raises:
        ConfigError: more nodes than it has.
    """
    together = max(1, min(options.islands_per_node, islands))
    groups, there = -(-max(1, islands) // together), len(allocation.nodes)
    most = there // groups
    if most == 0:
        raise ConfigError(
            f"{islands} islands, and allocation {allocation.job_id} has {there} nodes",
            where="diloco.islands",
            fix=f"launcher.islands_per_node={-(-islands // there)}",
        )
    if options.nodes > most:
        each = f" for each of {islands} islands" if islands else ""
        what = f"{options.nodes} nodes{each}, and allocation {allocation.job_id} has {there}"
        raise ConfigError(what, where="launcher.nodes", fix=f"launcher.nodes={most}")
    tasks = allocation.tasks_per_node
    return {
        "nodes": options.nodes if options.nodes > 1 else most,
        "tasks_per_node": options.tasks_per_node or (max(1, tasks // together) if tasks else None),
        "gpus_per_node": options.gpus_per_node or allocation.gpus_per_node,
    }


@dataclass
class AllocationHandle(LocalHandle):
    """A job within an allocation: a process on this machine that runs its steps."""

    def logs(self) -> list[Path]:
        return failed_first([*sorted((self.attempt.path / "logs").glob("*.log")), self.attempt.launch / "steps.log"], self.attempt)


@dataclass(frozen=True)
class AllocationLauncher:
    """Runs jobs as steps of the allocation this process is inside of.

    Args:
        slurm: whose orders and srun lines these steps share.
    """

    slurm: SlurmLauncher = field(default_factory=SlurmLauncher)

    name = "allocation"

    def submit(self, job: JobSpec, *, detach: bool = False) -> AllocationHandle:
        """Starts the steps and returns at once.

        The job belongs to this process: when this process ends, the job saves and stops. With `detach` it lives on, for as
        long as the allocation does.

        Raises:
            PreflightError: there is no allocation here, no srun, or the run directory cannot be written.
        """
        allocation = self._allocation()
        attempt = job.attempt
        code = self.slurm.code(job)
        command = [sys.executable, "-m", "factory_train.launchers.slurm_batch", str(attempt.run.path), str(attempt.number)]
        python_path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
        # How the shell's own step was bound to cores says nothing about the steps of this job.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_CPU_BIND")}
        stdin, lifeline = (None, None) if detach else os.pipe()
        try:
            storage.write_json(attempt.launch / SPEC_NAME, self._spec(job, allocation, attached=not detach))
            with open(attempt.launch / "steps.log", "ab") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL if stdin is None else stdin,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environ | {"PYTHONPATH": python_path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
            facts = {
                "format_version": 1,
                "launcher": self.name,
                "host": socket.gethostname(),
                "pid": process.pid,
                "pid_started": process_started_at(process.pid),
                "job_id": allocation.job_id,
                "job_ids": [allocation.job_id],
                "submitted": time.time(),
                "run_dir": str(attempt.run.path),
                "attempt": attempt.number,
                "command": command,
                "detached": detach,
                "gangs": [asdict(gang) for gang in job.gangs],
                "stages": list(job.stages),
            }
            storage.write_json(attempt.job_path, facts)
        except OSError as error:
            if lifeline is not None:
                # The process, where it was started, takes this for the end of its submitter.
                os.close(lifeline)
            raise PreflightError(f"cannot start the job: {error.strerror}", where=str(attempt.launch)) from error
        finally:
            if stdin is not None:
                os.close(stdin)
        return AllocationHandle(facts, process, lifeline)

    def attach(self, handle: dict[str, Any]) -> AllocationHandle:
        return AllocationHandle(handle)

    def describe(self, job: JobSpec) -> str:
        allocation = self._allocation()
        spec = self._spec(job, allocation, attached=True)
        lines = [f"allocation {allocation.job_id}: steps on {', '.join(allocation.nodes)}"]
        lines += [f"  {stage:8} {shlex.join(command)}" for stage in job.stages for command in slurm_script.stage_commands(spec, stage)]
        return "\n".join(lines)

    def _allocation(self) -> Allocation:
        allocation = find_allocation()
        if allocation is None:
            raise PreflightError(
                "this is not inside a Slurm allocation", where="launcher.name", fix="salloc first, or launcher=slurm submits a job"
            )
        return allocation

    def _spec(self, job: JobSpec, allocation: Allocation, *, attached: bool) -> dict[str, Any]:
        # The allocation is the person's, and so is what follows when it ends.
        return self.slurm.spec(job) | {"requeue": "never", "nodes": list(allocation.nodes), "attached": attached}
