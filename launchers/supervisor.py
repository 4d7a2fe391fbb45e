"""The process that runs a local job: its stages in order, its ranks, its signals, and the verdict at the end.

It never imports torch, so it starts at once and nothing a rank does can take it down. Ranks cannot outlive it: the
stdin of each is a pipe that only this process holds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.errors import ExitCode, FactoryTrainError
from factory_train.launchers import autopsy
from factory_train.launchers.attempt_runner import End
from factory_train.launchers.child import Child, end_all, signal_name
from factory_train.launchers.environment import child_environ
from factory_train.launchers.inbox import Inbox
from factory_train.launchers.island_supervisors import Supervisors
from factory_train.launchers.islands import Islands
from factory_train.launchers.job import WorkerEnv
from factory_train.launchers.pulse import Pulse
from factory_train.run_dir import HEARTBEAT_EVERY_S, Attempt, RunDir

# The submitter writes job.json right after it started this process; without it nobody could stop the job.
JOB_WAIT_S = 10.0
# Exit codes with which a rank says that it saved and stopped because it was asked to.
_STOPPED = {ExitCode.PREEMPTED: "preempted", ExitCode.INTERRUPTED: "interrupted"}
_BY_USER = (ExitCode.USAGE, ExitCode.PREFLIGHT, ExitCode.NOT_FOUND)


class Supervisor:
    """Runs one attempt.

    Args:
        attempt: where everything is read from and written to.
        job: content of job.json.
        inbox: signals and the end of the submitter arrive here.
    """

    def __init__(self, attempt: Attempt, job: dict[str, Any], inbox: Inbox) -> None:
        self._attempt, self._job, self._inbox = attempt, job, inbox
        self._children: list[Child] = []
        self._tracker: Child | None = None
        self._pulse = Pulse(attempt)

    def run(self) -> int:
        """Runs the stages and returns the exit code of the job; no process of the job is left, whatever happens."""
        try:
            try:
                end = self._run_stages()
            except (OSError, FactoryTrainError) as error:
                end = End("failed-transient", ExitCode.FAILED, f"the launcher on {socket.gethostname()} could not go on: {error}")
                if isinstance(error, FactoryTrainError) and error.by_user:
                    end = End("failed-user", error.exit_code, str(error))
            finally:
                end_all(self._children)
            exit_code = self._conclude(end)
            self._finish_tracker()
            return exit_code
        finally:
            end_all([self._tracker] if self._tracker else [], gently=True)

    def _run_stages(self) -> End | None:
        for stage in self._job["stages"]:
            self._inbox.wait(0)
            if self._inbox.stop is not None:
                return self._stopped(f"stopped before stage '{stage}'")
            self._note("stage-start", stage=stage)
            started = time.monotonic()
            end = self._run_stage(stage)
            self._note("stage-end", stage=stage, seconds=round(time.monotonic() - started, 3), outcome=end.outcome if end else "done")
            if end is not None or self._attempt.verdict() is not None:
                return end
        return None

    def _run_islands(self) -> End | None:
        if self._job["tracker"]:
            self._start_tracker()
        gangs, grace_s = self._job["gangs"], self._job["grace_s"]
        islands = Islands(self._attempt, gangs, grace_s, self._inbox, self._pulse, self._note, Supervisors(self._job))
        outcome, code, reason = islands.run()
        return None if outcome == "done" else End(outcome, code, reason)

    def _run_stage(self, stage: str) -> End | None:
        """Runs one stage to its end; returns None if the next one may follow."""
        if stage == "train" and self._job.get("islands"):
            return self._run_islands()
        self._children = ranks = self._start(stage)
        grace_s, peer_grace_s = self._job["grace_s"], self._job["peer_grace_s"]
        # When the ranks that are still running will be ended, and what will be said then.
        limit, late = float("inf"), None
        forwarded: signal.Signals | None = None
        failed: Child | None = None
        while True:
            ended = self._collect(ranks)
            # Not by another look: a rank that has failed meanwhile would be neither running nor among those that ended.
            running = [child for child in ranks if not child.swept]
            now = time.monotonic()
            if self._inbox.at_once:
                self._end(running, "asked to end at once")
                code = ExitCode.INTERRUPTED if self._inbox.at_once == signal.SIGINT else ExitCode.FAILED
                return End(
                    "killed",
                    code,
                    f"ended at once by a second {signal_name(self._inbox.at_once)}; what followed the last checkpoint is lost",
                )
            if self._inbox.stop is not None and forwarded is None:
                forwarded = self._inbox.stop
                self._note("signal", signal=signal_name(forwarded), reason=self._inbox.why, stage=stage)
                if stage != "train":
                    self._end(running, "nothing to save in this stage", gently=True)
                    return self._stopped(f"stopped during stage '{stage}'")
                for child in running:
                    child.signal(forwarded)
                limit, late = now + grace_s, self._unsaved()
            if failed is None and (bad := [child for child in ended if self._is_failure(child, forwarded)]):
                # A rank killed from outside died before those that missed it, even if both are found dead at once.
                failed = min(bad, key=lambda child: (child.process.returncode or 0) >= 0)
                autopsy.record(self._attempt, stage, failed)
                limit = min(limit, now + peer_grace_s)
            elif ended and forwarded is not None and any(child.exit_code == -forwarded for child in ended):
                # Its handler was not installed yet, so the others wait for it in vain.
                limit, late = min(limit, now + peer_grace_s), self._stopped("stopped while the ranks were starting")
            elif ended and running and late is None and failed is None:
                names = ", ".join(child.name for child in running)
                limit = now + grace_s
                late = End(
                    "failed-transient",
                    ExitCode.FAILED,
                    f"{names} did not end within launcher.grace_s={grace_s:g} after {ended[0].name} had",
                )
            if not running:
                break
            if now >= limit:
                self._end(running, late.reason if late and failed is None else f"{failed.name if failed else 'a rank'} failed")
                if failed is None and late is not None and late.outcome == "failed-transient" and forwarded is None:
                    autopsy.record_hung(self._attempt, stage, running[0], late.reason)
                return self._failure(stage, failed) if failed else late
            self._pulse.beat()
            self._inbox.wait(min(limit - now, HEARTBEAT_EVERY_S))
        if failed is not None:
            return self._failure(stage, failed)
        codes = [child.exit_code for child in ranks]
        for code, outcome in _STOPPED.items():
            if code in codes:
                return End(outcome, code, f"{outcome} in stage '{stage}'")
        if forwarded is not None and -forwarded in codes:
            return self._stopped("stopped while the ranks were starting")
        return None

    def _start(self, stage: str) -> list[Child]:
        gang = self._job["gangs"][0]
        size = gang["tasks_per_node"] if stage == "train" else 1
        names = [f"rank-{rank:05d}" for rank in range(size)] if stage == "train" else [stage]
        if stage == "train" and self._job["tracker"]:
            self._start_tracker()
        children: list[Child] = []
        self._children = children
        for rank, name in enumerate(names):
            worker = WorkerEnv(
                run_dir=str(self._attempt.run.path),
                attempt=self._attempt.number,
                gang=gang["name"],
                rank=rank,
                local_rank=rank,
                world_size=size,
                local_world_size=size,
                lifeline=1,
            )
            environ = child_environ(os.environ, self._job["environ"], worker, one_machine=True)
            children.append(Child.start(name, rank, self._job["worker_module"], [stage], environ, self._attempt.log_path(name)))
        self._note("ranks-started", stage=stage, pids=[child.process.pid for child in children])
        return children

    def _collect(self, ranks: list[Child]) -> list[Child]:
        """Returns the ranks that ended since the last call, their leftovers cleaned away."""
        ended = [child for child in ranks if not child.swept and not child.running]
        for child in ended:
            child.sweep()
            self._note("exit", name=child.name, exit_code=child.exit_code, how=child.death())
        if self._tracker and not self._tracker.swept and not self._tracker.running:
            self._tracker.sweep()
            self._note("tracker-exit", exit_code=self._tracker.exit_code, how=self._tracker.death())
        return ended

    def _end(self, children: list[Child], reason: str, *, gently: bool = False) -> None:
        self._note("kill", names=[child.name for child in children], reason=reason)
        end_all(children, gently=gently)
        for child in children:
            self._note("exit", name=child.name, exit_code=child.exit_code, how=child.death())

    def _is_failure(self, child: Child, forwarded: int | None) -> bool:
        fine = {ExitCode.OK, *_STOPPED} | ({-forwarded} if forwarded is not None else set())
        return child.exit_code not in fine and not child.ended_by_launcher

    def _failure(self, stage: str, failed: Child) -> End:
        error = self._attempt.error() or {}
        who = f"rank {error['rank']}" if stage == "train" and "rank" in error else f"stage '{stage}'"
        reason = f"{who}: {error.get('message') or failed.death()}"
        code = failed.process.returncode
        if code in _BY_USER:
            return End("failed-user", code, reason)
        return End("failed-transient", code if code in list(ExitCode) else ExitCode.FAILED, reason)

    def _stopped(self, reason: str) -> End:
        """The end of a job that was asked to stop and had nothing to save."""
        if self._inbox.stop == signal.SIGINT:
            return End("interrupted", ExitCode.INTERRUPTED, reason)
        return End("preempted", ExitCode.PREEMPTED, reason)

    def _unsaved(self) -> End:
        reason = f"did not save within launcher.grace_s={self._job['grace_s']:g}; what followed the last checkpoint is lost"
        if self._inbox.stop == signal.SIGINT:
            return End("killed", ExitCode.INTERRUPTED, reason)
        return End("failed-transient", ExitCode.FAILED, reason)

    def _conclude(self, end: End | None) -> int:
        """Writes the verdict unless the ranks have, and returns the exit code of the verdict that stands."""
        end = end or End("done", ExitCode.OK, "all stages ended well")
        try:
            self._attempt.write_verdict(end.outcome, end.exit_code, step=autopsy.last_step(self._attempt), reason=end.reason)
            verdict = self._attempt.verdict()
            assert verdict is not None
            return verdict.exit_code
        except (OSError, FactoryTrainError) as error:
            _say(f"no verdict could be written ({end.outcome}: {end.reason}): {error}")
            return end.exit_code or ExitCode.FAILED

    def _start_tracker(self) -> None:
        arguments = [str(self._attempt.run.path), "--follow"]
        environ = {name: value for name, value in os.environ.items() if not WorkerEnv.owns(name)} | self._job["environ"]
        try:
            self._tracker = Child.start("sync", 0, self._job["tracker_module"], arguments, environ, self._attempt.log_path("sync"))
        except OSError as error:
            self._note("tracker-failed", reason=str(error))

    def _finish_tracker(self) -> None:
        """Waits until the syncer has sent the end of the run; what it could not send, `sync` sends later."""
        if self._tracker is None or not self._tracker.running:
            return
        limit = time.monotonic() + self._job["tracker_grace_s"]
        asked = len(self._inbox.received)
        while self._tracker.running and time.monotonic() < limit and not self._inbox.at_once and len(self._inbox.received) == asked:
            self._inbox.wait(min(1.0, limit - time.monotonic()))
        if self._tracker.running:
            self._note(
                "tracker-ended",
                reason=f"still sending after {self._job['tracker_grace_s']:g} s; python -m factory_train sync sends the rest",
            )
        self._collect([])

    def _note(self, kind: str, **facts: Any) -> None:
        """Records a launch event; a full disk must not keep this process from ending its children."""
        try:
            self._attempt.record_launch_event(kind, **facts)
        except OSError as error:
            _say(f"{kind} {facts}: {error}")


def _say(text: str) -> None:
    """Writes to this process's own log; where even that is full, nothing is left to say it to."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _wait_for_job(attempt: Attempt) -> dict[str, Any]:
    limit = time.monotonic() + JOB_WAIT_S
    while time.monotonic() < limit:
        if job := storage.read_json(attempt.job_path):
            assert job["pid"] == os.getpid(), "job.json is about another process"
            return job
        time.sleep(0.01)
    sys.exit(f"{attempt.job_path} was not written by the process that submitted the job")


def main() -> int:
    """`python -m factory_train.launchers.supervisor RUN_DIR ATTEMPT`."""
    attempt = Attempt(RunDir.open(Path(sys.argv[1])), int(sys.argv[2]))
    inbox = Inbox()
    job = _wait_for_job(attempt)
    if not job["detached"]:
        inbox.watch_submitter(sys.stdin.fileno())
    return Supervisor(attempt, job, inbox).run()


if __name__ == "__main__":
    sys.exit(main())
