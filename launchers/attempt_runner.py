"""One attempt on machines that a scheduler gave: its stages in order, its signs of life, and the verdict at the end.

What starts processes there is the launcher's own: `slurm_batch` does it with srun, `ray_driver` with an actor a node.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from factory_train import heartbeat, switches
from factory_train.errors import ExitCode, FactoryTrainError, FencedError
from factory_train.heartbeat import Beat
from factory_train.launchers import attempts, autopsy
from factory_train.launchers.child import Child, end_all
from factory_train.launchers.environment import import_environ
from factory_train.launchers.inbox import Inbox
from factory_train.launchers.islands import Islands, Starter
from factory_train.launchers.job import WorkerEnv
from factory_train.launchers.pulse import Pulse
from factory_train.run_dir import Attempt

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


@dataclass(frozen=True)
class Stop:
    """Why the ranks are to save and stop, and what they are told.

    Args:
        signal: name of the signal without SIG: TERM (saved, and wants to go on) or INT (saved, and is over).
        reason: for people.
    """

    signal: str
    reason: str


class AttemptRunner(ABC):
    """Runs one attempt.

    Args:
        attempt: which one.
        spec: what the launcher left for later attempts of the job (launch/slurm.json, launch/ray.json).
        inbox: signals arrive here.
        deadline: seconds since the epoch at which the machines will be taken away, if known.
    """

    def __init__(self, attempt: Attempt, spec: dict[str, Any], inbox: Inbox, deadline: float | None) -> None:
        self._attempt, self._spec, self._inbox, self._deadline = attempt, spec, inbox, deadline
        self._tracker: Child | None = None
        self._pulse = Pulse(attempt)
        # The run as people know it: its switches count, and its figures are sent to the tracker.
        self._run = attempt.run

    @abstractmethod
    def _start(self, stage: str, orders: WorkerEnv) -> None:
        """Starts the processes of a stage.

        Args:
            orders: the same for all; `local_world_size` is the tasks of each node.
        """

    @abstractmethod
    def _poll(self) -> int | None:
        """Returns the exit code of the stage that runs, None while it does."""

    @abstractmethod
    def _end(self) -> None:
        """Ends the processes of the stage that runs, if one does."""

    @abstractmethod
    def _tell_ranks(self, name: str) -> None:
        """Sends a signal (TERM, INT) to all ranks."""

    @abstractmethod
    def _master(self) -> str:
        """Returns the name or address rank 0 is reached at."""

    @abstractmethod
    def _host_of(self, rank: int) -> str:
        """Returns the node a rank runs on."""

    @abstractmethod
    def _place(self) -> dict[str, Any]:
        """Returns what the event of the start says about the job and its nodes."""

    @abstractmethod
    def _unexplained(self, code: int) -> str:
        """Returns what to say about a stage that ended with `code` before any process could say why."""

    @abstractmethod
    def _after(self, *, goes_on: bool) -> None:
        """Acts on the verdict: `goes_on` when another attempt makes sense."""

    def _about(self, stage: str) -> Attempt:
        """Returns the attempt that a stage belongs to: its log, its failure."""
        return self._attempt

    def _starter(self) -> Starter | None:
        """Returns what starts this attempt's islands; None where its ranks are one gang."""
        return None

    def _rest(self, timeout_s: float) -> None:
        """Waits until something may have happened, at most `timeout_s`."""
        self._inbox.wait(timeout_s)

    def _stop(self) -> Stop | None:
        """Returns why the ranks are to save and stop, None while they are not."""
        return Stop("TERM", self._inbox.why) if self._inbox.stop is not None else None

    def _at_once(self) -> End | None:
        """Returns the end of an attempt that somebody does not want to wait for, None while nobody does."""
        return None

    def run(self) -> int:
        """Runs the stages, writes the verdict, and has the launcher act on it; returns the job's exit code."""
        attempt = self._attempt
        checkpoint = attempts.newest_checkpoint_step(attempt.run)
        attempt.record_launch_event("start", **self._place(), deadline=self._deadline, checkpoint=checkpoint)
        try:
            try:
                end = self._run_stages()
            except FencedError:
                raise
            except (OSError, FactoryTrainError) as error:
                end = End("failed-transient", ExitCode.FAILED, f"the launcher could not go on: {error}")
                if isinstance(error, FactoryTrainError) and error.by_user:
                    end = End("failed-user", error.exit_code, str(error))
            code = self._conclude(end)
            self._finish_tracker()
            return code
        except FencedError as error:
            attempt.record_launch_event("fenced", reason=str(error))
            return ExitCode.FAILED
        finally:
            self._end()
            end_all([self._tracker] if self._tracker else [], gently=True)

    def _run_stages(self) -> End | None:
        for stage in self._spec["stages"]:
            self._inbox.wait(0)
            if (stop := self._stop()) is not None:
                return self._stopped(stop, f"before stage '{stage}'")
            if switches.is_on(self._run, switches.STOP):
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
        if stage == "train" and (starter := self._starter()) is not None:
            return self._run_islands(starter)
        gang, about = self._spec["gang"], self._about(stage)
        orders = WorkerEnv(
            run_dir=str(about.run.path),
            attempt=about.number,
            gang=gang["name"],
            local_world_size=gang["tasks_per_node"] if stage == "train" else 1,
            master_addr=self._master() if stage == "train" else "127.0.0.1",
            deadline=self._deadline,
        )
        self._start(stage, orders)
        # When what still runs is ended, and what is said then.
        limit, late = float("inf"), None
        told: Stop | None = None
        while (code := self._poll()) is None:
            if not self._attempt.is_newest():
                raise FencedError(f"attempt {self._attempt.number} was superseded", where=str(self._attempt.run.path))
            now = time.monotonic()
            if now >= limit:
                self._end()
                return late
            if (over := self._at_once()) is not None:
                self._end()
                return over
            if told is None and (told := self._stop()) is not None:
                self._attempt.record_launch_event("signal", reason=told.reason, stage=stage)
                self._tell_ranks(told.signal)
                limit, late = now + self._spec["grace_s"], self._unsaved(stage, told)
            if late is None:
                late = self._reason_to_end(stage)
                if late is not None:
                    # What runs may need a moment to end what hangs; nothing more is waited for.
                    limit = now
            self._pulse.beat()
            self._rest(min(1.0, max(0.0, limit - now)))
        return self._ended(stage, code, told)

    def _run_islands(self, starter: Starter) -> End | None:
        note = self._attempt.record_launch_event
        islands = Islands(self._attempt, self._spec["islands"], self._spec["grace_s"], _Requests(self), self._pulse, note, starter)
        outcome, code, reason = islands.run()
        return None if outcome == "done" else End(outcome, code, reason)

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
        if switches.is_on(self._run, switches.STOP):
            return End("interrupted", ExitCode.INTERRUPTED, f"stopped during stage '{stage}'")
        if self._deadline is not None and time.time() > self._deadline - _LAST_S:
            return End("preempted", ExitCode.PREEMPTED, f"the time limit was reached in stage '{stage}'")
        return None

    def _hung(self, beat: Beat, what: str) -> End:
        hint = "the first rank that stopped; its node may be ill: launcher.exclude=NODE leaves it out"
        self._record_error("train", beat.rank, self._host_of(beat.rank), what, hint)
        return End("failed-transient", ExitCode.FAILED, f"rank {beat.rank} {what}")

    def _ended(self, stage: str, code: int, told: Stop | None) -> End | None:
        about = self._about(stage)
        if about.verdict() is not None or (code == 0 and (about.launch / f"{stage}.done").exists()):
            return None
        if code == ExitCode.PREEMPTED and stage != "train":
            if told is not None:
                return self._unsaved(stage, told)
            return End("preempted", ExitCode.PREEMPTED, f"asked to stop by a signal in stage '{stage}'")
        error = about.error()
        if error is None:
            if told is not None:
                return self._unsaved(stage, told)
            where = self._attempt.launch.relative_to(self._attempt.run.path)
            self._record_error(stage, 0, self._host_of(0), self._unexplained(code), f"see {where}")
            error = about.error() or {}
        who = f"rank {error.get('rank', 0)}" if stage == "train" else f"stage '{stage}'"
        reason = f"{who}: {error.get('message') or 'failed'}"
        failed = error.get("exit_code", code)
        if error.get("by_user") or failed in _BY_USER:
            return End("failed-user", failed if failed in _BY_USER else ExitCode.FAILED, reason)
        return End("failed-transient", ExitCode.FAILED, reason)

    def _record_error(self, stage: str, rank: int, host: str, message: str, hint: str) -> None:
        error = {"stage": stage, "rank": rank, "host": host, "message": message, "hint": hint}
        self._about(stage).record_error({"time": time.time(), **error, "traceback": None})

    def _stopped(self, stop: Stop, where: str) -> End:
        """The end of a job that was asked to stop and had nothing to save."""
        if stop.signal == "INT":
            return End("interrupted", ExitCode.INTERRUPTED, f"{stop.reason} {where}")
        return End("preempted", ExitCode.PREEMPTED, f"{stop.reason} {where}")

    def _unsaved(self, stage: str, stop: Stop) -> End:
        if stage != "train":
            return self._stopped(stop, f"during stage '{stage}'")
        lost = "the job was ended before its ranks had saved; what followed the last checkpoint is lost"
        if stop.signal == "INT":
            return End("killed", ExitCode.INTERRUPTED, lost)
        return End("failed-transient", ExitCode.FAILED, lost)

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
            # The log of this process may be on the same full disk.
            with contextlib.suppress(OSError):
                print(f"no verdict could be written ({end.outcome}: {reason}): {error}", file=sys.stderr)
        verdict = attempt.verdict()
        outcome, code = (verdict.outcome, verdict.exit_code) if verdict else (end.outcome, end.exit_code)
        self._after(goes_on=outcome == "preempted" or (outcome == "failed-transient" and fruitless < attempts.MOST_FRUITLESS))
        return code

    def _start_tracker(self) -> None:
        arguments = [str(self._run.path), "--follow"]
        environ = {name: value for name, value in import_environ(os.environ).items() if not WorkerEnv.owns(name)} | self._spec["environ"]
        try:
            self._tracker = Child.start("sync", 0, self._spec["tracker_module"], arguments, environ, self._attempt.log_path("sync"))
        except OSError as error:
            self._attempt.record_launch_event("tracker-failed", reason=str(error))

    def _finish_tracker(self) -> None:
        limit = time.monotonic() + _TRACKER_S
        while self._tracker and self._tracker.running and time.monotonic() < limit and self._inbox.stop is None:
            self._inbox.wait(1.0)


class _Requests:
    """What is asked of an attempt, as `Islands` wants to know it; a superseded attempt finds out here."""

    def __init__(self, runner: AttemptRunner) -> None:
        self._runner = runner

    @property
    def stop(self) -> signal.Signals | None:
        stop = self._runner._stop()
        return None if stop is None else signal.Signals[f"SIG{stop.signal}"]

    @property
    def why(self) -> str:
        stop = self._runner._stop()
        return stop.reason if stop else ""

    @property
    def at_once(self) -> signal.Signals | None:
        return None if self._runner._at_once() is None else signal.SIGINT

    def wait(self, timeout_s: float) -> None:
        # Not longer: the end of an island's process is told at once, other things have to be looked for.
        self._runner._rest(min(1.0, max(0.0, timeout_s)))
        # Right before anything is started over: it would be taken from who looks after the islands now.
        self._runner._attempt.check_fence("looking after its islands")
