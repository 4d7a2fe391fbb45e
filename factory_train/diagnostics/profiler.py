"""Profiles chosen steps with torch.profiler: a trace for a viewer, a table for the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from factory_train.config import ProfileConfig
from factory_train.diagnostics.memory_history import write_memory_snapshot

_TABLE_ROWS = 60
_NAME_WIDTH = 70
# Operators named in the event and on the terminal.
TOP_ROWS = 10


class StepProfiler:
    """Records the steps of `profile.steps` on the ranks of `profile.ranks`.

    What goes wrong while a profile is written is reported and ends nothing: training is worth more.

    Args:
        cfg: which steps and ranks, and how much detail.
        folder: where the files go.
        rank: this rank.
        device: what the steps run on.
        record: called with the name of an event and its facts.
    """

    def __init__(self, cfg: ProfileConfig, folder: Path, rank: int, device: torch.device, record: Callable[..., None]) -> None:
        self._cfg, self._folder, self._rank, self._device, self._record = cfg, folder, rank, device, record
        window = cfg.window() if rank in cfg.ranks else None
        self._window = window if window is not None else range(0)
        self._profile: profile | None = None
        self._step: record_function | None = None
        self._first = self._last = 0

    @property
    def is_on(self) -> bool:
        """Whether the step under way is recorded."""
        return self._profile is not None

    def before_step(self, step: int) -> bool:
        """Begins to record if it is time to; returns whether that took time of its own."""
        if step not in self._window:
            return False
        began = self._profile is None
        if began:
            self._begin(step)
        self._step = record_function(f"step {step}")
        self._step.__enter__()
        return began

    def after_step(self, step: int) -> bool:
        """Writes the profile if this was its last step; returns whether that took time of its own."""
        if self._profile is None:
            return False
        self._last = step
        self._leave_step()
        if step + 1 in self._window:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Writes what was recorded so far, if a profile is under way: the run may end in the middle of it."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        began = time.monotonic()
        try:
            self._leave_step()
            self._wait_for_device()
            recorded.stop()
            if self._last >= self._first:
                self._write(recorded, began)
        except Exception as error:
            # A full disk, or a device in an error state that this must not hide.
            self._record("profile-failed", step=self._last, message=f"{type(error).__name__}: {error}".splitlines()[0])

    def _begin(self, step: int) -> None:
        on_cuda = self._device.type == "cuda"
        self._wait_for_device()
        self._first, self._last = step, step - 1
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])],
            record_shapes=self._cfg.shapes,
            profile_memory=self._cfg.memory,
            acc_events=True,
        )
        self._profile.start()

    def _leave_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
        self._step = None

    def _wait_for_device(self) -> None:
        # Kernels of the step before must not be in the profile, and all of the last step must.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, recorded: profile, began: float) -> None:
        self._folder.mkdir(exist_ok=True)
        stem = f"rank-{self._rank:05d}-steps-{self._first}-{self._last + 1}"
        trace, table = self._folder / f"{stem}.json.gz", self._folder / f"{stem}.txt"
        recorded.export_chrome_trace(str(trace))
        averages = recorded.key_averages(group_by_input_shape=self._cfg.shapes)
        on_cuda = self._device.type == "cuda"
        by = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        top = top_lines(averages, on_cuda=on_cuda)
        title = f"steps {self._first} to {self._last} of rank {self._rank}: self {'device' if on_cuda else 'CPU'} time by operator"
        full = averages.table(sort_by=by, row_limit=_TABLE_ROWS, max_name_column_width=_NAME_WIDTH)
        table.write_text("\n".join([title, "", *top, "", full, ""]))
        facts: dict[str, Any] = {"trace": self._shown(trace), "table": self._shown(table)}
        if self._cfg.memory and on_cuda:
            snapshot = self._folder / f"{stem}.memory.pickle"
            write_memory_snapshot(snapshot)
            facts["memory"] = self._shown(snapshot)
        self._record("profile", step=self._last, first=self._first, **facts, top=top, seconds=round(time.monotonic() - began, 3))
        print("\n".join([title, *(f"  {line}" for line in top), f"  trace: {trace}"]), flush=True)

    def _shown(self, path: Path) -> str:
        return f"{self._folder.name}/{path.name}"


def top_lines(averages: Any, *, on_cuda: bool) -> list[str]:
    """Returns a line each for the operators that took most time themselves: part, time, calls, name.

    Args:
        averages: what `key_averages` returns.
        on_cuda: whether time on the device counts, or that of the CPU.
    """

    def spent_us(item: Any) -> float:
        return float(item.self_device_time_total if on_cuda else item.self_cpu_time_total)

    def shapes(item: Any) -> str:
        return f" {[shape for shape in item.input_shapes if shape]}" if item.input_shapes else ""

    # Named ranges are no work of the device itself.
    items = [item for item in averages if not (on_cuda and item.is_user_annotation)]
    total = sum(map(spent_us, items)) or 1.0
    ranked = sorted(items, key=spent_us, reverse=True)[:TOP_ROWS]
    return [
        f"{spent_us(item) / total:6.1%}  {spent_us(item) / 1e3:10.2f} ms  {item.count:7d} x  {item.key}{shapes(item)}" for item in ranked
    ]
