"""What the training loop does for diagnostics, before and after each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from factory_train.config import Config
from factory_train.diagnostics.garbage import GarbageCollection
from factory_train.diagnostics.profiler import StepProfiler
from factory_train.diagnostics.sync_check import SyncCheck
from factory_train.run_dir import Attempt
from factory_train.step_clock import StepClock
from factory_train.throughput import Throughput


class Diagnostics:
    """Profile, check for host synchronisations, and garbage collection of one rank.

    Args:
        cfg: its `profile` section and `train.gc_every_steps`.
        attempt: where profiles are written.
        rank: this rank.
        device: what the steps run on.
        clock: gives the profile its named ranges.
        throughput: is told what is no training time.
        record: called with the name of an event and its facts; events of other ranks than 0 are not kept.
    """

    def __init__(
        self,
        cfg: Config,
        attempt: Attempt,
        rank: int,
        device: torch.device,
        clock: StepClock,
        throughput: Throughput,
        record: Callable[..., None],
    ) -> None:
        self._clock, self._throughput = clock, throughput
        self._profiler = StepProfiler(cfg.profile, attempt.path / "profile", rank, device, record)
        # Ranks run the same code, so one of them is enough.
        self._sync_check = SyncCheck(device, record) if cfg.profile.sync_check and rank == 0 else None
        self._garbage = GarbageCollection(cfg.train.gc_every_steps)

    def begin(self) -> None:
        """Call when everything is built and training is about to begin."""
        self._garbage.begin()

    def before_step(self, step: int) -> None:
        """Prepares for step number `step`, counted from 1."""
        if self._profiler.before_step(step):
            self._throughput.restart_clock()
        self._clock.traced = self._profiler.is_on
        self._garbage.before_step(step)
        # The profiler waits for the device itself.
        if self._sync_check is not None and not self._profiler.is_on:
            self._sync_check.before_step()

    def step_figures(self, step: int) -> dict[str, Any]:
        """Ends step number `step` and returns what its row says of speed and of this object's own work."""
        profiled = self._profiler.is_on
        figures: dict[str, Any] = dict(self._throughput.step_done(typical=not profiled))
        if profiled:
            figures["profiled"] = 1
        if spent_s := self._garbage.take_spent_s():
            figures["gc_s"] = spent_s
        if self._sync_check is not None:
            self._sync_check.after_step(step)
        if self._profiler.after_step(step):
            self._throughput.restart_clock()
        return figures

    def pause(self) -> None:
        """Call when all ranks have paused, for a validation or a save, and training is about to go on."""
        self._garbage.collect()
        self._throughput.restart_clock()

    def close(self) -> None:
        """Ends everything that is under way; training is over, well or not."""
        self._profiler.close()
        if self._sync_check is not None:
            self._sync_check.close()
        self._garbage.end()
