"""Several gangs on this machine: a supervisor for each island, started again when it fails, while the others go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from factory_train import storage
from factory_train.errors import ExitCode
from factory_train.gangs import island_run, new_island_attempt
from factory_train.hardware import visible_cards
from factory_train.launchers import attempts
from factory_train.launchers.child import Child, end_all, signal_name
from factory_train.launchers.environment import import_environ
from factory_train.launchers.inbox import Inbox
from factory_train.launchers.pulse import Pulse
from factory_train.launchers.rendezvous import serving
from factory_train.run_dir import HEARTBEAT_EVERY_S, Attempt, process_started_at

# Ends of an island after which starting it again would lead to the same.
_HOPELESS = (ExitCode.USAGE, ExitCode.PREFLIGHT, ExitCode.NOT_FOUND, ExitCode.INTEGRITY)


@dataclass
class Island:
    """One island as its launcher sees it.

    Args:
        name, index: see `gangs.island_names`.
        gang: its entry in job.json.
        child: its supervisor.
        attempt: that runs.
        outcome: how it ended for good: done, preempted, interrupted, failed; None while it runs.
        exit_code, reason: of its last attempt.
    """

    name: str
    index: int
    gang: dict[str, Any]
    child: Child | None = None
    attempt: Attempt | None = None
    outcome: str | None = None
    exit_code: int = 0
    reason: str = ""


class Islands:
    """Runs the training stage of a job with several gangs.

    Args:
        attempt: of the run.
        job: content of its job.json.
        inbox: requests to stop.
        pulse: sign of life of the run's launcher.
        note: records a launch event.
    """

    def __init__(self, attempt: Attempt, job: dict[str, Any], inbox: Inbox, pulse: Pulse, note: Callable[..., None]) -> None:
        self._attempt, self._job, self._inbox, self._pulse, self._note = attempt, job, inbox, pulse, note
        self._islands = [Island(gang["name"], index, gang) for index, gang in enumerate(job["gangs"])]

    def run(self) -> tuple[str, int, str]:
        """Runs all islands to their end; returns how the stage ended: outcome, exit code, and the reason for people."""
        try:
            with serving(self._attempt, self._note):
                for island in self._islands:
                    self._start(island)
                return self._follow()
        finally:
            end_all([island.child for island in self._islands if island.child is not None], gently=True)

    def _follow(self) -> tuple[str, int, str]:
        forwarded: signal.Signals | None = None
        limit = float("inf")
        while True:
            for island in self._running():
                assert island.child is not None
                if not island.child.running:
                    self._ended(island, again=forwarded is None)
            running = self._running()
            if not running:
                return self._conclude()
            if any(island.outcome == "failed" and island.exit_code in _HOPELESS for island in self._islands):
                # What one island cannot do because of the configuration, or of what it found, no other can.
                self._end(running, "another island cannot go on")
            if self._inbox.at_once or time.monotonic() > limit:
                self._end(running, "asked to end at once" if self._inbox.at_once else "the other islands are done")
            elif self._inbox.stop is not None and forwarded is None:
                forwarded = self._inbox.stop
                self._note("signal", signal=signal_name(forwarded), reason=self._inbox.why, stage="train")
                for island in running:
                    assert island.child is not None
                    island.child.signal(forwarded)
            if any(island.outcome == "done" for island in self._islands) and limit == float("inf"):
                # The run has all its steps; an island that is behind by now has nothing to add.
                limit = time.monotonic() + self._job["grace_s"]
            self._pulse.beat()
            self._inbox.wait(HEARTBEAT_EVERY_S if limit == float("inf") else min(HEARTBEAT_EVERY_S, limit - time.monotonic() + 0.01))

    def _running(self) -> list[Island]:
        return [island for island in self._islands if island.outcome is None]

    def _start(self, island: Island) -> None:
        """Starts the next attempt of an island."""
        island.attempt = attempt = new_island_attempt(self._attempt.run, island.name, self._attempt.config())
        log = attempt.launch / "supervisor.log"
        arguments = [str(attempt.run.path), str(attempt.number)]
        environ = import_environ(os.environ)
        island.child = Child.start(island.name, island.index, "factory_train.launchers.supervisor", arguments, environ, log)
        pid = island.child.process.pid
        job = {
            **self._job,
            "pid": pid,
            "pid_started": process_started_at(pid),
            "run_dir": str(attempt.run.path),
            "attempt": attempt.number,
            "detached": False,
            "gangs": [island.gang],
            "islands": False,
            "stages": ["train"],
            "tracker": False,
            "environ": self._job["environ"] | self._cards(island),
        }
        storage.write_json(attempt.job_path, job)
        self._note("island-started", island=island.name, attempt=attempt.number, pid=pid)

    def _cards(self, island: Island) -> dict[str, str]:
        """Gives each island cards of its own, where the machine has enough for all."""
        each, cards = island.gang["tasks_per_node"], len(visible_cards())
        if cards < each * len(self._islands):
            return {}
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cards)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": ",".join(shown[island.index * each : (island.index + 1) * each])}

    def _ended(self, island: Island, *, again: bool) -> None:
        """Notes how an attempt of an island ended, and starts the next one where that may help."""
        assert island.child is not None
        assert island.attempt is not None
        island.child.sweep()
        verdict = island.attempt.verdict()
        outcome = verdict.outcome if verdict else "failed-transient"
        island.exit_code = verdict.exit_code if verdict else ExitCode.FAILED
        island.reason = verdict.reason if verdict else f"its supervisor {island.child.death()}"
        self._note("island-ended", island=island.name, attempt=island.attempt.number, outcome=outcome, reason=island.reason)
        if outcome in ("done", "preempted", "interrupted"):
            island.outcome = outcome
        elif self._may_try(island, again):
            self._start(island)
        else:
            island.outcome = "failed"

    def _may_try(self, island: Island, again: bool) -> bool:
        others_done = any(other.outcome == "done" for other in self._islands)
        fruitless = attempts.count_fruitless(island_run(self._attempt.run, island.name)) >= attempts.MOST_FRUITLESS
        return again and not others_done and not fruitless and island.exit_code not in _HOPELESS and not self._inbox.at_once

    def _end(self, islands: list[Island], reason: str) -> None:
        self._note("kill", names=[island.name for island in islands], reason=reason)
        end_all([island.child for island in islands if island.child is not None], gently=True)
        for island in islands:
            island.outcome, island.reason = "killed", reason

    def _conclude(self) -> tuple[str, int, str]:
        """Returns how the stage ended: done if one island did all steps, for its outer parameters are everybody's."""
        outcomes = {island.outcome for island in self._islands}
        if "done" in outcomes:
            return "done", ExitCode.OK, ""
        if self._inbox.at_once:
            code = ExitCode.INTERRUPTED if self._inbox.at_once == signal.SIGINT else ExitCode.FAILED
            return "killed", code, "ended at once; what followed the last checkpoint is lost"
        for outcome, code in (("interrupted", ExitCode.INTERRUPTED), ("preempted", ExitCode.PREEMPTED)):
            if outcome in outcomes:
                return outcome, code, f"{outcome}: {next(island.reason for island in self._islands if island.outcome == outcome)}"
        worst = max((island for island in self._islands if island.outcome == "failed"), key=lambda island: island.exit_code in _HOPELESS)
        assert worst.attempt is not None
        error = worst.attempt.error()
        if error is not None:
            log = worst.attempt.log_path(f"rank-{error.get('rank', 0):05d}")
            message, log_name = f"{worst.name}: {error.get('message')}", os.path.relpath(log, self._attempt.run.path)
            self._attempt.record_error({**error, "message": message, "log": log_name})
        by_user = worst.exit_code in _HOPELESS and worst.exit_code != ExitCode.INTEGRITY
        return "failed-user" if by_user else "failed-transient", worst.exit_code, f"{worst.name}: {worst.reason}"
