"""What the batch script runs, on the first node of a job: the stages, the verdict, and whether Slurm is to start it again.

`python -m factory_train.launchers.slurm_batch RUN_DIR ATTEMPT`, or `... ARRAY_FILE` for a point of a sweep. A start, a
restart and a job of a chain run the same command; which attempt it is follows from the run directory and the job's id alone.
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
from factory_train.launchers import attempts, slurm_array, slurm_preflight, slurm_queue, slurm_script
from factory_train.launchers.attempt_runner import AttemptRunner, End, Stop
from factory_train.launchers.environment import import_environ
from factory_train.launchers.inbox import END_SIGNAL, Inbox
from factory_train.launchers.islands import Starter
from factory_train.launchers.job import WorkerEnv
from factory_train.launchers.slurm_islands import IslandSteps
from factory_train.launchers.slurm_restart import Restart
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
        # An allocation may have more nodes than the job wants, and an island has some of the job's.
        self._job_id, self._nodes = job_id, (self._spec.get("nodes") or nodes)[: self._spec["num_nodes"]]
        self._steps = IslandSteps(self._spec, self._nodes, job_id) if self._spec["islands"] else None
        # Whether the nodes were there before the job, and whether it ends with the command that started it.
        self._in_allocation, self._is_attached = "nodes" in self._spec, bool(self._spec.get("attached"))
        if self._is_attached:
            inbox.watch_submitter(sys.stdin.fileno())
        self._restart = Restart(attempt, job_id, self._spec["requeue"])
        # Nodes that the next attempt should do without.
        self._bad_nodes: list[str] = []
        self._srun: subprocess.Popen[bytes] | None = None
        self._stage = ""

    def _place(self) -> dict[str, Any]:
        return {"job_id": self._job_id, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")), "nodes": self._nodes}

    def _run_stages(self) -> End | None:
        if self._spec["preflight"] and (end := self._look_at_nodes()):
            return end
        return super()._run_stages()

    def _look_at_nodes(self) -> End | None:
        """Looks at every node of the job; returns the end of this attempt where one must be left out."""
        attempt = self._attempt
        with slurm_preflight.Look(attempt, self._spec, self._nodes) as look:
            while not look.is_over():
                if (stop := self._stop()) is not None:
                    return self._stopped(stop, "before stage 'prepare'")
                if switches.is_on(self._run, switches.STOP):
                    return End("interrupted", ExitCode.INTERRUPTED, "stopped before stage 'prepare'")
                self._pulse.beat()
                self._rest(1.0)
        bad = look.conclude()
        if not bad:
            return None
        reason = f"preflight: {slurm_preflight.in_words(bad)}"
        if slurm_preflight.is_everywhere(bad, self._nodes):
            return End("failed-user", ExitCode.PREFLIGHT, reason)
        self._bad_nodes = list(bad)
        return End("failed-transient", ExitCode.PREFLIGHT, reason)

    def _starter(self) -> Starter | None:
        return self._steps

    def _stop(self) -> Stop | None:
        if self._in_allocation and self._inbox.stop == signal.SIGINT:
            return Stop("INT", self._inbox.why)
        if self._steps is not None and (told := self._steps.told()) is not None:
            return Stop(*told)
        return super()._stop()

    def _at_once(self) -> End | None:
        if not self._is_attached or self._inbox.at_once is None:
            return None
        if "share" in self._spec and END_SIGNAL not in self._inbox.received:
            # Slurm's SIGTERM to all processes of the job, and the same from the job's launcher, are one request.
            return None
        why = f"ended at once by a second {self._inbox.at_once.name}; what followed the last checkpoint is lost"
        return End("killed", ExitCode.INTERRUPTED, why)

    def _start(self, stage: str, orders: WorkerEnv) -> None:
        self._stage = stage
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
            self._restart.ask(bad_nodes=self._bad_nodes)
        else:
            self._restart.end_chain()

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
        if self._in_allocation and name == "INT" and self._stage != "train":
            # There is nothing to save.
            self._end()
            return
        if self._in_allocation and name == "INT":
            # Seen by rank 0 within seconds. srun takes a SIGINT for a question, and other steps of the allocation are not ours.
            switches.turn_on(self._attempt.run, switches.STOP)
            return
        if self._in_allocation:
            assert self._srun is not None
            # Which srun passes on to its tasks.
            self._srun.send_signal(signal.SIGUSR2)
            return
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


def begin() -> tuple[Inbox, str]:
    """Takes over the signals and returns what collects them, and this job's id."""
    inbox = Inbox()
    # What SIGHUP means to a terminal it does not mean here.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return inbox, own_job_id(dict(os.environ))


def main() -> int:
    """Takes the attempt that is this start's, and runs it."""
    inbox, job_id = begin()
    folder, number = sys.argv[1:] if len(sys.argv) == 3 else slurm_array.point_of(Path(sys.argv[1]), os.environ["SLURM_ARRAY_TASK_ID"])
    attempt = attempts.take(RunDir.open(Path(folder)), int(number), job_id)
    if attempt is None:
        return ExitCode.OK
    return Batch(attempt, job_id, slurm_queue.host_names(os.environ["SLURM_JOB_NODELIST"]), inbox).run()


if __name__ == "__main__":
    sys.exit(main())
