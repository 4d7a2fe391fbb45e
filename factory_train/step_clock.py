"""Where the time of a step goes: waiting for data, forward and backward, the reduction, the optimizer."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Which figure of the row each phase counts for; both passes of every micro-batch are one figure. Waiting for a checkpoint's copy
# has a figure of its own (`ckpt_stall_s`), so it counts for none of these.
_FIGURES: dict[str | None, str] = {
    "data": "data_s",
    "forward": "compute_s",
    "backward": "compute_s",
    "reduce": "reduce_s",
    "optimizer": "optimizer_s",
}
# What the device may still have before it when the facts of the step arrive.
_AFTER_REDUCTION = ("checkpoint", "optimizer", None)


@dataclass(frozen=True)
class _Mark:
    """Where a phase begins; the last mark of a step has none.

    Args:
        time_s: on the host's clock.
        event: the same on the device, where that works apart from the host.
    """

    phase: str | None
    time_s: float
    event: torch.cuda.Event | None


class StepClock:
    """Times the phases of each step: `enter` one after the other, then `leave`.

    On a CPU these are times of the host. On CUDA the host only queues work, so phases lie between events in the device's
    queue. They are read when the facts of the step have arrived, and by then all of them lie in the past but the optimizer's,
    so the row of a step has the optimizer's time of the step before. `data_s` is there the part of the host's wait in
    which the device had nothing to do: what lies behind a full queue costs nothing.

    Args:
        device: what the steps run on.
        new_event: makes the events of a device that works apart from the host.
    """

    def __init__(
        self, device: torch.device, new_event: Callable[[], torch.cuda.Event] = lambda: torch.cuda.Event(enable_timing=True)
    ) -> None:
        self._on_cuda, self._new_event = device.type == "cuda", new_event
        self._marks: list[_Mark] = []
        self._finished: deque[list[_Mark]] = deque()
        self._before: list[_Mark] = []
        self._range: torch.profiler.record_function | None = None
        # Whether phases appear as named ranges in the profile under way.
        self.traced = False

    def enter(self, phase: str) -> None:
        """Ends the phase before and begins this one: data, forward, backward, reduce, checkpoint or optimizer."""
        self._mark(phase)
        if self.traced or self._range is not None:
            self._next_range(phase)

    def leave(self) -> None:
        """Ends the step."""
        self._mark(None)
        if self._range is not None:
            self._next_range(None)
        self._finished.append(self._marks)
        self._marks = []

    def read(self) -> dict[str, float]:
        """Returns the figures, in seconds, of the oldest step that was not read yet; its reduction must be over."""
        marks = self._finished.popleft()
        figures = self._device_figures(marks) if self._on_cuda else _host_seconds(marks)
        self._before = marks
        return figures

    def _mark(self, phase: str | None) -> None:
        event = self._new_event() if self._on_cuda else None
        if event is not None:
            event.record()
        self._marks.append(_Mark(phase, time.perf_counter(), event))

    def _next_range(self, phase: str | None) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None if phase is None else torch.profiler.record_function(phase)
        if self._range is not None:
            self._range.__enter__()

    def _device_figures(self, marks: list[_Mark]) -> dict[str, float]:
        past = [mark for mark in marks if mark.phase not in _AFTER_REDUCTION]
        end = marks[len(past)]
        assert end.event is not None
        # It comes right behind what the host has waited for already: a matter of microseconds.
        end.event.synchronize()
        figures = _device_seconds([*past, end])
        figures["data_s"] = min(_host_seconds(marks)["data_s"], figures["data_s"])
        return figures | _device_seconds([mark for mark in self._before if mark.phase in _AFTER_REDUCTION])


def _host_seconds(marks: list[_Mark]) -> dict[str, float]:
    return _sums(marks, lambda mark, later: later.time_s - mark.time_s)


def _device_seconds(marks: list[_Mark]) -> dict[str, float]:
    def seconds(mark: _Mark, later: _Mark) -> float:
        assert mark.event is not None
        assert later.event is not None
        return mark.event.elapsed_time(later.event) / 1e3

    return _sums(marks, seconds)


def _sums(marks: list[_Mark], seconds: Callable[[_Mark, _Mark], float]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for mark, later in itertools.pairwise(marks):
        if name := _FIGURES.get(mark.phase):
            figures[name] = figures.get(name, 0.0) + seconds(mark, later)
    return figures
