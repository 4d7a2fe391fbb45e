"""Garbage collection at set moments instead of any moment."""

from __future__ import annotations

import gc
import time


class GarbageCollection:
    """Collects reference cycles on every rank at the same steps.

    Python's own collector starts when one process has made enough objects: then one rank stops for a while in the middle
    of a step, another one in another step, and all wait for each. What is there when training begins is taken out of its
    sight (frozen), so a full collection looks only at what training has made and takes a moment.

    Args:
        every_steps: steps between collections; 0 leaves everything to Python.
    """

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps
        self._begun = self._was_enabled = False
        self._spent_s = 0.0

    def begin(self) -> None:
        """Takes over from Python's collector; call when everything that stays is built."""
        if self._every_steps == 0 or self._begun:
            return
        self._begun, self._was_enabled = True, gc.isenabled()
        # What is garbage already must not be frozen.
        gc.collect()
        gc.freeze()
        gc.disable()

    def before_step(self, step: int) -> None:
        """Collects if it is time to."""
        if self._begun and step % self._every_steps == 0:
            self.collect()

    def collect(self) -> None:
        """Collects now: where all ranks pause anyway, as after a validation."""
        if self._begun:
            began = time.perf_counter()
            gc.collect()
            self._spent_s += time.perf_counter() - began

    def take_spent_s(self) -> float:
        """Returns the seconds spent on collections since the last call."""
        spent, self._spent_s = self._spent_s, 0.0
        return spent

    def end(self) -> None:
        """Leaves things as they were before `begin`."""
        if self._begun:
            self._begun = False
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()
