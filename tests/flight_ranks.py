"""Ranks over gloo of which one stays away from a collective; each then writes its flight recorder, as NCCL's watchdog does.

`python flight_ranks.py RANK WORLD_SIZE FOLDER CASE`
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from pathlib import Path

os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d


def main() -> None:
    rank, world_size, folder, case = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=100))
    value = torch.ones(3, 2)
    for _ in range(5):
        dist.all_reduce(value)
    # Only now: processes may start long after each other.
    dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(datetime.timedelta(seconds=4))
    with contextlib.suppress(RuntimeError):
        if case == "behind" and rank == 1:
            while not all((folder / f"nccl_trace_rank_{other}").exists() for other in range(world_size) if other != rank):
                time.sleep(0.05)
        elif case == "mismatch" and rank == 1:
            dist.broadcast(value, 0)
        else:
            dist.all_reduce(value)
    (folder / f"nccl_trace_rank_{rank}").write_bytes(c10d._dump_fr_trace())
    os._exit(0)


main()
