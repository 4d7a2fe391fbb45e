"""Launch parameters of kernels whose best ones depend on card and mode: a table, committed, and nothing tuned in place.

Tuning at import or inside a run would run kernels that change weights in place on somebody's weights, and would make
two runs of the same thing differ. The rows marked "not tuned" were chosen from the widths of loads, without a card.
"""

from __future__ import annotations

import functools

import torch

# Compute capability, or "any"; kernel; mode -> launch parameters. ROWS counts blocks of 256 elements.
_TABLE: dict[tuple[str, str, str], dict[str, int]] = {
    # Not tuned.
    ("any", "adamw", "float32"): {"ROWS": 8, "num_warps": 4},
    ("any", "adamw", "bfloat16"): {"ROWS": 8, "num_warps": 4},
    ("any", "adamw", "int8"): {"ROWS": 16, "num_warps": 8},
    ("any", "squares", "float32"): {"BLOCK": 4096, "num_warps": 8},
    ("any", "squares", "bfloat16"): {"BLOCK": 8192, "num_warps": 8},
}


def launch_parameters(kernel: str, mode: str, device: torch.device) -> dict[str, int]:
    """Returns block sizes and warps of a kernel in a mode, for the card at hand or, where the table has none, for any."""
    card = _card(device.index) if device.type == "cuda" else "any"
    return dict(_TABLE.get((card, kernel, mode)) or _TABLE["any", kernel, mode])


@functools.cache
def _card(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
