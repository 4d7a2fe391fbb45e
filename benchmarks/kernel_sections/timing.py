"""What the sections share: how a call on a card is timed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

_MIN_REPEATS = 10
_MAX_REPEATS = 50


def compare(calls: Mapping[str, Callable[[], Any]], deadline_s: float) -> dict[str, dict[str, float]]:
    """Times calls on the card in turns, so that drifting clocks hit all alike.

    Args:
        calls: by name of the implementation; one that raises is left out, with the reason under "error".
        deadline_s: all of them end after so many seconds.

    Returns:
        By name: ms_median, ms_p20, ms_p80, peak_bytes above what was held before, repeats.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            # Compilation, allocation and the library's own choice of kernels come first.
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            found[name] = {"times": [], "peak_bytes": torch.cuda.max_memory_allocated() - held}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    running = [name for name in found if "times" in found[name]]
    end = time.monotonic() + deadline_s
    for repeat in range(_MAX_REPEATS):
        if time.monotonic() > end and repeat >= _MIN_REPEATS:
            break
        for name in running:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            stop.record()
            stop.synchronize()
            found[name]["times"].append(start.elapsed_time(stop))
    for name in running:
        times = sorted(found[name].pop("times"))
        low, high = times[len(times) // 5], times[len(times) * 4 // 5]
        found[name] |= {"ms_median": statistics.median(times), "ms_p20": low, "ms_p80": high, "repeats": len(times)}
    return found


def count_launches(call: Callable[[], Any]) -> int:
    """Returns how many kernels one call launches on the card; copies and fills of memory count too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def host_microseconds(call: Callable[[], Any]) -> float:
    """Returns how long the host is busy with one call, the card being idle when it begins; the median of ten."""
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def copy_gb_per_s(device: str) -> float:
    """Returns the bandwidth of copying 4 GiB on the card, read and written bytes, in GB/s: the ceiling of what memory sets."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = compare({"copy": lambda: target.copy_(source)}, 5.0)["copy"]
    return 2 * source.numel() / found["ms_median"] / 1e6


def matmul_tflops_per_s(device: str) -> float:
    """Returns the rate of a bfloat16 matmul of 8192 x 8192 matrices, in TFLOP/s."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = compare({"matmul": lambda: a @ b}, 5.0)["matmul"]
    return 2 * 8192**3 / found["ms_median"] / 1e9


def print_section(correctness: Callable[[str], Iterable[Any]], times: Callable[[str, float], Iterable[Any]]) -> None:
    """Prints one section's rows as JSON lines: correctness anywhere, times on a card."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for row in correctness(device):
        print(json.dumps(row))
    if device == "cpu":
        print("timing needs a GPU")
        return
    for row in times(device, 60.0):
        print(json.dumps(row))
