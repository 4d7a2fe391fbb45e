"""What follows an attempt on Slurm: the same job again, the next of its chain, or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence

from factory_train import storage, switches
from factory_train.errors import FactoryTrainError
from factory_train.launchers import slurm_queue
from factory_train.run_dir import Attempt, RunDir

_TRIES, _PAUSE_S = 4, 0.3


class Restart:
    """Asks Slurm for the next start of a run, from within a job of it.

    Args:
        attempt: that ends.
        job_id: of this job, as squeue shows it.
        how: launcher.requeue.
        run: whose switches count; None is that of the attempt.
    """

    def __init__(self, attempt: Attempt, job_id: str, how: str, run: RunDir | None = None) -> None:
        self._attempt, self._job_id, self._how, self._run = attempt, job_id, how, run or attempt.run

    def ask(self, bad_nodes: Sequence[str] = ()) -> bool:
        """Has Slurm start the job again, unless it means to already, or the next of a chain follows, or nobody wants it.

        Args:
            bad_nodes: what starts next does without these.

        Returns:
            Whether another attempt is to be expected.
        """
        attempt = self._attempt
        attempt.check_fence("asking for a restart")
        if switches.is_on(self._run, switches.STOP):
            return False
        if self._how == "chain":
            waiting = [job_id for job_id in self._behind() if slurm_queue.job_state(job_id) == "PENDING"]
            self._leave_out(bad_nodes, waiting)
        if self._how != "requeue":
            attempt.record_launch_event("no-requeue", reason=f"launcher.requeue={self._how}")
            return self._how == "chain" and bool(waiting)
        state = slurm_queue.job_state(self._job_id)
        if state not in ("RUNNING", "SUSPENDED"):
            # Slurm is ending the job: to start it again (preemption, lost node), or because somebody cancelled it.
            attempt.record_launch_event("no-requeue", reason=f"Slurm has the job in state {state}")
            return state != "CANCELLED"
        attempt.record_launch_event("requeue", job_id=self._job_id)
        if (why := self._requeue()) is not None:
            attempt.record_launch_event("requeue-failed", reason=why)
            return False
        # Slurm takes no other nodes for a job that runs, but does from now on, and leaves this process KillWait to say so.
        self._leave_out(bad_nodes, [self._job_id])
        return True

    def end_chain(self) -> None:
        """Takes the jobs behind this one out of the queue: there is nothing left for them."""
        if behind := self._behind():
            try:
                slurm_queue.cancel(behind)
            except FactoryTrainError as error:
                self._attempt.record_launch_event("chain-left", reason=str(error).splitlines()[0])

    def _requeue(self) -> str | None:
        """Returns why Slurm would not start the job again, None where it will."""
        why = None
        for _ in range(_TRIES):
            try:
                slurm_queue.run("scontrol", "requeue", self._job_id)
                return None
            except FactoryTrainError as error:
                # The end of this job reaches every process of it: the very scontrol that asked for it, too.
                why = str(error).splitlines()[0]
                if slurm_queue.job_state(self._job_id) not in ("RUNNING", "SUSPENDED", None):
                    return None
                time.sleep(_PAUSE_S)
        return why

    def _leave_out(self, nodes: Sequence[str], job_ids: Sequence[str]) -> None:
        """Keeps jobs that come next away from some nodes."""
        for job_id in job_ids if nodes else []:
            why = self._exclude(job_id, nodes)
            if why is None:
                self._attempt.record_launch_event("exclude", nodes=list(nodes), job_id=job_id)
            else:
                self._attempt.record_launch_event("exclude-failed", nodes=list(nodes), job_id=job_id, reason=why)

    def _exclude(self, job_id: str, nodes: Sequence[str]) -> str | None:
        """Returns why it was not possible, None where it was."""
        why = None
        for _ in range(_TRIES):
            try:
                slurm_queue.exclude_nodes(job_id, nodes)
                return None
            except FactoryTrainError as error:
                why = str(error).splitlines()[0]
                time.sleep(_PAUSE_S)
        return why

    def _behind(self) -> list[str]:
        """Returns the jobs of the chain behind this one."""
        job = storage.read_json(self._attempt.job_path) or {"job_ids": []}
        return [job_id for job_id in job["job_ids"] if job_id != self._job_id]
