"""Two processes of one node add a number (`python -m factory_train.slurm.collective`); exit code 3 where there is no torch."""

from __future__ import annotations

import subprocess
import sys

_RANK = """
import sys, datetime, torch, torch.distributed as dist
rank, port = int(sys.argv[1]), int(sys.argv[2])
cuda = torch.cuda.device_count() >= 2
store = dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=datetime.timedelta(seconds=60))
dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
value = torch.full((1 << 16,), float(rank + 1), device=f"cuda:{rank}" if cuda else "cpu")
dist.all_reduce(value)
assert value.eq(3.0).all()
dist.destroy_process_group()
"""


def main() -> int:
    """Starts the two and returns 0 when both got the sum."""
    try:
        import torch.distributed as dist
    except ImportError:
        return 3
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    ranks = [subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(store.port)]) for rank in range(2)]
    return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
