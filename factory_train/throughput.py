"""How fast training goes: tokens per second, TFLOP/s, MFU, memory."""

from __future__ import annotations

import time
from collections import deque

import torch

# Steps over which speed is averaged; one step alone jumps too much to read.
WINDOW_STEPS = 20


class Throughput:
    """Measures steps on the host clock.

    Args:
        tokens_per_step: target tokens of one step over all ranks.
        flops_per_token: see `plan.flops_per_token`.
        world_size: number of devices.
        peak_flops: dense bf16 peak of one device in FLOP/s; None when unknown, and then no MFU is stated.
        device: whose memory is reported.
    """

    def __init__(
        self, *, tokens_per_step: int, flops_per_token: float, world_size: int, peak_flops: float | None, device: torch.device
    ) -> None:
        self._tokens_per_step, self._flops_per_token = tokens_per_step, flops_per_token
        self._world_size, self._peak_flops, self._device = world_size, peak_flops, device
        self._step_times_s: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._last = time.perf_counter()

    def restart_clock(self) -> None:
        """Begins a new step now: time since the last one (validation, a save) is not training time."""
        self._last = time.perf_counter()

    def step_done(self, *, typical: bool = True) -> dict[str, float]:
        """Closes a step and returns its figures; speeds are means over the last `WINDOW_STEPS`.

        Args:
            typical: False for a step that was slowed down (profiled): it counts for no later step's speed.
        """
        now = time.perf_counter()
        step_time_s, self._last = now - self._last, now
        if typical:
            self._step_times_s.append(step_time_s)
        times = self._step_times_s or (step_time_s,)
        mean_s = sum(times) / len(times)
        flops_per_s = self._tokens_per_step * self._flops_per_token / mean_s / self._world_size
        figures = {
            "step_time_s": step_time_s,
            "tokens_per_s": self._tokens_per_step / mean_s,
            "tflops_per_s": flops_per_s / 1e12,
            "memory_bytes": float(peak_memory_bytes(self._device)),
        }
        if self._peak_flops:
            figures["mfu"] = flops_per_s / self._peak_flops
        return figures


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory this rank has held: CUDA allocator's reserve, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
