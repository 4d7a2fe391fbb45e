"""The training stage of several gangs: an island that fails is started again, while the others go on.

What starts an island is the launcher's own: `island_supervisors` does it with a process on this machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from factory_train import switches
from factory_train.errors import ExitCode
from factory_train.gangs import island_run, new_island_attempt
from factory_train.launchers import attempts, autopsy
from factory_train.launchers.child import signal_name
from factory_train.launchers.pulse import Pulse
from factory_train.launchers.rendezvous import serving
from factory_train.run_dir import HEARTBEAT_EVERY_S, Attempt

# Ends of an island after which starting it again would lead to the same.
_HOPELESS = (ExitCode.USAGE, ExitCode.PREFLIGHT, ExitCode.NOT_FOUND, ExitCode.INTEGRITY)


class Running(Protocol):
    """An attempt of an island that was started."""

    @property
    def running(self) -> bool:
        """Whether anything of it still runs."""
        ...

    def signal(self, signum: int) -> None:
        """Asks it to save and stop: SIGTERM where it should go on later, SIGINT where not."""
        ...

    def death(self) -> str:
        """Returns how it ended, in words that follow "its launcher": "was killed by SIGKILL"."""
        ...


class Starter(Protocol):
    """What starts islands; it has the attempt's verdict written when one ends."""

    def start(self, island: Island, attempt: Attempt) -> Running:
        """Starts an attempt of an island, which has no job.json yet, and returns at once."""
        ...

    def end(self, started: Sequence[Running]) -> None:
        """Ends what still runs of these, saved or not, and what those that ended have left behind; returns when it is gone."""
        ...


class Requests(Protocol):
    """What is asked of a job from outside, as `Inbox` has it."""

    @property
    def stop(self) -> signal.Signals | None:
        """SIGINT or SIGTERM once the islands are to save and stop."""
        ...

    @property
    def why(self) -> str:
        """What asked to stop."""
        ...

    @property
    def at_once(self) -> signal.Signals | None:
        """SIGINT or SIGTERM once nobody wants to wait any more."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Sleeps until something may have happened, at most `timeout_s`."""
        ...


@dataclass
class Island:
    """One island as its launcher sees it.

    Args:
        name, index: see `gangs.island_names`.
        gang: its name, nodes and tasks_per_node.
        started: what runs of it.
        attempt: that runs.
        outcome: how it ended for good: done, preempted, interrupted, failed; None while it runs.
        exit_code, reason: of its last attempt.
    """

    name: str
    index: int
    gang: dict[str, Any]
    started: Running | None = None
    attempt: Attempt | None = None
    outcome: str | None = None
    exit_code: int = 0
    reason: str = ""


