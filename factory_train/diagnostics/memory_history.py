"""What CUDA's allocator holds and where it was asked for, as a snapshot for the viewer at pytorch.org/memory_viz."""

from __future__ import annotations

from pathlib import Path

import torch

# The newest events are what explains an end; a step of a large model makes tens of thousands.
_MAX_ENTRIES = 200_000


def record_memory_history(device: torch.device) -> None:
    """Records allocations with their Python stacks from now on; call once. Other devices than CUDA have no such record."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES, stacks="python", device=device)


def write_memory_snapshot(path: Path) -> None:
    """Writes what CUDA's allocator holds now, with what was recorded of how it came to that."""
    torch.cuda.memory._dump_snapshot(str(path))
