"""What the batch script runs, on the first node of a job: the stages, the verdict, and whether Slurm is to start it again.

`python -m factory_train.launchers.slurm_batch RUN_DIR ATTEMPT`. A start, a restart and a job of a chain run the same
command; which attempt it is follows from the run directory and the job's id alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from factory_train import storage, switches
from factory_train.errors import ExitCode, FactoryTrainError
from factory_train.launchers import attempts, slurm_queue, slurm_script
from factory_train.launchers.attempt_runner import AttemptRunner
from factory_train.launchers.environment import import_environ
from factory_train.launchers.inbox import Inbox
from factory_train.launchers.job import WorkerEnv
from factory_train.run_dir import Attempt, RunDir


class Batch(AttemptRunner):
    """Runs one attempt within one allocation.

    Args:
        attempt: whose orders are in launch/slurm.json.
        job_id: as squeue shows it.
        nodes: of the allocation, in Slurm's order.
        inbox: signals arrive here.
    """

    def __init__(self, attempt: Attempt, job_id: str, nodes: list[str], inbox: Inbox) -> None:
        super().__init__(attempt, storage.read_json(attempt.launch / "slurm.json"), inbox, slurm_queue.end_time(job_id))
        self._job_id, self._nodes = job_id, nodes
        self._srun: subprocess.Popen[bytes] | None = None

    def _place(self) -> dict[str, Any]:
        return {"job_id": self._job_id, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")), "nodes": self._nodes}

    def _start(self, stage: str, orders: WorkerEnv) -> None:
        nodes = self._spec["gang"]["nodes"] if stage == "train" else 1
        command = slurm_script.stage_command(self._spec, stage, nodes=nodes, tasks_per_node=orders.local_world_size)
        self._srun = subprocess.Popen(command, env=import_environ(os.environ) | orders.to_environ(), stdin=subprocess.DEVNULL)

    def _poll(self) -> int | None:
        assert self._srun is not None
        return self._srun.poll()

    def _unexplained(self, code: int) -> str:
        return f"srun ended with code {code} before any rank could say why; a node was lost, or tasks could not be started"

    def _after(self, *, goes_on: bool) -> None:
        if goes_on:
            self._go_on()
        else:
            self._end_chain()

    def _go_on(self) -> None:
        """Has Slurm start the job again, unless it means to already, or the next of a chain follows, or nobody wants it."""
        attempt = self._attempt
        attempt.check_fence("asking for a restart")
        if switches.is_on(attempt.run, switches.STOP):
            return
        if self._spec["requeue"] != "requeue":
            attempt.record_launch_event("no-requeue", reason=f"launcher.requeue={self._spec['requeue']}")
            return
        state = slurm_queue.job_state(self._job_id)
        if state not in ("RUNNING", "SUSPENDED"):
            # Slurm is ending the job: to start it again (preemption, lost node), or because somebody cancelled it.
            attempt.record_launch_event("no-requeue", reason=f"Slurm has the job in state {state}")
            return
        try:
            attempt.record_launch_event("requeue", job_id=self._job_id)
            slurm_queue.run("scontrol", "requeue", self._job_id)
        except FactoryTrainError as error:
            attempt.record_launch_event("requeue-failed", reason=str(error).splitlines()[0])

    def _end_chain(self) -> None:
        """Takes the jobs behind this one out of the queue: there is nothing left for them."""
        job = storage.read_json(self._attempt.job_path) or {"job_ids": []}
        behind = [job_id for job_id in job["job_ids"] if job_id != self._job_id]
        if behind:
            try:
                slurm_queue.cancel(behind)
            except FactoryTrainError as error:
                self._attempt.record_launch_event("chain-left", reason=str(error).splitlines()[0])

    def _master(self) -> str:
        """Returns the first node's name, or its address where the name means nothing here."""
        import socket

        name = self._nodes[0]
        try:
            socket.getaddrinfo(name, None)
            return name
        except OSError:
            return slurm_queue.node_address(name) or name

    def _host_of(self, rank: int) -> str:
        node = rank // self._spec["gang"]["tasks_per_node"]
        return self._nodes[node] if node < len(self._nodes) else "?"

    def _tell_ranks(self, name: str) -> None:
        try:
            slurm_queue.signal_steps(self._job_id, name)
        except FactoryTrainError as error:
            # A job that Slurm is ending takes no signals any more: its ranks have had theirs.
            self._attempt.record_launch_event("signal-failed", reason=str(error).splitlines()[0])

    def _end(self) -> None:
        if self._srun is not None and self._srun.poll() is None:
            # srun ends the tasks before it ends itself.
            self._srun.terminate()
            try:
                self._srun.wait(60.0)
            except subprocess.TimeoutExpired:
                self._srun.kill()
                self._srun.wait()


def own_job_id(environ: dict[str, str]) -> str:
    """Returns this job's id as squeue shows it: JOB_TASK within an array, whose elements have numbers of their own as well."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def main() -> int:
    """Takes the attempt that is this start's, and runs it."""
    inbox = Inbox()
    # What SIGHUP means to a terminal it does not mean here.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run, job_id = RunDir.open(Path(sys.argv[1])), own_job_id(dict(os.environ))
    attempt = attempts.take(run, int(sys.argv[2]), job_id)
    if attempt is None:
        return ExitCode.OK
    return Batch(attempt, job_id, slurm_queue.host_names(os.environ["SLURM_JOB_NODELIST"]), inbox).run()


if __name__ == "__main__":
    sys.exit(main())
