"""Stop requests: a signal sets a flag and nothing else; what happens next is agreed by all ranks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from factory_train import switches
from factory_train.heartbeat import Place
from factory_train.run_dir import Attempt

# Warnings of a scheduler. Not SIGUSR1: NCCL has been seen to take it.
_WARNINGS = (signal.SIGTERM, signal.SIGUSR2)
# Before any save was measured: what a save may take, at most this part of the time that is left.
_SAVE_GUESS_S = 30.0
_SAVE_GUESS_PART = 0.25
# For the verdict, the restart's request, and clocks that differ.
_MARGIN_S = 4.0


class Deadline:
    """When the machine will be taken away, and how long before that the last save must begin.

    Args:
        at: in seconds since the epoch; None when nobody knows of a limit.
        saves_s: how long saves of this run took so far.
    """

    def __init__(self, at: float | None, saves_s: list[float] | None = None) -> None:
        self._at, self._saves_s = at, list(saves_s or [])
        self._guess_s = min(_SAVE_GUESS_S, max(0.0, at - time.time()) * _SAVE_GUESS_PART) if at is not None else 0.0
        self._longest_step_s = 0.0
        # What is needed besides saving.
        self.margin_s = _MARGIN_S
        self._looks, self._last_look = 0, 0.0

    @staticmethod
    def of(attempt: Attempt, at: float | None) -> Deadline:
        """Returns the deadline of an attempt, with what its predecessors learned about saving."""
        if at is None:
            return Deadline(None)
        events = [event for before in attempt.run.attempts() for event in before.events()]
        return Deadline(at, [event["seconds"] for event in events if event["event"] == "checkpoint"])

    @property
    def need_s(self) -> float:
        """How long before the deadline the ranks must begin to stop: two saves, two of the longest steps, and `margin_s`."""
        save_s = max(self._saves_s[-5:]) if self._saves_s else self._guess_s
        return 2 * save_s + 2 * self._longest_step_s + self.margin_s

    def is_near(self) -> bool:
        """Returns whether it is time to save and stop; call it once a step: it learns from that how long steps take."""
        if self._at is None:
            return False
        now = time.time()
        # The first step compiles and allocates; it will not come again.
        if self._looks >= 2:
            self._longest_step_s = max(self._longest_step_s, now - self._last_look)
        self._looks, self._last_look = self._looks + 1, now
        return now > self._at - self.need_s

    def noting(self, record: Callable[..., None]) -> Callable[..., None]:
        """Returns `record` for events, with an ear for how long saves take."""

        def note(kind: str, **facts: Any) -> None:
            if kind == "checkpoint":
                self._saves_s.append(facts["seconds"])
            record(kind, **facts)

        return note


class StopSignal:
    """Remembers what was asked of this rank, for the training step to pass on.

    SIGTERM and SIGUSR2 mean that the machine will be taken away, SIGINT is the person. Install it before anything slow is
    imported: a signal during start-up must not be lost or become a traceback.
    """

    def __init__(self) -> None:
        self.preempt = False
        self.interrupt = False
        self.save = False
        self.why = ""
        self.place = Place()
        self.deadline = Deadline(None)

    def install(self) -> None:
        """Takes over the signals; must run in the main thread. A launcher may have started the process with them blocked."""
        for signum in (*_WARNINGS, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_WARNINGS, signal.SIGINT))

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            self.interrupt = True
        else:
            self.preempt = True
        self.why = self.why or f"asked to stop ({signal.Signals(signum).name})"

    @property
    def reason(self) -> str:
        """Why this gang stops, as far as this rank knows: a signal may have reached another rank alone."""
        return self.why or "another rank was asked to stop"

    def must_leave(self) -> bool:
        """Returns whether the machine will be taken away: somebody said so, or the deadline is near. Call it once a step."""
        if self.deadline.is_near() and not self.preempt:
            self.why = "the time limit is near"
            self.preempt = True
        return self.preempt

    def take_save(self) -> bool:
        """Returns whether a checkpoint was asked for since the last call."""
        asked, self.save = self.save, False
        return asked

    def look_at_switches(self, attempt: Attempt) -> None:
        """Looks for the files with which a person asks for a stop or a save; rank 0 does."""
        if switches.is_on(attempt.run, switches.STOP) and not self.interrupt:
            self.why = self.why or "asked to stop (switches/stop)"
            self.interrupt = True
        if switches.is_on(attempt.run, switches.SAVE):
            switches.turn_off(attempt.run, switches.SAVE)
            self.save = True
