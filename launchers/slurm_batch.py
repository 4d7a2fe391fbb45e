"""What the batch script runs, on the first node of a job: the stages, the verdict, and whether Slurm is to start it again.

`python -m factory_train.launchers.slurm_batch RUN_DIR ATTEMPT`, or `... ARRAY_FILE` for a point of a sweep. A start, a
restart and a job of a chain run the same command; which attempt it is follows from the run directory and the job's id alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory_train import heartbeat, storage, switches
from factory_train.errors import ExitCode, FactoryTrainError, FencedError
from factory_train.heartbeat import Beat
from factory_train.launchers import attempts, autopsy, slurm_array, slurm_preflight, slurm_queue, slurm_script
from factory_train.launchers.child import Child, end_all
from factory_train.launchers.environment import import_environ
from factory_train.launchers.inbox import Inbox
from factory_train.launchers.job import WorkerEnv
from factory_train.launchers.pulse import Pulse
from factory_train.launchers.slurm_restart import Restart
from factory_train.run_dir import Attempt, RunDir

_BY_USER = (ExitCode.USAGE, ExitCode.PREFLIGHT, ExitCode.NOT_FOUND)
# Before the time limit a stage that saves nothing is given up, so that there is time to ask for a restart.
_LAST_S = 15.0
# What the syncer has at the end to send the rest.
_TRACKER_S = 60.0


@dataclass(frozen=True)
class End:
    """How an attempt ends, as far as this process can tell; a verdict of the ranks goes before it."""

    outcome: str
    exit_code: int
    reason: str


class Batch:
    """Runs one attempt within one allocation.

    Args:
        attempt: whose orders are in launch/slurm.json.
        job_id: as squeue shows it.
        nodes: of the allocation, in Slurm's order.
        inbox: signals arrive here.
    """

    def __init__(self, attempt: Attempt, job_id: str, nodes: list[str], inbox: Inbox) -> None:
        self._attempt, self._job_id, self._inbox = attempt, job_id, inbox
        self._spec: dict[str, Any] = storage.read_json(attempt.launch / "slurm.json")
        # An allocation may have more nodes than the job wants.
        self._nodes = nodes[: self._spec["gang"]["nodes"]]
        # Whether the nodes were there before the job, and whether it ends with the command that started it.
        self._in_allocation, self._is_attached = "nodes" in self._spec, bool(self._spec.get("attached"))
        if self._is_attached:
            inbox.watch_submitter(sys.stdin.fileno())
        self._deadline = slurm_queue.end_time(job_id)
        self._srun: subprocess.Popen[bytes] | None = None
        self._tracker: Child | None = None
        self._pulse = Pulse(attempt)
        self._restart = Restart(attempt, job_id, self._spec["requeue"])
        # Nodes that the next attempt should do without.
        self._bad_nodes: list[str] = []

    def run(self) -> int:
        """Runs the stages, writes the verdict, asks for a restart where one makes sense; returns the job's exit code."""
        attempt = self._attempt
        attempt.record_launch_event(
            "start",
            job_id=self._job_id,
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            nodes=self._nodes,
            deadline=self._deadline,
            checkpoint=attempts.newest_checkpoint_step(attempt.run),
        )
        try:
            end = self._run_stages()
            code = self._conclude(end)
            self._finish_tracker()
            return code
        except FencedError as error:
            attempt.record_launch_event("fenced", reason=str(error))
            return ExitCode.FAILED
        finally:
            self._end_srun()
            end_all([self._tracker] if self._tracker else [], gently=True)

    def _run_stages(self) -> End | None:
        if self._spec["preflight"] and (end := self._look_at_nodes()):
            return end
        for stage in self._spec["stages"]:
            self._inbox.wait(0)
            if self._inbox.stop == signal.SIGINT and self._in_allocation:
                return End("interrupted", ExitCode.INTERRUPTED, f"{self._inbox.why} before stage '{stage}'")
            if self._inbox.stop is not None:
                return End("preempted", ExitCode.PREEMPTED, f"{self._inbox.why} before stage '{stage}'")
            if switches.is_on(self._attempt.run, switches.STOP):
                return End("interrupted", ExitCode.INTERRUPTED, f"stopped before stage '{stage}'")
            if stage == "train" and self._spec["tracker"]:
                self._start_tracker()
            started = time.monotonic()
            self._attempt.record_launch_event("stage-start", stage=stage)
            end = self._run_stage(stage)
            seconds = round(time.monotonic() - started, 3)
            self._attempt.record_launch_event("stage-end", stage=stage, seconds=seconds, outcome=end.outcome if end else "done")
            if end is not None or self._attempt.verdict() is not None:
                return end
        return None

    def _run_stage(self, stage: str) -> End | None:
        """Runs one stage to its end; returns None if the next one may follow."""
        gang = self._spec["gang"]
        nodes, tasks = (gang["nodes"], gang["tasks_per_node"]) if stage == "train" else (1, 1)
        orders = WorkerEnv(
            run_dir=str(self._attempt.run.path),
            attempt=self._attempt.number,
            gang=gang["name"],
            local_world_size=tasks,
            master_addr=self._master() if stage == "train" else "127.0.0.1",
            deadline=self._deadline,
        )
        command = slurm_script.stage_command(self._spec, stage, nodes=nodes, tasks_per_node=tasks)
        self._srun = srun = subprocess.Popen(command, env=import_environ(os.environ) | orders.to_environ(), stdin=subprocess.DEVNULL)
        # When what still runs is ended, and what is said then.
        limit, late = float("inf"), None
        told = False
        while srun.poll() is None:
            if not self._attempt.is_newest():
                raise FencedError(f"attempt {self._attempt.number} was superseded", where=str(self._attempt.run.path))
            now = time.monotonic()
            if now >= limit:
                self._end_srun()
                return late
            if self._is_attached and self._inbox.at_once is not None:
                self._end_srun()
                why = f"ended at once by a second {signal.Signals(self._inbox.at_once).name}; what followed the last checkpoint is lost"
                return End("killed", ExitCode.INTERRUPTED, why)
            if self._inbox.stop is not None and not told:
                told = True
                self._attempt.record_launch_event("signal", reason=self._inbox.why, stage=stage)
                self._tell_ranks()
                limit, late = now + self._spec["grace_s"], self._unsaved(stage)
            if late is None:
                late = self._reason_to_end(stage)
                if late is not None:
                    # srun may need a moment to end what hangs; nothing more is waited for.
                    limit = now
            self._pulse.beat()
            self._inbox.wait(min(1.0, max(0.0, limit - now)))
        return self._ended(stage, srun.returncode)

    def _look_at_nodes(self) -> End | None:
        """Looks at every node of the job; returns the end of this attempt where one must be left out."""
        attempt = self._attempt
        with slurm_preflight.Look(attempt, self._spec, self._nodes) as look:
            while not look.is_over():
                if self._inbox.stop is not None:
                    return End("preempted", ExitCode.PREEMPTED, f"{self._inbox.why} before stage 'prepare'")
                if switches.is_on(attempt.run, switches.STOP):
                    return End("interrupted", ExitCode.INTERRUPTED, "stopped before stage 'prepare'")
                self._pulse.beat()
                self._inbox.wait(1.0)
        bad = look.conclude()
        if not bad:
            return None
        reason = f"preflight: {slurm_preflight.in_words(bad)}"
        if slurm_preflight.is_everywhere(bad, self._nodes):
            return End("failed-user", ExitCode.PREFLIGHT, reason)
        self._bad_nodes = list(bad)
        return End("failed-transient", ExitCode.PREFLIGHT, reason)

    def _reason_to_end(self, stage: str) -> End | None:
        """Returns why a stage must not go on: a rank that has stopped, a switch, the time limit."""
        if stage == "train":
            beats = heartbeat.read_all(self._attempt)
            stopped = heartbeat.silent(beats, self._spec["hang_s"])
            if stopped is not None:
                return self._hung(stopped, f"gave no sign of life for {stopped.age_s:.0f} s")
            first = heartbeat.furthest_behind(beats)
            stall_s = self._spec["stall_s"]
            newest = max((beat.since for beat in beats), default=time.time())
            if first is not None and 0 < stall_s < time.time() - newest:
                return self._hung(first, f"stands in '{first.phase}' of step {first.step + 1}, and no rank has moved for {stall_s:.0f} s")
            return None
        if switches.is_on(self._attempt.run, switches.STOP):
            return End("interrupted", ExitCode.INTERRUPTED, f"stopped during stage '{stage}'")
        if self._deadline is not None and time.time() > self._deadline - _LAST_S:
            return End("preempted", ExitCode.PREEMPTED, f"the time limit was reached in stage '{stage}'")
        return None

    def _hung(self, beat: Beat, what: str) -> End:
        self._attempt.record_error(
            {
                "time": time.time(),
                "stage": "train",
                "rank": beat.rank,
                "host": self._host_of(beat.rank),
                "message": what,
                "hint": "the first rank that stopped; its node may be ill: launcher.exclude=NODE leaves it out",
                "traceback": None,
            }
        )
        return End("failed-transient", ExitCode.FAILED, f"rank {beat.rank} {what}")

    def _ended(self, stage: str, code: int) -> End | None:
        if self._attempt.verdict() is not None or (code == 0 and (self._attempt.launch / f"{stage}.done").exists()):
            return None
        if code == ExitCode.PREEMPTED and stage != "train":
            return End("preempted", ExitCode.PREEMPTED, f"stopped in stage '{stage}'")
        error = self._attempt.error()
        if error is None:
            if self._inbox.stop is not None:
                return self._unsaved(stage)
            self._attempt.record_error(
                {
                    "time": time.time(),
                    "stage": stage,
                    "rank": 0,
                    "host": self._nodes[0],
                    "message": f"srun ended with code {code} before any rank could say why; a node was lost, or tasks could not be started",
                    "hint": f"see {self._attempt.launch.relative_to(self._attempt.run.path)}",
                    "traceback": None,
                }
            )
            error = self._attempt.error() or {}
        who = f"rank {error.get('rank', 0)}" if stage == "train" else f"stage '{stage}'"
        reason = f"{who}: {error.get('message') or 'failed'}"
        failed = error.get("exit_code", code)
        if error.get("by_user") or failed in _BY_USER:
            return End("failed-user", failed if failed in _BY_USER else ExitCode.FAILED, reason)
        return End("failed-transient", ExitCode.FAILED, reason)

    def _unsaved(self, stage: str) -> End:
        if stage != "train":
            return End("preempted", ExitCode.PREEMPTED, f"{self._inbox.why} during stage '{stage}'")
        return End(
            "failed-transient", ExitCode.FAILED, "Slurm ended the job before its ranks had saved; what followed the last checkpoint is lost"
        )

    def _conclude(self, end: End | None) -> int:
        """Writes the verdict unless the ranks have, and acts on the one that stands; returns its exit code."""
        end = end or End("done", ExitCode.OK, "all stages ended well")
        attempt, run = self._attempt, self._attempt.run
        step, reason = autopsy.last_step(attempt), end.reason
        fruitless = attempts.count_fruitless(run) if end.outcome == "failed-transient" else 0
        if fruitless >= attempts.MOST_FRUITLESS:
            reason += f"; not tried again: {fruitless} attempts in a row without a newer checkpoint"
        try:
            attempt.write_verdict(end.outcome, end.exit_code, step=step, reason=reason)
        except OSError as error:
            print(f"no verdict could be written ({end.outcome}: {reason}): {error}", file=sys.stderr)
        verdict = attempt.verdict()
        outcome, code = (verdict.outcome, verdict.exit_code) if verdict else (end.outcome, end.exit_code)
        if outcome == "preempted" or (outcome == "failed-transient" and fruitless < attempts.MOST_FRUITLESS):
            self._restart.ask(bad_nodes=self._bad_nodes)
        else:
            self._restart.end_chain()
        return code

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

    def _tell_ranks(self) -> None:
        """Asks all ranks to save and stop."""
        if self._in_allocation and self._inbox.stop == signal.SIGINT:
            # Seen by rank 0 within seconds. srun takes a SIGINT for a question, and other steps of the allocation are not ours.
            switches.turn_on(self._attempt.run, switches.STOP)
            return
        if self._in_allocation:
            assert self._srun is not None
            # Which srun passes on to its tasks.
            self._srun.send_signal(signal.SIGUSR2)
            return
        try:
            slurm_queue.signal_steps(self._job_id, "TERM")
        except FactoryTrainError as error:
            # A job that Slurm is ending takes no signals any more: its ranks have had theirs.
            self._attempt.record_launch_event("signal-failed", reason=str(error).splitlines()[0])

    def _end_srun(self) -> None:
        if self._srun is not None and self._srun.poll() is None:
            # srun ends the tasks before it ends itself.
            self._srun.terminate()
            try:
                self._srun.wait(60.0)
            except subprocess.TimeoutExpired:
                self._srun.kill()
                self._srun.wait()

    def _start_tracker(self) -> None:
        arguments = [str(self._attempt.run.path), "--follow"]
        environ = {name: value for name, value in import_environ(os.environ).items() if not WorkerEnv.owns(name)} | self._spec["environ"]
        try:
            self._tracker = Child.start("sync", 0, self._spec["tracker_module"], arguments, environ, self._attempt.log_path("sync"))
        except OSError as error:
            self._attempt.record_launch_event("tracker-failed", reason=str(error))

    def _finish_tracker(self) -> None:
        limit = time.monotonic() + _TRACKER_S
        while self._tracker and self._tracker.running and time.monotonic() < limit and self._inbox.stop is None:
            self._inbox.wait(1.0)


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
    job_id = own_job_id(dict(os.environ))
    folder, number = sys.argv[1:] if len(sys.argv) == 3 else slurm_array.point_of(Path(sys.argv[1]), os.environ["SLURM_ARRAY_TASK_ID"])
    attempt = attempts.take(RunDir.open(Path(folder)), int(number), job_id)
    if attempt is None:
        return ExitCode.OK
    return Batch(attempt, job_id, slurm_queue.host_names(os.environ["SLURM_JOB_NODELIST"]), inbox).run()


if __name__ == "__main__":
    sys.exit(main())
