"""Keeps PyTorch's flight recorder out of this process.

Of torch 2.11 it crashes when threads use groups for the first time at the same moment, which only islands in threads do.
"""

from __future__ import annotations

import os

import torch

_SIZE = "TORCH_FR_BUFFER_SIZE"


def stop_recording() -> None:
    """Makes it with no room; call it before any group is used. Processes that are started from here are not concerned."""
    before = os.environ.get(_SIZE)
    os.environ[_SIZE] = "0"
    # It reads its size when it is first asked for anything.
    torch._C._distributed_c10d._dump_fr_trace_json()
    if before is None:
        del os.environ[_SIZE]
    else:
        os.environ[_SIZE] = before
