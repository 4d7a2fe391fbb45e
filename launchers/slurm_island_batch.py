"""What the batch script of an island runs that is a job of its own: its training, and what it finds to do for the run.

`python -m factory_train.launchers.slurm_island_batch ISLAND_DIR ATTEMPT`. Data is prepared by the first island that comes to it.
Whichever has made all steps evaluates, exports and ends the run.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from factory_train import switches
from factory_train.errors import ExitCode
from factory_train.gangs import island_run, run_of_island
from factory_train.launchers import attempts, slurm_island_jobs, slurm_queue
from factory_train.launchers.attempt_runner import End, Stop
from factory_train.launchers.inbox import Inbox
from factory_train.launchers.pulse import Pulse
from factory_train.launchers.rendezvous import serving
from factory_train.launchers.slurm_batch import Batch, begin
from factory_train.launchers.slurm_restart import Restart
from factory_train.run_dir import Attempt, RunDir

_TRAINED = "train.done"


class IslandBatch(Batch):
    """Runs one attempt of an island within its own allocation; arguments as of `Batch`, `attempt` being the island's."""

    def __init__(self, attempt: Attempt, job_id: str, nodes: list[str], inbox: Inbox) -> None:
        super().__init__(attempt, job_id, nodes, inbox)
        self._run = run_of_island(attempt.run)
        self._main = Attempt(self._run, self._spec["main_attempt"])
        self._claims = slurm_island_jobs.Claims(self._main, job_id)
        self._restart = Restart(attempt, job_id, self._spec["requeue"], self._run)
        # A file has one writer.
        self._main_pulse = Pulse(self._main, f"launcher-{attempt.run.name}")
        # When another island was seen to have made all steps.
        self._trained_since: float | None = None

    def _about(self, stage: str) -> Attempt:
        return self._attempt if stage == "train" else self._main

    def _run_stage(self, stage: str) -> End | None:
        if stage == "prepare":
            return self._prepare()
        if stage == "train":
            if self._is_trained():
                return None
            # Whichever island is where they meet over TCP, if they do, serves it.
            with serving(self._main, self._attempt.record_launch_event):
                end = super()._run_stage(stage)
            if end is None and self._attempt.verdict() is None:
                (self._main.launch / _TRAINED).touch()
            return end
        if self._is_done(stage) or not self._claims.take(stage):
            return None
        return super()._run_stage(stage)

    def _prepare(self) -> End | None:
        """Prepares the data, or waits until another island has."""
        while not self._is_done("prepare"):
            if self._claims.take("prepare"):
                return super()._run_stage("prepare")
            if (stop := self._stop()) is not None:
                return self._stopped(stop, "while another island prepared the data")
            if (end := self._reason_to_end("prepare")) is not None:
                return end
            self._pulse.beat()
            self._rest(1.0)
        return None

    def _is_done(self, stage: str) -> bool:
        return (self._main.launch / f"{stage}.done").exists()

    def _is_trained(self) -> bool:
        return (self._main.launch / _TRAINED).exists()

    def _start_tracker(self) -> None:
        if self._claims.take("sync"):
            super()._start_tracker()

    def _stop(self) -> Stop | None:
        if switches.is_on(self._run, switches.STOP):
            return Stop("INT", "asked to stop (switches/stop)")
        return super()._stop()

    def _at_once(self) -> End | None:
        if self._stage != "train" or not self._is_trained():
            return None
        self._trained_since = self._trained_since or time.monotonic()
        if time.monotonic() - self._trained_since < self._spec["grace_s"]:
            return None
        # The run has all its steps; an island that is behind by now has nothing to add.
        return End("killed", ExitCode.OK, "another island has made all steps, and this one was behind")

    def _rest(self, timeout_s: float) -> None:
        self._main_pulse.beat()
        if switches.take(self._run, switches.SAVE):
            for name in self._spec["island_names"]:
                switches.turn_on(island_run(self._run, name), switches.SAVE)
        super()._rest(timeout_s)

    def _after(self, *, goes_on: bool) -> None:
        verdict = self._attempt.verdict()
        if goes_on and self._restart.ask(bad_nodes=self._bad_nodes):
            return
        if not goes_on:
            self._restart.end_chain()
        if verdict is not None and verdict.outcome == "done" and self._is_done("finish"):
            slurm_island_jobs.conclude(self._main, verdict.step)
        if verdict is not None:
            slurm_island_jobs.write_over(self._main, self._attempt, verdict)


def main() -> int:
    """Takes the attempt that is this start's, and runs it if there is anything left to do for the run."""
    inbox, job_id = begin()
    home = RunDir.open(Path(sys.argv[1]))
    ended = run_of_island(home).attempts()[-1].verdict()
    if ended is not None:
        print(f"{run_of_island(home).name}: {ended.outcome}: {ended.reason}; nothing to do")
        return ExitCode.OK
    attempt = attempts.take(home, int(sys.argv[2]), job_id)
    if attempt is None:
        return ExitCode.OK
    return IslandBatch(attempt, job_id, slurm_queue.host_names(os.environ["SLURM_JOB_NODELIST"]), inbox).run()


if __name__ == "__main__":
    sys.exit(main())