class Islands:
    """Runs the training stage of a job with several gangs.

    Args:
        attempt: of the run.
        gangs: of the job, as in job.json.
        grace_s: how long islands that are behind have, once one has done all steps.
        requests: to stop.
        pulse: sign of life of the run's launcher.
        note: records a launch event.
        starter: starts islands.
    """

    def __init__(
        self,
        attempt: Attempt,
        gangs: Sequence[dict[str, Any]],
        grace_s: float,
        requests: Requests,
        pulse: Pulse,
        note: Callable[..., None],
        starter: Starter,
    ) -> None:
        self._attempt, self._grace_s, self._requests, self._pulse, self._note = attempt, grace_s, requests, pulse, note
        self._starter = starter
        self._islands = [Island(gang["name"], index, gang) for index, gang in enumerate(gangs)]

    def run(self) -> tuple[str, int, str]:
        """Runs all islands to their end; returns how the stage ended: outcome, exit code, and the reason for people."""
        try:
            with serving(self._attempt, self._note):
                for island in self._islands:
                    self._start(island)
                return self._follow()
        finally:
            self._end_started(self._islands)

    def _follow(self) -> tuple[str, int, str]:
        forwarded: signal.Signals | None = None
        limit = float("inf")
        while True:
            for island in self._running():
                assert island.started is not None
                if not island.started.running:
                    self._ended(island, again=forwarded is None and self._asked() is None)
            running = self._running()
            if not running:
                return self._conclude()
            if any(island.outcome == "failed" and island.exit_code in _HOPELESS for island in self._islands):
                # What one island cannot do because of the configuration, or of what it found, no other can.
                self._end(running, "another island cannot go on")
            if self._requests.at_once or time.monotonic() > limit:
                self._end(running, "asked to end at once" if self._requests.at_once else "the other islands are done")
            elif forwarded is None and (asked := self._asked()) is not None:
                forwarded, why = asked
                self._note("signal", signal=signal_name(forwarded), reason=why, stage="train")
                for island in running:
                    assert island.started is not None
                    island.started.signal(forwarded)
            if any(island.outcome == "done" for island in self._islands) and limit == float("inf"):
                # The run has all its steps; an island that is behind by now has nothing to add.
                limit = time.monotonic() + self._grace_s
            self._pulse.beat()
            self._requests.wait(HEARTBEAT_EVERY_S if limit == float("inf") else min(HEARTBEAT_EVERY_S, limit - time.monotonic() + 0.01))

    def _asked(self) -> tuple[signal.Signals, str] | None:
        """Returns the request to save and stop and where it is from; a wish for a checkpoint is passed on."""
        run = self._attempt.run
        if switches.take(run, switches.SAVE):
            for island in self._islands:
                switches.turn_on(island_run(run, island.name), switches.SAVE)
        if (stop := self._requests.stop) is not None:
            return stop, self._requests.why
        return (signal.SIGINT, "asked to stop (switches/stop)") if switches.is_on(run, switches.STOP) else None

    def _running(self) -> list[Island]:
        return [island for island in self._islands if island.outcome is None]

    def _start(self, island: Island) -> None:
        """Starts the next attempt of an island."""
        island.attempt = new_island_attempt(self._attempt.run, island.name, self._attempt.config())
        # What was asked of the attempt before has been done.
        switches.turn_off(island.attempt.run, switches.STOP)
        island.started = self._starter.start(island, island.attempt)
        self._note("island-started", island=island.name, attempt=island.attempt.number)

    def _ended(self, island: Island, *, again: bool) -> None:
        """Notes how an attempt of an island ended, and starts the next one where that may help."""
        assert island.started is not None
        assert island.attempt is not None
        self._starter.end([island.started])
        reason = f"its launcher {island.started.death()}"
        if island.attempt.verdict() is None:
            with contextlib.suppress(OSError):
                island.attempt.write_verdict("failed-transient", ExitCode.FAILED, step=autopsy.last_step(island.attempt), reason=reason)
        verdict = island.attempt.verdict()
        outcome = verdict.outcome if verdict else "failed-transient"
        island.exit_code = verdict.exit_code if verdict else ExitCode.FAILED
        island.reason = verdict.reason if verdict else reason
        self._note("island-ended", island=island.name, attempt=island.attempt.number, outcome=outcome, reason=island.reason)
        stopped = outcome in ("done", "preempted", "interrupted")
        # One that was told to go, while the others were not, saved and comes back.
        if (outcome == "preempted" or not stopped) and self._may_try(island, again):
            self._start(island)
        else:
            island.outcome = outcome if stopped else "failed"

    def _may_try(self, island: Island, again: bool) -> bool:
        others_done = any(other.outcome == "done" for other in self._islands)
        run = island_run(self._attempt.run, island.name)
        fruitless = max(attempts.count_fruitless(run), attempts.count_unbegun(run)) >= attempts.MOST_FRUITLESS
        return again and not others_done and not fruitless and island.exit_code not in _HOPELESS and not self._requests.at_once

    def _end(self, islands: list[Island], reason: str) -> None:
        self._note("kill", names=[island.name for island in islands], reason=reason)
        self._end_started(islands)
        for island in islands:
            island.outcome, island.reason = "killed", reason

    def _end_started(self, islands: Sequence[Island]) -> None:
        self._starter.end([island.started for island in islands if island.started is not None])

    def _conclude(self) -> tuple[str, int, str]:
        """Returns how the stage ended: done if one island did all steps, for its outer parameters are everybody's."""
        outcomes = {island.outcome for island in self._islands}
        if "done" in outcomes:
            return "done", ExitCode.OK, ""
        if self._requests.at_once:
            code = ExitCode.INTERRUPTED if self._requests.at_once == signal.SIGINT else ExitCode.FAILED
            return "killed", code, "ended at once; what followed the last checkpoint is lost"
        for outcome, code in (("interrupted", ExitCode.INTERRUPTED), ("preempted", ExitCode.PREEMPTED)):
            if outcome in outcomes:
                return outcome, code, f"{outcome}: {next(island.reason for island in self._islands if island.outcome == outcome)}"
        worst = max((island for island in self._islands if island.outcome == "failed"), key=lambda island: island.exit_code in _HOPELESS)
        assert worst.attempt is not None
        repeat_error(self._attempt, worst.attempt)
        by_user = worst.exit_code in _HOPELESS and worst.exit_code != ExitCode.INTEGRITY
        return "failed-user" if by_user else "failed-transient", worst.exit_code, f"{worst.name}: {worst.reason}"


def repeat_error(attempt: Attempt, of_island: Attempt) -> None:
    """Makes the first failure of an island's attempt that of the run's, unless this has one."""
    error = of_island.error()
    if error is not None:
        log = os.path.relpath(of_island.log_path(f"rank-{error.get('rank', 0):05d}"), attempt.run.path)
        attempt.record_error({**error, "message": f"{of_island.run.name}: {error.get('message')}", "log": log})
